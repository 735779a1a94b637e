"""Recorded experiments of the last chapter: languages as tasks, after Gu et al. (2018).

A task is to translate names of one language to English, letter by letter. What is compared is where fine-tuning begins:
at random weights, at a network that was trained on all training languages together, or at meta-learned ones.

Source: Gu, Wang, Chen, Cho and Li (2018), arXiv:1808.08437, there with sentences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import runtime
from helpers.estimators.equal_cost import METHODS, method
from helpers.fields import among
from helpers.lab import seeds
from helpers.lab.experiment import Experiment
from helpers.lab.seeds import BegunAlike
from helpers.lab.statistics import Interval, Tolerance, both_names, chosen, over_seeds
from helpers.lab.translation import Translating, summary, together
from helpers.learners.fine_tuning import FineTuning
from helpers.models.seq2seq import Seq2Seq, translation_loss
from helpers.numerics.tracing import traced
from helpers.tasks import names
from helpers.tasks.names import LONGEST, TEST_HELD, TEST_SEEN, TRAIN, VALIDATION, VOCABULARY, LanguageTasks, Names
from helpers.types import Params, Tasks

TEST_SEED = 20_180_825  # of the minibatches of fine-tuning


@dataclass(frozen=True)
class Translation(Experiment):
    """One way to train the start, three seeds, fine-tuned on few names of languages that were never trained on.

    Every method spends the same number of gradients, a name's being the unit. Fine-tuning is the same for all: Adam
    without momentum on minibatches, its rate and number of steps chosen for each method and number of names on the
    validation languages, from one grid.

    Attributes:
        method: one of ``METHODS``.
        sources: training languages.
        validation: languages of validation.
        seen: test languages whose families training has seen.
        held: test languages of other families.
        hidden: width of the network's layers.
        embedding: numbers that stand for a letter.
        batch: names of a language in a meta-batch, see :func:`~helpers.estimators.equal_cost.method`.
        inner_rate: step size of the inner loop in training.
        count: minibatches of the inner loop, see :func:`~helpers.estimators.equal_cost.method`.
        budget: gradients of names of one seed.
        outer_rate: Adam's first rate.
        outer_rate_final: Adam's last rate; it goes there linearly, and none keeps the first one.
        split_seed: of the split of the concepts.
        sizes: names to adapt on; 0 is no adaptation.
        queries: names of each kind that a test language is judged on.
        rates: of the grid of fine-tuning.
        steps: numbers of steps of the grid of fine-tuning.
        fixed: names, rate and steps of the check that needs no search.
    """

    # A letter on the brink changes all that is written after it: a few names of the six hundred may come out otherwise.
    # With the processor's vector units switched off none did.
    tolerances = (("*", Tolerance(0.01, relative=0.01)),)

    name: str
    method: str = among(*METHODS)
    sources: tuple[str, ...] = TRAIN
    hidden: int = 64
    embedding: int = 32
    batch: int = 8
    inner_rate: float = 0.3
    count: int = 18
    budget: int = 150_000
    outer_rate: float = 3e-3
    outer_rate_final: float | None = 1e-4
    seed: int = 0
    seeds: int = 3
    split_seed: int = 0
    sizes: tuple[int, ...] = (0, 10, 30, 100, 300)
    queries: int = 100
    validation: tuple[str, ...] = VALIDATION
    seen: tuple[str, ...] = TEST_SEEN
    held: tuple[str, ...] = TEST_HELD
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: tuple[int, ...] = (1, 3, 10, 30, 100)
    fixed: tuple[int, float, int] = (30, 3e-3, 3)
    paper: str = "metanmt"

    @property
    def per_step(self) -> int:
        """Gradients of names in an outer step."""
        return self.count * self.batch

    @property
    def iterations(self) -> int:
        """As many as the budget pays for; what trains nothing has one, which changes nothing."""
        return 1 if self.method == "scratch" else self.budget // self.per_step

    @property
    def evaluate_every(self) -> int:
        """As many as there are iterations: it is evaluated at the end only."""
        return self.iterations

    def config(self) -> dict[str, Any]:
        """The fields, and the number of iterations that follows from the budget."""
        return super().config() | {"iterations": self.iterations, "evaluate_every": self.evaluate_every}

    def data(self) -> dict[str, Any]:
        """Digest and versions of the names."""
        return names.load().provenance

    def model(self) -> Seq2Seq:
        return Seq2Seq(VOCABULARY, LONGEST, self.hidden, self.embedding)

    def setup(self, device: torch.device, compiled: bool) -> TranslationTraining:
        return TranslationTraining(self, names.load(), device)


class TranslationTraining(BegunAlike):
    """A method on one device."""

    def __init__(self, experiment: Translation, library: Names, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device, model = device, e.model()
        self.learner, estimator, size = method(e.method, model, translation_loss, e.batch, e.inner_rate, e.count)
        self.tasks = size.pop("tasks")
        self.family = LanguageTasks(library, e.sources, part="shown", seed=e.split_seed, **size)
        self.estimator = traced(seeds.side_by_side(estimator))
        tuner = FineTuning(model, translation_loss, TEST_SEED)
        self.judged = Translating(library, tuner, e.queries, e.split_seed, device)

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The estimator's gradient for every seed, each on languages of its own, and the mean query loss."""
        e = self.experiment
        if e.method == "scratch":
            return self.nothing(theta)
        numbers = torch.randint(2**62, (e.seeds,), generator=generator, device=generator.device).tolist()
        drawn = [self.family.sample(self.tasks, runtime.generator(number, self.device)) for number in numbers]
        support, query = (together(examples, self.device) for examples in zip(*drawn, strict=True))
        gradient, losses = self.estimator(self.learner, theta, Tasks(support, query))
        return gradient, losses.mean()

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``cer_N…`` and ``exact_N…`` for N names to adapt on, 0 for none: over all test languages and both kinds of
        names; by group of families, ``_seen`` and ``_held``; by kind of names too, ``_shown`` and ``_new``; and
        ``cer_N_language_CODE``. ``rate_N`` and ``steps_N`` are what was chosen, and ``lost`` is what is lost where the
        most names become the fewest."""
        e = self.experiment
        grid = e.rates, e.steps
        settings = {n: self.judged.choose(theta, e.validation, n, *grid) for n in e.sizes if n}
        codes, metrics, whole = (*e.seen, *e.held), {}, {}
        for shots in sorted(e.sizes, reverse=True):  # the most first, which is the headline
            rate, steps = settings.get(shots, (0.0, 0))
            found = self.judged.translated(theta, codes, shots, rate, steps)
            whole[shots] = found[0].mean((1, 2))
            metrics |= summary(found, str(shots), {"seen": e.seen, "held": e.held})
            if shots:
                metrics[f"rate_{shots}"] = chosen(rate)
                metrics[f"steps_{shots}"] = chosen(float(steps))
        adapted = [shots for shots in e.sizes if shots]
        metrics["lost"] = over_seeds(whole[min(adapted)] - whole[max(adapted)])
        return metrics | both_names(self.spot_check(theta))

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """The first seen and the first held-out language, after no adaptation and after ``fixed``."""
        e, metrics = self.experiment, {}
        shots, rate, steps = e.fixed
        for code in (e.seen[0], e.held[0]):
            for label, settings in (("start", (0, 0.0, 0)), ("fixed", (shots, rate, steps))):
                found = self.judged.translated(theta, (code,), *settings)
                metrics[f"spot_{label}_cer_{code}"] = over_seeds(found[0].mean((1, 2)))
        return metrics


def experiments() -> list:
    """The experiments, the most important first."""
    return [
        Translation("languages-fomaml", "fomaml"),
        Translation("languages-transfer", "transfer"),
        Translation("languages-reptile", "reptile"),
        Translation("languages-scratch", "scratch"),
        Translation("languages-fomaml-romance", "fomaml", sources=("es", "fr", "it", "pt")),
    ]
