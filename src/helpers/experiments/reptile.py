"""The recorded experiments of the Reptile chapter: Omniglot by its official commands, Figure 3, and the sine wave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.estimators.explicit import combinations, slug
from helpers.lab import evaluation, seeds, statistics
from helpers.lab.evaluation import PREDICTED, Predictor, minibatch_episodes
from helpers.lab.experiment import Experiment
from helpers.lab.few_shot import FewShotExperiment, FewShotRun, OnOmniglot
from helpers.lab.seeds import SideBySide
from helpers.lab.statistics import Tolerance
from helpers.learners.minibatch import MinibatchAdam, MinibatchDescent
from helpers.models.convnet import ConvNet
from helpers.models.layers import subtree_of
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.tasks.batches import merge_support_query, minibatches
from helpers.tasks.episodes import FewShot
from helpers.tasks.images import ImageClasses
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Estimator, Examples, Params, Tasks

TEST_SEED = 20_180_308  # of the test tasks; the same tasks for every experiment and every evaluation
BLOCK = 100  # test tasks that are drawn at once


def network(e: FewShotExperiment) -> ConvNet:
    """The Omniglot network of the official code: scales and shifts are adapted, the last layer sees all positions."""
    return e.convnet(head_scale=None, flatten=True, affine=True)


@dataclass(frozen=True)
class Omniglot(OnOmniglot):
    """Few-shot Omniglot by the commands of the official code.

    The commands for 1 and for 5 shots train in the same way, with ``train_shots`` examples a class; they differ in the
    evaluation alone. So one run answers both, with and without transduction.

    Attributes:
        train_shots: examples a class that the inner loop draws its minibatches from.
        inner_batch: examples in a minibatch of meta-training.
        inner_steps: minibatches of a task in meta-training.
        inner_rate: Adam's.
        carry: hand the memory of the inner Adam on from task to task, as the official code does.
        outer_rate: size ε of the first outer step.
        outer_rate_final: size of the last outer step; it goes there linearly, and none keeps the first one.
        test_shots: shots that are evaluated; ``inductive_accuracy`` is that of the first.
        test_batch: examples in a minibatch of the evaluation.
        test_steps: minibatches of a test task.
        test_tasks: test episodes, with one query a class; the official code draws 10,000.
    """

    headline = "inductive_accuracy"

    name: str
    ways: int = 5
    train_shots: int = 10
    inner_batch: int = 10
    inner_steps: int = 5
    inner_rate: float = 1e-3
    carry: bool = True
    meta_batch: int = 5
    iterations: int = 100_000
    outer: str = "sgd"
    outer_rate: float = 1.0
    outer_rate_final: float | None = 0.0
    seed: int = 0
    queries: int = 1
    test_shots: tuple[int, ...] = (1, 5)
    test_batch: int = 5
    test_steps: int = 50
    test_tasks: int = 10_000
    spot_tasks: int = 500
    evaluate_every: int = 10_000
    paper: str = "reptile"

    def learner(self) -> MinibatchAdam:
        """Network, loss and inner loop."""
        return MinibatchAdam(network(self), losses.cross_entropy, self.inner_rate, carry=self.carry)

    def setup(self, device: torch.device, compiled: bool) -> OmniglotTraining:
        """Load the images and build the estimator."""
        family = FewShot(self.classes("train").to(device), self.ways, self.train_shots, self.queries)
        return OmniglotTraining(self, family, device, compiled, self.classes("test"))


@dataclass(eq=False)
class OmniglotTraining(FewShotRun):
    """An Omniglot experiment on one device; ``test`` are the classes that it is judged on."""

    test: ImageClasses | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.predict = Predictor(tracing.compiled if self.compiled else tracing.traced)

    def estimator_in(self, form: str) -> Estimator:
        """θ − mean φ, in this form."""
        return tracing.FORMS[form](estimators.reptile)

    def in_chunks(self, estimator: Estimator) -> Estimator:
        """The whole meta-batch at once, which is small."""
        return self.watching(estimator)

    def prepared(self, tasks: Tasks, generator: torch.Generator) -> Tasks:
        """A meta-batch, its support sets cut into minibatches."""
        e = self.experiment
        return Tasks(minibatches(tasks.support, e.inner_batch, e.inner_steps, generator), tasks.query)

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """All metrics, on all test episodes."""
        return self._accuracies(theta, self.experiment.test_tasks)

    def spot_check(self, theta: Params) -> dict[str, statistics.Interval]:
        """The metrics of the first episodes alone: for the points on the way, and to check a record."""
        return self._accuracies(theta, self.experiment.spot_tasks)

    def _accuracies(self, theta: Params, count: int) -> dict[str, statistics.Interval]:
        e, metrics = self.experiment, {}
        for shots in e.test_shots:
            family = FewShot(self.test, e.ways, shots, e.queries)
            settings = {"size": e.test_batch, "steps": e.test_steps, "seed": TEST_SEED + shots, "device": self.device}
            episodes = minibatch_episodes(family, count, block=BLOCK, **settings)
            right = torch.cat([self.predict(self.learner, theta, *some).cpu() for some in episodes], 1)[:, :count]
            for kind, accuracies in zip(PREDICTED, right, strict=True):
                metrics[f"{kind}_accuracy_{shots}_shot"] = statistics.interval(accuracies)
                metrics[f"spot_{kind}_accuracy_{shots}_shot"] = statistics.interval(accuracies[: e.spot_tasks])
        return {e.headline: metrics[f"{e.headline}_{e.test_shots[0]}_shot"]} | metrics


@dataclass(frozen=True)
class Combinations(OnOmniglot):
    """Figure 3 of the paper: which of the gradients of the inner path should move θ?

    Ten networks with the same start see the same tasks. Each goes k = 1 … 4 steps of plain SGD on k minibatches that do
    not overlap, and moves by one combination of the gradients on the way: their sum, the sum divided by k, or the last
    alone. θ holds the networks under the name of their combination, such as ``g1+g2/``.

    Attributes:
        inner_batch: 25, all classes' ``shots`` in one minibatch.
        outer_rate: 0.25; an entry ``(g1+g2)/2`` moves by half of it.
        longest: the most minibatches of an inner path.
    """

    headline = "inductive_accuracy"
    meta_batch = 1  # no field: an iteration is one task

    name: str
    ways: int = 5
    shots: int = 5
    inner_batch: int = 25
    inner_rate: float = 0.003
    longest: int = 4
    iterations: int = 40_000
    outer: str = "sgd"
    outer_rate: float = 0.25
    outer_rate_final: float | None = 0.0
    seed: int = 0
    queries: int = 1
    test_steps: int = 5
    test_tasks: int = 1_000
    evaluate_every: int = 2_000
    paper: str = "reptile"

    def learner(self) -> MinibatchDescent:
        """Network, loss and inner loop."""
        return MinibatchDescent(network(self), losses.cross_entropy, self.inner_rate)

    def setup(self, device: torch.device, compiled: bool) -> CombinationsTraining:
        """Load the images and build the estimators."""
        # All twenty images of a class are needed for the longest path, so none is left for queries of their own.
        half = self.shots * self.longest // 2
        family = FewShot(self.classes("train").to(device), self.ways, half, half)
        return CombinationsTraining(self, family, device, compiled, self.classes("test"))


@dataclass(eq=False)
class CombinationsTraining(FewShotRun):
    """The ten networks on one device; ``test`` are the classes that they are judged on."""

    test: ImageClasses | None = None

    divides = False

    def __post_init__(self) -> None:
        self.weights = combinations(self.experiment.longest)
        super().__post_init__()
        self.predict = Predictor(tracing.traced)

    def init(self, generator: torch.Generator) -> Params:
        """One start for all ten."""
        theta = self.learner.init(generator)
        return {f"{kind}/{name}": value for kind in self.weights for name, value in theta.items()}

    def estimator_in(self, form: str) -> Estimator:
        """The ten combinations on the same task, in the units of the inner rate; each loss is measured on the first
        minibatch after its inner path."""
        each = {kind: tracing.FORMS[form](estimators.combination(weights)) for kind, weights in self.weights.items()}

        def run(learner: MinibatchDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
            gradients, all_losses = {}, []
            for kind, weights in self.weights.items():
                self.check_clock()
                support = tree_map(lambda t: t[:, : len(weights)], tasks.support)  # noqa: B023
                some = Tasks(support, tasks.query)
                gradient, losses = each[kind](learner, subtree_of(theta, kind), some)
                gradients |= {f"{kind}/{name}": learner.rate * g for name, g in gradient.items()}
                all_losses.append(losses)
            return gradients, torch.cat(all_losses)

        return run

    def in_chunks(self, estimator: Estimator) -> Estimator:
        """A single task has no parts."""
        return estimator

    def prepared(self, tasks: Tasks, generator: torch.Generator) -> Tasks:
        """A task, all of its examples cut into minibatches."""
        e = self.experiment
        batches = minibatches(merge_support_query(tasks), e.inner_batch, e.longest, generator)
        return Tasks(batches, tree_map(lambda t: t[:, 0], batches))

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Accuracies of each after five steps on all support examples, ``g1_g2_inductive_accuracy`` and so on."""
        e, metrics = self.experiment, {}
        family = FewShot(self.test, e.ways, e.shots, e.queries)
        settings = {"size": e.inner_batch, "steps": e.test_steps, "seed": TEST_SEED, "device": self.device}
        (episodes,) = minibatch_episodes(family, e.test_tasks, block=e.test_tasks, **settings)
        for kind in self.weights:
            right = self.predict(self.learner, subtree_of(theta, kind), *episodes).cpu()
            for way, accuracies in zip(PREDICTED, right, strict=True):
                metrics[f"{slug(kind)}_{way}_accuracy"] = statistics.interval(accuracies)
        longest = "_".join(f"g{i}" for i in range(1, e.longest + 1))
        return {e.headline: metrics[f"{longest}_{e.headline}"]} | metrics


@dataclass(frozen=True)
class SineDemo(Experiment):
    """The sine wave of the official demonstration, several seeds side by side.

    Every parameter carries a leading seed axis. A task is 50 fixed points, seen once in minibatches of 10, and an outer
    iteration is one task.

    Attributes:
        points: equally spaced x in [−5, 5] that a task consists of.
        inner_rate: of SGD, in training and at test.
        shots: points that are seen at test.
        inner_batch: points in a minibatch.
    """

    made_of = "sinusoids"
    # Nothing was learned for a fresh start: its steps bounce off kinks and narrow valleys.
    tolerances = (("scratch_*", Tolerance(intervals=0.5)), *Experiment.tolerances)

    name: str
    hidden: tuple[int, ...] = (64, 64)
    points: int = 50
    inner_batch: int = 10
    inner_rate: float = 0.02
    iterations: int = 30_000
    outer: str = "sgd"
    outer_rate: float = 0.1
    outer_rate_final: float | None = 0.0
    seed: int = 0
    seeds: int = 5
    shots: int = 10
    test_tasks: int = 600
    test_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    evaluate_every: int = 10_000
    paper: str = "reptile"

    def family(self) -> Sinusoids:
        """Amplitudes in [0.1, 5] and, unlike MAML's, all phases."""
        return Sinusoids(self.points, 1, phases=(0.0, 2 * torch.pi))

    def learner(self) -> MinibatchDescent:
        """The tanh network of the demonstration."""
        model = MLP((1, *self.hidden, 1), activation="tanh", scale=None)
        return MinibatchDescent(model, losses.mean_squared_error, self.inner_rate)

    def setup(self, device: torch.device, compiled: bool) -> SineTraining:
        return SineTraining(self, device)


class SineTraining(SideBySide):
    """The sine study on one device."""

    def __init__(self, experiment: SineDemo, device: torch.device) -> None:
        super().__init__(experiment, device)
        self.estimator = tracing.traced(seeds.side_by_side(estimators.reptile))

    def waves(self, count: int, generator: torch.Generator) -> Examples:
        """Whole waves ``[seeds * count, points, 1]``."""
        e = self.experiment
        return e.family().wave(e.seeds * count, e.points, generator)

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """θ − φ of each seed on a wave of its own, and the mean error on the whole wave after the inner round."""
        e = self.experiment
        wave = self.waves(1, generator)
        support = minibatches(wave, e.inner_batch, e.points // e.inner_batch, generator)
        step, errors = self.estimator(self.learner, theta, seeds.apart(Tasks(support, wave), e.seeds, 1))
        return step, errors.mean()

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Error on the whole wave ``mse_{steps}`` after steps on ``shots`` random points; and of a fresh network."""
        e, draws = self.experiment, runtime.generator(TEST_SEED)
        wave = self.waves(e.test_tasks, draws)
        support = tree_map(lambda t: t[:, 0], minibatches(wave, e.shots, 1, draws))
        tasks = tree_map(lambda t: t.to(self.device).unflatten(0, (e.seeds, e.test_tasks)), Tasks(support, wave))

        fresh = tree_map(lambda t: t.to(self.device), self.init(runtime.generator(e.seed)))
        metrics = {}
        for kind, start in (("reptile", theta), ("scratch", fresh)):
            curves = evaluation.curves_of_seeds(self.learner, start, tasks, e.test_steps, losses.mean_squared_error)
            metrics |= statistics.by_steps(f"{kind}_mse", e.test_steps, curves.mean(2).T)
        headline = f"reptile_mse_{max(e.test_steps)}"
        return {headline: metrics[headline]} | metrics


def experiments() -> list:
    """The experiments of the chapter, the most important first."""
    twenty_way = {"ways": 20, "inner_batch": 20, "inner_steps": 10, "inner_rate": 5e-4, "iterations": 200_000}
    twenty_way |= {"test_batch": 10}
    return [
        Omniglot("reptile-omniglot-5w1s"),
        SineDemo("reptile-sine"),
        Combinations("reptile-combinations"),
        Omniglot("reptile-omniglot-5w1s-fresh", carry=False),
        Omniglot("reptile-omniglot-20w1s", **twenty_way),
    ]
