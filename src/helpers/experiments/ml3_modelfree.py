"""A learned loss for policies whose environment is a black box: ML3 without a model, against PPO.

A policy is improved by descending a learned loss on trajectories that it has sampled. Nothing is differentiated through
the environment: where the learned loss led to is judged by the score-function gradient on fresh trajectories. The paper
gives no code and few constants for this part; what is not its own is said where it stands.

Here an action is counted in units of the environment's ``max_action``, for every method alike. The reward of a step is

    r = −‖p − g‖ − control_cost · ‖a‖²,

with p the position after it (m for the point mass; joint angles in rad for the arm), g the goal and a the action, cut
to [−1, 1]. A *return* is the sum over the horizon, thus about −horizon times the mean distance.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map
from tqdm import tqdm

from helpers import evaluation, metagradients, runtime
from helpers.experiments import Recorded, both_names
from helpers.learners import LossDescent
from helpers.losses import LearnedLoss
from helpers.models import MLP, Params, stacked
from helpers.runtime import UserError
from helpers.tasks import Examples
from helpers.tasks.control import Control, PointMass, Reacher
from helpers.tracing import linearized

TEST_SEED = 20_190_612  # of the test goals, policies and noise; the same for every experiment and every evaluation
TUNING_SEED = 1  # of the training goals that PPO is tuned on


# ---------------------------------------- policies and what they sample


@dataclass(frozen=True)
class GaussianPolicy:
    """Actions from a normal distribution with independent coordinates: its mean is a network's, its deviation free.

    Parameters are those of ``mean`` and ``log_std`` ``[actions]``; the deviation is ``smallest_std`` + exp(log_std), so
    that no update ends the exploration. Called, it gives mean and deviation ``[n, 2 actions]``.

    Attributes:
        mean: from an observation to an action, in units of ``max_action``.
        first_std: the deviation before any update.
        smallest_std: its lower bound.
        first_scale: factor of the last layer's first values, so that all policies begin with hardly any force.
    """

    mean: MLP
    first_std: float = 0.5
    smallest_std: float = 0.1
    first_scale: float = 0.1

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        params = self.mean.init(generator, dtype)
        params |= {name: self.first_scale * value for name, value in params.items() if name.startswith(self.head)}
        log_std = torch.full_like(params["linear1.bias"][:1], self.first_std - self.smallest_std).log()
        return params | {"log_std": log_std.repeat(self.mean.sizes[-1])}

    @property
    def head(self) -> str:
        """The last layer of the mean."""
        return self.mean.head

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Mean and deviation, ``[n, 2 actions]``, at observations ``x`` ``[n, observation]``."""
        mean = self.mean(params, x)
        return torch.cat([mean, (self.smallest_std + params["log_std"].exp()).expand_as(mean)], -1)

    def adapts(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all."""
        return True


def log_probability(outputs: Tensor, action: Tensor) -> Tensor:
    """Log density of actions ``[..., actions]`` under ``outputs`` ``[..., 2 actions]``, mean and deviation; ``[...]``.

    The density is that of the action as it was drawn, before the environment's limits cut it.
    """
    mean, std = outputs.chunk(2, -1)
    return (-((action - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2).sum(-1)


class Experience(NamedTuple):
    """Sampled trajectories; the leading axes ``[..., n]`` are policies and their trajectories.

    Attributes:
        observations: ``[..., n, horizon, observation]``.
        actions: ``[..., n, horizon, actions]``, as drawn, in units of ``max_action``.
        rewards: ``[..., n, horizon]``.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor

    @property
    def returns(self) -> Tensor:
        """Sum of the rewards of each trajectory, ``[..., n]``."""
        return self.rewards.sum(-1)


def reward(env: Control, state: Tensor, action: Tensor, goal: Tensor, control_cost: float) -> Tensor:
    """The reward of arriving at ``state`` ``[..., 4]`` by ``action`` ``[..., 2]``: ``[...]``.

    Args:
        goal: position, m, or joint angles, rad; broadcast against ``state[..., :2]``.
        control_cost: in m or rad, for a full action.
    """
    away = torch.linalg.vector_norm(state[..., :2] - goal, dim=-1)
    return -away - control_cost * action.clamp(-1, 1).square().sum(-1)


def act(
    env: Control,
    policy: GaussianPolicy,
    control_cost: float,
    params: Params,
    state: Tensor,
    goal: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of several policies.

    Args:
        params: tensors ``[policies, ...]``.
        state: ``[policies, n, state]``.
        goal: ``[policies, 1, 2]``.
        noise: standard normal, ``[policies, n, actions]``.

    Returns:
        Observation, action, reward and the next state.
    """
    seen = env.observe(state, goal)
    mean, std = vmap(policy)(params, seen).chunk(2, -1)
    action = mean + std * noise
    state = env.step(state, env.max_action * action)
    return seen, action, reward(env, state, action, goal, control_cost), state


def sample(
    env: Control,
    policy: GaussianPolicy,
    params: Params,
    goal: Tensor,
    start: Tensor,
    noise: Tensor,
    control_cost: float = 0.0,
    step: Callable = act,
) -> Experience:
    """Let each policy follow its own goal, as often as there is noise for.

    Args:
        params: tensors ``[policies, ...]``.
        goal: ``[policies, 2]``.
        start: ``[policies, n, state]``.
        noise: standard normal, ``[policies, n, horizon, actions]``.
        control_cost: see :func:`reward`.
        step: :func:`act`, or the same recorded.
    """
    state, taken = start, []
    with torch.no_grad():
        for now in noise.unbind(-2):
            *seen, state = step(env, policy, control_cost, params, state, goal[:, None], now)
            taken.append(seen)
    observations, actions, rewards = zip(*taken, strict=True)
    return Experience(torch.stack(observations, 2), torch.stack(actions, 2), torch.stack(rewards, 2))


def to_go(rewards: Tensor) -> Tensor:
    """What is still to come, this step's included: ``[..., horizon]``, like the rewards."""
    return rewards.flip(-1).cumsum(-1).flip(-1)


def advantages(rewards: Tensor) -> Tensor:
    """Rewards to go, less their mean over the trajectories at the same step, in units of their deviation.

    The deviation is one for all steps of a policy's trajectories. So goals near and far, and policies early and late,
    weigh the same in the outer objective; the paper has the plain return.

    Args:
        rewards: ``[..., n, horizon]``.
    """
    future = to_go(rewards)
    future = future - future.mean(-2, keepdim=True)
    return future / (future.square().mean((-1, -2), keepdim=True).sqrt() + 1e-6)


# ---------------------------------------- the learned loss


def experience_features(x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
    """What a learned loss sees of a step: observation, mean, deviation, action, log density; and the rest of ``y``.

    Args:
        x: observations ``[n, observation]``, which contain the goal.
        outputs: the policy's mean and deviation ``[n, 2 actions]``.
        y: ``[n, actions]``, or with more columns, such as rewards.
    """
    chance = log_probability(outputs, y[:, : outputs.shape[-1] // 2])
    return torch.cat([x, outputs, y, chance[:, None]], -1)


def surrogate(outputs: Tensor, y: Tensor) -> Tensor:
    """The outer objective: minus the mean of advantage times log density.

    Its gradient is that of the expected return, estimated by the score function.

    Args:
        outputs: mean and deviation ``[n, 2 actions]``.
        y: action and advantage ``[n, actions + 1]``.

    Source: Bechtle et al. (2020), section on model-free reinforcement learning: L_T = −E[R(τ) log π(τ)].
    """
    return -(y[:, -1] * log_probability(outputs, y[:, :-1])).mean()


def support(experience: Experience, rewards: bool = False) -> Examples:
    """Trajectories as the learned loss gets them, all steps of a policy in one row.

    Args:
        experience: of several policies.
        rewards: add the rewards to go, standardised as by :func:`advantages`.

    Returns:
        ``x`` ``[policies, n · horizon, observation]``, ``y`` ``[policies, n · horizon, actions (+ 1)]``.
    """
    y = experience.actions
    if rewards:
        y = torch.cat([y, advantages(experience.rewards)[..., None]], -1)
    return Examples(experience.observations.flatten(1, 2), y.flatten(1, 2))


def query(experience: Experience) -> Examples:
    """Trajectories as :func:`surrogate` takes them, with advantages."""
    return support(experience, rewards=True)


# ---------------------------------------- the recorded experiments


@dataclass(frozen=True)
class ModelFree(Recorded):
    """A learned loss for Gaussian policies, several seeds side by side, and PPO on the same goals.

    An outer iteration draws goals and fresh policies, and makes ``updates`` updates of each, all by the present learned
    loss. Each is judged by itself, one step deep, on the trajectories that the next one will then learn from; the
    gradients are added up.

    Attributes:
        task: ``"pointmass"`` or ``"reacher"``.
        max_action: what an action of 1 is: N for the point mass; times the gear, N m for the arm.
        control_cost: see :func:`reward`.
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
    task: str = "pointmass"
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
    outer_rate_final: float = 5e-4
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

    def data(self) -> dict[str, Any]:
        """Goals and starts are drawn, not stored."""
        return {"data": self.task}

    def environment(self) -> PointMass | Reacher:
        """The black box; an episode of the arm is that of Reacher-v5, 50 steps of 0.02 s.

        Each of these is one Runge-Kutta step, not two: twice as fast, and the same to 1e-6 rad.

        Raises:
            UserError: for an unknown task.
        """
        kinds = {"pointmass": PointMass, "reacher": partial(Reacher, dt=0.02, substeps=1, horizon=50)}
        if self.task not in kinds:
            raise UserError(f"there is no task {self.task!r}: use {' or '.join(kinds)}")
        return kinds[self.task](max_action=self.max_action)

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
        """Make the learner."""
        return ModelFreeTraining(self, device)


class ModelFreeTraining:
    """The model-free study on one device."""

    def __init__(self, experiment: ModelFree, device: torch.device) -> None:
        self.experiment, self.device = experiment, device
        self.env, self.learner = experiment.environment(), experiment.learner()
        self.step = metagradients.traced(act)
        self.update = metagradients.traced(self._update)
        self.differentiable_update = linearized(self._update, by=(0,))
        self.judge = metagradients.traced(self._judge)

    def _update(self, theta: Params, params: Params, given: Examples) -> Params:
        """One update of every policy, ``[seeds, policies, ...]``."""
        step = vmap(self.learner.step, in_dims=(None, 0, 0))
        return vmap(step)(theta, params, given)

    def _judge(self, moved: Params, fresh: Examples) -> tuple[Params, Tensor]:
        """Gradients of the outer objective by the updated policies, and its values, ``[seeds, policies, ...]``."""
        return vmap(vmap(grad_and_value(self.learner.query_loss)))(moved, fresh)

    def one_step(self, theta: Params, params: Params, given: Examples, judged: Callable) -> tuple[Params, Params]:
        """The meta-gradient of one update: ∂θ_new/∂ψ, transposed, times the outer gradient at θ_new.

        Args:
            theta: learned losses ``[seeds, ...]``.
            params: policies ``[seeds, policies, ...]``.
            given: what the update learns from, ``[seeds, policies, ...]``.
            judged: from the updated policies to fresh trajectories, as :func:`query` gives them.

        Returns:
            The gradient of the outer objective's mean over the policies, and the updated policies.
        """
        moved, pull = self.differentiable_update(theta, params, given)
        outer, _ = self.judge(moved, judged(moved))
        count = next(iter(outer.values())).shape[1]
        (gradient,) = pull({name: value / count for name, value in outer.items()})
        return gradient, moved

    def init(self, generator: torch.Generator) -> Params:
        """θ ``[seeds, ...]``: learned losses, and no policies."""
        return stacked([self.learner.init(generator) for _ in range(self.experiment.seeds)])

    def policies(self, count: int, generator: torch.Generator) -> Params:
        """Fresh policies ``[seeds, count, ...]``."""
        drawn = stacked([self.learner.model.init(generator) for _ in range(self.experiment.seeds * count)])
        return self._apart(drawn)

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
        return tree_map(lambda t: t.unflatten(0, (self.experiment.seeds, -1)), tree)

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
                params = self.update(theta, params, self._apart(support(met, e.rewards)))
        return torch.stack(found).cpu()

    def spot_check(self, theta: Params) -> dict[str, evaluation.Interval]:
        """What needs no PPO: the returns by the learned loss."""
        returns = self.returns(theta).mean(-1)
        return {f"spot_ml3_return_{n}": evaluation.over_seeds(returns[n]) for n in self.experiment.test_updates}

    def evaluate(self, theta: Params) -> dict[str, evaluation.Interval]:
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

    def _ppo(self) -> dict[str, evaluation.Interval]:
        """PPO, tuned on training goals for the best return after its last update."""
        e = self.experiment
        training = self.env.goals(e.ppo_goals, runtime.generator(TUNING_SEED))
        test = self.tests()[0][: e.test_goals].cpu()
        bar = tqdm(total=len(e.ppo_settings) * e.ppo_goals + e.seeds * e.test_goals, desc="PPO", leave=False)

        def run(goal: Tensor, setting: tuple[float, int, float], seed: int) -> Tensor:
            bar.update()
            return ppo(e, goal, setting, max(e.ppo_updates), seed)

        with bar:
            tuned = [
                torch.stack([run(goal, setting, seed) for seed, goal in enumerate(training)])[:, -1].mean()
                for setting in e.ppo_settings
            ]
            best = e.ppo_settings[int(torch.stack(tuned).argmax())]
            runs = [[run(goal, best, 1000 * (1 + seed) + i) for i, goal in enumerate(test)] for seed in range(e.seeds)]
        returns = torch.stack([torch.stack(goals).mean(0) for goals in runs])
        found = {f"ppo_return_{n}": evaluation.over_seeds(returns[:, n]) for n in e.ppo_updates}
        for name, value in zip(("rate", "epochs", "discount"), best, strict=True):
            found[f"ppo_{name}"] = evaluation.Interval(float(value), math.nan, 1)
        return found


# ---------------------------------------- PPO


def _needed(package: str) -> Any:
    """The package, or the sentence that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0].replace("_", "-")
        raise UserError(f'{name} is not installed and is needed here: pip install -e ".[control]"') from None


def as_gymnasium(env: PointMass | Reacher, goal: Tensor, control_cost: float = 0.0, seed: int = 0) -> Any:
    """One goal of a task as a ``gymnasium.Env``.

    Actions are in [−1, 1], observations and rewards those of this module, as float32 and float; an episode is
    truncated at the horizon and never terminates.

    Args:
        goal: ``[2]``.
        seed: of the starts, until ``reset`` is given another.

    Raises:
        UserError: where gymnasium is not installed.
    """
    gymnasium = _needed("gymnasium")
    spaces = gymnasium.spaces

    class OneGoal(gymnasium.Env):
        """The state is a tensor ``[4]``."""

        def __init__(self) -> None:
            self.draws, self.state, self.time = runtime.generator(seed), None, 0
            size = env.observe(env.reset(1, runtime.generator(seed)), goal).shape[-1]
            self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
            self.action_space = spaces.Box(-1.0, 1.0, (env.action_size,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            if seed is not None:
                self.draws = runtime.generator(seed)
            self.state, self.time = env.reset(1, self.draws)[0], 0
            return env.observe(self.state, goal).numpy(), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            drawn = torch.as_tensor(action, dtype=torch.float32)
            self.state, self.time = env.step(self.state, env.max_action * drawn), self.time + 1
            gained = reward(env, self.state, drawn, goal, control_cost).item()
            return env.observe(self.state, goal).numpy(), gained, False, self.time >= env.horizon, {}

    return OneGoal()


def _side_by_side(e: ModelFree, goal: Tensor, seed: int) -> Any:
    """As many of :func:`as_gymnasium` as an update takes trajectories, stepped as one batch, for stable-baselines3."""
    vectors = _needed("stable_baselines3.common.vec_env")
    env, n = e.environment(), e.trajectories
    one = as_gymnasium(env, goal, e.control_cost)

    class SideBySide(vectors.VecEnv):
        """``returns`` collects the mean return of each round of episodes."""

        def __init__(self) -> None:
            self.draws, self.returns, self.actions = runtime.generator(seed), [], None
            super().__init__(n, one.observation_space, one.action_space)

        def reset(self) -> np.ndarray:
            self.state, self.time, self.total = env.reset(n, self.draws), 0, 0.0
            return env.observe(self.state, goal).numpy()

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = torch.as_tensor(actions)

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
            self.state, self.time = env.step(self.state, env.max_action * self.actions), self.time + 1
            gained = reward(env, self.state, self.actions, goal, e.control_cost)
            self.total += gained.mean().item()
            seen, over = env.observe(self.state, goal).numpy(), self.time >= env.horizon
            infos = [{"terminal_observation": last, "TimeLimit.truncated": True} if over else {} for last in seen]
            if over:
                self.returns.append(self.total)
                seen = self.reset()
            return seen, gained.numpy(), np.full(n, over), infos

        def close(self) -> None:
            pass

        def get_attr(self, attr_name: str, indices: Any = None) -> list:
            return [getattr(one, attr_name)] * n

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise UserError("environments side by side are not changed from outside: make new ones")

        def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list:
            raise UserError("environments side by side are not changed from outside: make new ones")

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            return [False] * n

    return SideBySide()


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the global generators, which stable-baselines3 seeds and uses, as they were found."""
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)


def ppo(e: ModelFree, goal: Tensor, setting: Sequence[float], updates: int, seed: int) -> Tensor:
    """Train a fresh policy for one goal by proximal policy optimisation, with a value function of its own.

    An update is what follows ``e.trajectories`` trajectories: all epochs over their steps, in minibatches as long as a
    trajectory. The rest is left to the library's defaults.

    Args:
        goal: ``[2]``.
        setting: learning rate, epochs, discount.

    Returns:
        Mean return of the trajectories sampled after 0, 1, … ``updates`` updates, ``[updates + 1]``.

    Raises:
        UserError: where stable-baselines3 is not installed.

    Source: Schulman et al. (2017); the implementation is stable-baselines3's.
    """
    library = _needed("stable_baselines3")
    rate, epochs, discount = setting
    with _own_randomness():
        world, horizon = _side_by_side(e, goal, seed), e.environment().horizon
        model = library.PPO(
            "MlpPolicy", world, rate, n_steps=horizon, batch_size=horizon, n_epochs=epochs,
            gamma=discount, seed=seed, device="cpu",
            policy_kwargs={"net_arch": list(e.hidden), "log_std_init": math.log(e.first_std)},
        )  # fmt: skip
        model.learn((updates + 1) * model.n_steps * world.num_envs)
    return torch.tensor(world.returns)


def experiments() -> list[ModelFree]:
    """The point mass and the arm."""
    return [
        ModelFree("ml3-pointmass-free"),
        ModelFree("ml3-reacher-free", task="reacher", max_action=0.1),
    ]
