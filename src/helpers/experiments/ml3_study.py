"""What the experiments on learned losses share: descending, training, tables."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import estimators, losses
from helpers.lab import seeds, statistics
from helpers.lab.experiment import Experiment
from helpers.lab.seeds import SideBySide
from helpers.lab.statistics import Tolerance
from helpers.learners.learned import LossDescent, begun
from helpers.learners.paths import along, descended
from helpers.numerics import tracing
from helpers.types import Params, Started, Tasks

# Hundreds of steps across kinks, or a rollout, amplify rounding; what a learned loss is judged by must stay inside what
# five of them differ by, a share may change by one in fifty, and a rate that was picked not at all.
TOLERANCES = (("*_rate", Tolerance()), ("*", Tolerance(0.02, relative=0.01, intervals=0.5)))
TEST_SEED = 20_210_110  # of the test tasks; the same tasks for every experiment and every evaluation
TUNING_SEED = TEST_SEED + 1  # of the tasks on which rates of the baselines are chosen
Metrics = dict[str, statistics.Interval]


@dataclass(frozen=True)
class Ml3Experiment(Experiment):
    """What the experiments with a learned loss share.

    Attributes:
        way: points on the way of an inner optimisation from which that inner loop begins (:func:`along`); 1 is the
            start alone.
        seeds: learned losses that are trained side by side, each on draws of its own.
    """

    name: str
    inner_rate: float = 1e-3
    inner_steps: int = 1
    way: int = 1
    meta_batch: int = 1
    iterations: int = 500
    outer_rate: float = 1e-3
    seed: int = 0
    seeds: int = 5
    evaluate_every: int = 250
    paper: str = "ml3"

    tolerances = TOLERANCES

    @abstractmethod
    def learner(self) -> LossDescent:
        """The optimizee, the task's loss and the learned one."""

    @abstractmethod
    def tasks(self, count: int, generator: torch.Generator) -> Started:
        """Draw ``count`` tasks of meta-training, each with a start of its own."""

    def from_starts(self, tasks: Tasks, few: int | None, generator: torch.Generator) -> Started:
        """The tasks, each with first parameters of its own, or with one of the few that each seed has."""
        model, count = self.learner().model, len(tasks.support.x)
        if few is None:
            return begun(model, tasks, generator)
        return Started(*tasks, seeds.few_starts(model.init, few, self.seeds, count, generator))

    @abstractmethod
    def judge(self, run: Training, theta: Params) -> Metrics:
        """All metrics, the headline first; θ ``[seeds, ...]``."""

    def setup(self, device: torch.device, compiled: bool) -> Training:
        """Make the learner; nothing here is large enough to be compiled."""
        return Training(self, device)


class Training(SideBySide):
    """A study on one device; θ are the parameters ψ of learned losses."""

    def __init__(self, experiment: Ml3Experiment, device: torch.device) -> None:
        super().__init__(experiment, device)
        self.estimator = tracing.traced(self._seeds)

    def _seeds(self, theta: Params, tasks: Started) -> tuple[Params, Tensor]:
        def one(theta: Params, tasks: Started) -> tuple[Params, Tensor]:
            learner = self.bound(theta, self.learner)
            learned = {name: value for name, value in theta.items() if name.startswith(losses.LOSS)}
            if self.experiment.way > 1:
                tasks = along(learner, learned, tasks, self.experiment.way)
            gradient, after = estimators.maml(learner, learned, tasks)
            return {name: gradient.get(name, torch.zeros_like(value)) for name, value in theta.items()}, after

        return vmap(one)(theta, tasks)

    def bound(self, theta: Params, learner: LossDescent) -> LossDescent:
        """The learner of one seed, where θ holds more than its loss."""
        return learner

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The meta-gradient of every seed on tasks of its own, and the mean task loss after the inner loop."""
        gradient, after = self.estimator(theta, self.draw(self.experiment.meta_batch, generator))
        return gradient, after.mean()

    def draw(self, count: int, generator: torch.Generator) -> Started:
        """Training tasks ``[seeds, count, ...]``."""
        tasks = self.experiment.tasks(self.experiment.seeds * count, generator)
        return seeds.apart(tree_map(lambda t: t.to(self.device), tasks), self.experiment.seeds, count)

    def common(self, tasks: Started) -> Started:
        """The same tasks for every seed, ``[seeds, ...]``: so that what is compared differs in the loss alone."""
        return tree_map(lambda t: t.to(self.device).expand(self.experiment.seeds, *t.shape), tasks)

    def learned(
        self, theta: Params, tasks: Started, steps: Sequence[int], measure=None, learner=None, **settings
    ) -> Tensor:
        """The measure (by default the task loss) ``[steps, seeds, tasks]`` while the learned loss is descended.

        Args:
            settings: further ones of :func:`helpers.learners.paths.descended`.
        """

        def one(theta: Params, tasks: Started) -> Tensor:
            return descended(self.bound(theta, learner or self.learner), theta, tasks, steps, measure, **settings)

        return vmap(one)(theta, tasks).transpose(0, 1)

    def plain(
        self, theta: Params, tasks: Started, steps: Sequence[int], rate: float, measure=None, learner=None, **settings
    ) -> Tensor:
        """The same while the task's own loss is descended; ψ is not used."""
        return self.learned(theta, tasks, steps, measure, learner, rate=rate, own_loss=True, **settings)

    def compared(
        self, theta: Params, tasks: Started, steps: Sequence[int], what: str, rates: Mapping[str, float | None],
        measure=None, learner=None,
    ) -> Metrics:  # fmt: skip
        """``{kind}_{what}_{steps}`` of each kind: down the task's own loss at a rate, or for None the learned one."""
        found: Metrics = {}
        for kind, rate in rates.items():
            own = {} if rate is None else {"rate": rate, "own_loss": True}
            table(found, f"{kind}_{what}", steps, self.learned(theta, tasks, steps, measure, learner, **own))
        return found

    def tuned(
        self, theta: Params, rates: Sequence[float], tasks: Started, steps: int, measure=None, **settings
    ) -> float:
        """Of several rates the one with the lowest measure after ``steps`` steps down the task's own loss."""
        ends = [self.plain(theta, tasks, (steps,), rate, measure, **settings).mean() for rate in rates]
        return rates[int(torch.stack(ends).argmin())]

    def evaluate(self, theta: Params) -> Metrics:
        """All metrics, the headline first; what they are the experiment's ``judge`` says."""
        return self.experiment.judge(self, theta)


def table(metrics: Metrics, kind: str, steps: Sequence[int], values: Tensor) -> None:
    """Enter ``kind_STEPS`` with intervals over seeds, of ``values`` ``[steps, seeds, tasks]``.

    Where no seed differs from another, since nothing that was learned is used, the interval is over tasks instead.
    """
    for number, entry in zip(steps, values, strict=True):
        metrics[f"{kind}_{number}"] = statistics.over_runs(entry)
