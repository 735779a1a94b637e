"""Recorded experiments of the last chapter: languages as tasks, after Gu et al. (2018).

A task is to translate names of one language to English, letter by letter. What is compared is where fine-tuning begins:
at random weights, at a network that was trained on all training languages together, or at meta-learned ones.

Source: Gu, Wang, Chen, Cho and Li (2018), arXiv:1808.08437, there with sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import estimators, runtime
from helpers.errors import UserError
from helpers.experiments.base import Experiment, Run
from helpers.fields import among
from helpers.lab import seeds
from helpers.lab.statistics import Interval, Tolerance, both_names, chosen, over_seeds
from helpers.learners.descent import GradientDescent
from helpers.learners.fine_tuning import FineTuning
from helpers.learners.minibatch import MinibatchDescent
from helpers.models.layers import stacked
from helpers.models.seq2seq import Seq2Seq, greedy, translation_loss
from helpers.numerics.tracing import traced
from helpers.tasks import names
from helpers.tasks.names import LONGEST, TEST_HELD, TEST_SEEN, TRAIN, VALIDATION, VOCABULARY, LanguageTasks, Names
from helpers.tasks.spelling import errors
from helpers.types import Estimator, Examples, Params, Tasks

METHODS = ("scratch", "transfer", "fomaml", "reptile")
KINDS = ("shown", "new")  # concepts: shown in training, in other languages; never shown
TEST_SEED = 20_180_825  # of the minibatches of fine-tuning


def method(
    name: str, model: Seq2Seq, batch: int = 8, inner_rate: float = 0.3, count: int = 18
) -> tuple[GradientDescent, Estimator, dict[str, int]]:
    """A way to train the start, as arguments of one engine; each spends ``count · batch`` gradients an outer step.

    ``transfer`` is MAML without an inner step, which is joint training. ``fomaml`` takes one inner step on a minibatch
    of a language and is judged on another; ``reptile`` adds the gradients of both, and so is two-step Reptile.

    Args:
        name: ``"transfer"``, ``"fomaml"`` or ``"reptile"``; ``"scratch"`` trains nothing and has no estimator to use.
        model: the network.
        batch: names of a minibatch.
        inner_rate: of gradient descent within a language, in training.
        count: minibatches of a meta-batch: of ``transfer`` one a language, of the others two each of half as many.

    Returns:
        Learner, estimator, and what a meta-batch is: ``tasks``, and the names of each, ``support`` and ``query``.

    Raises:
        UserError: for another name.
    """
    half = max(1, count // 2)
    match name:
        case "scratch" | "transfer":
            learner, size = GradientDescent(model, translation_loss, 0.0, steps=0), {"tasks": count, "support": 0}
            return learner, estimators.maml, size | {"query": batch}
        case "fomaml":
            learner = GradientDescent(model, translation_loss, inner_rate, steps=1)
            return learner, estimators.fomaml, {"tasks": half, "support": batch, "query": batch}
        case "reptile":
            # The second minibatch comes as the query too: its loss after one step is what is logged.
            learner = MinibatchDescent(model, translation_loss, inner_rate)
            return learner, _reptile, {"tasks": half, "support": batch, "query": batch}
    raise UserError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}")


def _reptile(learner: MinibatchDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """Two-step Reptile by its gradients, Σ gᵢ: support and query are its two minibatches."""
    batches = Examples(*(torch.stack(pair, 1) for pair in zip(*tasks, strict=True)))
    return estimators.combination((1, 1))(learner, theta, Tasks(batches, tasks.query))


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
        batch: names of a language in a meta-batch, see :func:`method`.
        inner_rate: step size of the inner loop in training.
        count: minibatches of the inner loop, see :func:`method`.
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


class TranslationTraining(Run):
    """A method with its seeds side by side: every tensor of θ has a leading axis of seeds."""

    def __init__(self, experiment: Translation, library: Names, device: torch.device) -> None:
        e = self.experiment = experiment
        self.library, self.device, self.model = library, device, e.model()
        self.learner, estimator, size = method(e.method, self.model, e.batch, e.inner_rate, e.count)
        self.tasks = size.pop("tasks")
        self.family = LanguageTasks(library, e.sources, part="shown", seed=e.split_seed, **size)
        self.estimator = traced(seeds.side_by_side(estimator))
        self.tuner = FineTuning(self.model, translation_loss, TEST_SEED)

    def init(self, generator: torch.Generator) -> Params:
        """One start a seed, each from a generator of its own that all methods share."""
        e = self.experiment
        return stacked(seeds.of_their_own(self.model.init, e.seed, e.seeds, self.device))

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The estimator's gradient for every seed, each on languages of its own, and the mean query loss."""
        e = self.experiment
        if e.method == "scratch":
            return {n: torch.zeros_like(v) for n, v in theta.items()}, next(iter(theta.values())).new_zeros(())
        numbers = torch.randint(2**62, (e.seeds,), generator=generator, device=generator.device).tolist()
        drawn = [self.family.sample(self.tasks, runtime.generator(number, self.device)) for number in numbers]
        support, query = (self.together(examples) for examples in zip(*drawn, strict=True))
        gradient, losses = self.estimator(self.learner, theta, Tasks(support, query))
        return gradient, losses.mean()

    # ---------------------------------------- fine-tuning and judging

    def taken_apart(self, codes: Sequence[str], shots: int) -> tuple[Examples, Examples, list[list[str]]]:
        """Languages as support ``[languages, shots, ...]``, both kinds of queries one after the other, and these as
        texts, English ones."""
        e = self.experiment
        parts = [names.taken_apart(self.library, code, shots, e.queries, e.split_seed) for code in codes]
        queries = [[pair for kind in KINDS for pair in each[kind]] for each in parts]
        tables = ([names.rows(pairs) for pairs in group] for group in ([each["support"] for each in parts], queries))
        support, query = (self.together(group) for group in tables)
        return support, query, [names.decode(names.encode([p.target for p in pairs])) for pairs in queries]

    def together(self, tables: Sequence[Examples]) -> Examples:
        """Equally large sets of names, of several languages or seeds, with a leading axis of these."""
        return Examples(*(torch.stack(tensors).to(self.device) for tensors in zip(*tables, strict=True)))

    def choose(self, theta: Params) -> dict[int, tuple[float, int]]:
        """Rate and steps for each number of names: what is best on the validation languages, by the share of letters
        that are predicted given the right ones before them, over languages, seeds and both kinds of names."""
        e, best = self.experiment, {}
        for shots in e.sizes:
            if shots:
                support, query, _ = self.taken_apart(e.validation, shots)
                found = {
                    (rate, steps): self.tuner.accuracy(phi, query).mean().item()
                    for rate in e.rates
                    for steps, phi in zip(e.steps, self.tuner.path(theta, support, rate, e.steps), strict=True)
                }
                best[shots] = max(found, key=found.get)
        return best

    def translated(self, theta: Params, codes: Sequence[str], shots: int, rate: float, steps: int) -> Tensor:
        """Character error rates and shares of exact names after fine-tuning, ``[2, seeds, languages, kinds]``."""
        support, query, right = self.taken_apart(codes, max(1, shots))
        (phi,) = self.tuner.path(theta, support, rate, (steps if shots else 0,))
        source, found = query.x[..., :LONGEST], []
        for s in range(len(next(iter(theta.values())))):
            for i in range(len(codes)):
                one = {name: value[s * len(codes) + i] for name, value in phi.items()}
                written = names.decode(greedy(self.model, one, source[i], LONGEST + 1))
                half = len(written) // len(KINDS)
                found += [errors(written[part], right[i][part]) for part in (slice(half), slice(half, None))]
        return torch.tensor(found, dtype=torch.float64).view(-1, len(codes), len(KINDS), 2).movedim(-1, 0)

    def summary(self, found: Tensor, label: str) -> dict[str, Interval]:
        """Intervals over seeds of what :meth:`translated` found of the seen and then the held-out languages."""
        e = self.experiment
        groups = {"seen": slice(0, len(e.seen)), "held": slice(len(e.seen), None)}
        metrics = {}
        for measure, values in zip(("cer", "exact"), found, strict=True):
            metrics[f"{measure}_{label}"] = over_seeds(values.mean((1, 2)))
            for group, part in groups.items():
                metrics[f"{measure}_{label}_{group}"] = over_seeds(values[:, part].mean((1, 2)))
                for k, kind in enumerate(KINDS):
                    metrics[f"{measure}_{label}_{group}_{kind}"] = over_seeds(values[:, part, k].mean(1))
        for i, code in enumerate((*e.seen, *e.held)):
            metrics[f"cer_{label}_language_{code}"] = over_seeds(found[0][:, i].mean(1))
        return metrics

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``cer_N…`` and ``exact_N…`` for N names to adapt on, 0 for none: over all test languages and both kinds of
        names; by group of families, ``_seen`` and ``_held``; by kind of names too, ``_shown`` and ``_new``; and
        ``cer_N_language_CODE``. ``rate_N`` and ``steps_N`` are what was chosen, and ``lost`` is what is lost where the
        most names become the fewest."""
        e, settings = self.experiment, self.choose(theta)
        codes, metrics, whole = (*e.seen, *e.held), {}, {}
        for shots in sorted(e.sizes, reverse=True):  # the most first, which is the headline
            rate, steps = settings.get(shots, (0.0, 0))
            found = self.translated(theta, codes, shots, rate, steps)
            whole[shots] = found[0].mean((1, 2))
            metrics |= self.summary(found, str(shots))
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
                found = self.translated(theta, (code,), *settings)
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
