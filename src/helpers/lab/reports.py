"""From the state of a run to the files that keep what it measured: the record, its samples, its table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from helpers import runtime
from helpers.errors import UserError
from helpers.lab import records
from helpers.lab.checkpoints import LOG_EVERY, SUFFIX, State, entries, read_checkpoint
from helpers.lab.experiment import Experiment, Run
from helpers.lab.statistics import Interval
from helpers.types import Params


def measured(run: Run, theta: Params, device: torch.device, commit: str) -> tuple[dict[str, Interval], dict[str, Any]]:
    """Evaluate a run's parameters; returns the metrics, and what a record says of where and how they were measured.

    Args:
        commit: of the code that runs.
    """
    wall, processor = time.monotonic(), time.process_time()
    metrics = run.evaluate(theta)
    return metrics, {
        **runtime.origin(commit, device),
        "seconds": round(time.monotonic() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


def write(
    experiment: Experiment,
    run: Run,
    state: State,
    metrics: Mapping[str, Interval],
    evaluated: dict[str, Any],
    data: Path,
) -> records.Record:
    """Write the record of a run with its samples and its table, and return the record.

    Args:
        metrics, evaluated: as :func:`measured` gives them.
        data: folder with ``records/``.

    Raises:
        UserError: if a file cannot be written or a metric is not finite.
    """
    done, curve = state.iteration, []
    for point in state.curve:  # without what diverged on the way: JSON has no word for it, and a curve may have a gap
        known = {name: entry for name, entry in point["metrics"].items() if math.isfinite(entry["value"])}
        curve.append(point | {"metrics": known})
    record = {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "status": "complete" if done == experiment.iterations else "partial",
        "iterations": {"done": done, "planned": experiment.iterations},
        "metrics": entries(metrics),
        "config": experiment.config(),
        "curve": curve,
        "losses": {"every": LOG_EVERY, "values": [round(loss, 5) for loss in state.losses]},
        "provenance": {
            "data": experiment.data(),
            "seconds": round(state.seconds, 1),
            "slices": state.slices,
            **({"returns": state.returns} if state.returns else {}),
            "evaluated": evaluated,
        },
    }
    place = data / "records" / experiment.name
    records.checked(record)  # before a file is touched
    samples = records.save_samples(metrics, place.with_name(f"{experiment.name}{records.SAMPLES}"))
    record["provenance"]["evaluated"] = evaluated | {"digest": records.digest(record, samples)}
    records.save(record, place.with_name(f"{experiment.name}.json"))
    if (rows := run.table(state.values())) is not None:
        records.save_table(rows, place.with_name(f"{experiment.name}.csv.gz"))
    return record


def again(
    experiment: Experiment,
    device: torch.device | str = "cpu",
    data: Path | None = None,
    say: Callable = print,
    compiled: bool = False,
) -> records.Record:
    """Measure a checkpoint again and write its record anew; nothing is trained.

    Args:
        data: folder with ``checkpoints/`` and ``records/``; by default that of the checkout.
        say: told the headline.
        compiled: let ``torch.compile`` make the inner steps of the evaluation, where the run has such a form.

    Times that belong to the run, ``seconds…``, are kept: nobody can measure them again.

    Raises:
        UserError: if there is no checkpoint, or it is damaged or of another configuration.
    """
    device, data = torch.device(device), data or runtime.root() / "data"
    path = data / "checkpoints" / f"{experiment.name}{SUFFIX}"
    commit = runtime.commit()
    with runtime.only_one(path, f"measuring {experiment.name}"):
        run = experiment.setup(device, compiled)
        generator = runtime.generator(experiment.seed, device)
        state = State(run.init(generator), experiment.outer_rate, generator, experiment.outer)
        read = read_checkpoint(path)
        over = read[1]["iteration"]  # as over: no optimiser is asked for
        state.restore(path, experiment.config(), over, experiment.seed, read)
        metrics, evaluated = measured(run, state.values(), device, commit)
        evaluated |= {"compiled": True} if compiled else {}
        record = write(experiment, run, state, metrics | kept_times(experiment.name, data), evaluated, data)
    headline = next(iter(record["metrics"]))
    say(f"{experiment.name}: {records.progress(record)}; {headline} {records.metric(record, headline)}")
    return record


def kept_times(name: str, data: Path) -> dict[str, Interval]:
    """What the record of a run says of the time it took, which cannot be measured again once the run is over."""
    with suppress(UserError):  # a damaged record is about to be written anew
        record = records.load(name, missing_ok=True, where=data / "records")
        kept = record["metrics"] if record else {}
        return {key: records.metric(record, key) for key in kept if key.startswith("seconds")}
    return {}
