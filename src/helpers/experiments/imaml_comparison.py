"""iMAML beside MAML, Reptile and the released code on equal terms."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from helpers import estimators, losses
from helpers.estimators.implicit import released
from helpers.experiments.imaml import TEST_SEED
from helpers.fields import among
from helpers.lab import seeds, statistics
from helpers.lab.evaluation import accuracy_curve
from helpers.lab.experiment import Run
from helpers.lab.few_shot import OnGlyphs
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchAdam
from helpers.learners.proximal import Proximal
from helpers.models.layers import subtree_of
from helpers.numerics import tracing
from helpers.numerics.solvers import conjugate_gradient
from helpers.tasks.batches import drawn, merge_support_query, minibatches
from helpers.tasks.episodes import FewShot
from helpers.tasks.images import ImageClasses
from helpers.types import Params, Tasks

METHODS = ("maml", "fomaml", "reptile", "imaml", "released")
REPTILE_STEPS = 50  # of its code at test, where all methods have the same five images


@dataclass(frozen=True)
class Comparison(OnGlyphs):
    """One estimator on 5-way 1-shot glyphs, several seeds: a row of the table at equal compute.

    All methods see tasks of the same 30 images: five to adapt to and 25 to be judged on, for Reptile all 30 in
    minibatches. Seed s draws the start and the tasks; Reptile's batch is smaller, so its tasks are others of the same
    distribution. The unit of compute is the gradient of one image (forward and backward); a Hessian-vector product
    counts as two. Every method runs until it has spent ``budget`` of them.

    Attributes:
        method: ``"maml"``, ``"fomaml"``, ``"reptile"``, ``"imaml"``, or ``"released"``
            (:func:`~helpers.estimators.implicit.released`).
        cost: image gradients of one task.
        budget: image gradients of one seed.
        strength: λ of the implicit gradient, see :class:`~helpers.experiments.imaml.Omniglot`.
        damping: added to λ in the linear system of the implicit gradient alone.
        cg_steps: conjugate-gradient steps of the implicit gradient.
        reptile_batch: images of Reptile's minibatches.
        looks: points of the curve, the end included.
    """

    name: str
    method: str = among(*METHODS)
    inner_rate: float
    inner_steps: int
    meta_batch: int
    outer_rate: float
    cost: int
    budget: int = 400_000
    outer: str = "adam"
    outer_rate_final: float | None = 1e-3
    ways: int = 5
    shots: int = 1
    queries: int = 5
    filters: int = 32
    strength: float = 0.2
    damping: float = 1.0
    cg_steps: int = 5
    reptile_batch: int = 10
    seed: int = 0
    seeds: int = 3
    test_tasks: int = 300
    looks: int = 2
    paper: str = "imaml"

    @property
    def iterations(self) -> int:
        """As many as the budget pays for."""
        return self.budget // (self.cost * self.meta_batch)

    @property
    def evaluate_every(self) -> int:
        """``looks`` points on the way, the end included."""
        return max(1, -(-self.iterations // self.looks))

    def config(self) -> dict[str, Any]:
        """The fields, and what follows from the budget: iterations, and how far apart the points of the curve are."""
        return super().config() | {"iterations": self.iterations, "evaluate_every": self.evaluate_every}

    def learner(self) -> GradientDescent:
        """The network with all its parameters adapted, and the method's inner loop."""
        model = self.convnet(filters=self.filters, flatten=True, affine=True)
        settings = (model, losses.cross_entropy, self.inner_rate, self.inner_steps)
        if self.method in ("imaml", "released"):
            return Proximal(*settings, strength=self.strength)
        return MinibatchAdam(*settings) if self.method == "reptile" else GradientDescent(*settings)

    def setup(self, device: torch.device, compiled: bool) -> ComparisonTraining:
        """Draw the glyphs and build the estimator."""
        return ComparisonTraining(self, self.classes("train"), self.classes("test"), device)


class ComparisonTraining(Run):
    """A method with its seeds side by side: θ holds them under ``0/``, ``1/`` …"""

    def __init__(self, experiment: Comparison, train: ImageClasses, test: ImageClasses, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, self.learner, self.test = device, e.learner(), test
        self.family = FewShot(train.to(device), e.ways, e.shots, e.queries)
        self.tested = e.learner()
        if e.method == "reptile":
            self.tested = self.tested.replace(steps=REPTILE_STEPS)
        solver = partial(conjugate_gradient, steps=e.cg_steps, damping=e.damping)
        methods = {
            "maml": tracing.traced(estimators.maml),
            "fomaml": tracing.traced(estimators.fomaml),
            "reptile": tracing.traced(estimators.reptile),
            "imaml": estimators.ImplicitGradient(solver, by=tracing.traced),
            "released": tracing.traced(partial(released, cg_steps=e.cg_steps)),
        }
        self.estimator = estimators.chunked(self.watching(methods[e.method]), 8 if e.method != "reptile" else None)
        self.seconds, self.count = 0.0, 0

    def init(self, generator: torch.Generator) -> Params:
        """One start a seed, each from a generator of its own that all methods share."""
        e = self.experiment
        return seeds.numbered(seeds.of_their_own(self.learner.init, e.seed, e.seeds, generator.device))

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The estimator's gradient for every seed, and the mean query loss; the processor's seconds are counted."""
        e = self.experiment

        def one(_: int, theta: Params) -> tuple[Params, Tensor]:
            draws = seeds.draws_of(generator)
            tasks = self.family.sample(e.meta_batch, draws)
            begin = time.process_time()
            if e.method == "reptile":
                every = merge_support_query(tasks)
                tasks = Tasks(minibatches(every, e.reptile_batch, e.inner_steps, draws), tasks.query)
            found = self.estimator(self.learner, theta, tasks)
            # The first call records the operations, which is no cost of the method.
            if self.count:
                self.seconds += time.process_time() - begin
            self.count += 1
            return found

        return seeds.one_by_one(one, theta, e.seeds)

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Accuracies over the seeds, all on the same tasks, transductive and not; ``seconds_per_iteration`` a seed."""
        e = self.experiment
        tasks = drawn(FewShot(self.test, e.ways, e.shots, e.queries), e.test_tasks, TEST_SEED, self.device)
        each, steps = [subtree_of(theta, str(s)) for s in range(e.seeds)], (self.tested.steps,)

        def accuracy(transductive: bool) -> statistics.Interval:
            curves = [accuracy_curve(self.tested, one, tasks, steps, transductive) for one in each]
            return statistics.over_seeds(torch.stack([curve.mean() for curve in curves]))

        metrics = {"transductive_accuracy": accuracy(True), "inductive_accuracy": accuracy(False)}
        if self.count > 1:
            seconds = self.seconds / (self.count - 1)
            metrics["seconds_per_iteration"] = statistics.Interval(seconds, float("nan"), self.count - 1)
        return metrics


def experiments() -> list[Comparison]:
    """The methods at equal compute; ``cost`` in image gradients a task, as explained at each."""
    maml = {"inner_rate": 0.4, "meta_batch": 16, "outer_rate": 1e-3}
    implicit = {"inner_rate": 0.1, "inner_steps": 16, "meta_batch": 16, "outer_rate": 1e-3}
    return [
        # Five images adapt, 25 judge, and the way back is one Hessian-vector product of five images.
        Comparison("imaml-compare-maml", "maml", inner_steps=1, cost=5 + 25 + 2 * 5, **maml),
        Comparison("imaml-compare-fomaml", "fomaml", inner_steps=1, cost=5 + 25, **maml),
        # Five minibatches of ten images; no query gradient.
        Comparison(
            "imaml-compare-reptile", "reptile", inner_rate=1e-3, inner_steps=5, meta_batch=5, outer="sgd",
            outer_rate=1.0, outer_rate_final=0.0, cost=5 * 10,
        ),
        # 16 steps of five images, the query gradient, and five Hessian-vector products.
        Comparison("imaml-compare-imaml", "imaml", cost=16 * 5 + 25 + 5 * 2 * 5, **implicit),
        Comparison("imaml-compare-released", "released", cost=16 * 5 + 25 + 5 * 2 * 5, strength=2.0, **implicit),
    ]  # fmt: skip
