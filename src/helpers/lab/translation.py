"""How well starts are fine-tuned to translate names of a language, letter by letter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from helpers.lab.statistics import Interval, over_seeds
from helpers.learners.fine_tuning import FineTuning
from helpers.models.seq2seq import greedy
from helpers.tasks import names
from helpers.tasks.names import LONGEST, Names
from helpers.tasks.spelling import errors
from helpers.types import Examples, Params

KINDS = ("shown", "new")  # concepts: shown in training, in other languages; never shown


def together(tables: Sequence[Examples], device: torch.device | str) -> Examples:
    """Equally large sets of names, of several languages or seeds, with a leading axis of these."""
    return Examples(*(torch.stack(tensors).to(device) for tensors in zip(*tables, strict=True)))


@dataclass(frozen=True)
class Translating:
    """Fine-tuning of several starts on several languages, and what the networks then write.

    Attributes:
        library: the names.
        tuner: how starts are fine-tuned.
        queries: names of each kind that a language is judged on.
        split_seed: of the split of the concepts.
        device: where the names are put.
    """

    library: Names
    tuner: FineTuning
    queries: int
    split_seed: int
    device: torch.device | str = "cpu"

    def taken_apart(self, codes: Sequence[str], shots: int) -> tuple[Examples, Examples, list[list[str]]]:
        """Languages as support ``[languages, shots, ...]``, both kinds of queries one after the other, and these as
        texts, English ones."""
        parts = [names.taken_apart(self.library, code, shots, self.queries, self.split_seed) for code in codes]
        queries = [[pair for kind in KINDS for pair in each[kind]] for each in parts]
        tables = ([names.rows(pairs) for pairs in group] for group in ([each["support"] for each in parts], queries))
        support, query = (together(group, self.device) for group in tables)
        return support, query, [names.decode(names.encode([p.target for p in pairs])) for pairs in queries]

    def choose(
        self, theta: Params, codes: Sequence[str], shots: int, rates: Sequence[float], steps: Sequence[int]
    ) -> tuple[float, int]:
        """Rate and steps that are best on some languages, by the share of letters that are predicted given the right
        ones before them, over languages, seeds and both kinds of names."""
        support, query, _ = self.taken_apart(codes, shots)
        found = {
            (rate, count): self.tuner.accuracy(phi, query).mean().item()
            for rate in rates
            for count, phi in zip(steps, self.tuner.path(theta, support, rate, steps), strict=True)
        }
        return max(found, key=found.get)

    def translated(self, theta: Params, codes: Sequence[str], shots: int, rate: float, steps: int) -> Tensor:
        """Character error rates and shares of exact names after fine-tuning, ``[2, seeds, languages, kinds]``."""
        support, query, right = self.taken_apart(codes, max(1, shots))
        (phi,) = self.tuner.path(theta, support, rate, (steps if shots else 0,))
        source, found = query.x[..., :LONGEST], []
        for s in range(len(next(iter(theta.values())))):
            for i in range(len(codes)):
                one = {name: value[s * len(codes) + i] for name, value in phi.items()}
                written = names.decode(greedy(self.tuner.model, one, source[i], LONGEST + 1))
                half = len(written) // len(KINDS)
                found += [errors(written[part], right[i][part]) for part in (slice(half), slice(half, None))]
        return torch.tensor(found, dtype=torch.float64).view(-1, len(codes), len(KINDS), 2).movedim(-1, 0)


def summary(found: Tensor, label: str, groups: Mapping[str, Sequence[str]]) -> dict[str, Interval]:
    """Intervals over seeds of character error rates ``cer_{label}`` and shares of exact names ``exact_{label}``.

    Over all languages, by group, by group and kind of names, and the error rates by language.

    Args:
        found: ``[2, seeds, languages, kinds]``, see :meth:`Translating.translated`.
        groups: the languages' codes by group, in the order of ``found``.
    """
    metrics, ends = {}, list(accumulate(len(codes) for codes in groups.values()))
    parts = {name: slice(end - len(groups[name]), end) for name, end in zip(groups, ends, strict=True)}
    for measure, values in zip(("cer", "exact"), found, strict=True):
        metrics[f"{measure}_{label}"] = over_seeds(values.mean((1, 2)))
        for group, part in parts.items():
            metrics[f"{measure}_{label}_{group}"] = over_seeds(values[:, part].mean((1, 2)))
            for k, kind in enumerate(KINDS):
                metrics[f"{measure}_{label}_{group}_{kind}"] = over_seeds(values[:, part, k].mean(1))
    for i, code in enumerate(chain(*groups.values())):
        metrics[f"cer_{label}_language_{code}"] = over_seeds(found[0][:, i].mean(1))
    return metrics
