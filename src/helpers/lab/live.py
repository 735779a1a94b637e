"""What a chapter measures itself to answer a claim, each time it runs: shown on the page, kept as a record.

The chapter shows a :class:`Live`, whose output carries the numbers beside its words. ``metabook refresh`` reads them
from the executed notebook and writes records of kind ``live``; the regression check compares a fresh run with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from helpers import runtime
from helpers.errors import UserError
from helpers.lab import records
from helpers.lab.checkpoints import entries
from helpers.lab.statistics import Interval
from helpers.site.compare import LIVE


class Live:
    """Metrics that a chapter measured for the claims of a paper.

    Args:
        name: of the record, ``PAPER-live-…``.
        paper: whose claims it answers.
        metrics: with their samples, or numbers that were counted and have no spread.

    >>> import torch
    >>> from helpers.lab.statistics import interval
    >>> Live("imaml-live-ridge", "imaml", {"error": interval(torch.tensor([0.1, 0.3])), "bytes": 12})
    kept as the record imaml-live-ridge: 2 metrics
    """

    def __init__(self, name: str, paper: str, metrics: Mapping[str, Interval | float]) -> None:
        if not metrics:
            raise UserError(f"{name} has no metrics: give those that its claims name")
        self.name, self.paper = name, paper
        self.metrics = {
            key: value if isinstance(value, Interval) else Interval(float(value), math.nan, 1)
            for key, value in metrics.items()
        }

    def record(self) -> records.Record:
        """The record of these metrics with their samples, for the verdicts on the page itself."""
        content = self._content()
        samples = {key: entry["samples"] for key, entry in content["metrics"].items() if "samples" in entry}
        return _record(content, {}) | {"samples": samples}

    def _content(self) -> dict[str, Any]:
        found = entries(self.metrics)
        for key, metric in self.metrics.items():
            if metric.samples is not None and metric.n > 1:
                found[key]["samples"] = [float(f"{v:.7g}") for v in metric.samples]
        return {"experiment": self.name, "paper": self.paper, "metrics": found}

    def __repr__(self) -> str:
        return f"kept as the record {self.name}: {len(self.metrics)} metrics"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), LIVE: self._content()}


def keep(notebook: Any, chapter: str, folder: Path | None = None) -> list[str]:
    """Write the records of what an executed notebook measured; returns their names.

    Args:
        notebook: as ``nbformat`` reads it.
        chapter: its name.
        folder: of the records; by default ``data/records`` of the checkout.
    """
    folder, names = folder or records.folder(), []
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    for content in [data[LIVE] for output in outputs if LIVE in (data := output.get("data", {}))]:
        name = content["experiment"]
        evaluated = runtime.origin(runtime.commit())
        record = _record(content, evaluated, chapter)
        measured = {
            key: Interval(e["value"], math.nan, e["n"], samples=torch.tensor(e["samples"], dtype=torch.float64))
            for key, e in content["metrics"].items()
            if "samples" in e
        }
        samples = records.save_samples(measured, folder / f"{name}{records.SAMPLES}")
        evaluated["digest"] = records.digest(record, samples)
        records.save(record, folder / f"{name}.json")
        names.append(name)
    return names


def _record(content: Mapping[str, Any], evaluated: dict[str, Any], chapter: str = "") -> records.Record:
    metrics = {
        key: {part: value for part, value in entry.items() if part != "samples"}
        for key, entry in content["metrics"].items()
    }
    return {
        "experiment": content["experiment"],
        "paper": content["paper"],
        "kind": "live",
        "status": "complete",
        "iterations": {"done": 1, "planned": 1},
        "metrics": metrics,
        "config": {"name": content["experiment"], "chapter": chapter},
        "provenance": {"data": {"data": "drawn"}, "seconds": 0, "slices": [], "evaluated": evaluated},
    }
