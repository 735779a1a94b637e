"""Named, recorded experiments, one module a paper, and the order in which a queue runs them."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Any

from helpers.evaluation import Interval
from helpers.models import Params, below
from helpers.runtime import UserError


class Recorded:
    """What the experiments' dataclasses share: their configuration is their fields."""

    def config(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return asdict(self)


class OnOmniglot(Recorded):
    """An experiment whose data are Omniglot."""

    def data(self) -> dict[str, Any]:
        """Digest of the images and of the split."""
        from helpers.tasks import omniglot

        return omniglot.provenance()


def both_names(spot: dict[str, Interval]) -> dict[str, Interval]:
    """Metrics of a spot check that is as thorough as the evaluation: once as ``spot_…`` and once without."""
    return spot | {name.removeprefix("spot_"): value for name, value in spot.items()}


def part(theta: Params, kind: str) -> Params:
    """The entries of θ under ``kind/``, without that prefix: one of several networks that are trained together."""
    return below(theta, f"{kind}/")


def catalogue() -> dict:
    """All experiments by name, in the order of the ``paper`` queue."""
    order = (
        "maml",
        "reptile",
        "imaml",
        "ml3",
        "ml3_control",
        "ml3_digits",
        "ml3_modelfree",
        "nos",
        "nos_transfer",
        "jets",
        "languages",
        "turtles",
        "ways",
        "combined",
    )
    papers = (import_module(f"{__name__}.{paper}") for paper in order)
    return {experiment.name: experiment for paper in papers for experiment in paper.experiments()}


def find(name: str):
    """The experiment of that name.

    Raises:
        UserError: if there is none.
    """
    known = catalogue()
    if name not in known:
        raise UserError(f"there is no experiment {name!r}; known: {', '.join(known)}")
    return known[name]
