"""A point mass that is pushed to a goal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from helpers.tasks.control.checks import check_matching, check_positive, goal_for, length_of, uniform_between
from helpers.tasks.control.types import Trajectory
from helpers.validate import whole

__all__ = ["PointMass"]


@dataclass(frozen=True)
class PointMass:
    """A mass pushed over a plane with friction: x and y are independent double integrators with damping.

    State ``[x, y, vx, vy]`` (m, m/s), action ``[fx, fy]`` (N). A step is v ← v + dt · (f − damping · v) / mass, cut to
    ``max_speed``, then p ← p + dt · v; at a wall the velocity into it is lost.

    The public code of ML3 has no point mass, so these constants are plain round numbers. The goals can be reached: a
    mass under full force passes 1 m in 1.4 s of the 5 s.

    Attributes:
        mass: kg.
        damping: N s/m.
        dt: s.
        wall: largest coordinate, m.
        goal_box: goals are drawn from [−goal_box, goal_box]², m.
        control_cost: weight of the squared force in the loss, in m/N².

    Raises:
        UserError: when a number that must be positive, or finite, is not.
    """

    mass: float = 1.0
    damping: float = 0.1
    dt: float = 0.1
    wall: float = 2.0
    max_speed: float = 2.0
    max_action: float = 1.0
    goal_box: float = 1.0
    control_cost: float = 1e-3
    horizon: int = 50

    state_size: ClassVar[int] = 4
    action_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_positive(self, "mass", "dt", "wall", "max_speed", "max_action", "goal_box")
        check_positive(self, "damping", "control_cost", zero=True)
        whole(self.horizon, "horizon of the point mass")

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` masses at rest in the middle, ``[n, 4]``, on the generator's device; nothing is drawn."""
        whole(n, "number of starts")
        return torch.zeros(n, 4, dtype=dtype, device=generator.device)

    def goals(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` positions to reach, ``[n, 2]`` in m, on the generator's device."""
        whole(n, "number of goals")
        return uniform_between((n, 2), -self.goal_box, self.goal_box, generator, dtype)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state one ``dt`` later: ``state`` ``[..., 4]``, ``action`` ``[..., 2]``, result ``[..., 4]``."""
        check_matching(self, state, action)
        p, v = state[..., :2], state[..., 2:]
        force = action.clamp(-self.max_action, self.max_action)
        v = (v + self.dt * (force - self.damping * v) / self.mass).clamp(-self.max_speed, self.max_speed)
        p = p + self.dt * v
        v = torch.where(p.abs() > self.wall, torch.zeros_like(v), v)
        return torch.cat([p.clamp(-self.wall, self.wall), v], -1)

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor:
        """State and goal, ``[..., 6]``.

        Raises:
            UserError: without a goal ``[..., 2]``.
        """
        return torch.cat([state, goal_for(goal, state)], -1)

    def distance(self, state: Tensor, goal: Tensor) -> Tensor:
        """Of the mass from the goal, ``[...]`` in m."""
        return (state[..., :2] - goal).norm(dim=-1)

    def loss(self, trajectory: Trajectory, goal: Tensor) -> Tensor:
        """Mean distance from the goal, m, plus ``control_cost`` times the mean squared force; ``[...]``."""
        goal = goal_for(goal, trajectory.states[..., 0, :])
        away = length_of(trajectory.states[..., :2] - goal[..., None, :]).mean(-1)
        return away + self.control_cost * trajectory.actions.square().sum(-1).mean(-1)
