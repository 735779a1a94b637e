"""The recorded experiments of the ML3 chapter in which a learned loss improves a policy through a model of the world.

Model-based reinforcement learning: policies are followed in an environment, or a model of one, that can be
differentiated (:mod:`helpers.tasks.control.rollout`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from helpers import runtime
from helpers.experiments.ml3_study import TEST_SEED, TUNING_SEED, Metrics, Ml3Experiment, Training, table
from helpers.fields import among
from helpers.lab import seeds
from helpers.lab.statistics import chosen
from helpers.learners.descent import CARRIED
from helpers.learners.learned import LossDescent
from helpers.losses import LearnedLoss
from helpers.models.layers import stacked, subtree
from helpers.models.mlp import MLP
from helpers.tasks.control.ensemble import ensemble_step, fit_ensemble
from helpers.tasks.control.mountain_car import MountainCar
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.control.rollout import Rollout
from helpers.tasks.control.seen import seen_of_reaching, seen_of_the_car
from helpers.tasks.control.types import Trajectory
from helpers.types import Examples, Params, Started, Tasks

DYNAMICS = CARRIED + "dynamics:"  # prefix, in θ, of learned dynamics: kept with the checkpoint, left alone by training


# ---------------------------------------- mountain car
@dataclass(frozen=True)
class Car(Ml3Experiment):
    """A loss for the mountain car, with an intermediate goal at meta-training or without.

    The learned loss sees state, action and the distance at the end, a constant, of every step. It is judged by whether
    policies that descend it, which are told neither goal, reach the top.

    Attributes:
        shaped: meta-train with the intermediate goal.
        policies: first policies that there are for each seed. The public code has one, in training and at test; None
            draws a new one for every task.
        test_policies: new ones.
        arrived: how near to the goal's position counts as having reached it.
        hidden: width of the policy's inner layer.
        loss_width: of the learned loss.
        tuning_rates: for the task's own loss.
    """

    inner_rate: float = 1e-3
    meta_batch: int = 4
    iterations: int = 1_000
    evaluate_every: int = 500
    shaped: bool = True
    policies: int | None = None
    hidden: int = 200
    loss_width: int = 400
    test_policies: int = 20
    test_steps: tuple[int, ...] = (0, 1, 2, 5, 10)
    arrived: float = 0.05
    tuning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)

    def env(self) -> MountainCar:
        """The car, differentiated through its limits as in the public code."""
        return MountainCar(through=True)

    def learner(self) -> LossDescent:
        """A linear policy of two factors, and the public code's loss network."""
        env = self.env()
        policy = MLP((2, self.hidden, 1), scale=None, activation="identity", bias=False)
        body = MLP((4, self.loss_width, self.loss_width, 1), scale=None, activation="elu")

        def loss(trajectory: Trajectory, y: Tensor) -> Tensor:
            return env.loss(trajectory, self.shaped).mean()

        learned = LearnedLoss(body, seen_of_the_car, positive=False)
        return LossDescent(Rollout(env, policy), loss, self.inner_rate, self.inner_steps, learned=learned)

    def tasks(self, count: int, generator: torch.Generator) -> Started:
        """Always the same start at rest in the valley and the same goal; what differs is the policy."""
        env = self.env()
        x = env.reset(count, generator)[:, None]
        examples = Examples(x, x.new_tensor(env.goal).expand_as(x))
        return self.from_starts(Tasks(examples, examples), self.policies, generator)

    def judge(self, run: Training, theta: Params) -> Metrics:
        """``{kind}_reached_{updates}`` (share of policies that reach the top) and ``{kind}_gap_{updates}`` (distance
        of the goal from the farthest position).

        Kinds: ``ml3``; ``task``, the task's own loss at the best of several rates, with the extra information if the
        experiment has it; ``same``, for ``ml3`` from the policies of meta-training, where these are few."""
        m: Metrics = {}
        env, steps, fresh = self.env(), self.test_steps, replace(self, policies=None)
        count = self.test_policies
        tests, others = (run.common(fresh.tasks(count, runtime.generator(s))) for s in (TEST_SEED, TUNING_SEED))
        rate = run.tuned(theta, self.tuning_rates, others, min(10, max(steps)))

        def gap(phi: Params, query: Examples) -> Tensor:
            return env.gap(run.learner.model(phi, query.x)).mean()

        def enter(kind: str, gaps: Tensor) -> None:
            table(m, f"{kind}_reached", steps, (gaps <= self.arrived).double())
            table(m, f"{kind}_gap", steps, gaps)

        enter("ml3", run.learned(theta, tests, steps, gap))
        enter("task", run.plain(theta, tests, steps, rate, gap))
        if self.policies is not None:
            same = run.draw(self.policies, runtime.generator(TEST_SEED))
            enter("same", run.learned(theta, same, steps, gap))
        m["tuned_rate"] = chosen(rate)
        return {"reached": m["ml3_reached_2"]} | m


# ---------------------------------------- point mass and reacher
@dataclass(frozen=True)
class Reaching(Ml3Experiment):
    """A loss that brings a point mass or a two-link arm to goals, new ones among them.

    The meta-gradient goes through a model of the dynamics: the mass's own, or an ensemble of networks fitted to random
    motion of the arm. Judged in the true environment.

    Attributes:
        body: ``"mass"`` or ``"arm"``.
        goals: goals that there are in training. The public code has one; None draws new ones.
        loss_width: of the learned loss.
        policies: first policies that there are for each seed. The public code has one; None draws new ones.
        sees_goal: the learned loss sees the goal itself. In the public code it sees the distance at the end, a number
            that does not tell where to go.
        members: networks of the ensemble; none is the exact dynamics.
        member_hidden: width of such a network's layers.
        member_epochs: of fitting it.
        rollouts: random ones for each seed's ensemble.
        horizon: of a rollout; None is the environment's own, 50 steps of the mass and 65 of the arm.
        test_goals: new goals, with a new policy each.
        tuning_rates: for the task's own loss.
    """

    inner_rate: float = 1e-4
    way: int = 1
    meta_batch: int = 4
    iterations: int = 1_000
    outer_rate: float = 1e-2
    evaluate_every: int = 500
    body: str = among("mass", "arm", default="arm")
    goals: int | None = None
    policies: int | None = None
    sees_goal: bool = True
    hidden: tuple[int, ...] = (64, 64)
    loss_width: int = 400
    members: int = 0
    member_hidden: tuple[int, ...] = (100, 30)
    member_epochs: int = 60
    rollouts: int = 30
    horizon: int | None = None
    test_goals: int = 20
    test_steps: tuple[int, ...] = (0, 1, 2, 3, 5, 10, 20)
    tuning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

    def env(self) -> PointMass | Reacher:
        """The environment. The arm has the public code's one substep of 0.01 s and a tenth of Reacher-v5's torque, 20
        N m, with which a random policy does not spin it."""
        env = PointMass() if self.body == "mass" else Reacher(substeps=1, gear=20.0)
        return env if self.horizon is None else replace(env, horizon=self.horizon)

    def learner(self) -> LossDescent:
        """The policy that is followed in the environment; in learned dynamics once it is bound to them."""
        env = self.env()
        seen = 6 if self.body == "mass" else 8
        policy = MLP((seen, *self.hidden, 2), scale=None, activation="tanh")
        width = env.state_size + 2 + 1 + 2 * self.sees_goal
        body = MLP((width, self.loss_width, self.loss_width, 1), scale=None, activation="elu")
        learned = LearnedLoss(body, partial(seen_of_reaching, env, self.sees_goal))
        # As in the public code a policy's observations are constants for the derivatives through an arm.
        model = Rollout(env, policy, constant_observations=self.body == "arm")

        def loss(trajectory: Trajectory, y: Tensor) -> Tensor:
            return env.loss(trajectory, y).mean()

        return LossDescent(model, loss, self.inner_rate, self.inner_steps, learned=learned)

    def tasks(self, count: int, generator: torch.Generator) -> Started:
        """Initial states with goals, and the policies that each task starts from."""
        env = self.env()
        start = env.reset(count, generator)
        if self.goals is None:
            goals = env.goals(count, generator)
        else:
            which = torch.randint(self.goals, (count,), generator=generator, device=generator.device)
            goals = env.goals(self.goals, runtime.generator(1)).to(generator.device)[which]
        examples = Examples(torch.cat([start, goals], -1)[:, None], goals[:, None])
        return self.from_starts(Tasks(examples, examples), self.policies, generator)

    def setup(self, device: torch.device, compiled: bool) -> ReachingTraining:
        return ReachingTraining(self, device)

    def distance(self, phi: Params, query: Examples) -> Tensor:
        """Distance from the goal at the end, in m, in the true environment."""
        last = self.learner().model(phi, query.x).states[..., -1, :]
        return self.env().distance(last, query.y).mean()

    def judge(self, run: Training, theta: Params) -> Metrics:
        """``{kind}_distance_{updates}`` and ``{kind}_loss_{updates}`` at new goals.

        Kinds: ``ml3``; ``same``, the task's own loss at the same rate; ``task``, at the best of several rates, chosen
        on other goals."""
        m: Metrics = {}
        steps, fresh = self.test_steps, replace(self, goals=None, policies=None)
        count = self.test_goals
        tests, others = (run.common(fresh.tasks(count, runtime.generator(s))) for s in (TEST_SEED, TUNING_SEED))
        rate = run.tuned(theta, self.tuning_rates, others, min(10, max(steps)), run.learner.query_loss)
        rates = {"ml3": None, "same": self.inner_rate, "task": rate}
        for what, measure in (("distance", self.distance), ("loss", run.learner.query_loss)):
            m |= run.compared(theta, tests, steps, what, rates, measure)
        m["tuned_rate"] = chosen(rate)
        return {"distance": m["ml3_distance_2"]} | m


class ReachingTraining(Training):
    """A reaching study; with ``members`` each seed has dynamics of its own in θ, fitted once, under ``DYNAMICS``."""

    def init(self, generator: torch.Generator) -> Params:
        """Fresh ψ and, where there are any, fitted dynamics; ``[seeds, ...]``."""
        theta = super().init(generator)
        return theta | self._fitted(generator) if self.experiment.members else theta

    def _fitted(self, generator: torch.Generator) -> Params:
        e = self.experiment

        def fitted(draws: torch.Generator) -> Params:
            return fit_ensemble(e.env(), draws, e.members, e.member_hidden, e.member_epochs, e.rollouts)

        each = seeds.of_their_own(fitted, e.seed, e.seeds, generator.device)
        return {DYNAMICS + name: value for name, value in stacked(each).items()}

    def bound(self, theta: Params, learner: LossDescent) -> LossDescent:
        """The learner whose policies are followed in the dynamics of θ."""
        dynamics = subtree(theta, DYNAMICS)
        if not dynamics:
            return learner
        step = partial(ensemble_step, self.experiment.env(), dynamics)
        return learner.replace(model=replace(learner.model, step=step))


def experiments() -> list[Ml3Experiment]:
    """The control experiments of the chapter, the most important first."""
    public = {"goals": 1, "policies": 1, "sees_goal": False}
    arm = {"body": "arm", "members": 3}
    one = {"policies": 1, "meta_batch": 1, "seeds": 8}
    return [
        Car("ml3-mountain-car-one", **one),
        Car("ml3-mountain-car-one-plain", **one, shaped=False),
        Car("ml3-mountain-car"),
        Car("ml3-mountain-car-plain", shaped=False),
        Reaching("ml3-point-mass", body="mass", outer_rate=1e-3, inner_rate=1e-2, way=3, iterations=600),
        Reaching("ml3-reacher", **arm),
        Reaching("ml3-reacher-one", **arm, **public),
    ]
