"""Reinforcement learning in the MAML paper, as far as it fits one processor: 2D navigation, and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import runtime
from helpers.estimators.policy_search import PolicySearch, policy_descent
from helpers.fields import among
from helpers.lab import checkpoints, seeds
from helpers.lab.experiment import Experiment, Run
from helpers.lab.statistics import Interval, Tolerance, both_names, chosen, interval, over_runs, over_seeds
from helpers.learners.descent import CARRIED
from helpers.models.layers import subtree_of
from helpers.models.mlp import MLP
from helpers.models.policies import GaussianPolicy
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.surrogates import SURROGATES
from helpers.types import Params

TEST_SEED = 20_170_807  # of the noise of the actions at test; the goals there are the paper's
TUNING_SEED = 20_170_808  # of the goals on which rates of the baselines are chosen
COMPARED = ("pretrained", "random", "oracle")
STEPS = CARRIED + "steps/"  # in θ, by method: outer steps that were tried and that were taken, ``[seeds, 2]``


@dataclass(frozen=True)
class NavigationStudy(Experiment):
    """Section 5.3 of the paper in the plane: MAML, a policy pre-trained on all goals, a random one, and an oracle.

    Several seeds, one after the other in every iteration; θ holds the policies under ``0/maml/``, ``0/pretrained/`` and
    so on. All that is trained sees the same goals at an iteration, meets as many steps of the environment, and moves by
    a trust-region step, which the outer optimiser takes over as it is: it is SGD with a rate of 1, and what it is given
    is the old θ minus the new one. So the pre-trained policy is a stronger one than the paper's, which made a hundred
    steps of Adam on half of the experience.

    Attributes:
        compared: what MAML is held against, of ``COMPARED``. The random policy is the one that MAML begins with.
        surrogate: of the inner step, a key of :data:`~helpers.tasks.control.surrogates.SURROGATES`; ``"score"`` is the
            released code's.
        inner_rate: of MAML in training and in the first step at test; in the released code 0.5, by the text 0.1. All
            further steps go at half of it.
        trajectories: of each task before and after the inner step; without an inner step twice as many. The released
            code collects a number of time steps instead, which is the same where no episode ends early.
        limit: of the KL in an outer step.
        curvature: trajectories of each task from which the metric of the outer step is measured.
        horizon: of an episode.
        meta_batch: goals of an iteration and seed.
        seeds: policies that are trained beside each other.
        test_tasks: the first so many of the paper's goals, which are 40.
        test_trajectories: of each goal before every step.
        test_steps: numbers of steps after which returns are measured.
        tuning_rates: of the first step of the pre-trained and of the random policy; the one with the best mean return
            after the first and all further steps on other goals is used at test.
        tuning_tasks: goals for that.
        start: the experiment whose policies are the first ones; fresh ones if there is none.
    """

    made_of = "goals in a square"
    # Adaptation amplifies rounding, and a reward beyond the end of an episode is lost by rounding, too.
    tolerances = (("*_rate", Tolerance()), ("*", Tolerance(0.2, relative=0.01, intervals=0.5)))

    name: str
    compared: tuple[str, ...] = among(*COMPARED, default=COMPARED)
    surrogate: str = among(*SURROGATES, default="score")
    inner_rate: float = 0.5
    trajectories: int = 20
    limit: float = 0.01
    curvature: int = 4
    horizon: int = 100
    hidden: tuple[int, ...] = (100, 100)
    meta_batch: int = 20
    iterations: int = 100
    outer: str = "sgd"
    outer_rate: float = 1.0
    seed: int = 0
    seeds: int = 3
    test_tasks: int = 40
    test_trajectories: int = 40
    test_steps: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_rates: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0)
    tuning_tasks: int = 10
    evaluate_every: int = 25
    start: str | None = None
    paper: str = "maml"

    def config(self) -> dict[str, Any]:
        """The fields as JSON; a start that there is not is not named."""
        return {key: value for key, value in super().config().items() if key != "start" or value}

    def data(self) -> dict[str, Any]:
        """Goals are drawn, not stored; a start has a digest."""
        if not self.start:
            return super().data()
        digest = checkpoints.digest("", checkpoints.load_theta(self.start))
        return super().data() | {"start": self.start, "start_sha256": digest}

    def env(self, sees_goal: bool = False) -> Navigation:
        """The plane, with a goal in sight for the oracle."""
        return Navigation(horizon=self.horizon, sees_goal=sees_goal)

    def policy(self, env: Navigation) -> GaussianPolicy:
        """The released code's: ReLU, Glorot's first weights, and deviations that adapt, from 1."""
        mean = MLP((env.observation_size, *self.hidden, env.action_size), scale="xavier")
        return GaussianPolicy(mean, first_std=1.0, smallest_std=0.0, first_scale=1.0)

    def setup(self, device: torch.device, compiled: bool) -> NavigationTraining:
        return NavigationTraining(self, device)


class NavigationTraining(Run):
    """The navigation study on one device."""

    def __init__(self, experiment: NavigationStudy, device: torch.device) -> None:
        e = self.experiment = experiment
        self.device = device
        self.search = self._search(sees_goal=False, steps=1)
        self.learner = self.search.learner
        searches = {
            "maml": self.search,
            "pretrained": self._search(sees_goal=False, steps=0),
            "oracle": self._search(sees_goal=True, steps=0),
        }
        self.searches = {kind: search for kind, search in searches.items() if kind in ("maml", *e.compared)}

    def _search(self, sees_goal: bool, steps: int) -> PolicySearch:
        e = self.experiment
        env = e.env(sees_goal)
        learner = policy_descent(e.policy(env), e.surrogate, e.inner_rate, steps)
        # As a function, since training puts in another clock.
        return PolicySearch(env, learner, e.trajectories, e.limit, e.curvature, lambda: self.check_clock())

    def init(self, generator: torch.Generator) -> Params:
        """A start for each seed, which all methods share as far as they see the same; no step tried."""
        e = self.experiment
        if e.start:
            return {name: value.to(self.device) for name, value in checkpoints.load_theta(e.start).items()}

        def each(policy: GaussianPolicy) -> list[Params]:
            return seeds.of_their_own(policy.init, e.seed, e.seeds, self.device)

        found = {kind: each(search.learner.model) for kind, search in self.searches.items()}
        theta = seeds.numbered(
            [
                {f"{kind}/{name}": value for kind, own in found.items() for name, value in own[number].items()}
                for number in range(e.seeds)
            ]
        )
        return theta | {STEPS + kind: torch.zeros(e.seeds, 2, device=self.device) for kind in self.searches}

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """θ minus what a trust-region step of every method and seed makes of it, and minus the mean return of MAML's
        query sets."""
        e = self.experiment
        counts = {STEPS + kind: torch.zeros(e.seeds, 2, device=self.device) for kind in self.searches}

        def one(number: int, theta: Params) -> tuple[Params, Tensor]:
            draws = seeds.draws_of(generator)
            goals, change, losses = e.env().goals(e.meta_batch, draws), {}, []
            for kind, search in self.searches.items():
                own = subtree_of(theta, kind)
                moved, returns = search(own, goals, draws)
                change |= {f"{kind}/{name}": value - moved.theta[name] for name, value in own.items()}
                counts[STEPS + kind][number] = torch.tensor([-1.0, -float(moved.factor > 0)])
                losses.append(-returns.mean())
            return change, losses[0]

        change, loss = seeds.one_by_one(one, theta, e.seeds)
        return change | counts, loss

    def policies(self, theta: Params, kind: str) -> list[Params]:
        """The policy of every seed; random ones are those that training began with."""
        e = self.experiment
        if kind == "random":
            return seeds.of_their_own(self.learner.model.init, e.seed, e.seeds, self.device)
        return [subtree_of(theta, f"{number}/{kind}") for number in range(e.seeds)]

    def returns(self, search: PolicySearch, policies: list[Params], goals: Tensor, rates: Sequence[float]) -> Tensor:
        """Returns ``[len(rates) + 1, seeds, goals]`` before and after steps at these rates, all with the same noise."""
        n, found = self.experiment.test_trajectories, []
        for policy in policies:
            draws = runtime.generator(TEST_SEED, self.device)
            found.append(search.returns(policy, goals.to(self.device), rates, n, draws))
        return torch.stack(found, 1).nan_to_num(nan=-1e6).cpu()

    def rates(self, first: float) -> tuple[float, ...]:
        """As in the paper: half of the first rate from the second step on."""
        return (first, *[first / 2] * max(self.experiment.test_steps))[: max(self.experiment.test_steps)]

    def tuned(self, policies: list[Params]) -> float:
        """Of the rates the one with the best returns after the steps, on goals of its own."""
        e = self.experiment
        goals = e.env().goals(e.tuning_tasks, runtime.generator(TUNING_SEED))
        ends = [self.returns(self.search, policies, goals, self.rates(rate))[1:].mean() for rate in e.tuning_rates]
        return e.tuning_rates[int(torch.stack(ends).argmax())]

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """What needs no baseline: MAML's returns on all test goals."""
        e = self.experiment
        every = self.returns(self.search, self.policies(theta, "maml"), self._goals(), self.rates(e.inner_rate))
        return self._entered("spot_maml", every)

    def _goals(self) -> Tensor:
        return self.experiment.env().published_goals(self.experiment.test_tasks)

    def _entered(self, kind: str, values: Tensor) -> dict[str, Interval]:
        """``{kind}_return_{steps}`` with intervals over seeds, and ``…_by_goal`` with those over goals, of returns
        ``[steps, seeds, goals]``."""
        found = {}
        for k in (k for k in self.experiment.test_steps if k < len(values)):
            found[f"{kind}_return_{k}"] = over_runs(values[k])
            found[f"{kind}_return_{k}_by_goal"] = interval(values[k].mean(0))
        return found

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Mean returns at the paper's test goals, ``{method}_return_{steps}``, with intervals over training seeds, and
        ``{method}_return_{steps}_by_goal`` with intervals over goals.

        Methods: ``maml``; ``constant``, its policies at its rate in all steps; and what it is compared with.
        ``{method}_rate`` is what was tuned, and ``{method}_taken`` the share of outer steps that found a length.
        """
        e, goals = self.experiment, self._goals()
        metrics = both_names(self.spot_check(theta))
        constant, own = [e.inner_rate] * max(e.test_steps), self.policies(theta, "maml")
        metrics |= self._entered("constant", self.returns(self.search, own, goals, constant))
        for kind in e.compared:
            own = self.policies(theta, kind)
            if kind == "oracle":
                metrics |= self._entered(kind, self.returns(self.searches[kind], own, goals, ()))
                continue
            rate = self.tuned(own)
            metrics |= self._entered(kind, self.returns(self.search, own, goals, self.rates(rate)))
            metrics[f"{kind}_rate"] = chosen(rate)
        for kind in self.searches:
            tried, taken = theta[STEPS + kind].unbind(-1)
            metrics[f"{kind}_taken"] = over_seeds(taken / tried.clamp(min=1))
        headline = f"maml_return_{sorted(e.test_steps)[:2][-1]}"
        return {headline: metrics[headline]} | metrics


def experiments() -> list[NavigationStudy]:
    """The study at the rate of the released code; on from there; and what changes with the rate and the surrogate."""
    return [
        NavigationStudy("maml-navigation"),
        NavigationStudy("maml-navigation-slow", inner_rate=0.1, compared=()),
        NavigationStudy("maml-navigation-ratio", surrogate="ratio", compared=()),
        NavigationStudy("maml-navigation-long", iterations=200, start="maml-navigation", seed=1),
    ]
