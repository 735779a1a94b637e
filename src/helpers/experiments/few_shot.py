"""Few-shot images, of Omniglot or of glyphs: what the experiments of several papers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers import estimators, losses
from helpers.experiments.base import Experiment, Run, Tolerance
from helpers.lab import evaluation
from helpers.lab.statistics import Interval, interval
from helpers.learners.descent import GradientDescent
from helpers.numerics import tracing
from helpers.tasks.episodes import FewShot
from helpers.types import Estimator, Learner, Params, Tasks

# Inner steps amplify rounding, so that a prediction on the border between two classes may flip. Five of them are
# allowed, which is less than half of the interval of 600 tasks.
FLIPS = 5.5
ACCURACIES = (("transductive", True), ("inductive", False))  # kinds by name, and whether queries are seen together


class FewShotExperiment(Experiment):
    """An experiment on few-shot episodes of images.

    Attributes:
        headline: the metric that comes first; whether the queries of a task are seen together is fixed beforehand, by
            what the paper reports.
    """

    headline: ClassVar[str] = "transductive_accuracy"
    ways: int
    queries: int

    @property
    def tolerances(self) -> tuple[tuple[str, Tolerance], ...]:
        """Some predictions may flip."""
        return ("*accuracy*", Tolerance(per_sample=FLIPS / (self.ways * self.queries))), *Experiment.tolerances


class OnOmniglot(FewShotExperiment):
    """An experiment whose data are Omniglot."""

    def data(self) -> dict[str, Any]:
        """Digest of the images and of the split."""
        from helpers.tasks import omniglot

        return omniglot.provenance()


@dataclass(eq=False)
class FewShotRun(Run):
    """A few-shot experiment on one device: an estimator on a fresh meta-batch of episodes at every iteration."""

    experiment: Any
    family: FewShot
    device: torch.device
    compiled: bool = False

    forms = tuple(tracing.FORMS)

    def __post_init__(self) -> None:
        self.learner = self.experiment.learner()
        self.use("compiled" if self.compiled else "traced")

    def use(self, form: str) -> None:
        """Run the estimator in one of the forms of ``helpers.numerics.tracing.FORMS``."""
        self.estimator = self.in_chunks(self.estimator_in(form))

    @abstractmethod
    def estimator_in(self, form: str) -> Estimator:
        """The estimator in this form, on all tasks of a meta-batch at once."""

    def in_chunks(self, estimator: Estimator) -> Estimator:
        """The estimator on ``chunk`` tasks at a time: a CPU is fastest on the few that fit its cache, a GPU on all."""
        size = self.experiment.chunk if self.device.type == "cpu" else None
        return estimators.chunked(self.watching(estimator), size)

    def at(self, iteration: int) -> Learner:
        """The learner at an iteration."""
        return self.learner

    def prepared(self, tasks: Tasks, generator: torch.Generator) -> Tasks:
        """The meta-batch in the form in which the learner wants it."""
        return tasks

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Meta-gradient and mean query loss of a fresh meta-batch."""
        tasks = self.prepared(self.family.sample(self.experiment.meta_batch, generator), generator)
        gradient, query_losses = self.estimator(self.at(iteration), theta, tasks)
        return gradient, query_losses.mean()


def accuracy_curve(
    learner: GradientDescent, theta: Params, tasks: Tasks, steps: Sequence[int], transductive: bool = True
) -> Tensor:
    """Accuracies ``[steps, tasks]`` after numbers of inner steps, as many tasks at a time as the device is good for."""
    chunk = 25 if tasks.support.x.device.type == "cpu" else 300
    return evaluation.adaptation_curve(learner, theta, tasks, steps, losses.accuracy, transductive, chunk=chunk)


def accuracies(
    learner: GradientDescent, theta: Params, tasks: Tasks, steps: Sequence[int], headline: int, spot: int | None = None
) -> dict[str, Interval]:
    """``{kind}_accuracy_{steps}``, transductive and not; ``transductive_accuracy``, after ``headline`` steps, is first.

    Args:
        spot: also enter ``spot_{kind}_accuracy_{headline}``, from the first so many tasks.
    """
    measured = {}
    for kind, transductive in ACCURACIES:
        curve = accuracy_curve(learner, theta, tasks, steps, transductive)
        for count, values in zip(steps, curve, strict=True):
            measured[f"{kind}_accuracy_{count}"] = interval(values)
            if count == headline and spot:
                measured[f"spot_{kind}_accuracy_{count}"] = interval(values[:spot])
    return {"transductive_accuracy": measured[f"transductive_accuracy_{headline}"]} | measured
