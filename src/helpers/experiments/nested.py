"""The recorded experiments about three levels: what an initialization for meta-training is worth on a new family.

Four starts for MAML on a family of sinusoids that nobody has seen: random weights, a network trained jointly on tasks
of all training families, MAML on the same mixture (the second level), and a start that was trained so that a few steps
of MAML on a family's tasks make it a good one for that family (the third level). There is no paper behind it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.estimators.nested import MetaLearner, evaluations
from helpers.fields import AT_LEAST_0, among, limited
from helpers.lab import break_even, seeds, statistics
from helpers.lab.experiment import Experiment
from helpers.lab.meta_training import meta_training
from helpers.lab.seeds import SideBySide
from helpers.lab.statistics import Interval, Tolerance, chosen
from helpers.learners.descent import GradientDescent
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.tasks.batches import merge_support_query
from helpers.tasks.families import SPLITS, SinusoidFamilies
from helpers.types import Params, Tasks

KINDS = ("random", "joint", "second", "third")
TEST_SEED = 20_170_806  # of the test families; the same ones for every start
FAILED = 100.0  # a squared error above it counts as this much, so that a mean exists where meta-training diverged


@dataclass(frozen=True)
class NestedExperiment(Experiment):
    """One way to come by a start, and what it is worth on new families; several seeds side by side.

    Every parameter carries a leading seed axis. Adam works entry by entry, so training the seeds together is training
    them apart.

    Attributes:
        kind: one of :data:`KINDS`.
        inner_rate: step size of the inner loop, the same for all starts.
        inner_steps: steps of the inner loop, the same for all starts.
        families: families in one iteration of training.
        steps: of meta-training on a family, at the third level. The other kinds see the same tasks in one heap.
        step_tasks: tasks that each of these steps sees.
        query_tasks: tasks of the family that judge the result.
        meta_rate: β of these steps.
        first_order: at the third level alone: take the meta-gradients on the way for constants.
        meta_batch: tasks of one iteration of meta-training on a new family.
        measured: after how many of these iterations the meta-test loss is measured.
        sgd_rates: of the grid of outer steps for a new family, plain ones. For each start and each number of
            iterations, what was best on validation families is used on the test families.
        adam_rates: of the grid of outer steps for a new family, Adam's.
        levels: losses to be reached.
        test_families: of each seed.
        validation_families: of each seed, for choosing from the grid.
        shifted_families: of each seed, beyond the range of training.
        test_tasks: tasks a family for measuring.
        test_queries: query points of each of these.
    """

    made_of = "families of sinusoids"

    name: str
    kind: str = among(*KINDS)
    shots: int = 5
    queries: int = 10
    hidden: tuple[int, ...] = (40, 40)
    inner_rate: float = 0.02
    inner_steps: int = 1
    families: int = 4
    steps: int = limited(AT_LEAST_0, 5)
    step_tasks: int = 5
    query_tasks: int = 5
    meta_rate: float = 0.1
    first_order: bool = False
    iterations: int = 2_000
    outer_rate: float = 2e-3
    outer_rate_final: float | None = 0.0
    seed: int = 0
    seeds: int = 5
    meta_batch: int = 5
    measured: tuple[int, ...] = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200)
    sgd_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    adam_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    levels: tuple[float, ...] = (1.0, 0.7, 0.5, 0.4)
    test_families: int = 8
    validation_families: int = 4
    shifted_families: int = 4
    test_tasks: int = 40
    test_queries: int = 40
    evaluate_every: int = 1_000_000
    paper: str = "turtles"

    @property
    def tolerances(self) -> tuple[tuple[str, Tolerance], ...]:
        """Hundreds of iterations at the largest rates amplify rounding, measured by up to a fifth of an interval. Of
        two nearly level settings of the grid another may be picked, and a seed may just miss a level of loss."""
        return (
            ("picked_*", Tolerance(len(self.sgd_rates) + len(self.adam_rates))),
            ("reached_*", Tolerance(1.5 / self.seeds)),
            ("iterations_to_*", Tolerance(2, intervals=0.5)),
            ("*", Tolerance(intervals=0.5)),
        )

    def learner(self) -> GradientDescent:
        """Network, loss and inner loop: the learner of the second level."""
        network = MLP((1, *self.hidden, 1), scale=None, activation="tanh")
        return GradientDescent(network, losses.mean_squared_error, self.inner_rate, self.inner_steps)

    def upper(self) -> MetaLearner:
        """The learner of the third level; each of its steps sees tasks of its own."""
        return MetaLearner(self.learner(), self.meta_rate, self.steps, max(1, self.steps), self.first_order)

    def family(self, split: str = "train") -> SinusoidFamilies:
        """Families of a split of :data:`~helpers.tasks.families.SPLITS`."""
        support = max(1, self.steps) * self.step_tasks
        return SinusoidFamilies(support, self.query_tasks, self.shots, self.queries, SPLITS[split])

    def evaluations(self) -> Counter[int]:
        """Losses that are evaluated in all of one seed's training, by order:
        :func:`~helpers.estimators.nested.evaluations`."""
        tasks = max(1, self.steps) * self.step_tasks + self.query_tasks
        one = {
            "random": Counter(),
            "joint": Counter({1: tasks}),
            "second": Counter({d: tasks * n for d, n in evaluations(self.learner()).items()}),
            "third": evaluations(self.upper(), [(self.step_tasks, self.query_tasks)]),
        }[self.kind]
        return Counter({d: self.iterations * self.families * n for d, n in one.items()})

    def setup(self, device: torch.device, compiled: bool) -> Training:
        """The learners on ``device``; no data is loaded and nothing compiled, so ``compiled`` counts for nothing."""
        return Training(self, device)


class Training(SideBySide):
    """One start on one device; small matrix products, so that programs are recorded but not compiled."""

    def __init__(self, experiment: NestedExperiment, device: torch.device) -> None:
        super().__init__(experiment, device)
        self.train = experiment.family()
        self.estimator = tracing.traced(seeds.side_by_side(estimators.maml))

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The gradient of the kind, on fresh families; the loss is averaged over seeds."""
        experiment = self.experiment
        if experiment.kind == "random":
            return self.nothing(theta)
        count = experiment.families
        families = seeds.apart(self.train.sample(experiment.seeds * count, generator), experiment.seeds, count)
        if experiment.kind == "third":
            learner, tasks = experiment.upper(), families
        else:  # all tasks of all families in one heap
            learner, tasks = self.learner, tree_map(lambda *t: torch.cat(t, 2).flatten(1, 2), *families)
        if experiment.kind == "joint":
            every = vmap(merge_support_query)(tasks)
            learner, tasks = self.learner.replace(steps=0), Tasks(every, every)
        gradient, query_losses = self.estimator(learner, theta, tasks)
        return gradient, query_losses.mean()

    def curves(self, theta: Params, split: str, count: int, picked: Sequence[int] | None = None) -> Tensor:
        """Meta-test loss on new families in the course of meta-training on them.

        Args:
            theta: the starts, one a seed.
            split: where the families are from; the same ones on every call.
            count: families of each seed.
            picked: numbers of the settings in the grid, SGD first; all without it.

        Returns:
            ``[measured, settings, seeds, families]``; at most ``FAILED``, also for a loss that is not finite.
        """
        e = self.experiment
        generator = runtime.generator(TEST_SEED + list(SPLITS).index(split))
        family = e.family(split)
        drawn = family.draw(e.seeds * count, generator)
        test = replace(family, queries=e.test_queries).tasks(drawn, e.test_tasks, generator)
        grid = [(rate, False) for rate in e.sgd_rates] + [(rate, True) for rate in e.adam_rates]
        settings = grid if picked is None else [grid[number] for number in picked]
        starts = {name: value.repeat_interleave(count, 0) for name, value in theta.items()}

        def tasks() -> Tasks:
            return family.tasks(drawn, e.meta_batch, generator)

        test = tree_map(lambda t: t.to(self.device), test)
        found = meta_training(self.estimator, self.learner, starts, tasks, test, settings, e.measured)
        return found.nan_to_num(FAILED).clamp(max=FAILED).unflatten(2, (e.seeds, count))

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Meta-test losses ``loss_{n}`` after n iterations on a new family, ``shifted_loss_{n}`` beyond the range of
        training, when levels are reached (:func:`~helpers.lab.break_even.reaching`), and what it all costs.
        """
        experiment = self.experiment
        validation = self.curves(theta, "validation", experiment.validation_families).mean((2, 3))
        best = validation.argmin(1).tolist()  # [measured]: the setting for each number of iterations
        picked = sorted(set(best))
        metrics, horizon = {}, experiment.measured
        for prefix, split in (("", "test"), ("shifted_", "shifted")):
            count = experiment.test_families if split == "test" else experiment.shifted_families
            every = self.curves(theta, split, count, picked).mean(3)
            curve = torch.stack([row[picked.index(b)] for row, b in zip(every, best, strict=True)])  # [measured, seeds]
            metrics |= statistics.by_steps(f"{prefix}loss", horizon, curve)
            if split == "test":
                metrics |= break_even.reaching(horizon, curve.T, experiment.levels)
        metrics |= {f"picked_{n}": chosen(b) for n, b in zip(horizon, best, strict=True)}
        metrics |= {f"evaluations_order_{d}": chosen(experiment.evaluations()[d]) for d in (1, 2, 3)}
        return metrics | {f"seconds_{what}": chosen(s) for what, s in self._seconds(theta).items()}

    def _seconds(self, theta: Params) -> dict[str, float]:
        """Processor seconds of one seed for an iteration of training, and for one of MAML on a new family.

        Both are measured as they are run here, several seeds side by side, and divided by their number.
        """
        generator = runtime.generator(TEST_SEED, self.device)
        family, count = self.experiment.family("test"), self.experiment.seeds
        tasks = family.tasks(family.draw(count, generator), self.experiment.meta_batch, generator)
        both = {
            "training": lambda: self.gradient(theta, generator, 0),
            "new_family": lambda: self.estimator(self.learner, theta, tasks),
        }
        return {what: break_even.seconds_of(once) / count for what, once in both.items()}


def experiments() -> list[NestedExperiment]:
    """The starts that the chapter compares, the most important first."""
    return [
        NestedExperiment("turtles-third", "third"),
        NestedExperiment("turtles-second", "second"),
        # About the processor time of turtles-third.
        NestedExperiment("turtles-second-long", "second", iterations=7_500),
        NestedExperiment("turtles-third-first-order", "third", first_order=True),
        NestedExperiment("turtles-joint", "joint"),
        NestedExperiment("turtles-random", "random", iterations=1),
    ]
