"""The recorded experiments of the ML3 chapter on pairs of handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.experiments.ml3_study import TOLERANCES
from helpers.fields import among
from helpers.lab import seeds, statistics
from helpers.lab.evaluation import Course
from helpers.lab.experiment import Experiment
from helpers.lab.seeds import SideBySide
from helpers.learners.descent import RATE, GradientDescent
from helpers.learners.paths import MinibatchLossDescent
from helpers.losses import LearnedLoss
from helpers.models.lenet import LeNet
from helpers.models.mlp import MLP
from helpers.numerics.tracing import traced
from helpers.tasks import digits
from helpers.tasks.batches import minibatches
from helpers.tasks.images import ImageClasses
from helpers.types import Model, Params, Started, Tasks

TEST_SEED = 20_190_612  # of the test tasks; the same tasks for every experiment and every evaluation


@dataclass(frozen=True)
class Digits(Experiment):
    """A loss learned on one pair of digits, for telling other digits apart, several seeds side by side.

    Every parameter carries a leading seed axis, and each seed has training pairs and held-out pairs of its own
    (:func:`~helpers.tasks.digits.pairs`). In the public code a support set is one image, which is the query too, with
    pixels from 0 to 255, and the first parameters of the optimizee never change.

    Attributes:
        images: the data, ``"mnist"`` or ``"digits"``.
        train_pairs: pairs of digits for meta-training.
        one_start: begin every task of meta-training at the same first parameters, one set for each seed, as the public
            code does, instead of fresh ones. At test they are fresh.
        architecture: another optimizee, used with the learned loss at test only: ``"lenet"`` or ``"mlp"``, two layers
            deeper.
        shots: images of a support set, and of a minibatch at test.
        queries: images of a query set.
        inner_rate: of SGD on the learned loss, in training and at test, and of its first competitor.
        tuning_rates: rates for SGD on the cross-entropy, of which each seed takes the best on its training pairs.
        tuning_factors: the same for SGD on the learned loss, as multiples of ``inner_rate``.
        test_tasks: fresh networks for each pair.
        test_images: images of the test set on which each is measured.
    """

    name: str
    images: str = among("mnist", "digits", default="mnist")
    train_pairs: int = 1
    hidden: tuple[int, ...] = (40,)
    one_start: bool = False
    architecture: str = among("lenet", "mlp", default="lenet")
    shots: int = 10
    queries: int = 10
    inner_rate: float = 1e-3
    inner_steps: int = 1
    meta_batch: int = 10
    iterations: int = 2_000
    outer_rate: float = 1e-3
    seed: int = 0
    seeds: int = 5
    tuning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    tuning_factors: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    test_steps: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100)
    test_tasks: int = 3
    test_images: int = 200
    evaluate_every: int = 250
    paper: str = "ml3"

    tolerances = TOLERANCES

    def data(self) -> dict[str, Any]:
        """Name and digests of the set of digits."""
        return digits.provenance(self.images)

    def pairs(self) -> list[tuple[tuple[digits.Pair, ...], tuple[digits.Pair, ...]]]:
        """Training and held-out pairs of every seed."""
        return [digits.pairs(self.seed + number, self.train_pairs) for number in range(self.seeds)]

    def model(self, pixels: int) -> MLP:
        """The optimizee of meta-training, a network of two outputs for images of so many pixels."""
        return MLP((pixels, *self.hidden, 2), scale=None)

    def other(self, pixels: int) -> Model:
        """The optimizee that is never trained on."""
        if self.architecture == "lenet":
            return LeNet(side=round(pixels**0.5))
        return MLP((pixels, *self.hidden, 40, 40, 2), scale=None)

    def learner(self, model: Model) -> MinibatchLossDescent:
        """The learned loss, of probabilities and label, and its descent."""
        learned = LearnedLoss(MLP((4, 40, 40, 1), scale=None), losses.probabilities_and_label, positive=True)
        return MinibatchLossDescent(model, losses.cross_entropy, self.inner_rate, learned=learned)

    def setup(self, device: torch.device, compiled: bool) -> DigitsTraining:
        """Load the images and make the learner."""
        train, test = (digits.load(split, self.images) for split in ("train", "test"))
        return DigitsTraining(self, train, test, device)


class DigitsTraining(SideBySide):
    """An experiment with digits on one device; θ are the learned losses."""

    def __init__(self, experiment: Digits, train: ImageClasses, test: ImageClasses, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, self.train, self.test = device, train.images.to(device), test.images.to(device)
        pixels = self.train.shape[2:].numel()
        self.model, self.other = e.model(pixels), e.other(pixels)
        self.learner = e.learner(self.model)
        self.pairs = e.pairs()
        self.families = [
            digits.DigitPairs(self.train, pairs, e.inner_steps * e.shots, e.queries) for pairs, _ in self.pairs
        ]
        self.estimator = traced(seeds.side_by_side(estimators.maml))
        self.course = Course()

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The meta-gradient of each seed on tasks of its own; the loss is the mean."""
        e, tasks = self.experiment, []
        for family in self.families:
            support, query = family.sample(e.meta_batch, generator)
            tasks.append(Tasks(minibatches(support, e.shots, e.inner_steps, generator), query))
        support, query = tree_map(lambda *parts: torch.stack(parts), *tasks)
        gradient, values = self.estimator(self.learner, theta, Started(support, query, self.starts(generator)))
        return gradient, values.mean()

    def starts(self, generator: torch.Generator) -> Params:
        """Where the optimizees of a meta-batch begin, ``[seeds, meta_batch, ...]``."""
        e = self.experiment
        if not e.one_start:
            return self.fresh(self.model, e.meta_batch, generator)
        same = self.fresh(self.model, 1, runtime.generator(e.seed, self.device))
        return {name: value.repeat(1, e.meta_batch, *[1] * (value.dim() - 2)) for name, value in same.items()}

    def fresh(self, model: Model, count: int, generator: torch.Generator) -> Params:
        """First parameters ``[seeds, count, ...]``."""
        together = seeds.fresh(model.init, self.experiment.seeds * count, generator)
        return seeds.apart(together, self.experiment.seeds, count)

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Accuracies and cross-entropies on test images while fresh networks learn, with intervals over the seeds.

        ``ml3_accuracy_{steps}`` and ``ml3_loss_{steps}`` are of networks that descend the learned loss on held-out
        pairs, ``ce_…`` of the same that descend the cross-entropy at the same rate. ``ml3_tuned_…`` and ``ce_tuned_…``
        use for every number of steps the rate that is best for it on the seed's training pairs, so that neither gains
        by its scale alone. With ``_train_pair`` at the end: on these pairs, and test images of them. With ``arch_`` at
        the beginning: of the other optimizee, on held-out pairs, one network for each.
        """
        e, metrics = self.experiment, {}
        training, held_out = zip(*self.pairs, strict=True)
        for prefix, model, networks in (("", self.model, e.test_tasks), ("arch_", self.other, 1)):
            plain = GradientDescent(model, losses.cross_entropy, e.inner_rate)
            multiples = [e.inner_rate * factor for factor in e.tuning_factors]
            for kind, learner, psi, rates in (
                ("ml3", e.learner(model), theta, multiples),
                ("ce", plain, {}, e.tuning_rates),
            ):
                tuned = self.tuned(learner, psi, training, rates, networks)
                for suffix, pairs in (("", held_out), ("_train_pair", training)):
                    if prefix and suffix:
                        continue
                    curve = partial(self.curves, learner, psi, pairs=pairs, test=self.test, networks=networks)
                    found = curve(e.inner_rate)
                    ends = torch.cat([curve(rate, measured=(steps,)) for steps, rate in tuned.items()], 2)
                    metrics |= self._named(f"{prefix}{kind}", found, suffix)
                    metrics |= self._named(f"{prefix}{kind}_tuned", ends, suffix)
                    if (kind, prefix, suffix) == ("ml3", "", ""):
                        metrics |= self._named("spot_ml3", found[:1])
                metrics[f"{prefix}{kind}_tuned_rate"] = statistics.over_seeds(tuned[e.test_steps[-1]])
        return {"ml3_accuracy": metrics[f"ml3_accuracy_{e.test_steps[-1]}"]} | metrics

    def spot_check(self, theta: Params) -> dict[str, statistics.Interval]:
        """``spot_ml3_…``, from the first network of each held-out pair: for the points on the way, and to check."""
        held_out = [pairs for _, pairs in self.pairs]
        found = self.curves(self.learner, theta, self.experiment.inner_rate, held_out, self.test, networks=1)
        return self._named("spot_ml3", found)

    def _named(self, kind: str, curves: Tensor, suffix: str = "") -> dict[str, statistics.Interval]:
        """Metrics of curves ``[networks, 2, steps, seeds]``."""
        return {
            f"{kind}_{quantity}_{steps}{suffix}": statistics.over_seeds(value)
            for quantity, values in zip(("accuracy", "loss"), curves.mean(0), strict=True)
            for steps, value in zip(self.experiment.test_steps, values, strict=True)
        }

    def tuned(
        self,
        learner: GradientDescent,
        theta: Params,
        pairs: Sequence[Sequence[digits.Pair]],
        rates: Sequence[float],
        networks: int | None = None,
    ) -> dict[int, Tensor]:
        """For each number of steps the rate ``[seeds]`` after which the cross-entropy of training images that are new
        to the network is lowest."""
        pairs = [list(one) * -(-4 // len(one)) for one in pairs]  # one pair and a few networks would be left to chance
        curves = [self.curves(learner, theta, rate, pairs, None, networks=networks) for rate in rates]
        ends = torch.stack(curves).mean(1)[:, 1]
        best = ends.argmin(0)
        return dict(zip(self.experiment.test_steps, torch.tensor(rates, device=ends.device)[best], strict=True))

    def curves(
        self,
        learner: GradientDescent,
        theta: Params,
        rate: float | Tensor,
        pairs: Sequence[Sequence[digits.Pair]],
        test: Tensor | None,
        measured: Sequence[int] | None = None,
        networks: int | None = None,
    ) -> Tensor:
        """Accuracy and cross-entropy while fresh networks learn.

        Args:
            learner: what makes a step.
            theta: its meta-parameters ``[seeds, ...]``.
            rate: of every seed, or of each one ``[seeds]``.
            pairs: as many for every seed.
            test: images to measure on; None for training images that the network does not see.
            measured: numbers of steps after which to measure; by default ``test_steps``.
            networks: how many of each pair's ``test_tasks`` networks; by default all.

        Returns:
            ``[networks, 2, steps, seeds]``, means over pairs. The same tasks and networks on every call.
        """
        e, draws = self.experiment, runtime.generator(TEST_SEED + (test is None), self.device)
        rate = torch.as_tensor(rate, dtype=torch.float32, device=self.device).expand(e.seeds).contiguous()
        found = []
        for _ in range(networks or e.test_tasks):
            every = [pair for one in pairs for pair in one]
            tasks = digits.long_tasks(self.train, test, every, e.shots, e.test_steps[-1], e.test_images, draws)
            phi = self.fresh(learner.model, len(pairs[0]), draws)
            rated = theta | {RATE + name: rate for name in phi}
            found.append(self.course(learner, rated, phi, seeds.apart(tasks, e.seeds, -1), measured or e.test_steps))
        return torch.stack(found)


def experiments() -> list:
    """The experiments with digits, the most important first."""
    deep = {"inner_steps": 10, "inner_rate": 0.1, "meta_batch": 4, "iterations": 1_000}
    return [
        Digits("ml3-mnist"),
        Digits("ml3-mnist-deep", **deep),
        Digits("ml3-mnist-one-start", one_start=True),
    ]
