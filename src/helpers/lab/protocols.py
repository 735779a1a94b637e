"""What an experiment and its run must offer to be trained, recorded and resumed."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from helpers.lab.statistics import Interval
from helpers.types import Params


class Run(Protocol):
    """An experiment made ready on one device."""

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters θ, drawn by ``generator``, on its device."""
        ...

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Draw a meta-batch and return the meta-gradient and the mean query loss (a scalar tensor).

        ``iteration`` counts from 0, for what changes in the course of training, such as an annealed inner rate.
        """
        ...

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """All metrics of the record, on tasks that are the same on every call.

        Where that takes long, a run also has ``spot_check(theta)``: metrics from part of the tasks, for the points on
        the way and for checking a record; those named ``spot_…`` are the same in both.

        What a run wrote down row by row, ``table(theta)`` returns as dictionaries of texts and numbers; it is kept
        beside the record.
        """
        ...


class Experiment(Protocol):
    """A named, recorded experiment. Its attributes are the configuration; see ``helpers.experiments.maml`` for one.

    Attributes:
        name: what files and commands call it.
        paper: whose claims its record answers.
        iterations: outer iterations of the whole run.
        outer_rate: step size of the outer optimiser, at the beginning where it is annealed.
        outer_rate_final: where the outer rate goes, linearly.
        outer_rate_hold: iterations before the outer rate begins to go there.
        seed: of first parameters and training tasks; test tasks do not depend on it.
        evaluate_every: iterations between two points of the curve in the record.
        outer: the outer optimiser, ``"adam"`` or ``"sgd"``.
        watched: metric that tells whether a run has lost its footing.
    """

    name: str
    paper: str
    iterations: int
    outer_rate: float
    seed: int
    evaluate_every: int
    # Optional: ``outer``, "adam" (the default) or "sgd"; ``outer_rate_final``, to which the outer rate goes linearly,
    # ``outer_rate_hold``, the iterations before it begins to, and ``outer_rate_restarts``: see
    # :func:`~helpers.lab.schedules.outer_rate_at`. ``watched``, a metric of the points on the way: a run that loses its
    # footing by the rule of :func:`~helpers.lab.schedules.steady` goes back to its last quiet point, or to where it was
    # last resumed, and on at half the outer rate.

    def config(self) -> dict[str, Any]:
        """The whole configuration as JSON. A checkpoint of another configuration is refused."""
        ...

    def data(self) -> dict[str, Any]:
        """Provenance of the data: names and digests."""
        ...

    def setup(self, device: torch.device, compiled: bool) -> Run:
        """Load the data and build the estimator."""
        ...
