"""Rules with labels, as a table has them, and how they are compared: a sweep of rates each, then training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.optimizers.child_training import Network, Population
from helpers.optimizers.language import parse
from helpers.optimizers.rules import ADDSIGN, BASELINES, PAPER_RULES, POWERSIGN
from helpers.types import Examples

SCORES = ("test", "valid", "best_test", "best_valid")
# label, rule, decay of its sign term
Entry = tuple[str, str, str | None]
TABLE: tuple[Entry, ...] = (
    *((name.lower(), rule, None) for name, rule in BASELINES.items()),
    *((f"rule{number:02d}", rule, None) for number, rule in enumerate(PAPER_RULES, start=1)),
)
SIGNS: tuple[Entry, ...] = (
    ("addsign", ADDSIGN, None),
    *((f"powersign_{kind}", POWERSIGN, kind) for kind in ("linear", "cosine", "restarts")),
    ("addsign_linear", ADDSIGN, "linear"),
)
POWERSIGN_LABEL = f"rule{PAPER_RULES.index(POWERSIGN) + 1:02d}"


def networks_of(population: Population, entries: Sequence[Entry], rates: Sequence[float]) -> list[Network]:
    """A network of the population for each rule and its rate."""
    pairs = zip(entries, rates, strict=True)
    return [population.network(parse(rule), rate, schedule) for (_, rule, schedule), rate in pairs]


def swept(population: Population, entries: Sequence[Entry], rates: Sequence[float], epochs: int) -> Tensor:
    """Validation scores ``[rules, rates]`` of every rule at every rate, after so many epochs."""
    pairs = [(entry, rate) for entry in entries for rate in rates]
    networks = networks_of(population, *zip(*pairs, strict=True))
    population.run(networks, epochs)
    return population.scores(networks).view(-1, len(rates))


def trained(
    population: Population, entries: Sequence[Entry], rates: Sequence[float], epochs: int, test: Examples
) -> Tensor:
    """Scores ``[rules, 4]`` of all rules at their rates, see ``SCORES``; the best ones are over the epochs."""
    networks = networks_of(population, entries, rates)
    best_valid = best_test = torch.zeros(len(networks))
    for _ in range(epochs):
        population.run(networks, 1)
        valid, found = population.scores(networks), population.scores(networks, test)
        best_valid, best_test = torch.maximum(best_valid, valid), torch.maximum(best_test, found)
    return torch.stack([found, valid, best_test, best_valid], 1)
