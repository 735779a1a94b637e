"""The recorded experiments of the jet chapter: taggers that meet regions of phase space they were not trained in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import evaluation, losses, metagradients, runtime
from helpers.evaluation import Interval
from helpers.experiments import Recorded
from helpers.learners import GradientDescent, MinibatchDescent, Proximal
from helpers.models import ConvNet, DeepSets, Model, Params, stacked
from helpers.runtime import UserError
from helpers.tasks import Examples, Tasks, jets, minibatches, whole
from helpers.tasks.jets import Detector, Domain, JetSamples, JetTasks, View

TEST_SEED = 20_171_213  # of the test tasks; the same tasks for every experiment and every evaluation
TRAIN_WINDOWS, INSIDE, OUTSIDE = (0, 1, 3), 2, 4  # 400–500 GeV interpolates, 600–800 GeV extrapolates
TRAIN_SHOWERS = ("fsr-half", "fsr-one", "fsr-two")
TRAIN_DETECTORS = (
    Detector(cell=0.1, threshold=0.5, smearing=0.05),
    Detector(cell=0.1, threshold=0.5, smearing=0.15, dropped=0.05),
    Detector(cell=0.1, threshold=1.0, smearing=0.1, pileup=20),
)
TUNING_DETECTOR = Detector(cell=0.1, threshold=0.5, smearing=0.2, dropped=0.02)  # of the validation tasks
DATA_DETECTOR = Detector(cell=0.1, threshold=0.5, smearing=0.3)  # of what stands for real data
WINDOWS = tuple(range(len(jets.WINDOWS) - 1))
SHARES = (0.2, 0.8)  # of signal in two unlabelled bags
EDGES = tuple(str(edge) for edge in jets.WINDOWS[:-1])  # the windows' lower ones, as metrics name them
LOSSES = {"labels": losses.cross_entropy, "proportions": losses.label_proportions, "mixture": losses.mixture}


class Supervision(NamedTuple):
    """What a tagger is given to adapt to a domain.

    Attributes:
        kind: ``"labels"``; or ``"proportions"`` or ``"mixture"``, two unlabelled bags.
        size: labelled jets of each class, or jets in a bag.
        shares: of signal in the bags.
        offset: how far the stated shares are off.
    """

    kind: str
    size: int
    shares: tuple[float, float] = SHARES
    offset: float = 0.0

    @property
    def name(self) -> str:
        """As metrics are named: ``labels20``, ``proportions64``, ``proportions64_over5``, ``…_drift30_50``."""
        name = f"{self.kind}{self.size}"
        if self.offset:
            name += f"_{'over' if self.offset > 0 else 'under'}{100 * abs(self.offset):.0f}"
        if self.shares != SHARES:
            name += "_drift" + "_".join(f"{100 * share:.0f}" for share in self.shares)
        return name

    def tasks(self, family: JetTasks, chosen: Sequence[int], generator: torch.Generator) -> Tasks:
        """One task of each chosen domain."""
        if self.kind == "labels":
            return family.of(chosen, generator, self.size)
        support, query = family.bags_of(chosen, self.size, generator, self.shares)
        return Tasks(Examples(support.x, (support.y + self.offset).clamp(0, 1)), query)


LABELS = tuple(Supervision("labels", shots) for shots in (5, 20, 100))
PROPORTIONS = tuple(Supervision("proportions", size) for size in (64, 256))
MIXTURES = tuple(Supervision("mixture", size) for size in (64, 256))
WRONG = tuple(PROPORTIONS[0]._replace(offset=offset) for offset in (-0.10, -0.05, 0.05, 0.10))
DRIFTED = tuple(PROPORTIONS[0]._replace(shares=shares) for shares in ((0.1, 0.4), (0.3, 0.5), (0.4, 0.6)))


def training_domains() -> tuple[Domain, ...]:
    """Where taggers are trained: 27 domains of W jets."""
    return jets.domains(["W"], TRAIN_WINDOWS, TRAIN_SHOWERS, TRAIN_DETECTORS)


def tuning_domains() -> tuple[Domain, ...]:
    """Where inner rates and numbers of steps are chosen: as in training, but for the detector."""
    return jets.domains(["W"], TRAIN_WINDOWS, TRAIN_SHOWERS, [TUNING_DETECTOR])


def test_domains() -> dict[str, tuple[Domain, ...]]:
    """Where taggers are judged: W jets with the tune to data in each window, named by its lower edge; then other
    signals, and W jets with the shower of training and with another one, in all windows (top jets above 400 GeV, where
    they are whole)."""
    found = {EDGES[window]: jets.domains(["W"], [window], ["monash"], [DATA_DETECTOR]) for window in WINDOWS}
    for name, signal, shower, windows in (
        ("wt", "WT", "monash", WINDOWS),
        ("z", "Z", "monash", WINDOWS),
        ("top", "top", "monash", WINDOWS[2:]),
        ("train", "W", "fsr-one", WINDOWS),
        ("vincia", "W", "vincia", WINDOWS),
    ):
        found[name] = jets.domains([signal], windows, [shower], [DATA_DETECTOR])
    return found


def tagger(kind: str) -> Model:
    """A network that gives two logits, QCD and signal.

    Args:
        kind: ``"images"``, a small convolutional network without normalisation, so that jets are judged one by one; or
            ``"particles"``, a network of their set.

    Raises:
        UserError: for another kind.
    """
    match kind:
        case "images":
            return ConvNet(2, filters=8, blocks=3, head_scale=None, flatten=True, size=25, gain=2**0.5, norm=False)
        case "particles":
            return DeepSets()
    raise UserError(f"there is no tagger of {kind!r}: use images or particles")


def ranking(background: Tensor, signal: Tensor) -> Tensor:
    """Area under the ROC curve, and the background efficiency at signal efficiencies of 0.5 and 0.3: ``[3]``."""
    passing = (evaluation.background_efficiency(background, signal, part) for part in (0.5, 0.3))
    return torch.stack([evaluation.auc(background, signal), *passing])


def named(rankings: dict[str, Tensor], how: str, summary: Callable[[Tensor], Interval]) -> dict[str, Interval]:
    """Metrics of rankings ``[samples, 3]`` by place, with the windows among them: ``auc_{where}_{how}``, also for
    their ``mean``, ``rejection_{where}_{how}`` and ``rejection30_{where}_{how}``."""
    mean = torch.stack([rankings[edge] for edge in EDGES]).mean(0)
    metrics = {f"auc_mean_{how}": summary(mean[:, 0])}
    for where, values in rankings.items():
        area, half, third = values.unbind(1)
        metrics[f"auc_{where}_{how}"] = summary(area)
        metrics[f"rejection_{where}_{how}"] = summary(1 / half)
        metrics[f"rejection30_{where}_{how}"] = summary(1 / third)
    return metrics


def best(grid: Sequence[Tensor], rates: Sequence[float], steps: Sequence[int]) -> tuple[float, int]:
    """The rate and number of steps with the largest entry of ``grid``, ``[len(steps)]`` for each rate."""
    rate, step = divmod(int(torch.stack(list(grid)).argmax()), len(steps))
    return rates[rate], steps[step]


class Judge:
    """How well adapted taggers rank query jets; its two pieces are recorded once for each shape, whatever the rate.

    Args:
        chunk: tasks at a time.
    """

    def __init__(self, chunk: int = 2) -> None:
        self.chunk = chunk
        self._step, self._quality = metagradients.traced(_step), metagradients.traced(_quality)

    def __call__(self, learner: GradientDescent, theta: Params, tasks: Tasks, steps: Sequence[int]) -> Tensor:
        """Adapt and judge.

        Args:
            learner: adapts.
            theta: several taggers, tensors ``[seeds, ...]``.
            tasks: T tasks; in the query sets the background comes first, then as much signal.
            steps: increasing numbers of inner steps.

        Returns:
            ``[seeds, T, len(steps), 3]``: area under the ROC curve, and the background efficiency at signal
            efficiencies of 0.5 and 0.3. Scores that are no numbers count as 0, so a diverged tagger is one that cannot
            tell anything.
        """
        count, seeds = len(tasks.query.y), len(next(iter(theta.values())))
        learner, start, parts = learner.with_(steps=1), learner.start(theta), []
        for begin in range(0, count, self.chunk):
            rows = torch.arange(begin, begin + self.chunk).clamp(max=count - 1)  # the last chunk is filled up
            some = tree_map(lambda t, rows=rows: t[rows.to(t.device)], tasks)
            phi = {n: v[:, None].expand(seeds, self.chunk, *v.shape[1:]).contiguous() for n, v in start.items()}
            done, values = 0, []
            for target in steps:
                for _ in range(target - done):
                    phi = self._step(learner, theta, phi, some.support)
                done = target
                values.append(self._quality(learner, phi, some.query.x))
            parts.append(torch.stack(values, 2))
        return torch.cat(parts, 1)[:, :count]


def _step(learner: GradientDescent, theta: Params, phi: Params, support: Examples) -> Params:
    """One inner step of every seed on every task."""
    return vmap(vmap(learner.step, in_dims=(None, 0, 0)), in_dims=(0, 0, None))(theta, phi, support)


def _quality(learner: GradientDescent, phi: Params, x: Tensor) -> Tensor:
    """``[seeds, T, 3]``, see :class:`Judge`."""

    def one(phi: Params, x: Tensor) -> Tensor:
        outputs = learner.model(phi, x)
        background, signal = (outputs[:, 1] - outputs[:, 0]).nan_to_num().view(2, -1)
        return ranking(background, signal)

    return vmap(vmap(one), in_dims=(0, None))(phi, x)


def together(estimator: metagradients.Estimator) -> metagradients.Estimator:
    """The same estimator for several θ at once, with tasks of their own: all tensors have one more leading axis."""

    def run(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        return vmap(partial(estimator, learner))(theta, tasks)

    return run


class OnJets(Recorded):
    """An experiment whose data are the simulated jets."""

    def data(self) -> dict[str, Any]:
        """Digest of the simulated jets."""
        return jets.load().provenance


@dataclass(frozen=True)
class Tagging(OnJets):
    """A tagger of W jets that is to work where it was not trained: five of them, from five starts, side by side.

    Every parameter carries a leading seed axis. With labels all methods see the same number of jets in an iteration;
    two bags have a few more.

    Attributes:
        method: ``"scratch"`` (nothing is learned before the test), ``"pooled"`` (joint training on all domains),
            ``"maml"``, ``"fomaml"``, ``"reptile"`` or ``"imaml"``.
        inner: what the inner loop of the training descends: ``"labels"``, ``"proportions"`` or ``"mixture"``. The outer
            loss is always the cross-entropy of labels.
        tagger: ``"images"`` or ``"particles"``.
        zoom: multiply angles by pT/2m.
        shots: labelled support jets of each class, in training.
        bag: jets in each of the two bags, in training.
        queries: query jets of each class, in training.
        meta_batch: tasks of a meta-batch, for each seed.
        strength: λ of iMAML.
        reptile_batch: jets of a minibatch of Reptile, which sees support and query set together.
        test_rates: inner rates that are tried at test.
        test_steps: numbers of inner steps that are tried.
        test_draws: test tasks of a window; other domains have one each.
        test_queries: query jets of each class at test.
        tuning_queries: query jets of each class where rates and steps are chosen.
        given: what the tagger is adapted with at test, kinds of :class:`Supervision`.
        stress: also adapt with wrong and with drifted shares of signal.
    """

    name: str
    method: str
    inner: str = "labels"
    tagger: str = "images"
    zoom: bool = False
    inner_rate: float = 0.1
    inner_steps: int = 3
    shots: int = 20
    bag: int = 32
    queries: int = 30
    meta_batch: int = 4
    iterations: int = 1_000
    outer: str = "adam"
    outer_rate: float = 2e-3
    outer_rate_hold: int = 500
    outer_rate_final: float = 2e-4
    strength: float = 1.0
    reptile_batch: int = 20
    seed: int = 0
    seeds: int = 5
    test_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    test_steps: tuple[int, ...] = (1, 3, 10)
    test_draws: int = 5
    test_queries: int = 300
    tuning_queries: int = 100
    given: tuple[str, ...] = ("labels",)
    stress: bool = False
    evaluate_every: int = 250
    paper: str = "jets"

    @property
    def view(self) -> View:
        """What the tagger sees."""
        return View("image" if self.tagger == "images" else "particles", zoom=jets.W_MASS if self.zoom else None)

    def learner(self, inner: str | None = None) -> GradientDescent:
        """The inner loop, on the loss of training or on another one; the outer loss is the cross-entropy.

        Raises:
            UserError: for an unknown method or loss.
        """
        inner = self.inner if inner is None else inner
        if inner not in LOSSES:
            raise UserError(f"there is no inner loss {inner!r}: choose one of {', '.join(LOSSES)}")
        if self.inner != "labels" and self.method in ("pooled", "reptile"):
            raise UserError(
                f"{self.method} training is on labels: choose another method for the inner loss {self.inner}"
            )
        steps = 0 if self.method == "pooled" else self.inner_steps
        settings = (tagger(self.tagger), LOSSES[inner], self.inner_rate, steps)
        match self.method:
            case "scratch" | "pooled" | "maml" | "fomaml":
                return GradientDescent(*settings, outer_loss=losses.cross_entropy)
            case "reptile":
                return MinibatchDescent(*settings, outer_loss=losses.cross_entropy)
            case "imaml":
                return Proximal(*settings, outer_loss=losses.cross_entropy, strength=self.strength)
        raise UserError(f"there is no method {self.method!r} for taggers")

    def tested(self, inner: str, rate: float) -> GradientDescent:
        """How the tagger adapts at test: by steps on the whole support set."""
        learner = self.learner(inner)
        if self.method == "reptile":
            learner = GradientDescent(learner.model, learner.loss, learner.rate)
        return learner.with_(rate=rate)

    def supervisions(self) -> tuple[Supervision, ...]:
        """What the tagger is given at test."""
        return tuple(one for one in LABELS + PROPORTIONS + MIXTURES if one.kind in self.given)

    def setup(self, device: torch.device, compiled: bool) -> TaggingTraining:
        """Read the jets and build the estimator."""
        return TaggingTraining(self, jets.load().to(device), device)


class TaggingTraining:
    """A method on one device."""

    def __init__(self, experiment: Tagging, samples: JetSamples, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, self.learner = device, e.learner()
        self.family = JetTasks(samples, training_domains(), "train", e.shots, e.queries, e.view)
        self.tuning = JetTasks(samples, tuning_domains(), "validation", 1, e.tuning_queries, e.view)
        self.groups, every = {}, []
        for name, some in test_domains().items():
            self.groups[name] = range(len(every), len(every) + len(some))
            every += some
        self.test = JetTasks(samples, every, "test", 1, e.test_queries, e.view)
        self.judge = Judge()
        if e.method == "imaml":
            self.estimator, self.alone = metagradients.imaml(by=metagradients.traced), True
        else:
            found = {"fomaml": metagradients.fomaml, "reptile": metagradients.reptile}
            self.estimator = metagradients.traced(together(found.get(e.method, metagradients.maml)))
            self.alone = False

    def init(self, generator: torch.Generator) -> Params:
        """θ ``[seeds, ...]``; seed s begins where it does in every method."""
        e = self.experiment
        draws = (runtime.generator(e.seed + s, self.device) for s in range(e.seeds))
        return stacked([self.learner.init(one) for one in draws])

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The estimator's gradient for every seed, on tasks of its own, and the mean query loss."""
        e = self.experiment
        if e.method == "scratch":
            return {name: torch.zeros_like(value) for name, value in theta.items()}, torch.zeros((), device=self.device)
        tasks = self.draw(generator)
        if not self.alone:
            gradient, values = self.estimator(self.learner, theta, tasks)
            return gradient, values.mean()
        found = []
        for s in range(e.seeds):
            one = {name: value[s] for name, value in theta.items()}
            found.append(self.estimator(self.learner, one, tree_map(lambda t, s=s: t[s], tasks)))
        gradients, values = zip(*found, strict=True)
        return stacked(gradients), torch.stack(values).mean()

    def draw(self, generator: torch.Generator) -> Tasks:
        """A meta-batch of every seed, ``[seeds, meta_batch, ...]``, in the form in which the method wants it."""
        e = self.experiment
        count = e.seeds * e.meta_batch
        if e.inner == "labels":
            tasks = self.family.sample(count, generator)
        else:
            tasks = self.family.bags(count, e.bag, generator, SHARES)
        if e.method in ("pooled", "reptile"):
            every = whole(tasks)
            tasks = Tasks(tasks.support, every)
            if e.method == "reptile":
                tasks = Tasks(minibatches(every, e.reptile_batch, e.inner_steps, generator), tasks.query)
        return tree_map(lambda t: t.unflatten(0, (e.seeds, e.meta_batch)), tasks)

    # ------------------------------------ at test

    def chosen(self, draws: int, other: int) -> list[int]:
        """Domains of the test tasks: ``draws`` times each window, ``other`` times each further domain."""
        return [
            at for name, some in self.groups.items() for at in some for _ in range(draws if name in EDGES else other)
        ]

    def test_tasks(self, supervision: Supervision, draws: int, other: int) -> tuple[Tasks, Tensor]:
        """Tasks, the same on every call, and the domain of each."""
        chosen = self.chosen(draws, other)
        needed = supervision.size + self.test.queries  # of each class; the small samples are too few for large bags
        chosen = [at for at in chosen if self.test.available(at) >= needed]
        generator = runtime.generator(TEST_SEED, self.device)
        return supervision.tasks(self.test, chosen, generator), torch.tensor(chosen, device=self.device)

    def tuned(self, theta: Params, supervision: Supervision) -> tuple[float, int]:
        """Inner rate and number of steps that are best on validation tasks, one choice for all seeds."""
        e = self.experiment
        chosen = range(len(self.tuning.domains))
        tasks = supervision.tasks(self.tuning, chosen, runtime.generator(TEST_SEED + 1, self.device))
        grid = [
            self.judge(e.tested(supervision.kind, rate), theta, tasks, e.test_steps)[..., 0].mean((0, 1))
            for rate in e.test_rates
        ]
        return best(grid, e.test_rates, e.test_steps)

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Areas under the ROC curve and background rejections, with intervals over the seeds.

        ``auc_{where}_{how}``, ``rejection_{where}_{how}`` (at a signal efficiency of 0.5) and ``rejection30_…`` (of
        0.3). ``where`` is a domain of :func:`test_domains`, as far as it has enough jets, or, for areas, ``mean`` of
        the windows. ``how`` is ``none``, before adaptation; or the name of a :class:`Supervision`, with the inner rate
        and the number of steps that are best on validation tasks (``rate_{how}``, ``steps_{how}``); or ``trained``, as
        in training, without that choice. ``generous_auc_{how}``, of some of the tasks: with what is best on these test
        tasks themselves, for each seed.
        """
        e = self.experiment
        metrics = self._named(theta, LABELS[0], "none", e.inner_rate, 0, e.test_draws, 1)
        metrics |= self._named(theta, self.trained, "trained", e.inner_rate, e.inner_steps, e.test_draws, 0)
        for supervision in e.supervisions():
            rate, steps = self.tuned(theta, supervision)
            metrics |= self._named(theta, supervision, supervision.name, rate, steps, e.test_draws, 1)
            for name, value in (("rate", rate), ("steps", steps)):
                metrics[f"{name}_{supervision.name}"] = Interval(value, float("nan"), 1)
            if supervision in LABELS:
                tasks, _ = self.test_tasks(supervision, 2, 0)
                grid = [
                    self.judge(e.tested("labels", rate), theta, tasks, e.test_steps)[..., 0].mean(1)
                    for rate in e.test_rates
                ]
                highest = torch.stack(grid, 1).flatten(1).max(1).values
                metrics[f"generous_auc_{supervision.name}"] = evaluation.over_seeds(highest)
            if e.stress and supervision == PROPORTIONS[0]:
                for other in WRONG + DRIFTED:
                    metrics |= self._named(theta, other, other.name, rate, steps, e.test_draws, 0)
        spot = self.spot_check(theta)
        return {"auc_mean_trained": metrics["auc_mean_trained"]} | metrics | spot

    @property
    def trained(self) -> Supervision:
        """What an adapted tagger of the training was given."""
        e = self.experiment
        return Supervision(e.inner, e.shots if e.inner == "labels" else e.bag)

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """``spot_auc_mean_none`` and ``spot_auc_mean_trained``, from one task of each window."""
        e = self.experiment
        found = self._named(theta, LABELS[0], "none", e.inner_rate, 0, 1, 0)
        found |= self._named(theta, self.trained, "trained", e.inner_rate, e.inner_steps, 1, 0)
        return {f"spot_{name}": found[name] for name in ("auc_mean_none", "auc_mean_trained")}

    def _named(
        self, theta: Params, supervision: Supervision, how: str, rate: float, steps: int, draws: int, other: int
    ) -> dict[str, Interval]:
        tasks, domain = self.test_tasks(supervision, draws, other)
        found = self.judge(self.experiment.tested(supervision.kind, rate), theta, tasks, [steps])[:, :, 0]
        where = {}
        for name, some in self.groups.items():
            rows = (domain >= some[0]) & (domain <= some[-1])
            if rows.any():
                where[name] = found[:, rows].mean(1)
        return named(where, how, evaluation.over_seeds)


@dataclass(frozen=True)
class Matrix(OnJets):
    """Taggers that are trained in one window of pT each and judged in every one, before and after some labels.

    θ has a leading axis of windows · seeds taggers, those of the lowest window first.

    Attributes:
        zoom: multiply angles by pT/2m.
        shots: labelled jets of each class in the window of the test.
        batch: jets of each class in an iteration.
        test_rates: inner rates that are tried.
        test_steps: numbers of inner steps that are tried.
        test_draws: test tasks of a window.
        test_queries: query jets of each class.
        tuning_queries: query jets of each class where rate and steps are chosen.
    """

    name: str
    zoom: bool = False
    shots: int = 20
    batch: int = 50
    iterations: int = 1_000
    outer_rate: float = 2e-3
    outer_rate_hold: int = 500
    outer_rate_final: float = 2e-4
    seed: int = 0
    seeds: int = 3
    test_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    test_steps: tuple[int, ...] = (1, 3, 10)
    test_draws: int = 4
    test_queries: int = 300
    tuning_queries: int = 100
    evaluate_every: int = 500
    paper: str = "jets"

    def setup(self, device: torch.device, compiled: bool) -> MatrixTraining:
        """Read the jets and build the estimator."""
        return MatrixTraining(self, jets.load().to(device), device)


class MatrixTraining:
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
        self.estimator = metagradients.traced(together(metagradients.maml))

    def init(self, generator: torch.Generator) -> Params:
        """θ; the s-th taggers of all windows begin at the same parameters."""
        e = self.experiment
        draws = [self.learner.init(runtime.generator(e.seed + s, self.device)) for s in range(e.seeds)]
        return stacked(draws * len(WINDOWS))

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The gradient of every tagger's cross-entropy on jets of its window, and its mean."""
        drawn = [family.sample(self.experiment.seeds, generator) for family in self.families]
        every = [Tasks(one, one) for one in map(whole, drawn)]
        tasks = tree_map(lambda *parts: torch.cat(parts)[:, None], *every)
        gradient, values = self.estimator(self.learner, theta, tasks)
        return gradient, values.mean()

    def areas(
        self, family: JetTasks, theta: Params, rate: float, steps: Sequence[int], draws: int, seed: int
    ) -> Tensor:
        """Areas under the ROC curve ``[trained in, judged in, seeds, len(steps)]``."""
        chosen = [at for at in range(len(WINDOWS)) for _ in range(draws)]
        tasks = family.of(chosen, runtime.generator(seed, self.device))
        found = self.judge(self.learner.with_(rate=rate), theta, tasks, steps)[..., 0]
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
            metrics[f"auc_elsewhere_{how}"] = evaluation.over_seeds(found[apart].mean(0))
            metrics[f"auc_home_{how}"] = evaluation.over_seeds(found[~apart].mean(0))
            for row, column in product(WINDOWS, WINDOWS):
                name = f"auc_{jets.WINDOWS[row]}_{jets.WINDOWS[column]}_{how}"
                metrics[name] = evaluation.over_seeds(found[row, column])
        chosen = {"rate_labels": rate, "steps_labels": steps}
        return metrics | {name: Interval(value, float("nan"), 1) for name, value in chosen.items()}


@dataclass(frozen=True)
class Cuts(OnJets):
    """What physicists do without a network: a window in mass and a cut on τ₂₁, and the likelihood ratio of the two.

    Nothing is learned from the domain of the test. The likelihoods are histograms of all training jets.

    Attributes:
        low, high: edges of the mass window, GeV.
        bins: of mass, and of τ₂₁.
        parts: into which the test jets of a domain are dealt, for an interval.
    """

    name: str
    low: float = 65.0
    high: float = 105.0
    bins: int = 16
    parts: int = 10
    iterations: int = 1
    outer_rate: float = 1.0
    seed: int = 0
    evaluate_every: int = 1
    paper: str = "jets"

    def setup(self, device: torch.device, compiled: bool) -> CutsMeasured:
        """Read the jets."""
        return CutsMeasured(self, jets.load().to(device), device)


class CutsMeasured:
    """The cuts on one device; there is nothing to train."""

    def __init__(self, experiment: Cuts, samples: JetSamples, device: torch.device) -> None:
        self.experiment, self.samples, self.device = experiment, samples, device

    def init(self, generator: torch.Generator) -> Params:
        """Nothing."""
        return {}

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Nothing."""
        return {}, torch.zeros((), device=self.device)

    def seen(self, domain: Domain, process: str, split: str) -> jets.Observables:
        """Mass and τ₂₁ of the measured jets of a process."""
        rows = self.samples.select(process, domain.shower, split, domain.window)
        generator = runtime.generator(TEST_SEED + 2, self.device)
        return jets.observables(domain.detector(self.samples.particles(rows), generator))

    def cut(self, seen: jets.Observables) -> Tensor:
        """Inside the mass window the smaller τ₂₁ the better; outside all are worse, the farther the worse."""
        e = self.experiment
        outside = (e.low - seen.mass).clamp(min=0) + (seen.mass - e.high).clamp(min=0)
        return torch.where(outside > 0, -outside, 1 - seen.tau21)

    def bin(self, seen: jets.Observables) -> Tensor:
        """Number of the cell in mass, from 0 to 160 GeV, and τ₂₁."""
        bins = self.experiment.bins
        mass, shape = ((value * bins).long().clamp(0, bins - 1) for value in (seen.mass / 160, seen.tau21))
        return mass * bins + shape

    def likelihood(self) -> Tensor:
        """The logarithm of signal over background in every cell, over the domains of training."""
        counts = torch.ones(2, self.experiment.bins**2, dtype=torch.float64, device=self.device)
        for domain in training_domains():
            for row, process in enumerate(("QCD", domain.signal)):
                counts[row] += self.bin(self.seen(domain, process, "train")).bincount(minlength=counts.shape[1])
        background, signal = counts.log()
        return signal - background

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``auc_{where}_{cut}``, ``rejection_{where}_{cut}`` and ``rejection30_…``; ``cut`` is ``window`` or
        ``likelihood``, ``where`` a domain of :func:`test_domains`, or, for areas, ``mean`` of the windows. Intervals
        are over parts of the test jets."""
        ratio, found = self.likelihood(), {"window": {}, "likelihood": {}}
        for where, some in test_domains().items():
            each = []
            for domain in some:
                pair = [self.seen(domain, process, "test") for process in ("QCD", domain.signal)]
                scores = {"window": map(self.cut, pair), "likelihood": (ratio[self.bin(seen)] for seen in pair)}
                each.append({cut: self._quality(*values) for cut, values in scores.items()})
            for cut, places in found.items():
                places[where] = torch.stack([one[cut] for one in each]).mean(0)
        metrics = {}
        for cut, places in found.items():
            metrics |= named(places, cut, evaluation.interval)
        return metrics

    def _quality(self, background: Tensor, signal: Tensor) -> Tensor:
        """The ranking of every part, ``[parts, 3]``."""
        parts = self.experiment.parts
        return torch.stack([ranking(background[n::parts].double(), signal[n::parts].double()) for n in range(parts)])


def experiments() -> list:
    """The experiments of the chapter, the most important first."""
    reptile = {"outer": "sgd", "outer_rate": 1.0, "outer_rate_hold": 0, "outer_rate_final": 0.0, "inner_steps": 5}
    scratch = {"iterations": 1, "outer_rate_hold": 1}
    scratch |= {"test_rates": (0.03, 0.1, 0.3, 1.0), "test_steps": (3, 10, 30)}
    all_kinds = tuple(LOSSES)
    proportions = {"inner": "proportions", "given": ("proportions",)}
    return [
        Tagging("jets-maml", "maml", given=all_kinds),
        Tagging("jets-pooled", "pooled", given=all_kinds, stress=True),
        Tagging("jets-scratch", "scratch", given=all_kinds, **scratch),
        Tagging("jets-maml-proportions", "maml", stress=True, **proportions),
        Tagging("jets-pooled-zoomed", "pooled", zoom=True),
        Tagging("jets-maml-zoomed", "maml", zoom=True),
        Cuts("jets-cuts"),
        Matrix("jets-matrix"),
        Matrix("jets-matrix-zoomed", zoom=True),
        Tagging("jets-maml-mixture", "maml", inner="mixture", given=("mixture",)),
        Tagging("jets-particles-pooled", "pooled", tagger="particles", given=all_kinds),
        Tagging("jets-particles-maml", "maml", tagger="particles", given=all_kinds),
        Tagging("jets-particles-maml-proportions", "maml", tagger="particles", **proportions),
        # At the rate of MAML it does not learn: without second derivatives nothing keeps the curvature fit for it.
        Tagging("jets-fomaml", "fomaml", inner_rate=0.01),
        Tagging("jets-reptile", "reptile", **reptile),
        # Of particles, since an iteration takes many times as long. At MAML's inner rate it does not learn either.
        Tagging("jets-particles-imaml", "imaml", tagger="particles", inner_rate=0.02, inner_steps=15, strength=10.0),
    ]
