"""The frame that every recorded experiment and its run stand in.

An *experiment* is a frozen dataclass whose fields are its configuration: two with the same fields are the same
experiment, and a checkpoint of other fields is refused. What is no configuration is a class attribute or a method, with
the default that :class:`Experiment` declares. Wrong fields are refused when it is made
(:mod:`helpers.fields`).

``setup(device, compiled)`` loads the data and gives a *run*, the experiment made ready on one device (:class:`Run`).
:func:`helpers.lab.training.train` asks the experiment for its configuration, its data's digest and its outer rates,
and the run in this order: ``init`` once; ``use``, where it has ``forms``; ``iterate`` at every iteration, by default
``gradient`` and the outer step, in the course of which the run calls ``check_clock``; ``spot_check`` every
``evaluate_every`` iterations; at the end ``evaluate`` and ``table``. The check of records loads the checkpoint, calls
``spot_check`` and allows the differences that the experiment declares (``tolerances``, ``spot_chance``, ``spot_only``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.fields import check_fields
from helpers.lab.statistics import Interval, Tolerance
from helpers.types import Estimator, Learner, Params, Tasks


class Experiment(ABC):
    """A named, recorded experiment: what it must have, and the defaults of what it may have.

    Attributes:
        name: what its record and checkpoint are called.
        paper: whose claims it answers, the name of a claims file.
        iterations: outer steps of the whole run.
        outer_rate: step size of the outer optimiser.
        evaluate_every: iterations between two points on the way.
        seed: of first parameters and training tasks; test tasks do not depend on it.
        seeds: runs side by side, for an interval.
        outer: the outer optimiser, ``"adam"`` or ``"sgd"``.
        outer_rate_final: to which the outer rate goes linearly; none leaves it where it is.
        outer_rate_hold: iterations before the outer rate begins to go to its final value.
        outer_rate_restarts: iterations at which an annealing ends and the next begins, see
            :func:`~helpers.lab.schedules.outer_rate_at`.
        watched: a metric of the points on the way. A run that loses its footing by the rule of
            :func:`~helpers.lab.schedules.steady` goes back to its last quiet point, or to where it was last resumed,
            and on at half the outer rate. None watches nothing.
        made_of: what the tasks are drawn from, where they are drawn and not stored.
        ways: classes of a task.
        shots: examples in a task's support set, of each class where it has classes.
        queries: examples in a task's query set, of each class where it has classes.
        inner_rate: step size of the inner loop in training.
        inner_steps: steps of the inner loop in training.
        meta_batch: tasks of an iteration.
        hidden: widths of the network's hidden layers.
        filters: channels of each of the network's convolutions.
        test_tasks: tasks that a metric is measured on.
        test_steps: numbers of inner steps after which a metric is measured.
        spot_tasks: of the test tasks, the first so many are for the points on the way and for checking a record.
        tolerances: for each pattern of a metric's name (as of ``fnmatch``) how far it may be from the record when the
            checkpoint is evaluated again; the first that fits counts.
        spot_chance: how far a metric of a spot check may be from the same of the whole evaluation, beyond twice the sum
            of their intervals.
        spot_only: metrics of a spot check that no evaluation has as a whole.
    """

    name: str
    paper: str
    iterations: int
    outer_rate: float
    evaluate_every: int
    seed: int
    outer: str = "adam"
    outer_rate_final: float | None = None
    outer_rate_hold: int = 0
    outer_rate_restarts: tuple[int, ...] = ()
    watched: str | None = None
    own = None  # no field here: images of a reader's own, see few_shot.OnImages
    made_of: ClassVar[str] = "drawn"
    # A mean squared error averages many thousand smooth functions of the same rounding.
    tolerances: tuple[tuple[str, Tolerance], ...] = (("*", Tolerance(relative=1e-3)),)
    spot_chance: ClassVar[Tolerance] = Tolerance(1e-9)
    spot_only: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_fields(self, str(self.name))

    def config(self) -> dict[str, Any]:
        """The fields by their names, fit for JSON. A checkpoint of another configuration is refused."""
        return asdict(self)

    def data(self) -> dict[str, Any]:
        """Provenance of the data: names and digests."""
        return {"data": self.made_of}

    @abstractmethod
    def setup(self, device: torch.device, compiled: bool) -> Run:
        """Load the data and build the estimator on ``device``; ``compiled`` asks for ``torch.compile``, where the run
        has a use for it."""

    def tolerance(self, metric: str, recorded: Mapping[str, Interval]) -> float:
        """How far a metric may be from the record when the checkpoint is evaluated again.

        Args:
            metric: its name.
            recorded: all metrics of the record.
        """
        allowed = next(allowed for pattern, allowed in self.tolerances if fnmatchcase(metric, pattern))
        return allowed.of(recorded[metric])


class Run(ABC):
    """An experiment made ready on one device.

    Attributes:
        experiment: which one.
        device: where its tensors are.
        learner: what adapts; a run that has another θ than its learner's has an ``init`` of its own.
        forms: names of ``helpers.numerics.tracing.FORMS`` that ``use`` takes; where there are none the run itself
            says how it is executed.
        divides: whether ``gradient`` shares its tasks among the processes that train together
            (:func:`helpers.estimators.explicit.divided`).
        check_clock: to be called in the course of an iteration that may last longer than a second. Training puts in a
            function that ends the iteration once the time is over or Ctrl-C came; nothing of the iteration is then
            kept, so that it must leave everything as it was but θ's copies and the generator.
    """

    experiment: Any
    device: torch.device
    learner: Learner
    forms: ClassVar[tuple[str, ...]] = ()
    divides: ClassVar[bool] = False
    check_clock: Callable[[], None] = staticmethod(lambda: None)

    def use(self, form: str) -> None:
        """Run the estimator in one of ``forms``.

        Raises:
            UserError: where there is no choice.
        """
        raise UserError(f"{self.experiment.name} has no forms to choose from: leave the form out, not {form!r}")

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters θ, drawn by ``generator``, on its device; by default the learner's."""
        return self.learner.init(generator)

    @abstractmethod
    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Draw a meta-batch by ``generator`` alone and return the meta-gradient and the mean query loss (a scalar).

        ``iteration`` counts from 0, for what changes in the course of training, such as an annealed inner rate.
        """

    def iterate(self, state: Any, rate: float) -> Tensor:
        """One iteration: a meta-batch is drawn, and θ takes an outer step; returns the loss.

        Args:
            state: of the run, a :class:`~helpers.lab.checkpoints.State`.
            rate: of the outer step.
        """
        gradient, loss = self.gradient(state.values(), state.generator, state.iteration)
        state.apply(gradient, rate)
        return loss

    def nothing(self, theta: Params) -> tuple[Params, Tensor]:
        """No gradient and no loss: of an iteration in which nothing is trained."""
        return {name: torch.zeros_like(value) for name, value in theta.items()}, torch.zeros((), device=self.device)

    @abstractmethod
    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """All metrics of the record, the headline first, on tasks that are the same on every call."""

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """Metrics for the points on the way and for checking a record.

        By default all. Where these take long, metrics from part of the tasks: those named ``spot_…`` are then the same
        here and in ``evaluate``.
        """
        return self.evaluate(theta)

    def table(self, theta: Params) -> list[dict[str, Any]] | None:
        """What the run wrote down row by row, texts and numbers, to be kept beside the record; None without any."""
        return None

    def watching(self, estimator: Estimator) -> Estimator:
        """The same estimator, which looks at the clock whenever it is called."""

        def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
            self.check_clock()
            return estimator(learner, theta, tasks)

        return run
