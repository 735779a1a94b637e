"""The mountain car with continuous actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.tasks.control.checks import check_matching, check_positive, length_of, uniform_between
from helpers.tasks.control.types import Trajectory
from helpers.validate import finite, whole

__all__ = ["MountainCar"]


@dataclass(frozen=True)
class MountainCar:
    """A car too weak for the hill in front of it: it must first back up the hill behind.

    State ``[position, velocity]``, action ``[force]``. A step is

        v ← v + dt · (power · a − pull · cos 3x − friction · v),  x ← x + dt · v,

    then both are cut to their limits, and a car that drives into the left wall stops. The right end only holds the
    position.

    The defaults are ML3's: mass 0.2 and gravity −9.8 are here ``power`` 1/0.2 and ``pull`` 0.2 · 9.8 (the public code
    does multiply gravity by the mass). The goal (0.5, 1.0375) and the intermediate goal (−0.947, −0.0055) are *states*,
    position and velocity: what a car has after 30 and after 15 steps that goes backwards with full force for 15 steps
    and forwards from then on. They are not points of the hill, which the public code draws as sin 3x: that is 0.9975
    and −0.296 high there.

    :meth:`gymnasium` has the constants of gymnasium's MountainCarContinuous-v0.

    Attributes:
        positions: left and right end.
        speed_first: the velocity is cut before it moves the car (gymnasium) instead of after (ML3).
        starts: range of the first position; the first velocity is 0.
        goal: position and velocity.
        waypoint: the intermediate goal, or None.
        waypoint_until: number of states, the start among them, that are judged by the intermediate goal.
        through: let derivatives pass the limits of state as though these were not there, as in the ML3 public code.

    Raises:
        UserError: when a number that must be positive, or finite, is not, or a range is empty.

    Source: Bechtle et al. (2021), section on shaping with extra information; constants of the public code.
    """

    power: float = 1 / 0.2
    pull: float = 0.2 * 9.8
    friction: float = 0.3
    dt: float = 0.1
    positions: tuple[float, float] = (-1.2, 0.5)
    max_speed: float = 1.5
    max_action: float = 0.25
    speed_first: bool = False
    starts: tuple[float, float] = (-0.55, -0.55)
    goal: tuple[float, float] = (0.5, 1.0375)
    waypoint: tuple[float, float] | None = (-0.947, -0.0055)
    waypoint_until: int = 15
    horizon: int = 35
    through: bool = False

    state_size: ClassVar[int] = 2
    action_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_positive(self, "dt", "max_speed", "max_action")
        for name in ("power", "pull", "friction"):
            finite(getattr(self, name), f"{name} of MountainCar")
        whole(self.horizon, "horizon of the mountain car")
        if not self.positions[0] < self.positions[1]:
            raise UserError(f"the car's left end must lie left of its right end, not {self.positions}")

    @classmethod
    def gymnasium(cls) -> MountainCar:
        """The constants of MountainCarContinuous-v0, where time is counted in steps and the goal is 0.45."""
        return cls(
            power=0.0015,
            pull=0.0025,
            friction=0.0,
            dt=1.0,
            positions=(-1.2, 0.6),
            max_speed=0.07,
            max_action=1.0,
            speed_first=True,
            starts=(-0.6, -0.4),
            goal=(0.45, 0.0),
            waypoint=None,
            horizon=999,
        )

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` cars at rest, ``[n, 2]``, on the generator's device."""
        whole(n, "number of starts")
        position = uniform_between((n, 1), *self.starts, generator, dtype)
        return torch.cat([position, torch.zeros_like(position)], -1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state one ``dt`` later: ``state`` ``[..., 2]``, ``action`` ``[..., 1]``, result ``[..., 2]``."""
        check_matching(self, state, action)

        def cut(y: Tensor, low: float, high: float) -> Tensor:
            limited = y.clamp(low, high)  # with `through`: its value, and the derivatives of y
            return limited.detach() + (y - y.detach()) if self.through else limited

        x, v = state.unbind(-1)
        force = action[..., 0].clamp(-self.max_action, self.max_action)
        fast = v + self.dt * (self.power * force - self.pull * torch.cos(3 * x) - self.friction * v)
        v = cut(fast, -self.max_speed, self.max_speed)
        far = x + self.dt * (v if self.speed_first else fast)
        stopped = v - v.detach() if self.through else torch.zeros_like(v)
        v = torch.where((far <= self.positions[0]) & (v < 0), stopped, v)
        x = cut(far, *self.positions)
        return torch.stack([x, v], -1)

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor:
        """The state itself, ``[..., 2]``; the goal is always the same and not shown."""
        return state

    def height(self, position: Tensor) -> Tensor:
        """The hill as the ML3 public code draws it, sin 3x; the dynamics use its shape only."""
        return torch.sin(3 * position)

    def gap(self, trajectory: Trajectory) -> Tensor:
        """What the farthest position lacks to the goal's, ``[...]``; negative beyond it."""
        return self.goal[0] - trajectory.states[..., 0].amax(-1)

    def loss(self, trajectory: Trajectory, shaped: bool = False) -> Tensor:
        """Distance of all states, as one long vector, from the goal; not a mean over time.

        Args:
            trajectory: leading axes ``[...]``.
            shaped: give the extra information: the first ``waypoint_until`` states are compared with the intermediate
                goal instead, and the two distances added.

        Returns:
            ``[...]``.

        Raises:
            UserError: with ``shaped``, if there is no intermediate goal or the trajectory ends before it is left.
        """
        states = trajectory.states
        goal = states.new_tensor(self.goal)
        if not shaped:
            return length_of((states - goal).flatten(-2))
        if self.waypoint is None:
            raise UserError("this mountain car has no intermediate goal: give it a waypoint, or ask for the plain loss")
        if states.shape[-2] <= self.waypoint_until:
            raise UserError(
                f"the shaped loss needs more than {self.waypoint_until} states, not {states.shape[-2]}: "
                "use a longer horizon or a smaller waypoint_until"
            )
        first, second = states[..., : self.waypoint_until, :], states[..., self.waypoint_until :, :]
        waypoint = states.new_tensor(self.waypoint)
        return length_of((first - waypoint).flatten(-2)) + length_of((second - goal).flatten(-2))
