"""The recorded experiments of the jet chapter: taggers that meet regions of phase space they were not trained in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import estimators, losses, runtime
from helpers.errors import UserError
from helpers.experiments.jets_cuts import Cuts
from helpers.experiments.jets_frame import TaggersExperiment
from helpers.experiments.jets_matrix import Matrix
from helpers.fields import among
from helpers.lab import seeds, statistics
from helpers.lab.ranking import Judge, best, named
from helpers.lab.seeds import BegunAlike
from helpers.lab.statistics import Interval, chosen
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchDescent
from helpers.learners.proximal import Proximal
from helpers.models.taggers import tagger
from helpers.numerics import tracing
from helpers.tasks import jets
from helpers.tasks.batches import merge_support_query, minibatches
from helpers.tasks.jets.detector import View
from helpers.tasks.jets.protocol import (
    DRIFTED,
    LABELS,
    LOSSES,
    MIXTURES,
    PROPORTIONS,
    SHARES,
    TEST_SEED,
    WRONG,
    JudgedJets,
    Supervision,
    training_domains,
    tuning_domains,
)
from helpers.tasks.jets.samples import JetSamples
from helpers.tasks.jets.tasks import JetTasks
from helpers.types import Params, Tasks
from helpers.validate import one_of

METHODS = ("scratch", "pooled", "maml", "fomaml", "reptile", "imaml")


@dataclass(frozen=True)
class Tagging(TaggersExperiment):
    """A tagger of W jets that is to work where it was not trained: five of them, from five starts, side by side.

    Every parameter carries a leading seed axis. With labels all methods see the same number of jets in an iteration;
    two bags have a few more.

    Attributes:
        method: ``"scratch"`` (nothing is learned before the test), ``"pooled"`` (joint training on all domains),
            ``"maml"``, ``"fomaml"``, ``"reptile"`` or ``"imaml"``.
        inner: what the inner loop of the training descends: ``"labels"``, ``"proportions"`` or ``"mixture"``. The outer
            loss is always the cross-entropy of labels.
        tagger: ``"images"`` or ``"particles"``.
        shots: labelled support jets of each class, in training.
        bag: jets in each of the two bags, in training.
        queries: query jets of each class, in training.
        meta_batch: tasks of a meta-batch, for each seed.
        strength: λ of iMAML.
        reptile_batch: jets of a minibatch of Reptile, which sees support and query set together.
        given: what the tagger is adapted with at test, kinds of
            :class:`~helpers.tasks.jets.protocol.Supervision`.
        stress: also adapt with wrong and with drifted shares of signal.
    """

    method: str = among(*METHODS)
    inner: str = among(*LOSSES, default="labels")
    tagger: str = among("images", "particles", default="images")
    inner_rate: float = 0.1
    inner_steps: int = 3
    bag: int = 32
    queries: int = 30
    meta_batch: int = 4
    outer: str = "adam"
    strength: float = 1.0
    reptile_batch: int = 20
    given: tuple[str, ...] = among(*LOSSES, default=("labels",))
    stress: bool = False
    evaluate_every: int = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner != "labels" and self.method in ("pooled", "reptile"):
            raise UserError(
                f"{self.method} training is on labels: choose another for the inner loss {self.inner} of {self.name}"
            )

    @property
    def view(self) -> View:
        """What the tagger sees of a jet: an image or particles, zoomed or not."""
        return View("image" if self.tagger == "images" else "particles", zoom=jets.W_MASS if self.zoom else None)

    def learner(self, inner: str | None = None) -> GradientDescent:
        """The inner loop, on the loss of training or on another one; the outer loss is the cross-entropy.

        Raises:
            UserError: for an unknown loss.
        """
        inner = self.inner if inner is None else inner
        one_of(inner, "inner loss", LOSSES)
        steps = 0 if self.method == "pooled" else self.inner_steps
        settings = (tagger(self.tagger), LOSSES[inner], self.inner_rate, steps)
        match self.method:
            case "reptile":
                return MinibatchDescent(*settings, outer_loss=losses.cross_entropy)
            case "imaml":
                return Proximal(*settings, outer_loss=losses.cross_entropy, strength=self.strength)
        return GradientDescent(*settings, outer_loss=losses.cross_entropy)

    def tested(self, inner: str, rate: float) -> GradientDescent:
        """How the tagger adapts at test: by steps on the whole support set."""
        learner = self.learner(inner)
        if self.method == "reptile":
            learner = GradientDescent(learner.model, learner.loss, learner.rate)
        return learner.replace(rate=rate)

    def supervisions(self) -> tuple[Supervision, ...]:
        """What the tagger is given at test."""
        return tuple(one for one in LABELS + PROPORTIONS + MIXTURES if one.kind in self.given)

    def setup(self, device: torch.device, compiled: bool) -> TaggingTraining:
        """Read the jets and build the estimator."""
        return TaggingTraining(self, jets.load().to(device), device)


class TaggingTraining(BegunAlike):
    """A method on one device."""

    def __init__(self, experiment: Tagging, samples: JetSamples, device: torch.device) -> None:
        super().__init__(experiment, device)
        e = experiment
        self.family = JetTasks(samples, training_domains(), "train", e.shots, e.queries, e.view)
        self.tuning = JetTasks(samples, tuning_domains(), "validation", 1, e.tuning_queries, e.view)
        self.test = JudgedJets(samples, e.test_queries, e.view)
        self.judge = Judge()
        if e.method == "imaml":
            self.estimator = seeds.in_turn(self.watching(estimators.ImplicitGradient(by=tracing.traced)))
        else:
            found = {"fomaml": estimators.fomaml, "reptile": estimators.reptile}
            self.estimator = tracing.traced(seeds.side_by_side(found.get(e.method, estimators.maml)))

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The estimator's gradient for every seed, on tasks of its own, and the mean query loss."""
        if self.experiment.method == "scratch":
            return self.nothing(theta)
        gradient, values = self.estimator(self.learner, theta, self.draw(generator))
        return gradient, values.mean()

    def draw(self, generator: torch.Generator) -> Tasks:
        """A meta-batch of every seed, ``[seeds, meta_batch, ...]``, in the form in which the method wants it."""
        e = self.experiment
        count = e.seeds * e.meta_batch
        if e.inner == "labels":
            tasks = self.family.sample(count, generator)
        else:
            tasks = self.family.bags(count, e.bag, generator, SHARES)
        if e.method in ("pooled", "reptile"):
            every = merge_support_query(tasks)
            tasks = Tasks(tasks.support, every)
            if e.method == "reptile":
                tasks = Tasks(minibatches(every, e.reptile_batch, e.inner_steps, generator), tasks.query)
        return seeds.apart(tasks, e.seeds, e.meta_batch)

    # ------------------------------------ at test

    def areas(self, theta: Params, kind: str, tasks: Tasks) -> list[Tensor]:
        """Areas under the ROC curve ``[seeds, tasks, test_steps]``, at each of the rates of the grid."""
        e = self.experiment
        return [self.judge(e.tested(kind, rate), theta, tasks, e.test_steps)[..., 0] for rate in e.test_rates]

    def tuned(self, theta: Params, supervision: Supervision) -> tuple[float, int]:
        """Inner rate and number of steps that are best on validation tasks, one choice for all seeds."""
        e = self.experiment
        every = range(len(self.tuning.domains))
        tasks = supervision.tasks(self.tuning, every, runtime.generator(TEST_SEED + 1, self.device))
        means = [areas.mean((0, 1)) for areas in self.areas(theta, supervision.kind, tasks)]
        return best(means, e.test_rates, e.test_steps)

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Areas under the ROC curve and background rejections, with intervals over the seeds.

        ``auc_{where}_{how}``, ``rejection_{where}_{how}`` (at a signal efficiency of 0.5) and ``rejection30_…`` (of
        0.3). ``where`` is a domain of :func:`~helpers.tasks.jets.protocol.test_domains`, as far as it has enough
        jets, or, for areas, ``mean`` of the windows. ``how`` is ``none``, before adaptation; or the name of a
        :class:`~helpers.tasks.jets.protocol.Supervision`, with the inner rate and the number of steps that are
        best on validation tasks (``rate_{how}``, ``steps_{how}``); or ``trained``, as in training, without that choice.
        ``generous_auc_{how}``, of some of the tasks: with what is best on these test tasks themselves, for each seed.
        """
        e = self.experiment
        metrics = self._named(theta, LABELS[0], "none", e.inner_rate, 0, e.test_draws, 1)
        metrics |= self._named(theta, self.trained, "trained", e.inner_rate, e.inner_steps, e.test_draws, 0)
        for supervision in e.supervisions():
            rate, steps = self.tuned(theta, supervision)
            metrics |= self._named(theta, supervision, supervision.name, rate, steps, e.test_draws, 1)
            metrics |= {f"rate_{supervision.name}": chosen(rate), f"steps_{supervision.name}": chosen(steps)}
            if supervision in LABELS:
                tasks, _ = self.test.given(supervision, 2, 0)
                means = [areas.mean(1) for areas in self.areas(theta, "labels", tasks)]
                highest = torch.stack(means, 1).flatten(1).max(1).values
                metrics[f"generous_auc_{supervision.name}"] = statistics.over_seeds(highest)
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
        tasks, groups = self.test.given(supervision, draws, other)
        found = self.judge(self.experiment.tested(supervision.kind, rate), theta, tasks, [steps])[:, :, 0]
        means = {name: found[:, rows].mean(1) for name, rows in groups.items()}
        return named(means, how, statistics.over_seeds)


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
