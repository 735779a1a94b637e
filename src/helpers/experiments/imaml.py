"""The recorded experiments of the iMAML chapter: Omniglot at the paper's set-up, and four estimators at equal compute."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers import evaluation, losses, metagradients, runtime
from helpers.learners import HessianFree, Proximal
from helpers.models import ConvNet, Params
from helpers.solvers import conjugate_gradient
from helpers.tasks import FewShot, Tasks
from helpers.tasks.images import ImageClasses, hashed_order

TEST_SEED = 20_190_910  # of the test tasks; the same tasks for every experiment and every evaluation
LEAK_SEED = 2  # of the split that takes no notice of what was trained on


@dataclass(frozen=True)
class Omniglot:
    """Few-shot Omniglot, as in section 4 of the paper and the command of its released code, with the paper's mathematics.

    Network, learning rates, λ and numbers of steps are the released code's; the inner problem has its proximal term in
    every step and the linear system is the paper's (v + Hv/λ, here written Hv + λv), which the released code's is not.

    Attributes:
        solver: of the inner problem, ``"gradient"`` or ``"hessian-free"``.
        strength: λ.
        cg_steps: conjugate-gradient steps of the meta-gradient.
        newton_cg_steps: and of one Newton step, for ``"hessian-free"``.
        queries: query examples a class; the released code takes as many as shots.
        headline_steps: inner steps of ``test_accuracy``, those of training.
        diagnosed_tasks: test tasks on which the linear solver's residual is measured.
        chunk: tasks that are differentiated at once; changes rounding and speed, nothing else.
    """

    name: str
    solver: str = "gradient"
    ways: int = 5
    shots: int = 1
    queries: int = 1
    inner_rate: float = 0.1
    inner_steps: int = 16
    strength: float = 2.0
    cg_steps: int = 5
    newton_cg_steps: int = 5
    meta_batch: int = 32
    iterations: int = 20_000
    outer_rate: float = 1e-3
    seed: int = 0
    test_tasks: int = 600
    test_steps: tuple[int, ...] = (4, 16, 50)
    headline_steps: int = 16
    diagnosed_tasks: int = 64
    evaluate_every: int = 1_000
    chunk: int = 8
    paper: str = "imaml"

    def config(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return asdict(self)

    def data(self) -> dict[str, Any]:
        """Digest of the images and of the split."""
        from helpers.tasks import omniglot

        return omniglot.provenance()

    def learner(self) -> Proximal:
        """Network, loss and inner loop."""
        model = ConvNet(self.ways, head_scale=None, flatten=True, affine=True, gain=3**0.5)
        settings = {"strength": self.strength}
        if self.solver == "hessian-free":
            settings["solver_steps"] = self.newton_cg_steps
        kind = HessianFree if self.solver == "hessian-free" else Proximal
        return kind(model, losses.cross_entropy, self.inner_rate, self.inner_steps, **settings)

    def setup(self, device: torch.device, compiled: bool) -> OmniglotTraining:
        """Load the images and build the estimator."""
        from helpers.tasks import omniglot

        return OmniglotTraining(self, omniglot.load("train"), omniglot.load("test"), leaking_split(), device, compiled)


def leaking_split() -> ImageClasses:
    """As many test characters as there are, drawn anew from all 1,623, as the released test script does with its own seed.

    Its first list holds the training characters, so three in four of these have been trained on.
    """
    from helpers.tasks import omniglot

    train, test = omniglot.load("train", rotations=False), omniglot.load("test")
    everything = ImageClasses(
        torch.cat([train.images, test.images]), train.names + test.names, train.groups + test.groups, test.provenance
    )
    return everything.select(hashed_order(everything.names, LEAK_SEED)[: len(test)])


class OmniglotTraining:
    """An Omniglot experiment on one device."""

    def __init__(
        self,
        experiment: Omniglot,
        train: ImageClasses,
        test: ImageClasses,
        leaking: ImageClasses,
        device: torch.device,
        compiled: bool,
    ) -> None:
        self.experiment, self.device, self.learner = experiment, device, experiment.learner()
        e = experiment
        self.family = FewShot(train.images.to(device), e.ways, e.shots, e.queries)
        self.tests = {"test": self.draw(test), "leaking": self.draw(leaking)}
        trained = {name.removesuffix("/rot000") for name in train.names}
        self.trained = sum(name in trained for name in leaking.names)
        solver = partial(conjugate_gradient, steps=e.cg_steps)
        self.estimator = metagradients.imaml(solver, by=metagradients.compiled if compiled else metagradients.traced)
        # A CPU is fastest on the few tasks that fit its cache, a GPU on the whole meta-batch.
        self.chunk = e.chunk if device.type == "cpu" else e.meta_batch
        self.chunked = metagradients.chunked(self.estimator, self.chunk)

    def draw(self, classes: ImageClasses) -> Tasks:
        """The test tasks, drawn on the CPU so that they are the same on every device."""
        e = self.experiment
        tasks = FewShot(classes.images, e.ways, e.shots, e.queries).sample(e.test_tasks, runtime.generator(TEST_SEED))
        return tree_map(lambda t: t.to(self.device), tasks)

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters."""
        return self.learner.init(generator)

    def gradient(self, theta: Params, generator: torch.Generator) -> tuple[Params, Tensor]:
        """Meta-gradient and mean query loss of a fresh meta-batch."""
        tasks = self.family.sample(self.experiment.meta_batch, generator)
        gradient, query_losses = self.chunked(self.learner, theta, tasks)
        return gradient, query_losses.mean()

    def evaluate(self, theta: Params) -> dict[str, evaluation.Interval]:
        """Accuracies, transductive and not; on the leaking split; without the pull; and how well the solvers solved."""
        e, measured = self.experiment, {}

        def accuracies(learner: Proximal, tasks: Tasks, steps: tuple[int, ...], transductive: bool = True) -> list:
            curve = evaluation.adaptation_curve(learner, theta, tasks, steps, losses.accuracy, transductive, chunk=25)
            return [evaluation.interval(values) for values in curve]

        for kind, transductive in (("transductive", True), ("inductive", False)):
            found = accuracies(self.learner, self.tests["test"], e.test_steps, transductive)
            measured |= {f"{kind}_accuracy_{s}": value for s, value in zip(e.test_steps, found, strict=True)}
        headline = (e.headline_steps,)
        measured["leaking_accuracy"] = accuracies(self.learner, self.tests["leaking"], headline)[0]
        never = evaluation.Interval(self.trained / len(self.tests["leaking"].support.x), float("nan"), 1)
        measured["leaking_share_trained"] = never
        # The released test script adapts without the proximal term. (No strength at all is not a proximal problem.)
        if e.solver == "gradient":
            free = self.learner.with_(strength=1e-30)
            measured["unpulled_accuracy"] = accuracies(free, self.tests["test"], headline)[0]
        residuals, stationary, indefinite = [], [], []
        for begin in range(0, e.diagnosed_tasks, e.chunk):
            part = tree_map(lambda t, begin=begin: t[begin : begin + e.chunk], self.tests["test"])
            found = self.estimator.solve(self.learner, theta, part)
            residuals.append(found.solution.residual)
            stationary.append(found.stationarity)
            indefinite.append(found.solution.indefinite.double())
        for name, parts in (("residual", residuals), ("stationarity", stationary), ("indefinite", indefinite)):
            measured[f"solver_{name}"] = evaluation.interval(torch.cat(parts).cpu())
        return {"test_accuracy": measured[f"transductive_accuracy_{e.headline_steps}"]} | measured


def experiments() -> list:
    """The experiments of the chapter, the most important first."""
    twenty_way = {"ways": 20, "inner_steps": 25, "meta_batch": 16, "chunk": 2}
    twenty_way |= {"test_steps": (8, 25, 50), "headline_steps": 25}
    newton = {"solver": "hessian-free", "inner_steps": 3, "test_steps": (1, 3, 5), "headline_steps": 3}
    five_shot = {"shots": 5, "queries": 5, "chunk": 2}
    return [
        Omniglot("imaml-omniglot-5w1s"),
        Omniglot("imaml-hf-omniglot-5w1s", **newton),
        Omniglot("imaml-omniglot-5w5s", **five_shot),
        Omniglot("imaml-hf-omniglot-5w5s", **newton | five_shot),
        Omniglot("imaml-omniglot-20w1s", **twenty_way),
        Omniglot("imaml-hf-omniglot-20w1s", **twenty_way | newton),
        Omniglot("imaml-omniglot-20w5s", **twenty_way | five_shot | {"chunk": 1}),
        Omniglot("imaml-hf-omniglot-20w5s", **twenty_way | newton | five_shot | {"chunk": 1}),
    ]
