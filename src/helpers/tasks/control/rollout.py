"""Acting in an environment: one trajectory of a policy, differentiable, or many random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.models.mlp import MLP
from helpers.tasks.control.checks import check_size, uniform_between
from helpers.tasks.control.types import Control, Trajectory, Transitions
from helpers.types import Params
from helpers.validate import whole

__all__ = ["Rollout", "random_rollouts", "rollout"]


def rollout(
    env: Control,
    policy: Callable[[Any, Tensor], Tensor],
    params: Any,
    start: Tensor,
    goal: Tensor | None = None,
    horizon: int | None = None,
    step: Callable[[Tensor, Tensor], Tensor] | None = None,
    constant_observations: bool = False,
) -> Trajectory:
    """Follow a policy from ``start`` for ``horizon`` steps.

    Args:
        env: the environment; its ``max_action`` limits what the policy says.
        policy: ``policy(params, observation) -> action`` with ``observation`` ``[n, observation_size]`` and ``action``
            ``[n, action_size]``, such as a :class:`~helpers.models.mlp.MLP`. All leading axes come to it as one.
        params: whatever the policy takes.
        start: states ``[..., state_size]``.
        goal: handed to ``env.observe``; leading axes that broadcast against those of ``start``.
        horizon: number of steps; ``env.horizon`` unless given.
        step: moves the state in place of ``env.step``, such as learned dynamics.
        constant_observations: treat what the policy sees as constants in derivatives, as the ML3 public code does for
            the reacher: the feedback through the policy is then missing.

    Returns:
        The trajectory, differentiable in ``params``, ``start`` and ``goal``.

    Raises:
        UserError: for a horizon that is not a positive whole number, or a start of the wrong size.
    """
    horizon = env.horizon if horizon is None else horizon
    whole(horizon, "horizon of a rollout")
    check_size(start, env.state_size, "state")
    move, state, states, actions = step or env.step, start, [start], []
    for _ in range(horizon):
        seen = env.observe(state, goal)
        said = policy(params, (seen.detach() if constant_observations else seen).reshape(-1, seen.shape[-1]))
        actions.append(said.reshape(*state.shape[:-1], -1).clamp(-env.max_action, env.max_action))
        state = move(state, actions[-1])
        states.append(state)
    return Trajectory(torch.stack(states, -2), torch.stack(actions, -2))


@dataclass(frozen=True)
class Rollout:
    """A policy in an environment, as a model: its input is where to start, its output is what happens.

    So a learner that descends a loss of a network's outputs descends a loss of trajectories, and needs to know nothing
    of control. Parameters are the policy's.

    Attributes:
        env: the environment.
        policy: a network from what ``env.observe`` shows to an action.
        step: moves the state in place of ``env.step``, such as learned dynamics.
        horizon: number of steps; ``env.horizon`` unless given.
        constant_observations: as in :func:`rollout`.
    """

    env: Control
    policy: MLP
    step: Callable[[Tensor, Tensor], Tensor] | None = None
    horizon: int | None = None
    constant_observations: bool = False

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters of the policy."""
        return self.policy.init(generator, dtype)

    @property
    def head(self) -> str:
        """Prefix of the parameters of the policy's last layer."""
        return self.policy.head

    def is_adapted(self, name: str) -> bool:
        """Whether a parameter adapts; what the policy adapts does."""
        return self.policy.is_adapted(name)

    def __call__(self, params: Params, x: Tensor) -> Trajectory:
        """``n`` trajectories from ``x`` ``[n, state_size]``, or ``[n, state_size + 2]`` with a goal beside each."""
        start, goal = x[..., : self.env.state_size], x[..., self.env.state_size :]
        return rollout(
            self.env, self.policy, params, start, goal if goal.shape[-1] else None, self.horizon, self.step,
            self.constant_observations,
        )  # fmt: skip


def random_rollouts(
    env: Control, n: int, horizon: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Transitions:
    """``n`` rollouts from ``env.reset`` under actions drawn uniformly within the limits, on the generator's device.

    Raises:
        UserError: for a number of rollouts or a horizon that is not a positive whole number.
    """
    whole(n, "number of rollouts")
    whole(horizon, "horizon of a rollout")
    states = [env.reset(n, generator, dtype)]
    actions = uniform_between((n, horizon, env.action_size), -env.max_action, env.max_action, generator, dtype)
    for t in range(horizon):
        states.append(env.step(states[-1], actions[:, t]))
    path = torch.stack(states, 1)
    return Transitions(path[:, :-1], actions, path[:, 1:])
