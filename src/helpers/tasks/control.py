"""Control problems that can be differentiated: a car on a hill, a point mass and a two-link arm, in torch alone.

An environment holds numbers only. ``env.step(state, action)`` is a pure function of tensors with any leading axes, so
that a whole rollout has derivatives of any order, and works under ``vmap``. An action beyond its limits acts as the
limit; derivatives are those of what is computed, thus 0 beyond a limit.

There is no episode end and no reward. :func:`rollout` gives the states and actions of a fixed horizon, and
``env.loss`` says how good they were, one number for each trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from helpers.models import MLP, Params
from helpers.runtime import UserError
from helpers.validate import finite, positive, whole

__all__ = [
    "Control",
    "MountainCar",
    "PointMass",
    "Reacher",
    "Rollout",
    "Trajectory",
    "Transitions",
    "random_rollouts",
    "rollout",
]


class Trajectory(NamedTuple):
    """What happened in a rollout.

    Attributes:
        states: ``[..., horizon + 1, state_size]``; the first is the start.
        actions: ``[..., horizon, action_size]``, within the limits.
    """

    states: Tensor
    actions: Tensor


class Transitions(NamedTuple):
    """Single steps, to fit a model of the dynamics to.

    Attributes:
        state: ``[n, horizon, state_size]``.
        action: ``[n, horizon, action_size]``, within the limits.
        next_state: ``[n, horizon, state_size]``.
    """

    state: Tensor
    action: Tensor
    next_state: Tensor


class Control(Protocol):
    """An environment: how it starts, how it moves, and what a policy sees of it."""

    state_size: ClassVar[int]
    action_size: ClassVar[int]
    max_action: float
    horizon: int

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def step(self, state: Tensor, action: Tensor) -> Tensor: ...

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor: ...


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
            ``[n, action_size]``, such as a :class:`~helpers.models.MLP`. All leading axes come to it as one.
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
    _sized(start, env.state_size, "state")
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
        """The policy's last layer."""
        return self.policy.head

    def adapts(self, name: str) -> bool:
        """Whether a parameter adapts; what the policy adapts does."""
        return self.policy.adapts(name)

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
    actions = _uniform((n, horizon, env.action_size), -env.max_action, env.max_action, generator, dtype)
    for t in range(horizon):
        states.append(env.step(states[-1], actions[:, t]))
    path = torch.stack(states, 1)
    return Transitions(path[:, :-1], actions, path[:, 1:])


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
        _positive(self, "dt", "max_speed", "max_action")
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
        position = _uniform((n, 1), *self.starts, generator, dtype)
        return torch.cat([position, torch.zeros_like(position)], -1)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state one ``dt`` later: ``state`` ``[..., 2]``, ``action`` ``[..., 1]``, result ``[..., 2]``."""
        _matching(self, state, action)

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
            return _length((states - goal).flatten(-2))
        if self.waypoint is None:
            raise UserError("this mountain car has no intermediate goal: give it a waypoint, or ask for the plain loss")
        if states.shape[-2] <= self.waypoint_until:
            raise UserError(
                f"the shaped loss needs more than {self.waypoint_until} states, not {states.shape[-2]}: "
                "use a longer horizon or a smaller waypoint_until"
            )
        first, second = states[..., : self.waypoint_until, :], states[..., self.waypoint_until :, :]
        waypoint = states.new_tensor(self.waypoint)
        return _length((first - waypoint).flatten(-2)) + _length((second - goal).flatten(-2))


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
        _positive(self, "mass", "dt", "wall", "max_speed", "max_action", "goal_box")
        _positive(self, "damping", "control_cost", zero=True)
        whole(self.horizon, "horizon of the point mass")

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` masses at rest in the middle, ``[n, 4]``, on the generator's device; nothing is drawn."""
        whole(n, "number of starts")
        return torch.zeros(n, 4, dtype=dtype, device=generator.device)

    def goals(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` positions to reach, ``[n, 2]`` in m, on the generator's device."""
        whole(n, "number of goals")
        return _uniform((n, 2), -self.goal_box, self.goal_box, generator, dtype)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state one ``dt`` later: ``state`` ``[..., 4]``, ``action`` ``[..., 2]``, result ``[..., 4]``."""
        _matching(self, state, action)
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
        return torch.cat([state, _goal(goal, state)], -1)

    def loss(self, trajectory: Trajectory, goal: Tensor) -> Tensor:
        """Mean distance from the goal, m, plus ``control_cost`` times the mean squared force; ``[...]``."""
        goal = _goal(goal, trajectory.states[..., 0, :])
        away = _length(trajectory.states[..., :2] - goal[..., None, :]).mean(-1)
        return away + self.control_cost * trajectory.actions.square().sum(-1).mean(-1)


@dataclass(frozen=True)
class Reacher:
    """A planar arm of two links, the arm of gymnasium's Reacher-v5 without MuJoCo.

    State ``[q1, q2, q̇1, q̇2]`` (rad, rad/s): shoulder angle from the x axis and elbow angle from the first link. Action:
    two numbers that, times ``gear``, are the torques in N m. With M(q) the mass matrix,

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
        _positive(self, "upper", "fore", "tip", "radius", "density", "gear", "dt", "max_action", "speed_scale")
        _positive(self, "armature", "damping", "start_angle", "start_speed", zero=True)
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
        _sized(state, 4, "state")
        _sized(acceleration, 2, "acceleration")
        return (self.mass_matrix(state) @ acceleration[..., None])[..., 0] + self._bias(state)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The state ``substeps · dt`` later: ``state`` ``[..., 4]``, ``action`` ``[..., 2]``, result ``[..., 4]``."""
        _matching(self, state, action)
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
        _sized(point, 2, "point")
        x, y = point.unbind(-1)
        cosine = (x * x + y * y - self.upper**2 - self.tip**2) / (2 * self.upper * self.tip)
        q2 = torch.acos(cosine.clamp(-1, 1))
        q1 = torch.atan2(y, x) - torch.atan2(self.tip * q2.sin(), self.upper + self.tip * q2.cos())
        return torch.stack([torch.remainder(q1 + math.pi, 2 * math.pi) - math.pi, q2], -1)

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` arms, nearly straight and at rest, ``[n, 4]``, on the generator's device."""
        whole(n, "number of starts")
        state = _uniform((n, 4), -1, 1, generator, dtype)
        return state * state.new_tensor([self.start_angle] * 2 + [self.start_speed] * 2)

    def goals(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` goals as joint angles ``[n, 2]``, rad, of points drawn uniformly between ``goal_radii``."""
        whole(n, "number of goals")
        near, far = self.goal_radii
        radius = _uniform((n,), near**2, far**2, generator, dtype).sqrt()
        angle = _uniform((n,), -math.pi, math.pi, generator, dtype)
        return self.inverse_kinematics(radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1))

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor:
        """Angles, velocities over ``speed_scale``, goal, and the goal's velocities, which are 0: ``[..., 8]``.

        Raises:
            UserError: without a goal ``[..., 2]``.
        """
        goal = _goal(goal, state)
        return torch.cat([state[..., :2], state[..., 2:] / self.speed_scale, goal, torch.zeros_like(goal)], -1)

    def loss(self, trajectory: Trajectory, goal: Tensor) -> Tensor:
        """10 ‖q_T − g‖ + mean ‖q − g‖ + 10⁻⁴ mean ‖q̇‖ of joint angles, the means over all states; ``[...]``.

        Args:
            trajectory: leading axes ``[...]``.
            goal: joint angles ``[..., 2]``, rad.
        """
        goal = _goal(goal, trajectory.states[..., 0, :])
        away = _length(trajectory.states[..., :2] - goal[..., None, :])
        return 10 * away[..., -1] + away.mean(-1) + 1e-4 * _length(trajectory.states[..., 2:]).mean(-1)


def _length(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis; at 0 all its derivatives are 0, where those of torch's are NaN from the second
    on: a start at rest is exactly there."""
    square = x.square().sum(-1)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)


def _positive(env: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        positive(getattr(env, name), f"{name} of {type(env).__name__}", zero)


def _sized(x: Tensor, size: int, what: str) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        raise UserError(f"the {what} must have {size} numbers on its last axis, not the shape {list(x.shape)}")


def _matching(env: Control, state: Tensor, action: Tensor) -> None:
    _sized(state, env.state_size, "state")
    _sized(action, env.action_size, "action")
    if state.shape[:-1] != action.shape[:-1]:
        raise UserError(
            f"states {list(state.shape)} and actions {list(action.shape)} must agree in all axes but the last: "
            "expand one of them"
        )


def _goal(goal: Tensor | None, state: Tensor) -> Tensor:
    """The goal with the leading axes of ``state``."""
    if goal is None:
        raise UserError("this task needs a goal: draw some with its function goals")
    _sized(goal, 2, "goal")
    try:
        return goal.expand(*state.shape[:-1], 2)
    except RuntimeError:
        raise UserError(f"goals {list(goal.shape)} do not fit states {list(state.shape)}: give one for each") from None
