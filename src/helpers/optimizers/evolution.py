"""Regularised evolution over encoded update rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.optimizers.language import Grammar
from helpers.validate import whole

__all__ = ["Evolution"]


@dataclass(frozen=True)
class Evolution:
    """Regularised evolution: the best of a random tournament has a child, and only the youngest are kept.

    Attributes:
        population: how many of the latest proposals may have children; until there are as many, rules are drawn at
            random.
        tournament: how many of them compete.

    Raises:
        UserError: for numbers that are no whole ones of at least 1.
    """

    population: int = 50
    tournament: int = 10

    def __post_init__(self) -> None:
        whole(self.population, "population of an evolution")
        whole(self.tournament, "tournament of an evolution")

    def propose(
        self,
        grammar: Grammar,
        history: Sequence[tuple[Sequence[int], float]],
        rules: int,
        generator: torch.Generator,
    ) -> list[list[int]]:
        """So many new sequences, given all earlier proposals of this search with their rewards, in order.

        Raises:
            UserError: for a number below 1.
        """
        whole(rules, "number of rules")
        if len(history) < self.population:
            return [completed(grammar, [], generator) for _ in range(rules)]
        living = history[-self.population :]
        proposals = []
        for _ in range(rules):
            rivals = torch.randint(len(living), (self.tournament,), generator=generator).tolist()
            parent = max((living[i] for i in rivals), key=lambda known: known[1])[0]
            proposals.append(mutated(grammar, parent, generator))
        return proposals


def _draw(mask: Tensor, generator: torch.Generator) -> int:
    choices = mask.nonzero()[:, 0]
    return int(choices[torch.randint(len(choices), (1,), generator=generator)])


def completed(
    grammar: Grammar, beginning: Sequence[int], generator: torch.Generator, wish: Sequence[int] = ()
) -> list[int]:
    """A whole rule with that beginning; the other tokens are those of ``wish`` while they fit, and random after."""
    sequence = list(beginning)
    wished = iter(wish)
    while len(kinds := grammar.expected(sequence)) > len(sequence):
        allowed, token = grammar.mask(kinds[-1]), next(wished, None)
        if token is None or not allowed[token]:
            token, wished = _draw(allowed, generator), iter(())
        sequence.append(token)
    return sequence


def mutated(grammar: Grammar, sequence: Sequence[int], generator: torch.Generator) -> list[int]:
    """The same rule with one token, chosen at random, replaced by another that may stand there."""
    place = int(torch.randint(len(sequence), (1,), generator=generator))
    others = grammar.mask(grammar.expected(sequence)[place]).clone()
    others[sequence[place]] = False
    return completed(grammar, [*sequence[:place], _draw(others, generator)], generator, sequence[place + 1 :])
