"""Taggers that are trained in one window of pT each, and judged in all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.experiments.jets_frame import TaggersExperiment
from helpers.lab import seeds, statistics
from helpers.lab.experiment import Run
from helpers.lab.ranking import Judge, best
from helpers.lab.statistics import Interval, chosen
from helpers.learners.descent import GradientDescent
from helpers.models.layers import stacked
from helpers.models.taggers import tagger
from helpers.numerics import tracing
from helpers.tasks import jets
from helpers.tasks.batches import merge_support_query
from helpers.tasks.jets.detector import View
from helpers.tasks.jets.protocol import (
    DATA_DETECTOR,
    TEST_SEED,
    TRAIN_DETECTORS,
    TRAIN_SHOWERS,
    TUNING_DETECTOR,
    WINDOWS,
)
from helpers.tasks.jets.samples import JetSamples
from helpers.tasks.jets.tasks import JetTasks
from helpers.types import Params, Tasks


@dataclass(frozen=True, kw_only=True)
class Matrix(TaggersExperiment):
    """Taggers that are trained in one window of pT each and judged in every one, before and after some labels.

    θ has a leading axis of windows · seeds taggers, those of the lowest window first.

    Attributes:
        shots: labelled jets of each class in the window of the test.
        batch: jets of each class in an iteration.
    """

    batch: int = 50
    seeds: int = 3
    test_draws: int = 4
    evaluate_every: int = 500

    def setup(self, device: torch.device, compiled: bool) -> MatrixTraining:
        """Read the jets and build the estimator."""
        return MatrixTraining(self, jets.load().to(device), device)


class MatrixTraining(Run):
    """Taggers of single windows on one device."""

    def __init__(self, experiment: Matrix, samples: JetSamples, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, view = device, View(zoom=jets.W_MASS if e.zoom else None)
        self.learner = GradientDescent(tagger("images"), losses.cross_entropy, 0.1, steps=0)
        places = [jets.domains(["W"], [window], TRAIN_SHOWERS, TRAIN_DETECTORS) for window in WINDOWS]
        self.families = [JetTasks(samples, some, "train", 1, e.batch - 1, view) for some in places]
        tuning = jets.domains(["W"], WINDOWS, ["fsr-one"], [TUNING_DETECTOR])
        self.tuning = JetTasks(samples, tuning, "validation", e.shots, e.tuning_queries, view)
        data = jets.domains(["W"], WINDOWS, ["monash"], [DATA_DETECTOR])
        self.judge = Judge()
        self.test = JetTasks(samples, data, "test", e.shots, e.test_queries, view)
        self.estimator = tracing.traced(seeds.side_by_side(estimators.maml))

    def init(self, generator: torch.Generator) -> Params:
        """θ; the s-th taggers of all windows begin at the same parameters."""
        e = self.experiment
        return stacked(seeds.of_their_own(self.learner.init, e.seed, e.seeds, self.device) * len(WINDOWS))

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The gradient of every tagger's cross-entropy on jets of its window, and its mean."""
        drawn = [family.sample(self.experiment.seeds, generator) for family in self.families]
        every = [Tasks(one, one) for one in map(merge_support_query, drawn)]
        tasks = tree_map(lambda *parts: torch.cat(parts)[:, None], *every)
        gradient, values = self.estimator(self.learner, theta, tasks)
        return gradient, values.mean()

    def areas(
        self, family: JetTasks, theta: Params, rate: float, steps: Sequence[int], draws: int, seed: int
    ) -> Tensor:
        """Areas under the ROC curve ``[trained in, judged in, seeds, len(steps)]``."""
        places = [at for at in range(len(WINDOWS)) for _ in range(draws)]
        tasks = family.of(places, runtime.generator(seed, self.device))
        found = self.judge(self.learner.replace(rate=rate), theta, tasks, steps)[..., 0]
        found = found.unflatten(0, (len(WINDOWS), -1)).unflatten(2, (len(WINDOWS), draws)).mean(3)
        return found.transpose(1, 2)

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``auc_{trained in}_{judged in}_{how}``, with intervals over the seeds; ``how`` is ``none`` or ``labels``.

        ``auc_home_{how}`` is the mean over the five cases in which both windows are the same, ``auc_elsewhere_{how}``
        over the others. The inner rate and number of steps are those that are best elsewhere, on validation tasks.
        """
        e = self.experiment
        apart = ~torch.eye(len(WINDOWS), dtype=torch.bool, device=self.device)
        grid = [
            self.areas(self.tuning, theta, rate, e.test_steps, 2, TEST_SEED + 1)[apart].mean((0, 1))
            for rate in e.test_rates
        ]
        rate, steps = best(grid, e.test_rates, e.test_steps)
        both = self.areas(self.test, theta, rate, (0, steps), e.test_draws, TEST_SEED)
        metrics = {}
        for how, found in zip(("none", "labels"), both.unbind(-1), strict=True):
            metrics[f"auc_elsewhere_{how}"] = statistics.over_seeds(found[apart].mean(0))
            metrics[f"auc_home_{how}"] = statistics.over_seeds(found[~apart].mean(0))
            for row, column in product(WINDOWS, WINDOWS):
                name = f"auc_{jets.WINDOWS[row]}_{jets.WINDOWS[column]}_{how}"
                metrics[name] = statistics.over_seeds(found[row, column])
        return metrics | {"rate_labels": chosen(rate), "steps_labels": chosen(steps)}
