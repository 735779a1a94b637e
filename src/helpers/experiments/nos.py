"""The recorded experiments of the Neural Optimizer Search chapter: the search itself.

How it goes is :mod:`helpers.optimizers.search`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import runtime
from helpers.errors import UserError
from helpers.lab import seeds
from helpers.lab.experiment import Experiment, Run
from helpers.lab.statistics import Interval, Tolerance, both_names, chosen, interval, over_seeds
from helpers.learners.descent import CARRIED
from helpers.models.layers import stacked, subtree
from helpers.optimizers import search
from helpers.optimizers.child_training import Outcome, Population
from helpers.optimizers.children import Children
from helpers.optimizers.controller import Controller
from helpers.optimizers.language import Expression, grammar, parse
from helpers.tasks import small_images
from helpers.types import Params


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
        return small_images.provenance(self.children.data_set)

    def setup(self, device: torch.device, compiled: bool) -> SearchRun:
        """Load the images; children are trained on ``device``, the searches think on the CPU."""
        return SearchRun(self, self.children.population(fused=compiled, device=device))

    def controller(self) -> Controller:
        return Controller(len(grammar(self.depth)), self.size)


CONTROLLER = "controller/"
LOG = CARRIED + "log/"


@dataclass(eq=False)
class SearchRun(Run):
    """A search made ready.

    θ holds the controllers' parameters under ``controller/``, ``[searches, ...]``, and everything that was proposed
    under ``carried:log/`` (:mod:`helpers.optimizers.search`).
    """

    search: Search
    population: Population
    cache: dict[Expression, Outcome] | None = None

    def __post_init__(self) -> None:
        self.experiment, self.population.check_clock = self.search, lambda: self.check_clock()

    def init(self, generator: torch.Generator) -> Params:
        """Uniform controllers and an empty log."""
        s = self.search
        fresh = seeds.fresh(s.controller().init, s.searches, runtime.on_cpu(generator))
        log = {LOG + name: value for name, value in search.empty(s).items()}
        return {CONTROLLER + name: value for name, value in fresh.items()} | log

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """PPO's gradient for every controller; at the beginning of a round, new proposals of all searches first."""
        s = self.search
        log = {name: value.clone() for name, value in subtree(theta, LOG).items()}
        done = int(log["done"])
        number, inner = divmod(done, s.ppo_steps)
        if inner == 0:
            if self.cache is None:
                self.cache = search.remembered(s, log)
            population, draws = self.population, runtime.on_cpu(generator)
            search.new_round(s, log, number, self.controllers(theta), population, self.cache, draws)
        log["done"] += 1
        gradient = {LOG + name: theta[LOG + name] - value for name, value in log.items()}
        pieces = search.policy_gradients(s, log, number, self.controllers(theta))
        gradient |= {CONTROLLER + name: value for name, value in stacked(pieces).items()}
        return gradient, -log["reward"][number, : s.searches].mean()

    def controllers(self, theta: Params) -> list[Params]:
        """The parameters of each search's controller."""
        together = subtree(theta, CONTROLLER)
        return [{name: value[own] for name, value in together.items()} for own in range(self.search.searches)]

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Rewards by method over the searches; children; and the best rules, trained again."""
        rows = self.table(theta)
        found = search.rewards(rows, self.search.searches, self.search.late)
        metrics = {name: over_seeds(torch.tensor(means)) for name, means in found.items()}
        trained = {row["rule"] for row in rows}
        metrics["children"] = chosen(float(len(trained)))
        metrics["proposals"] = chosen(float(len(rows)))
        metrics["duplicates"] = Interval(1 - len(trained) / len(rows), math.nan, len(rows))
        metrics["seconds_per_child"] = interval(torch.tensor([row["seconds"] for row in rows if row["seconds"]]))
        return metrics | both_names(self._again(rows))

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """The best rules of the log trained once more, as the search did."""
        return self._again(self.table(theta))

    def _again(self, rows: list[dict[str, Any]]) -> dict[str, Interval]:
        rules = [parse(row["rule"]) for row in search.best(rows, self.search.recheck)]
        again = self.population.rewards(rules, self.search.children.epochs, hopeless=self.search.children.hopeless)
        return {"spot_again_reward": interval(torch.tensor([outcome.reward for outcome in again]))}

    def table(self, theta: Params) -> list[dict[str, Any]]:
        """What was proposed and what came of it, a row each: :func:`helpers.optimizers.search.table`."""
        return search.table(self.search, subtree(theta, LOG))


def experiments() -> list:
    """The experiments of the chapter, the most important first."""
    cifar = Children("cifar10", size=16, train=2_000, valid=500, test=1_000, chunk=14)
    return [
        Search("nos-cifar10", cifar, searches=3, proposals=10, rounds=30, iterations=120),
        Search("nos-digits"),
        # A controller in less of a hurry: does it find better rules for settling later?
        Search("nos-digits-slow", outer_rate=3e-3, bonus=0.03),
    ]
