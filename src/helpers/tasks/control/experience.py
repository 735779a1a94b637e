"""Experience of a stochastic policy: drawn actions, rewards to go, advantages, and what a loss sees of it.

An action is counted in units of the environment's ``max_action``. The reward of a step is

    r = −‖p − g‖ − control_cost · ‖a‖²,

with p the position after it (m for the point mass; joint angles in rad for the arm), g the goal and a the action, cut
to [−1, 1]. A *return* is the sum over the horizon, thus about −horizon times the mean distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from helpers.models.policies import GaussianPolicy, log_probability
from helpers.tasks.control.types import Control
from helpers.types import Examples, Params


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
