"""The recorded experiments of the first chapter: ways to learn a learner, and what a sceptic compares them with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.fields import AT_LEAST_0, among, limited
from helpers.lab import checkpoints, evaluation, records, seeds, statistics
from helpers.lab.experiment import Run
from helpers.lab.few_shot import OnImages
from helpers.lab.statistics import Interval, Tolerance, chosen
from helpers.learners.descent import GradientDescent
from helpers.learners.feedforward import Amortized, AsItIs, Neighbours, Prototypes, Recurrent
from helpers.learners.learned import LearnedDescent, started
from helpers.models.convnet import ConvNet
from helpers.models.layers import new_head, subtree_of
from helpers.models.mixed import MixedConvNet, MixedMLP, decided
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.optimizers.recurrent import RecurrentRule
from helpers.tasks import shifts
from helpers.tasks.batches import drawn
from helpers.tasks.episodes import FewShot
from helpers.tasks.images import ImageClasses
from helpers.tasks.sinusoid import Sinusoids
from helpers.tasks.sources import CurveSources, ImageSources
from helpers.types import Model, Params, Started, Tasks

TEST_SEED = 19_930_601  # of the test tasks; the same tasks for all methods and seeds
FAILED = 25.0  # squared error with which a task counts on which adaptation diverges: the largest amplitude's square
# What is learned across tasks, by method. The first four are ways to learn F; then a distance, which needs no gradient
# at test either; then transfer, from one source and from many; and what knows nothing of other tasks.
METHODS = {
    "recurrence": "a network that reads the support set",
    "optimizer": "an update rule",
    "initialization": "a start (MAML)",
    "architecture": "the layers",
    "metric": "a distance",
    "joint": "one function for all tasks",
    "multisource": "features of many sources",
    "transfer": "a solution of one source",
    "scratch": "nothing",
    "nearest": "nothing",
}
DESCENDING = ("optimizer", "initialization", "architecture", "joint", "multisource", "transfer", "scratch", "combined")


@dataclass(frozen=True)
class ParadigmExperiment(OnImages):
    """One method on one family of tasks, several seeds, judged by the number of shots and by what adaptation costs.

    All methods see the same test tasks. What is chosen for adaptation, its rate and number of steps, every descending
    method chooses from the same grid, by its mean result on validation tasks of the same number of shots.

    Attributes:
        family: ``"sinusoid"`` or ``"glyphs"`` (5-way).
        method: a key of ``METHODS``.
        shots: K in training.
        minibatch: examples of an iteration, for the two kinds of transfer.
        sources: functions or scripts that transfer learns from; a script has many classes.
        test_shots: K at test.
        rates: of the grid of adaptation. A learned rule has none.
        steps: numbers of steps of the grid of adaptation.
        validation_tasks: tasks by which rate and steps are chosen.
        ways: classes of a task; none where a number is predicted.
    """

    made_of = "sinusoids"
    # Means over seeds and tasks of up to twenty steps across kinks; glyphs are normalised by small batches.
    tolerances = (("*", Tolerance(relative=0.03, intervals=0.5)),)
    # Seeds share their test tasks, so that the interval over them leaves out by how much few tasks differ: sinusoids by
    # their amplitude, squared.
    spot_chance = Tolerance(relative=0.3)

    name: str
    family: str = among("sinusoid", "glyphs")
    method: str = among(*METHODS, "combined")
    iterations: int
    outer_rate: float
    shots: int
    inner_rate: float = 0.0
    inner_steps: int = 0
    meta_batch: int = 25
    queries: int = 10
    ways: int = limited(AT_LEAST_0, 0)
    filters: int = 16
    sources: int = limited(AT_LEAST_0, 0)
    minibatch: int = 64
    test_shots: tuple[int, ...] = (5, 10, 20)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    steps: tuple[int, ...] = (1, 5, 20, 100)
    validation_tasks: int = 50
    test_tasks: int = 300
    spot_tasks: int = 100
    outer_rate_final: float | None = 0.0
    seed: int = 0
    seeds: int = 3
    evaluate_every: int = 1_000_000
    paper: str = "ways"

    @property
    def of_images(self) -> bool:
        """Whether it learns from glyphs."""
        return self.family == "glyphs"

    def splits(self) -> tuple[ImageClasses, ImageClasses, ImageClasses]:
        """Classes to train on, to choose by and to be judged on: those of the reader's folder, if any."""
        from helpers.tasks import glyphs

        if self.own is None:
            return glyphs.three_parts()
        return tuple(self.own.classes(part, self.ways) for part in ("train", "validation", self.own.judged))

    def data(self) -> dict[str, Any]:
        """What the tasks are made of."""
        if self.own:
            return self.own.provenance()
        if self.family == "sinusoid":
            return super().data()
        from helpers.tasks import glyphs

        return glyphs.load("train").provenance

    def model(self, outputs: int | None = None) -> Model:
        """The network that descends; ``outputs`` other than a task's for transfer from many sources."""
        if self.family == "sinusoid":
            # Pre-training and MAML begin with larger weights than PyTorch's: both then leave the plateau sooner.
            return MLP((1, 40, 40, outputs or 1), scale=0.3 if self.method in ("initialization", "joint") else None)
        return ConvNet(outputs or self.ways, filters=self.filters, channels=self.channels)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy for classes, the mean squared error for sinusoids."""
        return losses.cross_entropy if self.ways else losses.mean_squared_error

    def learner(self) -> GradientDescent | Amortized:
        """The learner of the method."""
        images = self.family == "glyphs"
        features = MLP((1, 40, 40), scale=None)
        if images:
            features = ConvNet(64, filters=self.filters, head_scale=None, channels=self.channels)
        descent = (self.loss, self.inner_rate, self.inner_steps)
        match self.method:
            case "recurrence":
                return Recurrent(features, self.ways, width=64 if images else 40)
            case "metric":
                return Prototypes(features, self.ways) if images else Neighbours(features)
            case "nearest":
                return Neighbours(AsItIs(), self.ways, sharpness=math.inf)
            case "optimizer":
                # As in the paper, the gradients of the inner loss are no functions of the rule.
                return LearnedDescent(self.model(), *descent, first_order=True, rule=RecurrentRule(hidden=10))
            case "architecture":
                mixed = MixedMLP((1, 40, 40, 1))
                if images:
                    mixed = MixedConvNet(self.ways, self.filters, channels=self.channels)
                return LearnedDescent(mixed, *descent, learn_frozen=True)
            case "scratch":
                return LearnedDescent(self.model(), *descent)
        return GradientDescent(self.model(), *descent)  # initialization, joint, multisource, transfer

    def drawn_shots(self, draws: torch.Generator) -> int:
        """How many examples a training task has."""
        return self.shots

    def outer_tasks(self, tasks: Tasks | Started) -> Tasks | Started:
        """What the outer loss of the training is measured on."""
        return tasks

    def shifts(self) -> dict[str, Callable[[Tasks], Tasks] | Sinusoids]:
        """Families that training never saw: other sinusoids, or a change of the test images."""
        return shifts.of_images() if self.of_images else shifts.of_sinusoids(Sinusoids(self.shots, self.queries))

    def setup(self, device: torch.device, compiled: bool) -> WayTraining:
        """Draw or load what the tasks are made of."""
        return WayTraining(self, device)


def capped(errors: Tensor) -> Tensor:
    """``FAILED`` in the place of errors that are larger or no numbers, so that a mean exists."""
    return errors.nan_to_num(FAILED).clamp(max=FAILED)


class WayTraining(Run):
    """A method on one device. θ holds one set of meta-parameters a seed, under ``0/``, ``1/`` …"""

    def __init__(self, experiment: ParadigmExperiment, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, self.learner = device, e.learner()
        self.estimator = tracing.traced(estimators.maml)
        if e.family == "glyphs":
            self.train, self.valid, self.test = e.splits()
            self.images = self.train.to(device)
        self.sources = [self._source(s) for s in range(e.seeds)] if e.sources else []
        ruled = isinstance(self.learner, LearnedDescent) and self.learner.rule is not None
        self.rates = (0.0,) if ruled else e.rates

    def _source(self, number: int) -> CurveSources | ImageSources:
        """What transfer learns from: other functions for each seed; one script for each, or all scripts."""
        e = self.experiment
        if e.family == "sinusoid":
            return CurveSources.draw(e.sources, TEST_SEED + 100 + number, self.device)
        return ImageSources.of(self.train, number if e.sources == 1 else None, self.device)

    # ---- tasks

    def tasks(self, split: str, count: int, shots: int, generator: torch.Generator) -> Tasks:
        """Tasks of one split; of sinusoids there are always new ones."""
        e = self.experiment
        if e.family == "sinusoid":
            return Sinusoids(shots, e.queries).sample(count, generator)
        images = {"train": self.images, "valid": self.valid, "test": self.test}[split]
        return FewShot(images, e.ways, shots, e.queries).sample(count, generator)

    def _begun(self, tasks: Tasks | Started, generator: torch.Generator) -> Tasks | Started:
        """With a start, where neither the method nor the tasks have one."""
        needed = isinstance(self.learner, LearnedDescent) and not isinstance(tasks, Started)
        return started(self.learner.model, tasks, generator) if needed else tasks

    def judged(self, split: str, shots: int, count: int, shift: str | None = None) -> Tasks:
        """Validation or test tasks, the same for all methods and seeds; drawn on the CPU."""
        e, seed = self.experiment, TEST_SEED + (split == "test")
        change = e.shifts()[shift] if shift else None
        if isinstance(change, Sinusoids):
            return drawn(replace(change, shots=shots), count, seed, self.device)
        tasks = self.tasks(split, count, shots, runtime.generator(seed))
        return tree_map(lambda t: t.to(self.device), change(tasks) if change else tasks)

    def start(self, theta: Params, seed: int) -> Params:
        """Where adaptation begins: at θ, after transfer with a new last layer."""
        e, theta = self.experiment, subtree_of(theta, str(seed))
        if not self.sources:
            return decided(theta) if e.method == "architecture" else theta
        return new_head(theta, e.model().head, e.ways or None)

    # ---- training

    def init(self, generator: torch.Generator) -> Params:
        """One start a seed, each from a generator of its own."""
        e = self.experiment
        if not self.sources:
            return seeds.numbered(seeds.of_their_own(self.learner.init, e.seed, e.seeds, self.device))
        models = [e.model(source.outputs) for source in self.sources]
        return seeds.numbered(
            [m.init(runtime.generator(seeds.of_run(e.seed, s), self.device)) for s, m in enumerate(models)]
        )

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The meta-gradient of every seed, each on tasks of its own; what is not trained has none."""
        e = self.experiment
        if not theta:
            return self.nothing(theta)

        def one(seed: int, own: Params) -> tuple[Params, Tensor]:
            self.check_clock()
            draws = seeds.draws_of(generator)
            if self.sources:
                model, (x, y) = e.model(self.sources[seed].outputs), self.sources[seed].batch(e.minibatch, draws)
                return grad_and_value(lambda theta: e.loss(model(theta, x), y))(own)
            tasks = self._begun(self.tasks("train", e.meta_batch, e.drawn_shots(draws), draws), draws)
            return self.estimator(self.learner, own, e.outer_tasks(tasks))

        return seeds.one_by_one(one, theta, e.seeds)

    # ---- judging

    def score(
        self, start: Params, tasks: Tasks, steps: Sequence[int], rate: float, measure: Callable | None = None
    ) -> Tensor:
        """Mean squared error, at most ``FAILED``, or accuracy ``[len(steps), tasks]`` of one seed's learner; or another
        measure, as it is."""
        learner, usual = self.learner, losses.accuracy if self.experiment.ways else losses.mean_squared_error
        if not isinstance(learner, Amortized):
            learner = learner.replace(rate=rate, first_order=False)
        found = evaluation.outcomes(learner, start, tasks, steps, measure or usual)
        return found if measure else capped(found)

    def scores(self, theta: Params, tasks: Tasks, *how: Any) -> Tensor:
        """The scores of all seeds ``[seeds, len(steps), tasks]``; where the start is drawn, each draws another."""
        found = []
        for s in range(self.experiment.seeds):
            begun = self._begun(tasks, runtime.generator(TEST_SEED + s, self.device))
            found.append(self.score(self.start(theta, s), begun, *how))
        return torch.stack(found)

    def settings(self, theta: Params, shots: int) -> tuple[int, float]:
        """Steps and rate that are best on the validation tasks, over all seeds."""
        e = self.experiment
        if e.method not in DESCENDING:
            return 0, 0.0
        tasks = self._begun(self.judged("valid", shots, e.validation_tasks), runtime.generator(TEST_SEED, self.device))
        grid = {}
        for rate in self.rates:
            means = self.scores(theta, tasks, e.steps, rate).mean(2).mean(0).tolist()
            grid |= {(steps, rate): mean for steps, mean in zip(e.steps, means, strict=True)}
        return (max if e.ways else min)(grid, key=grid.__getitem__)

    def training_loss(self, theta: Params) -> Interval:
        """Loss on the support set, the mean over the first ten steps: what a learned rule is trained for.

        Without a rule the rate is the one that is best by this measure on validation tasks.
        """
        e = self.experiment

        def along(split: str, count: int, rate: float) -> Tensor:
            tasks = self.judged(split, e.shots, count)
            tasks = tasks._replace(query=tasks.support)
            return capped(self.scores(theta, tasks, range(1, 11), rate, e.loss).mean(1))  # [seeds, tasks]

        best = min(self.rates, key=lambda rate: along("valid", e.validation_tasks, rate).mean().item())
        return statistics.over_runs(along("test", e.test_tasks, best))

    @property
    def kind(self) -> str:
        """Name of the measure: accuracy for classes, ``mse`` for sinusoids."""
        return "accuracy" if self.experiment.ways else "mse"

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``{accuracy or mse}_{shots}`` over seeds, with the steps, the rate and the cost behind it; and on other
        families, ``…_{family}``, at the shots of training.

        ``gradients_{shots}`` counts gradients of one example that adaptation to a task takes, ``seconds_{shots}`` is
        what it takes and the predictions, among tasks that are adapted to side by side.
        """
        e, metrics = self.experiment, {}
        choices = {shots: self.settings(theta, shots) for shots in e.test_shots}
        for shots, (steps, rate) in choices.items():
            tasks = self.judged("test", shots, e.test_tasks)
            began = time.process_time()
            scores = self.scores(theta, tasks, (steps,), rate)[:, 0]
            seconds = (time.process_time() - began) / scores.numel()
            metrics[f"{self.kind}_{shots}"] = statistics.over_runs(scores)
            if shots == e.shots:
                metrics[f"spot_{self.kind}_{shots}"] = statistics.over_runs(scores[:, : e.spot_tasks])
            examples = shots * max(1, e.ways)
            values = {"steps": steps, "rate": rate, "gradients": steps * examples, "seconds": seconds}
            metrics |= {f"{name}_{shots}": chosen(float(value)) for name, value in values.items()}
        steps, rate = choices[e.shots]
        if e.method in DESCENDING:
            tasks = self.judged("test", e.shots, e.test_tasks)
            metrics[f"{self.kind}_before"] = statistics.over_runs(self.scores(theta, tasks, (0,), 0.0)[:, 0])
        for shift in e.shifts():
            tasks = self.judged("test", e.shots, e.test_tasks, shift)
            metrics[f"{self.kind}_{shift}"] = statistics.over_runs(self.scores(theta, tasks, (steps,), rate)[:, 0])
        if e.method in ("optimizer", "scratch"):
            metrics[f"training_{e.shots}"] = self.training_loss(theta)
        metrics["parameters"] = chosen(float(sum(v.numel() for v in subtree_of(theta, "0").values())))
        headline = f"{self.kind}_{e.shots}"
        return {headline: metrics[headline]} | metrics

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """The headline on the first test tasks, with the recorded choice; where there is none it is made."""
        e = self.experiment
        record = records.load(e.name, missing_ok=True)
        if record and record["config"] == checkpoints.configuration(e):  # choosing again takes minutes
            steps, rate = (records.metric(record, f"{name}_{e.shots}").value for name in ("steps", "rate"))
        else:
            steps, rate = self.settings(theta, e.shots)
        tasks = tree_map(lambda t: t[: e.spot_tasks], self.judged("test", e.shots, e.test_tasks))
        scores = self.scores(theta, tasks, (int(steps),), rate)[:, 0]
        return {f"spot_{self.kind}_{e.shots}": statistics.over_runs(scores)}
