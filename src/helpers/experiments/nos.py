"""The recorded experiments of the Neural Optimizer Search chapter: the search itself.

Source: Bello, Zoph, Vasudevan and Le (2017), sections 4 and 5.1. No search code of the paper is public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from helpers import runtime
from helpers.errors import UserError
from helpers.experiments.base import Experiment, Run
from helpers.fields import among, check_fields
from helpers.lab import seeds
from helpers.lab.statistics import Interval, Tolerance, both_names, chosen, interval, over_seeds
from helpers.learners.descent import CARRIED
from helpers.models.convnet import ConvNet
from helpers.models.layers import stacked, subtree
from helpers.optimizers.child_training import Outcome, Population
from helpers.optimizers.controller import Controller, encoded, policy_gradient
from helpers.optimizers.evolution import Evolution
from helpers.optimizers.language import Expression, grammar, parse
from helpers.tasks.small_images import images, provenance
from helpers.types import Examples, Params

METHODS = ("controller", "random", "evolution")
STATUS = ("complete", "cut", "diverged")


def child(size: int, channels: int, filters: int = 32) -> ConvNet:
    """The paper's child: two layers of 3×3 convolution with 32 filters, each followed by batch normalisation and ReLU,
    and a linear layer. Convolutions have stride 2."""
    return ConvNet(
        10, filters=filters, blocks=2, channels=channels, head_scale=None, flatten=True, affine=True, size=size
    )


@dataclass(frozen=True)
class Children:
    """What a child is trained on, and for how long.

    Attributes:
        data_set: ``"digits"`` or ``"cifar10"``.
        size: height and width of the images.
        train: training images.
        valid: validation images, whose accuracy is the reward.
        test: test images.
        batch: images of a minibatch.
        epochs: of a child's training, the one of the sweep included.
        hopeless: a child whose best score after one epoch is not above this is trained no further; chance is 0.1.
        chunk: networks in one batched program.
    """

    data_set: str = among("digits", "cifar10", default="digits")
    size: int = 8
    train: int = 1_000
    valid: int = 400
    test: int = 300
    batch: int = 100
    epochs: int = 5
    filters: int = 32
    hopeless: float = 0.15
    chunk: int = 14

    def __post_init__(self) -> None:
        check_fields(self, "the children")

    def population(self, seed: int = 0, fused: bool = False, device: torch.device | str = "cpu") -> Population:
        """The children's common data and first weights, ready to train."""
        train, valid, _ = (Examples(*(t.to(device) for t in e)) for e in self.examples)
        net = child(self.size, train.x.shape[1], self.filters)
        steps = self.epochs * self.train // self.batch
        return Population(net, train, valid, self.batch, seed, chunk=self.chunk, fused=fused, horizon=steps)

    @cached_property
    def examples(self) -> tuple[Examples, ...]:
        """Training, validation and test examples."""
        return images(self.data_set, self.size, self.train, self.valid, self.test)


@dataclass(frozen=True)
class Search(Experiment):
    """A search for update rules by three methods at equal numbers of proposals, with one cache of children.

    An iteration is one step of the controllers; every ``ppo_steps`` iterations are a round, which begins with
    ``proposals`` new rules of every search. Everything proposed is written down in θ (see :class:`SearchRun`), so a
    killed search goes on with the same controllers and the same cache.

    Attributes:
        children: what a rule is tried on.
        searches: independent searches by each method.
        proposals: rules a search proposes in a round.
        rounds: how many.
        ppo_steps: steps of the controller on the same proposals.
        clip: PPO's clipping of the ratio.
        bonus: weight of the entropy.
        baseline: decay of the moving average of rewards.
        size: of the controllers.
        depth: of the expressions.
        population: rules that the evolution keeps.
        tournament: of these, how many are compared for the next parent.
        late: share of the rounds, at the end, whose rewards are reported as late.
        recheck: the best rules so many are trained once more when the record is made.
    """

    name: str
    children: Children = Children()
    searches: int = 5
    proposals: int = 10
    rounds: int = 60
    ppo_steps: int = 4
    outer_rate: float = 1e-2
    clip: float = 0.2
    bonus: float = 0.01
    baseline: float = 0.9
    size: int = 64
    depth: int = 3
    population: int = 50
    tournament: int = 10
    late: float = 0.2
    recheck: int = 5
    seed: int = 0
    evaluate_every: int = 1_000_000
    iterations: int = 240
    paper: str = "nos"

    # Hundreds of steps from scratch amplify rounding, as another start would: about what a child differs by then.
    tolerances = (("*", Tolerance(0.03)),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations != self.rounds * self.ppo_steps:
            raise UserError(f"{self.rounds} rounds of {self.ppo_steps} steps are not {self.iterations} iterations")

    def data(self) -> dict[str, Any]:
        """Name and digests of the images that the children are trained on."""
        return provenance(self.children.data_set)

    def setup(self, device: torch.device, compiled: bool) -> SearchRun:
        """Load the images; children are trained on ``device``, the searches think on the CPU."""
        return SearchRun(self, self.children.population(fused=compiled, device=device))

    def controller(self) -> Controller:
        return Controller(len(grammar(self.depth)), self.size)


CONTROLLER = "controller/"
LOG = CARRIED + "log/"
COLUMNS = ("reward", "rate", "status", "seconds", "log_probability", "baseline")


@dataclass(eq=False)
class SearchRun(Run):
    """A search made ready.

    θ holds the controllers' parameters under ``controller/``, ``[searches, ...]``, and under ``carried:log/``
    everything that was proposed, ``[rounds, methods × searches, proposals, ...]``: ``tokens``, ``reward``, ``rate``,
    ``status``, ``seconds`` (0 for a rule that had been tried before), ``log_probability`` and ``baseline`` when
    proposed; and ``carried:log/done``, the iterations done. The cache is the log read once.
    """

    search: Search
    population: Population
    cache: dict[Expression, Outcome] | None = None

    def __post_init__(self) -> None:
        self.experiment, self.population.check_clock = self.search, lambda: self.check_clock()

    def init(self, generator: torch.Generator) -> Params:
        """Uniform controllers and an empty log."""
        s, generator = self.search, on_cpu(generator)
        fresh = seeds.fresh(s.controller().init, s.searches, generator)
        shape = (s.rounds, len(METHODS) * s.searches, s.proposals)
        log = {name: torch.zeros(shape) for name in COLUMNS}
        log["tokens"] = torch.full((*shape, grammar(s.depth).length), -1.0)
        log["done"] = torch.zeros(())
        return {CONTROLLER + name: value for name, value in fresh.items()} | {
            LOG + name: value for name, value in log.items()
        }

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """PPO's gradient for every controller; at the beginning of a round, new proposals of all searches first."""
        s = self.search
        log = {name: value.clone() for name, value in subtree(theta, LOG).items()}
        done = int(log["done"])
        number, inner = divmod(done, s.ppo_steps)
        if inner == 0:
            self._propose(theta, log, number, generator)
        log["done"] += 1
        gradient = {LOG + name: theta[LOG + name] - value for name, value in log.items()}
        pieces = []
        for search in range(s.searches):
            params = _controller(theta, search)
            batch = encoded(grammar(s.depth), sequences(log["tokens"][number, search]))
            advantage = log["reward"][number, search] - log["baseline"][number, search]
            old = log["log_probability"][number, search]
            pieces.append(policy_gradient(s.controller(), params, batch, old, advantage, s.clip, s.bonus)[0])
        gradient |= {CONTROLLER + name: value for name, value in stacked(pieces).items()}
        return gradient, -log["reward"][number, : s.searches].mean()

    def _propose(self, theta: Params, log: dict[str, Tensor], number: int, generator: torch.Generator) -> None:
        """Fill one round of the log."""
        s, words, generator = self.search, grammar(self.search.depth), on_cpu(generator)
        if self.cache is None:
            self.cache = remembered(s, log)
        proposed = []
        uniform = {name: torch.zeros_like(value) for name, value in _controller(theta, 0).items()}
        for method in METHODS:
            for search in range(s.searches):
                arm = len(proposed)
                if method == "evolution":
                    earlier = sequences(log["tokens"][:number, arm].flatten(0, 1))
                    history = list(zip(earlier, log["reward"][:number, arm].flatten().tolist(), strict=True))
                    new = Evolution(s.population, s.tournament).propose(words, history, s.proposals, generator)
                else:
                    params = _controller(theta, search) if method == "controller" else uniform
                    new = s.controller().sample(params, words, s.proposals, generator)
                    with torch.no_grad():
                        log_probability, _ = s.controller().log_probabilities(params, encoded(words, new))
                    log["log_probability"][number, arm] = log_probability
                proposed.append(new)
        rules = [[words.rule(tokens) for tokens in new] for new in proposed]
        unknown = list(dict.fromkeys(rule for row in rules for rule in row if rule not in self.cache))
        found = self.population.rewards(unknown, s.children.epochs, hopeless=s.children.hopeless)
        self.cache |= dict(zip(unknown, found, strict=True))
        fresh = set(unknown)
        for arm, row in enumerate(rules):
            for i, rule in enumerate(row):
                outcome = self.cache[rule]
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
            now = s.baseline * log["baseline"][number - 1, :, 0] + (1 - s.baseline) * last
        log["baseline"][number] = now[:, None]

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Rewards by method over the searches; children; and the best rules, trained again."""
        rows = table(self.search, theta)
        rounds = 1 + max(row["round"] for row in rows)
        late, searches = rounds - max(1, round(self.search.late * rounds)), range(self.search.searches)
        metrics: dict[str, Interval] = {}
        for method in METHODS:
            own = [[row for row in rows if (row["method"], row["search"]) == (method, search)] for search in searches]
            for name, choose in (
                ("late_reward", lambda some: [row for row in some if row["round"] >= late]),
                ("reward", lambda some: some),
                ("early_reward", lambda some: [row for row in some if row["round"] < rounds - late]),
                ("best", lambda some: best(some, 10)),
            ):
                metrics[f"{method}_{name}"] = over_seeds(
                    torch.tensor([fmean(row["reward"] for row in choose(some)) for some in own])
                )
        trained = {row["rule"] for row in rows}
        metrics["children"] = chosen(float(len(trained)))
        metrics["proposals"] = chosen(float(len(rows)))
        metrics["duplicates"] = Interval(1 - len(trained) / len(rows), math.nan, len(rows))
        metrics["seconds_per_child"] = interval(torch.tensor([row["seconds"] for row in rows if row["seconds"]]))
        return metrics | both_names(self._again(rows))

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """The best rules of the log trained once more, as the search did."""
        return self._again(table(self.search, theta))

    def _again(self, rows: list[dict[str, Any]]) -> dict[str, Interval]:
        rules = [parse(row["rule"]) for row in best(rows, self.search.recheck)]
        again = self.population.rewards(rules, self.search.children.epochs, hopeless=self.search.children.hopeless)
        return {"spot_again_reward": interval(torch.tensor([outcome.reward for outcome in again]))}

    def table(self, theta: Params) -> list[dict[str, Any]]:
        """What was proposed and what came of it, a row each: :func:`table` of this search."""
        return table(self.search, theta)


def _controller(theta: Params, search: int) -> Params:
    """The parameters of one search's controller."""
    return {name: value[search] for name, value in subtree(theta, "controller/").items()}


def on_cpu(generator: torch.Generator) -> torch.Generator:
    """The generator, or one on the CPU that it seeds: a search thinks there, wherever its children are trained."""
    if generator.device.type == "cpu":
        return generator
    return runtime.generator(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))


def sequences(tokens: Tensor) -> list[list[int]]:
    """Token sequences of a part of the log ``[rules, length]``, without padding."""
    return [[int(token) for token in row if token >= 0] for row in tokens.tolist()]


def proposals(search: Search, log: dict[str, Tensor]) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Everything that was proposed so far: where it stands in the log (round, arm, number), and its tokens."""
    for number in range(math.ceil(int(log["done"]) / search.ppo_steps)):
        for arm in range(log["reward"].shape[1]):
            for i, tokens in enumerate(sequences(log["tokens"][number, arm])):
                yield (number, arm, i), tokens


def remembered(search: Search, log: dict[str, Tensor]) -> dict[Expression, Outcome]:
    """The cache that belongs to a log."""
    words, cache = grammar(search.depth), {}
    for at, tokens in proposals(search, log):
        outcome = Outcome(log["reward"][at].item(), log["rate"][at].item(), (), STATUS[int(log["status"][at])], 0.0)
        cache.setdefault(words.rule(tokens), outcome)
    return cache


def table(search: Search, theta: Params) -> list[dict[str, Any]]:
    """Every proposal of a search, in order: ``round``, ``method``, ``search``, ``rule`` (canonical text), ``reward``,
    ``rate``, ``status`` and ``seconds`` (0 where the cache had the answer)."""
    log, words, rows = subtree(theta, LOG), grammar(search.depth), []
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


def best(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows of the best different rules, the best first; of equal ones the shorter text first."""
    known = {row["rule"]: row for row in rows}
    return sorted(known.values(), key=lambda row: (-row["reward"], len(row["rule"]), row["rule"]))[:count]


def experiments() -> list:
    """The experiments of the chapter, the most important first."""
    cifar = Children("cifar10", size=16, train=2_000, valid=500, test=1_000, chunk=14)
    return [
        Search("nos-cifar10", cifar, searches=3, proposals=10, rounds=30, iterations=120),
        Search("nos-digits"),
        # A controller in less of a hurry: does it find better rules for settling later?
        Search("nos-digits-slow", outer_rate=3e-3, bonus=0.03),
    ]
