"""Few-shot images, of Omniglot, of glyphs or of a reader's own: what the experiments of several papers share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers import estimators
from helpers.errors import UserError
from helpers.lab.checkpoints import State
from helpers.lab.experiment import Experiment, Run
from helpers.lab.statistics import Tolerance
from helpers.models.convnet import ConvNet
from helpers.numerics import tracing
from helpers.tasks import folders
from helpers.tasks.episodes import FewShot
from helpers.tasks.folders import Folder
from helpers.tasks.images import ImageClasses
from helpers.types import Estimator, Learner, Params, Tasks

# Inner steps amplify rounding, so that a prediction on the border between two classes may flip. Five of them are
# allowed, which is less than half of the interval of 600 tasks.
FLIPS = 5.5
SIZE = 28  # height and width of the images of the recorded experiments


@dataclass(frozen=True)
class OnImages(Experiment):
    """An experiment on classes of images, in whose place a reader's own may be put.

    Attributes:
        own: a folder of your own images in place of the experiment's, which ``--data-folder`` names.
    """

    own: Folder | None = field(default=None, kw_only=True)

    @property
    def of_images(self) -> bool:
        """Whether images are what it learns from."""
        return True

    def config(self) -> dict[str, Any]:
        """The fields; of an own folder what decides the images, not where it lies, and nothing where there is none."""
        found = super().config()
        if own := found.pop("own"):
            found["own"] = {name: value for name, value in own.items() if name not in ("place", "content")}
        return found

    @property
    def channels(self) -> int:
        """Of the images: 1 for grey, 3 for colour."""
        return self.own.channels if self.own else 1

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.own.size if self.own else SIZE


class FewShotExperiment(OnImages):
    """An experiment on few-shot episodes of images.

    Attributes:
        headline: the metric that comes first; whether the queries of a task are seen together is fixed beforehand, by
            what the paper reports.
        headline_steps: inner steps of the headline, fixed beforehand: those of the paper.
        chunk: tasks that are differentiated at once; changes rounding and speed, nothing else.
    """

    headline: ClassVar[str] = "transductive_accuracy"
    ways: int
    queries: int

    @abstractmethod
    def published(self, split: str) -> ImageClasses:
        """The images of the recorded experiment: its ``"train"`` or ``"test"`` classes."""

    def classes(self, split: str) -> ImageClasses:
        """The images to train on, ``"train"``, or to be judged on, ``"test"``: those of the reader's folder, if any."""
        if self.own is None:
            return self.published(split)
        return self.own.classes(self.own.judged if split == "test" else split, self.ways)

    def convnet(self, **settings: Any) -> ConvNet:
        """The convolutional network for the images and the ways of the tasks."""
        return ConvNet(self.ways, channels=self.channels, size=self.size, **settings)

    @property
    def tolerances(self) -> tuple[tuple[str, Tolerance], ...]:
        """Some predictions may flip."""
        return ("*accuracy*", Tolerance(per_sample=FLIPS / (self.ways * self.queries))), *Experiment.tolerances


class OnOmniglot(FewShotExperiment):
    """An experiment whose data are Omniglot."""

    def published(self, split: str) -> ImageClasses:
        """Characters to train on, turned as well, or to be judged on."""
        from helpers.tasks import omniglot

        return omniglot.load(split)

    def data(self) -> dict[str, Any]:
        """Digest of the images and of the split."""
        from helpers.tasks import omniglot

        return self.own.provenance() if self.own else omniglot.provenance()


class OnGlyphs(FewShotExperiment):
    """An experiment whose data are glyphs."""

    def published(self, split: str) -> ImageClasses:
        """Letters of scripts to train on, or of others to be judged on."""
        from helpers.tasks import glyphs

        return glyphs.load(split)

    def data(self) -> dict[str, Any]:
        """What the glyphs are drawn from."""
        return self.own.provenance() if self.own else self.published("train").provenance


def on_folder(experiment: Experiment, place: Path | str, trained: bool = False) -> OnImages:
    """The experiment on the images of a reader's folder, named after their digest.

    Args:
        place: see :func:`helpers.tasks.folders.read`.
        trained: the experiment has a checkpoint, which is to be judged on these images. They then get the size and the
            channels that its network takes; and if it was trained on the same images, all remains as it was.

    Raises:
        UserError: for an experiment without images, or a folder without.
    """
    if not isinstance(experiment, OnImages) or not experiment.of_images:
        raise UserError(
            f"{experiment.name} does not take images of your own: choose an experiment that does, such as "
            "maml-omniglot-5w1s"
        )
    before = experiment.own
    found = folders.read(place, experiment.size, experiment.channels) if trained else folders.read(place)
    if before and before.sha256 == found.sha256:
        return replace(experiment, own=replace(before, place=found.place, content=found.content))
    return replace(experiment, own=found, name=f"{experiment.name}_own-folder-{found.sha256[:8]}")


def _changes(state: State, *_: Any) -> tuple[list[Tensor], list[torch.Generator]]:
    return state.changes()


@dataclass(eq=False)
class FewShotRun(Run):
    """A few-shot experiment on one device: an estimator on a fresh meta-batch of episodes at every iteration."""

    experiment: Any
    family: FewShot
    device: torch.device
    compiled: bool = False

    forms = tuple(tracing.FORMS)
    divides = True

    def __post_init__(self) -> None:
        self.learner = self.experiment.learner()
        self.use("compiled" if self.compiled else "traced")

    def use(self, form: str) -> None:
        """Run the estimator in one of the forms of ``helpers.numerics.tracing.FORMS``.

        ``"captured"`` is the whole iteration as one CUDA graph: the draw, the traced estimator and the outer step.
        """
        one_graph = form == "captured"
        self.estimator = estimators.divided(self.in_chunks(self.estimator_in("traced" if one_graph else form)))
        self.whole = tracing.captured(self._whole, _changes, strict=True) if one_graph else None

    @abstractmethod
    def estimator_in(self, form: str) -> Estimator:
        """The estimator in this form, eager, traced or compiled, on all tasks of a meta-batch at once."""

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
        return self._drawn(self.at(iteration), theta, generator)

    def iterate(self, state: State, rate: float) -> Tensor:
        """One iteration; captured, what changes from one to the next is the learner and the outer rate."""
        if self.whole is None:
            return super().iterate(state, rate)
        self.check_clock()
        return self.whole(state, self.at(state.iteration), torch.full((), rate, device=self.device))[1]

    def _drawn(self, learner: Learner, theta: Params, generator: torch.Generator) -> tuple[Params, Tensor]:
        tasks = self.prepared(self.family.sample(self.experiment.meta_batch, generator), generator)
        gradient, query_losses = self.estimator(learner, theta, tasks)
        return gradient, query_losses.mean()

    def _whole(self, state: State, learner: Learner, rate: Tensor) -> tuple[Params, Tensor]:
        gradient, loss = self._drawn(learner, state.values(), state.generator)
        state.apply(gradient, rate)
        return gradient, loss
