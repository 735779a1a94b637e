"""The recorded experiments of the iMAML chapter: Omniglot at the paper's set-up; four estimators at equal compute."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_map

from helpers import evaluation, losses, metagradients, runtime, tracing, training
from helpers.experiments import OnOmniglot, Recorded, part
from helpers.learners import GradientDescent, HessianFree, MinibatchAdam, Proximal
from helpers.models import ConvNet, Params
from helpers.solvers import conjugate_gradient
from helpers.tasks import Examples, FewShot, Tasks, minibatches, whole
from helpers.tasks.images import ImageClasses, hashed_order

TEST_SEED = 20_190_910  # of the test tasks; the same tasks for every experiment and every evaluation
WATCH_SEED = 20_190_911  # of tasks of training characters, on which a run is watched
LEAK_SEED = 2  # of the split that takes no notice of what was trained on


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
        outer_rate_final, outer_rate_hold, outer_rate_restarts: with so few tasks the outer gradients are noisy, so
            Adam's rate goes to 0 after the first ``outer_rate_hold`` iterations, and again after each restart. (The
            released code keeps it.)
        headline_steps: inner steps of ``test_accuracy``, those of training.
        spot_tasks: test tasks of the points on the way.
        diagnosed_tasks: test tasks on which the linear solver's residual is measured.
        chunk: tasks that are differentiated at once; changes rounding and speed, nothing else.
        start: the experiment whose meta-parameters are the first ones; fresh ones if there is none.
        watched: the metric of the points on the way by which training notices that the run loses its footing
            (:func:`helpers.training.steady`); none for a run that is not watched.
    """

    name: str
    solver: str = "gradient"
    network: str = "maml"
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
    outer_rate_final: float = 0.0
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

    def config(self) -> dict[str, Any]:
        """The configuration as JSON; what is optional and absent is not named."""
        optional = ("start", "watched")
        return {key: value for key, value in super().config().items() if key not in optional or value}

    def data(self) -> dict[str, Any]:
        """Digests of the images and of the split, and of the start."""
        if not self.start:
            return super().data()
        start = training.load_theta(self.start)
        return super().data() | {"start": self.start, "start_sha256": training.digest("", start)}

    def learner(self) -> Proximal:
        """Network, loss and inner loop."""
        # The first weights of the released code are √3 times Xavier's: with normalisation, a third of the curvature.
        ends = {"flatten": True, "affine": True}
        networks = {
            "maml": ConvNet(self.ways),
            "released": ConvNet(self.ways, head_scale=None, gain=3**0.5, **ends),
            "norm-last": ConvNet(self.ways, head_scale=0.0, norm_last=True, **ends),
        }
        if self.network not in networks:
            raise runtime.UserError(f"there is no network {self.network!r}: use {', '.join(networks)}")
        model = networks[self.network]
        settings = {"strength": self.strength, "query_sets": self.query_sets}
        if self.solver == "hessian-free":
            settings |= {"solver_steps": self.newton_cg_steps, "damping": self.damping}
        kind = HessianFree if self.solver == "hessian-free" else Proximal
        return kind(model, losses.cross_entropy, self.inner_rate, self.inner_steps, **settings)

    def setup(self, device: torch.device, compiled: bool) -> OmniglotTraining:
        """Load the images and build the estimator."""
        from helpers.tasks import omniglot

        return OmniglotTraining(self, omniglot.load("train"), omniglot.load("test"), leaking_split(), device, compiled)


def leaking_split() -> ImageClasses:
    """As many test characters as there are, drawn anew from all 1,623, as the released test script does.

    That script has a seed of its own, so three in four of these characters have been trained on.
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
        self.family = FewShot(train.images.to(device), e.ways, e.shots, e.queries * e.query_sets)
        self.tests = {"test": self.draw(test), "leaking": self.draw(leaking)}
        trained = {name.removesuffix("/rot000") for name in train.names}
        self.share_trained = sum(name in trained for name in leaking.names) / len(leaking)
        self.watched = self.draw(train, WATCH_SEED, e.diagnosed_tasks)
        self.use("compiled" if compiled else "traced")

    def use(self, form: str) -> None:
        """Run the estimator in one of the forms of ``helpers.tracing.FORMS``."""
        e = self.experiment
        solver = partial(conjugate_gradient, steps=e.cg_steps, damping=e.damping)
        pieces = "traced" if form == "captured" else form
        self.estimator = metagradients.imaml(solver, by=tracing.FORMS[pieces] if form != "eager" else None)
        whole = tracing.captured(self.estimator) if form == "captured" else self.estimator
        # A CPU is fastest on the few tasks that fit its cache, a GPU on the whole meta-batch.
        self.chunked = metagradients.chunked(whole, e.chunk if self.device.type == "cpu" else None)

    def draw(self, classes: ImageClasses, seed: int = TEST_SEED, count: int | None = None) -> Tasks:
        """``count`` tasks (those of a test), drawn on the CPU so that they are the same on every device."""
        e = self.experiment
        family = FewShot(classes.images, e.ways, e.shots, e.queries)
        tasks = family.sample(count or e.test_tasks, runtime.generator(seed))
        return tree_map(lambda t: t.to(self.device), tasks)

    def init(self, generator: torch.Generator) -> Params:
        """The first meta-parameters."""
        if not self.experiment.start:
            return self.learner.init(generator)
        return {name: value.to(self.device) for name, value in training.load_theta(self.experiment.start).items()}

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Meta-gradient and mean query loss of a fresh meta-batch."""
        tasks = self.family.sample(self.experiment.meta_batch, generator)
        gradient, query_losses = self.chunked(self.learner, theta, tasks)
        return gradient, query_losses.mean()

    def spot_check(self, theta: Params) -> dict[str, evaluation.Interval]:
        """The accuracies on the first test tasks alone: for the points on the way, and to check a record."""
        some = tree_map(lambda t: t[: self.experiment.spot_tasks], self.tests["test"])
        measured = self._accuracies(theta, some, (self.experiment.headline_steps,))
        return measured | (self._diagnosis(theta, self.watched, "spot") if self.experiment.watched else {})

    def _curve(self, learner: Proximal, theta: Params, tasks: Tasks, steps: tuple[int, ...], together=True) -> Tensor:
        chunk = 25 if self.device.type == "cpu" else 300
        return evaluation.adaptation_curve(learner, theta, tasks, steps, losses.accuracy, together, chunk=chunk)

    def _accuracies(self, theta: Params, tasks: Tasks, steps: tuple[int, ...]) -> dict[str, evaluation.Interval]:
        """``{kind}_accuracy_{steps}``, for the headline's steps also from the first tasks; ``test_accuracy`` first."""
        e, measured = self.experiment, {}
        for kind, transductive in (("transductive", True), ("inductive", False)):
            for s, values in zip(steps, self._curve(self.learner, theta, tasks, steps, transductive), strict=True):
                measured[f"{kind}_accuracy_{s}"] = evaluation.interval(values)
                if s == e.headline_steps:
                    measured[f"spot_{kind}_accuracy_{s}"] = evaluation.interval(values[: e.spot_tasks])
        return {"test_accuracy": measured[f"transductive_accuracy_{e.headline_steps}"]} | measured

    def evaluate(self, theta: Params) -> dict[str, evaluation.Interval]:
        """Accuracies, transductive and not; on the leaking split; without the pull; and how well the solvers solved."""
        e, headline = self.experiment, (self.experiment.headline_steps,)
        measured = self._accuracies(theta, self.tests["test"], e.test_steps)
        leaking = self._curve(self.learner, theta, self.tests["leaking"], headline)
        measured["leaking_accuracy"] = evaluation.interval(leaking)
        measured["leaking_share_trained"] = evaluation.Interval(self.share_trained, float("nan"), 1)
        # The released test script adapts without the proximal term. (No strength at all is not a proximal problem.)
        if e.solver == "gradient":
            free = self.learner.with_(strength=1e-30)
            unpulled = self._curve(free, theta, self.tests["test"], headline)
            measured["unpulled_accuracy"] = evaluation.interval(unpulled)
        measured |= self._diagnosis(theta, self.tests["test"], "solver")
        return measured | (self._diagnosis(theta, self.watched, "spot") if e.watched else {})

    def _diagnosis(self, theta: Params, tasks: Tasks, name: str) -> dict[str, evaluation.Interval]:
        """How well the inner problems and the linear systems of the first tasks are solved: ``{name}_…``."""
        e, found = self.experiment, []
        size = e.chunk if self.device.type == "cpu" else e.diagnosed_tasks
        for begin in range(0, e.diagnosed_tasks, size):
            some = tree_map(lambda t, begin=begin: t[begin : begin + size], tasks)
            found.append(self.estimator.solve(self.learner.with_(query_sets=1), theta, some))
        parts = {
            "residual": [one.solution.residual for one in found],
            "stationarity": [one.stationarity for one in found],
            "indefinite": [one.solution.indefinite.double() for one in found],
        }
        return {f"{name}_{kind}": evaluation.interval(torch.cat(values).cpu()) for kind, values in parts.items()}


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
    by_phi, query_losses = metagradients.query_gradient(learner, phi, tasks.query)
    moving, fixed = learner.split(phi)
    b, direct = learner.split(by_phi)

    def gradients(moving: Params) -> Params:
        return vmap(learner.support_gradient)(moving | fixed, tasks.support)

    _, hessian = vjp(gradients, moving)

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
        """The configuration as JSON."""
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
            self.tested = self.tested.with_(steps=50)
        solver = partial(conjugate_gradient, steps=e.cg_steps, damping=e.damping)
        estimators = {
            "maml": metagradients.traced(metagradients.maml),
            "fomaml": metagradients.traced(metagradients.fomaml),
            "reptile": metagradients.traced(metagradients.reptile),
            "imaml": metagradients.imaml(solver, by=metagradients.traced),
            "released": metagradients.traced(partial(released, cg_steps=e.cg_steps)),
        }
        if e.method not in estimators:
            raise runtime.UserError(f"there is no method {e.method!r}: choose one of {', '.join(estimators)}")
        self.estimator = metagradients.chunked(estimators[e.method], 8 if e.method != "reptile" else None)
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
                every = whole(tasks)
                tasks = Tasks(minibatches(every, e.reptile_batch, e.inner_steps, draws), tasks.query)
            gradient, query_losses = self.estimator(self.learner, part(theta, str(s)), tasks)
            # The first call records the operations, which is no cost of the method.
            if self.count:
                self.seconds += time.process_time() - begin
            self.count += 1
            gradients |= {f"{s}/{name}": g for name, g in gradient.items()}
            all_losses.append(query_losses.mean())
        return gradients, torch.stack(all_losses).mean()

    def evaluate(self, theta: Params) -> dict[str, evaluation.Interval]:
        """``test_accuracy`` (transductive) over the seeds, all on the same tasks; ``seconds_per_iteration`` a seed."""
        e = self.experiment
        family = FewShot(self.test, e.ways, e.shots, e.queries)
        tasks = tree_map(lambda t: t.to(self.device), family.sample(e.test_tasks, runtime.generator(TEST_SEED)))
        found = {True: [], False: []}
        for s in range(e.seeds):
            for transductive, values in found.items():
                values.append(self._accuracy(part(theta, str(s)), tasks, transductive))
        metrics = {
            "test_accuracy": evaluation.over_seeds(torch.stack(found[True])),
            "inductive_accuracy": evaluation.over_seeds(torch.stack(found[False])),
        }
        if self.count > 1:
            seconds = self.seconds / (self.count - 1)
            metrics["seconds_per_iteration"] = evaluation.Interval(seconds, float("nan"), self.count - 1)
        return metrics

    def _accuracy(self, theta: Params, tasks: Tasks, transductive: bool) -> Tensor:
        steps = (self.tested.steps,)
        curve = evaluation.adaptation_curve(self.tested, theta, tasks, steps, losses.accuracy, transductive, chunk=25)
        return curve.mean()


def comparisons() -> list[Comparison]:
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
        *comparisons(),
        Omniglot("imaml-omniglot-5w1s-long", iterations=8_000, evaluate_every=2_000, **further),
        Omniglot(
            "imaml-omniglot-5w1s-strong", strength=2.0, iterations=2_000, outer_rate_hold=2_000, outer_rate_restarts=()
        ),
        Omniglot("imaml-hf-omniglot-5w1s", **newton),
        Omniglot("imaml-omniglot-5w5s", **solved | thirty_two | five_shot),
        Omniglot("imaml-hf-omniglot-5w5s", **newton | five_shot),
        Omniglot("imaml-omniglot-20w1s", **twenty_way),
        Omniglot("imaml-hf-omniglot-20w1s", **twenty_way | newton),
        Omniglot("imaml-omniglot-20w5s", **twenty_way | five_shot | {"chunk": 1}),
        Omniglot("imaml-hf-omniglot-20w5s", **twenty_way | newton | five_shot | {"chunk": 1}),
    ]
