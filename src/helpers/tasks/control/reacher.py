"""An arm with two joints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.tasks.control.checks import (
    check_matching,
    check_positive,
    check_size,
    goal_for,
    length_of,
    uniform_between,
)
from helpers.tasks.control.types import Trajectory
from helpers.validate import whole

__all__ = ["Reacher"]


@dataclass(frozen=True)
class Reacher:
    """A planar arm of two links, the arm of gymnasium's Reacher-v5 without MuJoCo.

    State ``[q1, q2, q̇1, q̇2]`` (rad, rad/s): shoulder angle from the x axis and elbow angle from the first link.
    Action: two numbers that, times ``gear``, are the torques in N m. With M(q) the mass matrix,

        M(q) q̈ + c(q, q̇) + damping · q̇ = torque,

    integrated by the classical Runge-Kutta method, ``substeps`` times ``dt`` a step, with the torque held. Gravity is
    along the joints' axes and does nothing.

    The links are capsules of radius ``radius`` (a cylinder as long as the link, a half ball at each end), with a ball
    for the fingertip; their masses and inertias follow from ``density``. The joints' ``armature``, an inertia of the
    motors that is added to the diagonal of M, is some thousand times the arm's own: by default the joints hardly feel
    each other. With ``armature=0`` they do.

    Joint limits are left out. In Reacher-v5 the elbow meets a soft one at ±3 rad; the shoulder has none there. The arm
    touches nothing in either.

    Attributes:
        upper: length of the first link, m.
        fore: length of the second link, m.
        tip: distance of the fingertip from the elbow, m.
        radius: of links and fingertip, m.
        density: kg/m³; MuJoCo's default.
        armature: kg m².
        damping: N m s.
        gear: N m for an action of 1.
        dt: s. Reacher-v5 makes two such substeps a step; the ML3 public code one.
        start_angle: first angles are drawn from [−start_angle, start_angle], rad; ML3 starts at 0.
        start_speed: the same for angular velocities, rad/s.
        goal_radii: distance of goals from the shoulder, m. Reacher-v5 draws from the whole disc, some of which is
            nearer than the arm can fold within its limits.
        speed_scale: what a policy sees of a velocity is divided by this, rad/s.
        horizon: steps, 65 in the ML3 public code.

    Raises:
        UserError: when a number that must be positive, or finite, is not, or goals are out of reach.

    Source: Bechtle et al. (2021), section on model-based reinforcement learning; constants of gymnasium's
    ``reacher.xml``. The arm of the ML3 public code is another: the same geometry in another simulator, no gear, no
    damping.
    """

    upper: float = 0.1
    fore: float = 0.1
    tip: float = 0.11
    radius: float = 0.01
    density: float = 1000.0
    armature: float = 1.0
    damping: float = 1.0
    gear: float = 200.0
    dt: float = 0.01
    substeps: int = 2
    max_action: float = 1.0
    start_angle: float = 0.1
    start_speed: float = 0.005
    goal_radii: tuple[float, float] = (0.02, 0.2)
    speed_scale: float = 8.0
    horizon: int = 65

    state_size: ClassVar[int] = 4
    action_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_positive(self, "upper", "fore", "tip", "radius", "density", "gear", "dt", "max_action", "speed_scale")
        check_positive(self, "armature", "damping", "start_angle", "start_speed", zero=True)
        whole(self.substeps, "number of substeps")
        whole(self.horizon, "horizon of the reacher")
        near, far = self.goal_radii
        if not abs(self.upper - self.tip) <= near < far <= self.upper + self.tip:
            raise UserError(
                f"goals at {near} to {far} m are not all within the arm's reach: "
                f"choose goal_radii within {abs(self.upper - self.tip):.3g} and {self.upper + self.tip:.3g} m"
            )

    @cached_property
    def _inertia(self) -> tuple[float, float, float]:
        """In kg m²: the arm about the shoulder and the second link about the elbow, both but for the terms with cos q2;
        and the factor of cos q2."""

        def capsule(length: float) -> tuple[float, float]:
            """Mass and inertia about an end of the cylinder, across the axis."""
            r = self.radius
            tube, ball = self.density * math.pi * r**2 * length, self.density * 4 / 3 * math.pi * r**3
            centre = tube * (3 * r**2 + length**2) / 12 + ball * (0.4 * r**2 + length**2 / 4 + 3 / 8 * length * r)
            return tube + ball, centre + (tube + ball) * length**2 / 4

        ball = self.density * 4 / 3 * math.pi * self.radius**3
        _, shoulder = capsule(self.upper)
        mass, elbow = capsule(self.fore)
        elbow += ball * (0.4 * self.radius**2 + self.tip**2)
        shoulder += elbow + (mass + ball) * self.upper**2
        return shoulder, elbow, self.upper * (mass * self.fore / 2 + ball * self.tip)

    def mass_matrix(self, state: Tensor) -> Tensor:
        """M(q), armature included, ``[..., 2, 2]`` in kg m², of ``state`` ``[..., 4]``."""
        first, cross, last = self._entries(state)
        return torch.stack([torch.stack([first, cross], -1), torch.stack([cross, last], -1)], -2)

    def _entries(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shoulder, elbow, coupling = self._inertia
        bend = coupling * torch.cos(state[..., 1])
        return shoulder + self.armature + 2 * bend, elbow + bend, torch.full_like(bend, elbow + self.armature)

    def _bias(self, state: Tensor) -> Tensor:
        """Torques that keep the joints at constant velocity: Coriolis and centrifugal forces, and damping."""
        _, q2, v1, v2 = state.unbind(-1)
        twist = self._inertia[2] * torch.sin(q2)
        turning = torch.stack([-twist * v2 * (2 * v1 + v2), twist * v1 * v1], -1)
        return turning + self.damping * state[..., 2:]

    def acceleration(self, state: Tensor, torque: Tensor) -> Tensor:
        """Forward dynamics: angular accelerations ``[..., 2]``, rad/s², under ``torque`` ``[..., 2]``, N m."""
        first, cross, last = self._entries(state)
        t1, t2 = (torque - self._bias(state)).unbind(-1)
        determinant = first * last - cross * cross
        return torch.stack([last * t1 - cross * t2, first * t2 - cross * t1], -1) / determinant[..., None]

    def inverse_dynamics(self, state: Tensor, acceleration: Tensor) -> Tensor:
        """The torques ``[..., 2]``, N m, that accelerate the joints by ``acceleration`` ``[..., 2]``, rad/s².

        The exact inverse of :meth:`acceleration`; divided by ``gear`` it is an action, which may exceed the limits.
        """
        check_size(state, 4, "state")
        check_size(acceleration, 2, "acceleration")
        return (self.mass_matrix(state) @ acceleration[..., None])[..., 0] + self._bias(state)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state ``substeps · dt`` later: ``state`` ``[..., 4]``, ``action`` ``[..., 2]``, result ``[..., 4]``."""
        check_matching(self, state, action)
        torque, h = self.gear * action.clamp(-self.max_action, self.max_action), self.dt

        def slope(s: Tensor) -> Tensor:
            return torch.cat([s[..., 2:], self.acceleration(s, torque)], -1)

        for _ in range(self.substeps):
            k1 = slope(state)
            k2 = slope(state + h / 2 * k1)
            k3 = slope(state + h / 2 * k2)
            k4 = slope(state + h * k3)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return state

    def joints(self, state: Tensor) -> Tensor:
        """Forward kinematics: shoulder, elbow and fingertip, ``[..., 3, 2]`` in m, of ``state`` ``[..., 2 or 4]``."""
        q1, q12 = state[..., 0], state[..., 0] + state[..., 1]
        elbow = self.upper * torch.stack([q1.cos(), q1.sin()], -1)
        return torch.stack([torch.zeros_like(elbow), elbow, elbow + self._fore(q12)], -2)

    def fingertip(self, state: Tensor) -> Tensor:
        """Position of the fingertip, ``[..., 2]`` in m, of ``state`` ``[..., 2 or 4]``."""
        return self.joints(state)[..., 2, :]

    def _fore(self, angle: Tensor) -> Tensor:
        return self.tip * torch.stack([angle.cos(), angle.sin()], -1)

    def inverse_kinematics(self, point: Tensor) -> Tensor:
        """Joint angles ``[..., 2]`` in rad, elbow bent to the left (q2 ≥ 0), that put the fingertip at ``point``.

        Of a point out of reach, those that point the arm towards it.

        Args:
            point: ``[..., 2]``, m.
        """
        check_size(point, 2, "point")
        x, y = point.unbind(-1)
        cosine = (x * x + y * y - self.upper**2 - self.tip**2) / (2 * self.upper * self.tip)
        q2 = torch.acos(cosine.clamp(-1, 1))
        q1 = torch.atan2(y, x) - torch.atan2(self.tip * q2.sin(), self.upper + self.tip * q2.cos())
        return torch.stack([torch.remainder(q1 + math.pi, 2 * math.pi) - math.pi, q2], -1)

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` arms, nearly straight and at rest, ``[n, 4]``, on the generator's device."""
        whole(n, "number of starts")
        state = uniform_between((n, 4), -1, 1, generator, dtype)
        return state * state.new_tensor([self.start_angle] * 2 + [self.start_speed] * 2)

    def goals(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` goals as joint angles ``[n, 2]``, rad, of points drawn uniformly between ``goal_radii``."""
        whole(n, "number of goals")
        near, far = self.goal_radii
        radius = uniform_between((n,), near**2, far**2, generator, dtype).sqrt()
        angle = uniform_between((n,), -math.pi, math.pi, generator, dtype)
        return self.inverse_kinematics(radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1))

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor:
        """Angles, velocities over ``speed_scale``, goal, and the goal's velocities, which are 0: ``[..., 8]``.

        Raises:
            UserError: without a goal ``[..., 2]``.
        """
        goal = goal_for(goal, state)
        return torch.cat([state[..., :2], state[..., 2:] / self.speed_scale, goal, torch.zeros_like(goal)], -1)

    def distance(self, state: Tensor, goal: Tensor) -> Tensor:
        """Of the fingertip from where it is at the goal's angles, ``[...]`` in m."""
        return (self.fingertip(state) - self.fingertip(goal)).norm(dim=-1)

    def loss(self, trajectory: Trajectory, goal: Tensor) -> Tensor:
        """10 ‖q_T − g‖ + mean ‖q − g‖ + 10⁻⁴ mean ‖q̇‖ of joint angles, the means over all states; ``[...]``.

        Args:
            trajectory: leading axes ``[...]``.
            goal: joint angles ``[..., 2]``, rad.
        """
        goal = goal_for(goal, trajectory.states[..., 0, :])
        away = length_of(trajectory.states[..., :2] - goal[..., None, :])
        return 10 * away[..., -1] + away.mean(-1) + 1e-4 * length_of(trajectory.states[..., 2:]).mean(-1)
