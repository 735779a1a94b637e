"""iMAML beside MAML, Reptile and the released code on equal terms."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_map

from helpers import errors, estimators, losses, runtime
from helpers.experiments.base import Recorded
from helpers.experiments.imaml import TEST_SEED
from helpers.lab import evaluation, statistics
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchAdam
from helpers.learners.proximal import Proximal
from helpers.models.convnet import ConvNet
from helpers.models.layers import subtree
from helpers.numerics import tracing
from helpers.numerics.solvers import conjugate_gradient
from helpers.tasks.batches import merge_support_query, minibatches
from helpers.tasks.episodes import FewShot
from helpers.types import Examples, Params, Tasks


def released(learner: Proximal, theta: Params, tasks: Tasks, cg_steps: int = 5) -> tuple[Params, Tensor]:
    """What the public code computes in place of the implicit gradient; an estimator, for comparison.

    Its inner steps leave the proximal term out; one step of the term alone follows them ("pull back"). Its linear
    system is (2 I + H / (λ + 10)) u = v, where the paper's is (I + H / λ) u = v.

    Source: ``omniglot_implicit_maml.py`` and ``learner_model.py`` of the released code, at the settings of its README.
    """
    free = GradientDescent(learner.model, learner.loss, learner.rate, learner.steps)
    keep = 1 - learner.rate * learner.strength

    def adapt(support: Examples) -> Params:
        return {name: theta[name] + keep * (value - theta[name]) for name, value in free.adapt(theta, support).items()}

    phi = vmap(adapt)(tasks.support)
    by_phi, query_losses = estimators.query_gradient(learner, phi, tasks.query)
    adapted, frozen = learner.split(phi)
    b, direct = learner.split(by_phi)

    def gradients(adapted: Params) -> Params:
        return vmap(learner.support_gradient)(adapted | frozen, tasks.support)

    _, hessian = vjp(gradients, adapted)

    def product(v: Params) -> Params:
        (curved,) = hessian(v)
        return {name: 2 * v[name] + curved[name] / (learner.strength + 10) for name in v}

    solution = conjugate_gradient(product, b, cg_steps).x
    return {name: g.mean(0) for name, g in (solution | direct).items()}, query_losses


@dataclass(frozen=True)
class Comparison(Recorded):
    """One estimator on 5-way 1-shot glyphs, several seeds: a row of the table at equal compute.

    All methods see tasks of the same 30 images: five to adapt to and 25 to be judged on, for Reptile all 30 in
    minibatches. Seed s draws the start and the tasks; Reptile's batch is smaller, so its tasks are others of the same
    distribution. The unit of compute is the gradient of one image (forward and backward); a Hessian-vector product
    counts as two. Every method runs until it has spent ``budget`` of them.

    Attributes:
        method: ``"maml"``, ``"fomaml"``, ``"reptile"``, ``"imaml"``, or ``"released"`` (:func:`released`).
        cost: image gradients of one task.
        budget: image gradients of one seed.
        strength, damping, cg_steps: λ of the proximal term, and damping and steps of the linear solver, of iMAML.
        reptile_batch: images in a minibatch of Reptile.
        looks: points of the curve, the end included.
    """

    name: str
    method: str
    inner_rate: float
    inner_steps: int
    meta_batch: int
    outer_rate: float
    cost: int
    budget: int = 400_000
    outer: str = "adam"
    outer_rate_final: float = 1e-3
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

    def data(self) -> dict[str, Any]:
        """What the glyphs are drawn from."""
        from helpers.tasks import glyphs

        return glyphs.load("train").provenance

    def learner(self) -> GradientDescent:
        """The network with all its parameters adapted, and the method's inner loop."""
        model = ConvNet(self.ways, filters=self.filters, flatten=True, affine=True)
        settings = (model, losses.cross_entropy, self.inner_rate, self.inner_steps)
        if self.method in ("imaml", "released"):
            return Proximal(*settings, strength=self.strength)
        return MinibatchAdam(*settings) if self.method == "reptile" else GradientDescent(*settings)

    def setup(self, device: torch.device, compiled: bool) -> ComparisonTraining:
        """Draw the glyphs and build the estimator."""
        from helpers.tasks import glyphs

        return ComparisonTraining(self, glyphs.load("train").images, glyphs.load("test").images, device)


class ComparisonTraining:
    """A method with its seeds side by side: θ holds them under ``0/``, ``1/`` …"""

    def __init__(self, experiment: Comparison, train: Tensor, test: Tensor, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, self.learner, self.test = device, e.learner(), test
        self.family = FewShot(train.to(device), e.ways, e.shots, e.queries)
        self.tested = e.learner()
        if e.method == "reptile":  # at test all methods have the same five images; Reptile's code then takes 50 steps
            self.tested = self.tested.replace(steps=50)
        solver = partial(conjugate_gradient, steps=e.cg_steps, damping=e.damping)
        methods = {
            "maml": tracing.traced(estimators.maml),
            "fomaml": tracing.traced(estimators.fomaml),
            "reptile": tracing.traced(estimators.reptile),
            "imaml": estimators.ImplicitGradient(solver, by=tracing.traced),
            "released": tracing.traced(partial(released, cg_steps=e.cg_steps)),
        }
        if e.method not in methods:
            raise errors.UserError(f"there is no method {e.method!r}: choose one of {', '.join(methods)}")
        self.estimator = estimators.chunked(methods[e.method], 8 if e.method != "reptile" else None)
        self.seconds, self.count = 0.0, 0

    def init(self, generator: torch.Generator) -> Params:
        """One start a seed, each from a generator of its own that all methods share."""
        e, device = self.experiment, generator.device
        starts = [self.learner.init(runtime.generator(e.seed + s, device)) for s in range(e.seeds)]
        return {f"{s}/{name}": value for s, start in enumerate(starts) for name, value in start.items()}

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The estimator's gradient for every seed, and the mean query loss; the processor's seconds are counted."""
        e, gradients, all_losses = self.experiment, {}, []
        for s in range(e.seeds):
            number = torch.randint(2**62, (), generator=generator, device=generator.device)
            draws = runtime.generator(int(number), generator.device)
            tasks = self.family.sample(e.meta_batch, draws)
            begin = time.process_time()
            if e.method == "reptile":
                every = merge_support_query(tasks)
                tasks = Tasks(minibatches(every, e.reptile_batch, e.inner_steps, draws), tasks.query)
            gradient, query_losses = self.estimator(self.learner, subtree(theta, f"{str(s)}/"), tasks)
            # The first call records the operations, which is no cost of the method.
            if self.count:
                self.seconds += time.process_time() - begin
            self.count += 1
            gradients |= {f"{s}/{name}": g for name, g in gradient.items()}
            all_losses.append(query_losses.mean())
        return gradients, torch.stack(all_losses).mean()

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """``test_accuracy`` (transductive) over the seeds, all on the same tasks; ``seconds_per_iteration`` a seed."""
        e = self.experiment
        family = FewShot(self.test, e.ways, e.shots, e.queries)
        tasks = tree_map(lambda t: t.to(self.device), family.sample(e.test_tasks, runtime.generator(TEST_SEED)))
        found = {True: [], False: []}
        for s in range(e.seeds):
            for transductive, values in found.items():
                values.append(self._accuracy(subtree(theta, f"{str(s)}/"), tasks, transductive))
        metrics = {
            "test_accuracy": statistics.over_seeds(torch.stack(found[True])),
            "inductive_accuracy": statistics.over_seeds(torch.stack(found[False])),
        }
        if self.count > 1:
            seconds = self.seconds / (self.count - 1)
            metrics["seconds_per_iteration"] = statistics.Interval(seconds, float("nan"), self.count - 1)
        return metrics

    def _accuracy(self, theta: Params, tasks: Tasks, transductive: bool) -> Tensor:
        steps = (self.tested.steps,)
        curve = evaluation.adaptation_curve(self.tested, theta, tasks, steps, losses.accuracy, transductive, chunk=25)
        return curve.mean()


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
