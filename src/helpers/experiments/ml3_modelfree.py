"""A learned loss for policies whose environment is a black box: ML3 without a model, against PPO.

A policy is improved by descending a learned loss on trajectories that it has sampled. Nothing is differentiated through
the environment: where the learned loss led to is judged by the score-function gradient on fresh trajectories. The paper
gives no code and few constants for this part; what is not its own is said where it stands.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers import runtime
from helpers.estimators.black_box import OneStep
from helpers.experiments.ml3_study import TOLERANCES
from helpers.fields import among
from helpers.lab import seeds, statistics
from helpers.lab.experiment import Experiment
from helpers.lab.seeds import SideBySide
from helpers.lab.statistics import both_names, chosen
from helpers.learners.learned import LossDescent
from helpers.learners.ppo import tuned_ppo
from helpers.losses import LearnedLoss
from helpers.models.mlp import MLP
from helpers.models.policies import GaussianPolicy
from helpers.numerics import tracing
from helpers.tasks.control.experience import Experience, act, experience_features, query, sample, support, surrogate
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.types import Examples, Params

TEST_SEED = 20_190_612  # of the test goals, policies and noise; the same for every experiment and every evaluation
TUNING_SEED = 1  # of the training goals that PPO is tuned on


@dataclass(frozen=True)
class ModelFree(Experiment):
    """A learned loss for Gaussian policies, several seeds side by side, and PPO on the same goals.

    An outer iteration draws goals and fresh policies, and makes ``updates`` updates of each, all by the present learned
    loss. Each is judged by itself, one step deep, on the trajectories that the next one will then learn from; the
    gradients are added up.

    Attributes:
        task: ``"pointmass"`` or ``"reacher"``.
        max_action: what an action of 1 is: N for the point mass; times the gear, N m for the arm.
        control_cost: see :func:`~helpers.tasks.control.experience.reward`.
        hidden: layers of the policy (and of PPO's policy and value function).
        first_std: deviation of the actions before any update, for PPO too.
        loss_hidden: layers of the learned loss.
        rewards: whether the learned loss sees rewards, at meta-test time too. Without, it judges what was done from
            what it knows of the task.
        inner_rate: of the policy's descent.
        trajectories: sampled for each update, by PPO too.
        updates: of each policy in meta-training.
        goals: policies, each with a goal of its own, of an iteration and seed.
        test_goals: new goals, the same for all seeds and for PPO.
        test_updates: numbers of updates after which returns are reported; may go beyond ``updates``.
        ppo_updates: the same for PPO.
        ppo_settings: learning rate, epochs and discount that PPO is tuned over.
        ppo_goals: training goals that it is tuned on.
    """

    name: str
    task: str = among("pointmass", "reacher", default="pointmass")
    max_action: float = 1.0
    control_cost: float = 1e-3
    hidden: tuple[int, ...] = (32, 32)
    first_std: float = 0.5
    loss_hidden: tuple[int, ...] = (40, 40)
    rewards: bool = False
    inner_rate: float = 2.0
    trajectories: int = 8
    updates: int = 5
    goals: int = 8
    iterations: int = 1200
    outer_rate: float = 5e-3
    outer_rate_final: float | None = 5e-4
    outer_rate_hold: int = 600
    seed: int = 0
    seeds: int = 5
    test_goals: int = 8
    test_updates: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 7, 10)
    ppo_updates: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 7, 10, 20)
    ppo_settings: tuple[tuple[float, int, float], ...] = (
        (3e-4, 10, 0.99),  # the library's defaults
        (1e-3, 10, 0.99),
        (3e-3, 10, 0.99),
        (3e-3, 10, 0.9),
    )
    ppo_goals: int = 2
    evaluate_every: int = 200
    paper: str = "ml3"

    tolerances = TOLERANCES

    def data(self) -> dict[str, Any]:
        """Goals and starts are drawn, not stored."""
        return {"data": self.task}

    def environment(self) -> PointMass | Reacher:
        """The black box; an episode of the arm is that of Reacher-v5, 50 steps of 0.02 s.

        Each of these is one Runge-Kutta step, not two: twice as fast, and the same to 1e-6 rad.
        """
        if self.task == "pointmass":
            return PointMass(max_action=self.max_action)
        return Reacher(max_action=self.max_action, dt=0.02, substeps=1, horizon=50)

    def learner(self) -> LossDescent:
        """The policy, what it descends, and what the descent is judged by."""
        env, draws = self.environment(), torch.Generator().manual_seed(0)
        seen = env.observe(env.reset(1, draws), env.goals(1, draws)).shape[-1]
        mean = MLP((seen, *self.hidden, env.action_size), scale=None, activation="tanh")
        width = seen + 3 * env.action_size + 1 + self.rewards
        body = MLP((width, *self.loss_hidden, 1), scale=None, activation="tanh")
        learned = LearnedLoss(body, experience_features, positive=False)
        return LossDescent(GaussianPolicy(mean, self.first_std), surrogate, self.inner_rate, learned=learned)

    def setup(self, device: torch.device, compiled: bool) -> ModelFreeTraining:
        return ModelFreeTraining(self, device)


class ModelFreeTraining(SideBySide):
    """The model-free study on one device; θ are learned losses, and no policies."""

    def __init__(self, experiment: ModelFree, device: torch.device) -> None:
        super().__init__(experiment, device)
        self.env = experiment.environment()
        self.step, self.one_step = tracing.traced(act), OneStep(self.learner)

    def policies(self, count: int, generator: torch.Generator) -> Params:
        """Fresh policies ``[seeds, count, ...]``."""
        return self._apart(seeds.fresh(self.learner.model.init, self.experiment.seeds * count, generator))

    def experience(self, params: Params, goal: Tensor, generator: torch.Generator) -> Experience:
        """Trajectories ``[seeds · policies, trajectories, ...]`` of policies ``[seeds, policies, ...]``."""
        e, env, count = self.experiment, self.env, len(goal)
        start = env.reset(count * e.trajectories, generator).unflatten(0, (count, e.trajectories))
        shape = (count, e.trajectories, env.horizon, env.action_size)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        params = {name: value.flatten(0, 1) for name, value in params.items()}
        return sample(env, self.learner.model, params, goal, start, noise, e.control_cost, self.step)

    def _apart(self, tree: Any) -> Any:
        """``[seeds · policies, ...]`` as ``[seeds, policies, ...]``."""
        return seeds.apart(tree, self.experiment.seeds, -1)

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """The sum over the updates of their one-step meta-gradients, and minus the mean return after them."""
        e = self.experiment
        goal = self.env.goals(e.seeds * e.goals, generator)
        params = self.policies(e.goals, generator)
        met, total, losses = self.experience(params, goal, generator), None, []

        def judged(moved: Params) -> Examples:
            nonlocal met
            met = self.experience(moved, goal, generator)
            return self._apart(query(met))

        for _ in range(e.updates):
            self.check_clock()
            given = self._apart(support(met, e.rewards))
            step, params = self.one_step(theta, params, given, judged)
            total = step if total is None else {name: total[name] + g for name, g in step.items()}
            losses.append(-met.returns.mean())
        return total, torch.stack(losses).mean()

    def tests(self) -> tuple[Tensor, Params, torch.Generator]:
        """Test goals ``[seeds · test_goals, 2]``, the same for every seed; fresh policies; and noise to come."""
        e, draws = self.experiment, runtime.generator(TEST_SEED)
        goal = self.env.goals(e.test_goals, draws).repeat(e.seeds, 1)
        return goal.to(self.device), tree_map(lambda t: t.to(self.device), self.policies(e.test_goals, draws)), draws

    def returns(self, theta: Params) -> Tensor:
        """Returns of new policies on new goals after 0, 1, 2 … updates, ``[max(test_updates) + 1, seeds, test_goals]``.

        Each is the mean over the trajectories that the next update learns from.
        """
        e = self.experiment
        goal, params, draws = self.tests()
        noise = torch.Generator(device=self.device).manual_seed(draws.initial_seed())
        found = []
        for update in range(max(e.test_updates) + 1):
            met = self.experience(params, goal, noise)
            found.append(self._apart(met.returns.mean(-1)))
            if update < max(e.test_updates):
                params = self.one_step.update(theta, params, self._apart(support(met, e.rewards)))
        return torch.stack(found).cpu()

    def spot_check(self, theta: Params) -> dict[str, statistics.Interval]:
        """What needs no PPO: the returns by the learned loss."""
        measured = list(self.experiment.test_updates)
        return statistics.by_steps("spot_ml3_return", measured, self.returns(theta).mean(-1)[measured])

    def evaluate(self, theta: Params) -> dict[str, statistics.Interval]:
        """Returns on new goals, by the learned loss and, where stable-baselines3 is installed, by PPO.

        ``ml3_return_{updates}`` and ``ppo_return_{updates}`` after as many updates, 0 being fresh policies; means over
        the goals, intervals over the seeds. ``ppo_rate``, ``ppo_epochs`` and ``ppo_discount`` are what PPO was tuned
        to.
        """
        e = self.experiment
        metrics = both_names(self.spot_check(theta))
        if importlib.util.find_spec("stable_baselines3"):
            metrics |= self._ppo()
        headline = f"ml3_return_{e.updates}"
        return {headline: metrics[headline]} | metrics

    def _ppo(self) -> dict[str, statistics.Interval]:
        """PPO, tuned on training goals for the best return after its last update."""
        e = self.experiment
        training = self.env.goals(e.ppo_goals, runtime.generator(TUNING_SEED))
        test = self.tests()[0][: e.test_goals].cpu()
        best, returns = tuned_ppo(e, training, test, e.ppo_settings, max(e.ppo_updates), e.seeds)
        found = statistics.by_steps("ppo_return", e.ppo_updates, returns[:, list(e.ppo_updates)].T)
        for name, value in zip(("rate", "epochs", "discount"), best, strict=True):
            found[f"ppo_{name}"] = chosen(float(value))
        return found


def experiments() -> list[ModelFree]:
    """The point mass and the arm."""
    return [
        ModelFree("ml3-pointmass-free"),
        ModelFree("ml3-reacher-free", task="reacher", max_action=0.1),
    ]
