"""What the laboratory asks of an experiment and of its run.

:mod:`helpers.experiments.base` says what each of these means, and has the defaults of what an experiment may leave out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from helpers.lab.statistics import Interval
from helpers.types import Params


class Run(Protocol):
    """An experiment made ready on one device, see :class:`helpers.experiments.base.Run`."""

    forms: ClassVar[tuple[str, ...]]
    check_clock: Callable[[], None]

    def use(self, form: str) -> None:
        """Choose one of ``forms``."""

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters θ."""

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The meta-gradient of an iteration and the mean query loss."""

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """All metrics of the record."""

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """The metrics of a point on the way."""

    def table(self, theta: Params) -> list[dict[str, Any]] | None:
        """Rows to be kept beside the record."""


class Experiment(Protocol):
    """A named, recorded experiment, see :class:`helpers.experiments.base.Experiment`."""

    name: str
    paper: str
    iterations: int
    outer_rate: float
    evaluate_every: int
    seed: int
    outer: str
    outer_rate_final: float | None
    outer_rate_hold: int
    outer_rate_restarts: tuple[int, ...]
    watched: str | None

    def config(self) -> dict[str, Any]:
        """The whole configuration as JSON."""

    def data(self) -> dict[str, Any]:
        """Provenance of the data."""

    def setup(self, device: torch.device, compiled: bool) -> Run:
        """Load the data and build the estimator."""
