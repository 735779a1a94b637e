"""A search for update rules by three methods at equal numbers of proposals, with one cache of what was tried.

Everything proposed is written down in a log, tensors ``[rounds, methods × searches, proposals, ...]``: ``tokens``,
``reward``, ``rate``, ``status``, ``seconds`` (0 for a rule that had been tried before), ``log_probability`` and
``baseline`` when proposed; and ``done``, the iterations done. The cache is the log read once.

Source: Bello, Zoph, Vasudevan and Le (2017), sections 4 and 5.1. No search code of the paper is public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from helpers.optimizers.child_training import Outcome, Population
from helpers.optimizers.children import Children
from helpers.optimizers.controller import Controller, encoded, policy_gradient
from helpers.optimizers.evolution import Evolution
from helpers.optimizers.language import Expression, grammar
from helpers.types import Params

METHODS = ("controller", "random", "evolution")
STATUS = ("complete", "cut", "diverged")
COLUMNS = ("reward", "rate", "status", "seconds", "log_probability", "baseline")
Log = dict[str, Tensor]


class SearchSettings(Protocol):
    """What a search is given.

    Attributes:
        children: what a rule is tried on.
        searches: independent searches by each method.
        proposals: rules a search proposes in a round.
        rounds: how many.
        ppo_steps: iterations of a round.
        clip: PPO's clipping of the ratio.
        bonus: weight of the entropy.
        baseline: decay of the moving average of rewards.
        depth: of the expressions.
        population, tournament: of the evolution.
    """

    children: Children
    searches: int
    proposals: int
    rounds: int
    ppo_steps: int
    clip: float
    bonus: float
    baseline: float
    depth: int
    population: int
    tournament: int

    def controller(self) -> Controller:
        """What proposes rules."""


def empty(search: SearchSettings) -> Log:
    """The log of a search that has not begun."""
    shape = (search.rounds, len(METHODS) * search.searches, search.proposals)
    log = {name: torch.zeros(shape) for name in COLUMNS}
    return log | {"tokens": torch.full((*shape, grammar(search.depth).length), -1.0), "done": torch.zeros(())}


def new_round(
    search: SearchSettings,
    log: Log,
    number: int,
    controllers: Sequence[Params],
    population: Population,
    cache: dict[Expression, Outcome],
    generator: torch.Generator,
) -> None:
    """Propose rules by every search, try those that are new, and fill one round of the log and the cache.

    Args:
        controllers: the parameters of each search's controller.
        generator: on the CPU, where a search thinks.
    """
    words, proposed = grammar(search.depth), []
    uniform = {name: torch.zeros_like(value) for name, value in controllers[0].items()}
    for method in METHODS:
        for own in controllers:
            arm = len(proposed)
            if method == "evolution":
                earlier = sequences(log["tokens"][:number, arm].flatten(0, 1))
                history = list(zip(earlier, log["reward"][:number, arm].flatten().tolist(), strict=True))
                new = Evolution(search.population, search.tournament).propose(
                    words, history, search.proposals, generator
                )
            else:
                params = own if method == "controller" else uniform
                new = search.controller().sample(params, words, search.proposals, generator)
                with torch.no_grad():
                    log_probability, _ = search.controller().log_probabilities(params, encoded(words, new))
                log["log_probability"][number, arm] = log_probability
            proposed.append(new)
    rules = [[words.rule(tokens) for tokens in new] for new in proposed]
    unknown = list(dict.fromkeys(rule for row in rules for rule in row if rule not in cache))
    found = population.rewards(unknown, search.children.epochs, hopeless=search.children.hopeless)
    cache |= dict(zip(unknown, found, strict=True))
    fresh = set(unknown)
    for arm, row in enumerate(rules):
        for i, rule in enumerate(row):
            outcome = cache[rule]
            tokens = proposed[arm][i]
            log["tokens"][number, arm, i, : len(tokens)] = torch.tensor(tokens, dtype=torch.float32)
            log["reward"][number, arm, i] = outcome.reward
            log["rate"][number, arm, i] = outcome.rate
            log["status"][number, arm, i] = STATUS.index(outcome.status)
            if rule in fresh:
                log["seconds"][number, arm, i] = outcome.seconds
                fresh.remove(rule)
    now = log["reward"][number].mean(-1)
    if number:  # the moving average of the rounds before this one
        last = log["reward"][number - 1].mean(-1)
        now = search.baseline * log["baseline"][number - 1, :, 0] + (1 - search.baseline) * last
    log["baseline"][number] = now[:, None]


def policy_gradients(search: SearchSettings, log: Log, number: int, controllers: Sequence[Params]) -> list[Params]:
    """PPO's gradient for every search's controller, on what it proposed in one round of the log."""
    found = []
    for arm, params in enumerate(controllers):
        batch = encoded(grammar(search.depth), sequences(log["tokens"][number, arm]))
        advantage = log["reward"][number, arm] - log["baseline"][number, arm]
        old = log["log_probability"][number, arm]
        found.append(policy_gradient(search.controller(), params, batch, old, advantage, search.clip, search.bonus)[0])
    return found


def sequences(tokens: Tensor) -> list[list[int]]:
    """Token sequences of a part of the log ``[rules, length]``, without padding."""
    return [[int(token) for token in row if token >= 0] for row in tokens.tolist()]


def proposals(search: SearchSettings, log: Log) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Everything that was proposed so far: where it stands in the log (round, arm, number), and its tokens."""
    for number in range(math.ceil(int(log["done"]) / search.ppo_steps)):
        for arm in range(log["reward"].shape[1]):
            for i, tokens in enumerate(sequences(log["tokens"][number, arm])):
                yield (number, arm, i), tokens


def remembered(search: SearchSettings, log: Log) -> dict[Expression, Outcome]:
    """The cache that belongs to a log."""
    words, cache = grammar(search.depth), {}
    for at, tokens in proposals(search, log):
        outcome = Outcome(log["reward"][at].item(), log["rate"][at].item(), (), STATUS[int(log["status"][at])], 0.0)
        cache.setdefault(words.rule(tokens), outcome)
    return cache


def table(search: SearchSettings, log: Log) -> list[dict[str, Any]]:
    """Every proposal of a search, in order: ``round``, ``method``, ``search``, ``rule`` (canonical text), ``reward``,
    ``rate``, ``status`` and ``seconds`` (0 where the cache had the answer)."""
    words, rows = grammar(search.depth), []
    names: dict[tuple[int, ...], str] = {}
    for at, tokens in proposals(search, log):
        number, arm, _ = at
        if (key := tuple(tokens)) not in names:
            names[key] = str(words.rule(tokens))
        rows.append(
            {
                "round": number, "method": METHODS[arm // search.searches], "search": arm % search.searches,
                "rule": names[key], "reward": round(log["reward"][at].item(), 6),
                "rate": float(f"{log['rate'][at].item():.3g}"), "status": STATUS[int(log["status"][at])],
                "seconds": round(log["seconds"][at].item(), 4),
            }
        )  # fmt: skip
    return rows


def rewards(rows: list[dict[str, Any]], searches: int, late: float) -> dict[str, list[float]]:
    """Mean rewards of each of the searches: ``{method}_late_reward``, ``…_reward``, ``…_early_reward`` and ``…_best``.

    Args:
        rows: of a :func:`table`.
        late: share of the rounds, at the end, that is late; as many, at the beginning, are early.
    """
    rounds = 1 + max(row["round"] for row in rows)
    few, found = max(1, round(late * rounds)), {}
    for method in METHODS:
        own = [[row for row in rows if (row["method"], row["search"]) == (method, n)] for n in range(searches)]
        for name, some in (
            ("late_reward", [[row for row in each if row["round"] >= rounds - few] for each in own]),
            ("reward", own),
            ("early_reward", [[row for row in each if row["round"] < few] for each in own]),
            ("best", [best(each, 10) for each in own]),
        ):
            found[f"{method}_{name}"] = [fmean(row["reward"] for row in each) for each in some]
    return found


def best(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows of the best different rules, the best first; of equal ones the shorter text first."""
    known = {row["rule"]: row for row in rows}
    return sorted(known.values(), key=lambda row: (-row["reward"], len(row["rule"]), row["rule"]))[:count]
