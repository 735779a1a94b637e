"""The recorded experiments of the MAML chapter: Omniglot at the paper's set-up, and the sinusoid study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.fields import among
from helpers.lab import evaluation, seeds, statistics
from helpers.lab.evaluation import accuracies
from helpers.lab.experiment import Experiment, Run
from helpers.lab.few_shot import FewShotRun, OnOmniglot
from helpers.lab.statistics import Tolerance, chosen
from helpers.learners.descent import GradientDescent
from helpers.learners.multistep import MultiStepDescent, annealed
from helpers.models.layers import subtree_of
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.tasks.batches import drawn
from helpers.tasks.episodes import FewShot
from helpers.tasks.sinusoid import Sinusoids, halves, without_oracle
from helpers.types import Estimator, Params, Tasks

MAML = seeds.side_by_side(estimators.maml)
ESTIMATORS = {"maml": estimators.maml, "fomaml": estimators.fomaml}
TEST_SEED = 20_170_806  # of the test tasks; the same tasks for every experiment and every evaluation
DIVERGED = 25.0  # squared error at which adaptation to a sinusoid has failed: the largest amplitude's square


@dataclass(frozen=True)
class Omniglot(OnOmniglot):
    """Few-shot Omniglot, as in section 5.2 of the paper and the commands of its official code.

    Attributes:
        estimator: of the meta-gradient, a key of ``ESTIMATORS``.
        network: ``"conv"``, or ``"mlp"``, the fully connected one.
        head_scale: of the first weights of the last layer.
        inner_rate: on the *mean* cross-entropy; the official code applies its 0.4 to the sum over classes, which is 2.0
            here.
    """

    name: str
    estimator: str = among(*ESTIMATORS, default="maml")
    ways: int = 5
    shots: int = 1
    queries: int = 1
    network: str = among("conv", "mlp", default="conv")
    head_scale: float = 0.1
    inner_rate: float = 0.4
    inner_steps: int = 1
    meta_batch: int = 32
    iterations: int = 60_000
    outer_rate: float = 1e-3
    seed: int = 0
    test_tasks: int = 600
    test_steps: tuple[int, ...] = (1, 3, 10)
    headline_steps: int = 3
    evaluate_every: int = 2_500
    chunk: int = 4
    paper: str = "maml"

    def learner(self) -> GradientDescent:
        """Network, loss and inner loop."""
        connected = MLP((self.channels * self.size**2, 256, 128, 64, 64, self.ways), norm=True)
        model = self.convnet(head_scale=self.head_scale) if self.network == "conv" else connected
        return GradientDescent(model, losses.cross_entropy, self.inner_rate, self.inner_steps)

    def at(self, learner: GradientDescent, iteration: int, device: torch.device) -> GradientDescent:
        """The learner at an iteration of training: always the same."""
        return learner

    def setup(self, device: torch.device, compiled: bool) -> Training:
        """Load the images and build the estimator."""
        family = FewShot(self.classes("train").to(device), self.ways, self.shots, self.queries)
        unseen = FewShot(self.classes("test"), self.ways, self.shots, self.queries)
        return Training(self, family, device, compiled, drawn(unseen, self.test_tasks, TEST_SEED, device))


@dataclass(frozen=True)
class HeadOnly(Omniglot):
    """ANIL: the inner loop adapts the last layer alone, in training and at test.

    Source: Raghu, Raghu, Bengio and Vinyals (2020), section 4; its Omniglot results are 20-way (said from memory).
    Network, split and rates are those of this chapter's MAML, so that one thing differs.
    """

    def learner(self) -> GradientDescent:
        """That of MAML, with the head alone to adapt."""
        learner = super().learner()
        return learner.replace(adapted=(learner.model.head,))


@dataclass(frozen=True)
class MultiStep(Omniglot):
    """MAML with the query loss after every inner step, the first of the six remedies of MAML++ and here the only one.

    Attributes:
        anneal: iterations after which the last step's loss is alone.

    Source: Antoniou, Edwards and Storkey (2019), section 4. Steps, inner rate, meta-batch and iterations are those of
    the released code for 5-way 1-shot (``omniglot_1_8_0.1_64_5_0.json``: 100 epochs of 500 iterations, 10 of them with
    the multi-step loss). Learned rates, statistics by step and the cosine of the outer rate are left out.
    """

    inner_rate: float = 0.1
    inner_steps: int = 5
    meta_batch: int = 8
    iterations: int = 50_000
    test_steps: tuple[int, ...] = (1, 3, 5, 10)
    headline_steps: int = 5
    anneal: int = 5_000

    def learner(self) -> MultiStepDescent:
        """That of MAML, judged after every step."""
        plain = super().learner()
        return MultiStepDescent(plain.model, plain.loss, plain.rate, plain.steps)

    def at(self, learner: GradientDescent, iteration: int, device: torch.device) -> GradientDescent:
        """The learner with the weights of an iteration."""
        return learner.replace(weights=annealed(self.inner_steps, iteration, self.anneal, device))


@dataclass(eq=False)
class Training(FewShotRun):
    """An Omniglot experiment on one device."""

    test: Tasks | None = None

    def estimator_in(self, form: str) -> Estimator:
        """The experiment's estimator in this form."""
        return tracing.FORMS[form](ESTIMATORS[self.experiment.estimator])

    def at(self, iteration: int) -> GradientDescent:
        """The experiment's learner at an iteration."""
        return self.experiment.at(self.learner, iteration, self.device)

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Accuracy after each number of inner steps, transductive and not; ``transductive_accuracy`` comes first."""
        e = self.experiment
        return accuracies(e.learner(), theta, self.test, e.test_steps, e.headline_steps)


@dataclass(frozen=True)
class SinusoidStudy(Experiment):
    """Section 5.1 of the paper: MAML, a network pre-trained on all tasks, and an oracle, several seeds side by side.

    Every parameter carries a leading seed axis, and θ holds the three networks under ``maml/``, ``pretrained/`` and
    ``oracle/``. Adam works entry by entry, so training them together is training them apart.

    Attributes:
        inner_rate: of MAML, in training and at test.
        test_queries: points of a test task on which the error is measured.
        tuning_rates: fine-tuning rates for the pre-trained network; the best on validation tasks is used at test
            (the paper tunes it automatically too).
    """

    made_of = "sinusoids"
    other_shots: ClassVar[tuple[int, ...]] = (5, 20)  # the networks are also judged with, as in Table 2 and Figure 6
    other_steps: ClassVar[tuple[int, ...]] = (1, 5, 10)  # and after

    name: str
    shots: int = 10
    queries: int = 10
    hidden: tuple[int, ...] = (40, 40)
    inner_rate: float = 0.01
    inner_steps: int = 1
    meta_batch: int = 25
    iterations: int = 70_000
    outer_rate: float = 1e-3
    seed: int = 0
    seeds: int = 5
    test_tasks: int = 600
    test_queries: int = 100
    test_steps: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    tuning_rates: tuple[float, ...] = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.02, 0.05)
    evaluate_every: int = 35_000
    paper: str = "maml"

    @property
    def tolerances(self) -> tuple[tuple[str, Tolerance], ...]:
        """Rounding may decide what becomes of a task on the brink of divergence: one of them may go the other way."""
        return ("*_diverged_*", Tolerance(1.5 / (self.test_tasks * self.seeds))), *Experiment.tolerances

    def tolerance(self, metric: str, recorded: Mapping[str, statistics.Interval]) -> float:
        """Of an error where some tasks diverge, also the contribution of one of these."""
        share = recorded.get(metric.replace("_mse_", "_diverged_")) if "_mse_" in metric else None
        one = DIVERGED / (self.test_tasks * self.seeds)
        return super().tolerance(metric, recorded) + (one if share and share.value > 0 else 0.0)

    def setup(self, device: torch.device, compiled: bool) -> SinusoidTraining:
        return SinusoidTraining(self, device)


class SinusoidTraining(Run):
    """The sinusoid study on one device; a few matrix products a step, so nothing is compiled."""

    def __init__(self, experiment: SinusoidStudy, device: torch.device) -> None:
        self.experiment, self.device = experiment, device
        loss, hidden = losses.mean_squared_error, experiment.hidden
        self.learner = GradientDescent(MLP((1, *hidden, 1)), loss, experiment.inner_rate, experiment.inner_steps)
        self.oracle = GradientDescent(MLP((3, *hidden, 1)), loss, 0.0, 0)

    def init(self, generator: torch.Generator) -> Params:
        """θ with keys such as ``maml/linear1.weight`` ``[seeds, in, out]``."""
        learners = {"maml": self.learner, "pretrained": self.learner, "oracle": self.oracle}

        def init(generator: torch.Generator) -> Params:
            return {f"{kind}/{n}": p for kind, one in learners.items() for n, p in one.init(generator).items()}

        return seeds.fresh(init, self.experiment.seeds, generator)

    def tasks(self, count: int, queries: int, generator: torch.Generator, shots: int | None = None) -> Tasks:
        """Tasks ``[seeds, count, …]``, with amplitude and phase beside the input."""
        family = Sinusoids(shots or self.experiment.shots, queries, oracle=True)
        tasks = family.sample(self.experiment.seeds * count, generator)
        return seeds.apart(tasks, self.experiment.seeds, count)

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The three gradients, each network on the same fresh tasks; the loss is MAML's, averaged over seeds."""
        tasks = self.tasks(self.experiment.meta_batch, self.experiment.queries, generator)
        plain = without_oracle(tasks)
        gradient, query_losses = MAML(self.learner, subtree_of(theta, "maml"), plain)
        # Pre-training knows no adaptation: as in the official code it descends the loss of the K support points.
        supports, never = Tasks(plain.support, plain.support), self.learner.replace(steps=0)
        pretrained, _ = MAML(never, subtree_of(theta, "pretrained"), supports)
        supports = Tasks(tasks.support, tasks.support)
        oracle, _ = MAML(self.oracle, subtree_of(theta, "oracle"), supports)
        together = {"maml": gradient, "pretrained": pretrained, "oracle": oracle}
        joined = {f"{kind}/{name}": g for kind, gradients in together.items() for name, g in gradients.items()}
        return joined, query_losses.mean()

    def curves(self, theta: Params, tasks: Tasks, steps: Sequence[int], rate: float | None = None) -> Tensor:
        """Query error ``[steps, seeds, tasks]`` after each number of fine-tuning steps from θ; infinite for nan."""
        learner = self.learner if rate is None else self.learner.replace(rate=rate)
        found = evaluation.curves_of_seeds(learner, theta, tasks, steps, losses.mean_squared_error)
        return found.nan_to_num(torch.inf).transpose(0, 1)

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Mean squared errors ``{kind}_mse_{steps}`` with intervals over seeds; each seed has test tasks of its own.

        Beyond the one step of training, adaptation to a few tasks in a thousand diverges. Such a task counts with an
        error of ``DIVERGED``, so that a mean exists; ``{kind}_diverged_{steps}`` is their share, and
        ``{kind}_median_{steps}`` the median over tasks, which they do not move. ``…_at_5`` and ``…_at_20``: adapted to
        so many points (Table 2, Figure 6); ``…_unseen_half``: to five from the right half of the inputs, judged on the
        left one (Figure 2).
        """
        return self.judged(theta, (self.experiment.shots, *self.experiment.other_shots))

    def judged(self, theta: Params, every_shots: Sequence[int]) -> dict[str, statistics.Interval]:
        """The metrics with these numbers of points alone."""
        e, metrics = self.experiment, {}
        for shots in dict.fromkeys(every_shots):
            own = shots == e.shots
            seed, steps = (TEST_SEED, e.test_steps) if own else (TEST_SEED + 10 * shots, e.other_steps)
            test, validation = self._drawn(seed, shots), without_oracle(self._drawn(seed + 1, shots))
            tuned = self._tuned(subtree_of(theta, "pretrained"), validation, steps)
            self._judge(metrics, theta, without_oracle(test), steps, tuned, "" if own else f"_at_{shots}")
            if own:
                oracle = vmap(vmap(self.oracle.task_loss, in_dims=(None, 0)))(subtree_of(theta, "oracle"), test)
                metrics["oracle_mse_0"] = statistics.over_seeds(oracle.mean(1))
                metrics["pretrained_rate"] = chosen(tuned)
            if shots == min(e.other_shots):
                self._judge(metrics, theta, without_oracle(halves(test)), e.other_steps, tuned, "_unseen_half")
        headline = f"maml_mse_{max(e.test_steps)}"
        return {headline: metrics[headline]} | metrics

    def _drawn(self, seed: int, shots: int) -> Tasks:
        tasks = self.tasks(self.experiment.test_tasks, self.experiment.test_queries, runtime.generator(seed), shots)
        return tree_map(lambda t: t.to(self.device), tasks)

    def _tuned(self, pretrained: Params, validation: Tasks, steps: Sequence[int]) -> float:
        """Of the rates the one at which the pre-trained networks end lowest on validation tasks."""
        rates = self.experiment.tuning_rates
        ends = [self.curves(pretrained, validation, steps, rate)[-1].clamp(max=DIVERGED).mean() for rate in rates]
        return rates[int(torch.stack(ends).argmin())]

    def _judge(
        self, metrics: dict[str, statistics.Interval], theta: Params, tasks: Tasks, steps: Sequence[int],
        tuned: float, suffix: str,
    ) -> None:  # fmt: skip
        """Enter mean, median and share of diverged tasks of both networks."""
        for kind, rate in (("maml", None), ("pretrained", tuned)):
            for number, errors in zip(steps, self.curves(subtree_of(theta, kind), tasks, steps, rate), strict=True):
                capped = errors.clamp(max=DIVERGED)
                metrics[f"{kind}_mse_{number}{suffix}"] = statistics.over_seeds(capped.mean(1))
                metrics[f"{kind}_diverged_{number}{suffix}"] = statistics.over_seeds(
                    (errors >= DIVERGED).double().mean(1)
                )
                metrics[f"{kind}_median_{number}{suffix}"] = statistics.over_seeds(capped.median(1).values)


def experiments() -> list[Omniglot | SinusoidStudy]:
    """The experiments of the chapter, the most important first."""
    twenty_way = {"ways": 20, "inner_steps": 5, "inner_rate": 0.1, "meta_batch": 16, "chunk": 1}
    twenty_way |= {"test_steps": (1, 3, 5, 10), "headline_steps": 5}
    five_shot = {"shots": 5, "queries": 5}
    return [
        Omniglot("maml-omniglot-5w1s"),
        SinusoidStudy("maml-sinusoid-10", shots=10),
        SinusoidStudy("maml-sinusoid-5", shots=5),
        Omniglot("fomaml-omniglot-5w1s", estimator="fomaml"),
        Omniglot("maml-omniglot-5w5s", **five_shot, chunk=1),
        Omniglot("fomaml-omniglot-5w5s", estimator="fomaml", **five_shot, chunk=1),
        Omniglot("maml-omniglot-20w1s", **twenty_way),
        Omniglot("maml-omniglot-5w1s-mlp", network="mlp", chunk=32),
        Omniglot("maml-omniglot-5w1s-summed", inner_rate=2.0),
        Omniglot("maml-omniglot-20w5s", **twenty_way, **five_shot),
        Omniglot("maml-omniglot-5w5s-mlp", network="mlp", **five_shot, chunk=32),
        HeadOnly("anil-omniglot-5w1s"),
        HeadOnly("anil-omniglot-20w1s", **twenty_way),
        MultiStep("msl-omniglot-5w1s"),
    ]
