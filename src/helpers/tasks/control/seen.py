"""What a learned loss sees of the trajectories of a policy, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.control.types import Trajectory


def seen_of_the_car(x: Tensor, trajectory: Trajectory, y: Tensor) -> Tensor:
    """(state, action, distance at the end) of every step, ``[n * horizon, 4]``; the distance is a constant."""
    away = (trajectory.states[..., -1, :] - y).detach().norm(dim=-1)
    return _of_steps(trajectory.states[..., :-1, :], trajectory.actions, away)


def seen_of_reaching(env: PointMass | Reacher, goal: bool, x: Tensor, trajectory: Trajectory, y: Tensor) -> Tensor:
    """(state, action, distance at the end) of every step and, if ``goal``, the goal. Of the arm's, actions alone have
    derivatives."""
    states, actions = trajectory.states, trajectory.actions
    away = (states[..., -1, :2] - y).detach().norm(dim=-1)
    if isinstance(env, Reacher):
        states = states.detach() / states.new_tensor([1.0, 1.0, env.speed_scale, env.speed_scale])
    states = states[..., :-1, :]
    if goal:
        states = torch.cat([states, y[..., None, :].expand(*states.shape[:-1], -1)], -1)
    return _of_steps(states, actions, away)


def _of_steps(states: Tensor, actions: Tensor, ends: Tensor) -> Tensor:
    """What a loss sees of every step, ``[n * horizon, ...]``; ``ends`` ``[n]`` is the same for all steps."""
    features = torch.cat([states, actions, ends[..., None, None].expand(*actions.shape[:-1], 1)], -1)
    return features.flatten(0, -2)
