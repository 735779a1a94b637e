"""The recorded experiments of the iMAML chapter: Omniglot at the paper's set-up; four estimators at equal compute."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.errors import UserError
from helpers.fields import among
from helpers.lab import checkpoints, statistics
from helpers.lab.evaluation import accuracies, accuracy_curve
from helpers.lab.few_shot import FewShotRun, OnOmniglot
from helpers.lab.statistics import Tolerance, chosen
from helpers.learners.proximal import HessianFree, Proximal
from helpers.numerics import tracing
from helpers.numerics.solvers import conjugate_gradient
from helpers.tasks.batches import drawn
from helpers.tasks.episodes import FewShot
from helpers.tasks.images import ImageClasses
from helpers.types import Estimator, Params, Tasks

TEST_SEED = 20_190_910  # of the test tasks; the same tasks for every experiment and every evaluation
WATCH_SEED = 20_190_911  # of tasks of training characters, on which a run is watched


@dataclass(frozen=True)
class Omniglot(OnOmniglot):
    """Few-shot Omniglot, as in section 4 of the paper: its inner rate and numbers of steps, MAML's network.

    The inner problem has its proximal term in every step, and the linear system is the paper's, v + Hv/λ (here λv +
    Hv), which the released code's is not. What the inner problem is like depends on the network. With normalisation
    last, a flattened end and a head that begins at zero (``norm-last``), the inner steps solve it at the paper's λ = 2
    from a fresh start: these are the runs that are held against the paper, one with 32 steps of 0.05 and one with the
    paper's 16 steps of 0.1. With MAML's network a fresh start hardly learns at λ = 2 (``strong``). So an older run
    learned a start at λ = 0.2 (``weak``), and two went on from that start at λ = 2: ``staged`` for a short time, and
    ``long``, which lost its footing.

    Attributes:
        solver: of the inner problem, ``"gradient"`` or ``"hessian-free"``.
        network: ``"maml"``, MAML's; ``"released"``, with the ends and the first weights of iMAML's code; or
            ``"norm-last"``, with normalisation after ReLU, flattened, and a head that begins at zero.
        strength: λ.
        cg_steps: conjugate-gradient steps of the meta-gradient.
        damping: added to λ in the linear system alone. (The released code adds 10 to λ, and the identity once more.)
        newton_cg_steps: conjugate-gradient steps of one Newton step, for ``"hessian-free"``.
        queries: query examples a class of a test task, and of each query set in training.
        query_sets: query sets of a training task. The released code has one, as small as the support set, in each of 32
            tasks; five in each of eight are more queries and, on a CPU, a third of the time.
        outer_rate_final: 0, since with so few tasks the outer gradients are noisy. (The released code keeps its rate.)
        outer_rate_hold: iterations after which Adam's rate begins to fall.
        outer_rate_restarts: iterations at which the rate is back at ``outer_rate`` and goes down again.
        diagnosed_tasks: test tasks on which the linear solver's residual is measured.
        start: the experiment whose meta-parameters are the first ones; fresh ones if there is none.
    """

    name: str
    solver: str = among("gradient", "hessian-free", default="gradient")
    network: str = among("maml", "released", "norm-last", default="maml")
    ways: int = 5
    shots: int = 1
    queries: int = 1
    query_sets: int = 5
    inner_rate: float = 0.1
    inner_steps: int = 16
    strength: float = 0.2
    cg_steps: int = 5
    damping: float = 1.0
    newton_cg_steps: int = 5
    meta_batch: int = 8
    iterations: int = 64_000
    outer_rate: float = 1e-3
    outer_rate_final: float | None = 0.0
    outer_rate_hold: int = 5_000
    outer_rate_restarts: tuple[int, ...] = (12_000, 17_000, 30_000, 46_000)
    seed: int = 0
    test_tasks: int = 600
    test_steps: tuple[int, ...] = (4, 16, 50)
    headline_steps: int = 16
    spot_tasks: int = 200
    diagnosed_tasks: int = 64
    evaluate_every: int = 1_000
    chunk: int = 8
    start: str | None = None
    watched: str | None = None
    paper: str = "imaml"

    spot_only = ("spot_residual", "spot_stationarity", "spot_indefinite")  # of training tasks, which are no test

    @property
    def tolerances(self) -> tuple[tuple[str, Tolerance], ...]:
        """Of how well solvers solve, the order: single precision after many steps across kinks."""
        solving = (*self.spot_only, "solver_*")
        return *((name, Tolerance(0.05, 0.1)) for name in solving), *super().tolerances

    def config(self) -> dict[str, Any]:
        """The configuration as JSON; what is optional and absent is not named."""
        optional = ("start", "watched")
        return {key: value for key, value in super().config().items() if key not in optional or value}

    def data(self) -> dict[str, Any]:
        """Digests of the images and of the split, and of the start."""
        if not self.start:
            return super().data()
        start = checkpoints.load_theta(self.start)
        return super().data() | {"start": self.start, "start_sha256": checkpoints.digest("", start)}

    def learner(self) -> Proximal:
        """Network, loss and inner loop."""
        # The first weights of the released code are √3 times Xavier's: with normalisation, a third of the curvature.
        ends = {"flatten": True, "affine": True}
        model = {
            "maml": self.convnet(),
            "released": self.convnet(head_scale=None, gain=3**0.5, **ends),
            "norm-last": self.convnet(head_scale=0.0, norm_last=True, **ends),
        }[self.network]
        settings = {"strength": self.strength, "query_sets": self.query_sets}
        if self.solver == "hessian-free":
            settings |= {"solver_steps": self.newton_cg_steps, "damping": self.damping}
        kind = HessianFree if self.solver == "hessian-free" else Proximal
        return kind(model, losses.cross_entropy, self.inner_rate, self.inner_steps, **settings)

    def setup(self, device: torch.device, compiled: bool) -> OmniglotTraining:
        """Load the images and build the estimator."""
        from helpers.tasks import omniglot

        train = self.classes("train")
        family = FewShot(train.to(device), self.ways, self.shots, self.queries * self.query_sets)
        run = OmniglotTraining(self, family, device, compiled)
        run.judged_on(train, self.classes("test"), None if self.own else omniglot.leaking_split())
        return run


class OmniglotTraining(FewShotRun):
    """An Omniglot experiment on one device."""

    def judged_on(self, train: ImageClasses, test: ImageClasses, leaking: ImageClasses | None) -> None:
        """Draw the tasks of the evaluation; only Omniglot has a split that leaks."""
        self.tests = {"test": self.draw(test)}
        if leaking is not None:
            self.tests["leaking"] = self.draw(leaking)
            trained = {name.removesuffix("/rot000") for name in train.names}
            self.share_trained = sum(name in trained for name in leaking.names) / len(leaking)
        self.watched = self.draw(train, WATCH_SEED, self.experiment.diagnosed_tasks)

    def estimator_in(self, form: str) -> Estimator:
        """The implicit gradient, its pieces in this form."""
        e = self.experiment
        solver = partial(conjugate_gradient, steps=e.cg_steps, damping=e.damping)
        self.implicit = estimators.ImplicitGradient(solver, by=tracing.FORMS[form] if form != "eager" else None)
        return self.implicit

    def draw(self, classes: ImageClasses, seed: int = TEST_SEED, count: int | None = None) -> Tasks:
        """``count`` tasks (those of a test)."""
        e = self.experiment
        return drawn(FewShot(classes, e.ways, e.shots, e.queries), count or e.test_tasks, seed, self.device)

    def init(self, generator: torch.Generator) -> Params:
        """The learner's fresh θ, or that of the checkpoint in which the experiment starts."""
        if not self.experiment.start:
            return self.learner.init(generator)
        theta, fresh = checkpoints.load_theta(self.experiment.start), self.learner.init(runtime.generator(0))
        if {name: value.shape for name, value in theta.items()} != {name: value.shape for name, value in fresh.items()}:
            raise UserError(
                f"{self.experiment.name} cannot start from {self.experiment.start}, whose network is for other images "
                "or ways: start afresh with --set start=none"
            )
        return {name: value.to(self.device) for name, value in theta.items()}

    def spot_check(self, theta: Params) -> dict[str, statistics.Interval]:
        """The accuracies on the first test tasks alone: for the points on the way, and to check a record."""
        e = self.experiment
        some = tree_map(lambda t: t[: e.spot_tasks], self.tests["test"])
        measured = accuracies(self.learner, theta, some, (e.headline_steps,), e.headline_steps, e.spot_tasks)
        return measured | (self._diagnosis(theta, self.watched, "spot") if e.watched else {})

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Accuracies, transductive and not; on the leaking split; without the pull; and how well the solvers solved."""
        e, headline = self.experiment, (self.experiment.headline_steps,)
        measured = accuracies(self.learner, theta, self.tests["test"], e.test_steps, e.headline_steps, e.spot_tasks)
        if "leaking" in self.tests:
            leaking = accuracy_curve(self.learner, theta, self.tests["leaking"], headline)
            measured["leaking_accuracy"] = statistics.interval(leaking)
            measured["leaking_share_trained"] = chosen(self.share_trained)
        # The released test script adapts without the proximal term. (No strength at all is not a proximal problem.)
        if e.solver == "gradient":
            free = self.learner.replace(strength=1e-30)
            unpulled = accuracy_curve(free, theta, self.tests["test"], headline)
            measured["unpulled_accuracy"] = statistics.interval(unpulled)
        measured |= self._diagnosis(theta, self.tests["test"], "solver")
        return measured | (self._diagnosis(theta, self.watched, "spot") if e.watched else {})

    def _diagnosis(self, theta: Params, tasks: Tasks, name: str) -> dict[str, statistics.Interval]:
        """How well the inner problems and the linear systems of the first tasks are solved: ``{name}_…``."""
        e = self.experiment
        some = tree_map(lambda t: t[: e.diagnosed_tasks], tasks)
        size = e.chunk if self.device.type == "cpu" else e.diagnosed_tasks
        found = self.implicit.diagnosed(self.learner.replace(query_sets=1), theta, some, size)
        return {f"{name}_{kind}": statistics.interval(values) for kind, values in found.items()}


def experiments() -> list:
    """The experiments of the chapter, the most important first."""
    twenty_way = {"ways": 20, "inner_steps": 25, "meta_batch": 16, "chunk": 2}
    twenty_way |= {"test_steps": (8, 25, 50), "headline_steps": 25}
    newton = {"solver": "hessian-free", "inner_steps": 3, "test_steps": (1, 3, 5), "headline_steps": 3}
    further = {"strength": 2.0, "damping": 0.0, "seed": 1, "start": "imaml-omniglot-5w1s-weak"}
    further |= {"outer_rate_hold": 0, "outer_rate_restarts": ()}
    five_shot = {"shots": 5, "queries": 5, "query_sets": 1, "chunk": 2}
    solved = {"network": "norm-last", "strength": 2.0, "damping": 0.0, "iterations": 10_000, "outer_rate_hold": 5_000}
    solved |= {"outer_rate_restarts": (), "evaluate_every": 200, "spot_tasks": 50, "diagnosed_tasks": 64}
    solved |= {"watched": "spot_stationarity"}
    thirty_two = {"inner_rate": 0.05, "inner_steps": 32, "test_steps": (8, 32, 100), "headline_steps": 32}
    return [
        Omniglot("imaml-omniglot-5w1s", **solved | thirty_two),
        Omniglot("imaml-omniglot-5w1s-16-steps", **solved, outer_rate=4e-4),
        Omniglot("imaml-omniglot-5w1s-weak"),
        Omniglot("imaml-omniglot-5w1s-staged", iterations=2_000, outer_rate=7e-4, evaluate_every=500, **further),
        Omniglot("imaml-hf-omniglot-5w1s", **newton),
        Omniglot("imaml-omniglot-5w5s", **solved | thirty_two | five_shot),
        Omniglot("imaml-hf-omniglot-5w5s", **newton | five_shot),
        Omniglot("imaml-omniglot-20w1s", **twenty_way),
        Omniglot("imaml-hf-omniglot-20w1s", **twenty_way | newton),
        Omniglot("imaml-omniglot-20w5s", **twenty_way | five_shot | {"chunk": 1}),
        Omniglot("imaml-hf-omniglot-20w5s", **twenty_way | newton | five_shot | {"chunk": 1}),
    ]
