"""Control problems: agreement with gymnasium and MuJoCo, derivatives, batches, limits, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refusals import refused
from torch.func import grad, hessian, jacrev, vmap

from helpers.models.mlp import MLP
from helpers.runtime import generator
from helpers.tasks.control.checks import length_of
from helpers.tasks.control.mountain_car import MountainCar
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.control.rollout import random_rollouts, rollout
from helpers.tasks.control.types import Trajectory

ENVIRONMENTS = [MountainCar(), PointMass(), Reacher()]
LIGHT = {"armature": 0.0, "damping": 0.001, "gear": 0.02}  # an arm whose joints feel each other


def name(env) -> str:
    return type(env).__name__


def theirs(identifier: str):
    """Gymnasium's own environment, without its wrappers."""
    gymnasium = pytest.importorskip("gymnasium", reason='needs gymnasium: pip install -e ".[control]"')
    try:
        return gymnasium.make(identifier).unwrapped
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        pytest.skip(f'{identifier} needs more packages, pip install -e ".[control]": {error}')


def problem(env, horizon=12, n=3, dtype=torch.float64):
    """A function from parameters to the losses of ``n`` rollouts ``[n]``, and parameters."""
    draws = generator(0)
    start = env.reset(n, draws, dtype)
    goal = None if isinstance(env, MountainCar) else env.goals(n, draws, dtype)
    policy = MLP((env.observe(start, goal).shape[-1], 5, env.action_size), scale=None, activation="tanh")

    def losses(params):
        path = rollout(env, policy, params, start, goal, horizon)
        return env.loss(path) if goal is None else env.loss(path, goal)

    return losses, {key: value / 2 for key, value in policy.init(draws, dtype).items()}


# Against gymnasium


@pytest.mark.parametrize("pumped", [False, True])
def test_mountain_car_is_gymnasiums(pumped):
    """To 1e-6 at every step of an episode, both computing in float64 and rounding each state to float32.

    Left to itself gymnasium computes in float32 too and drifts by 2e-5 in an episode, one step of ours in float32 being
    within 1e-7 of its own.
    """
    env, car, draws = theirs("MountainCarContinuous-v0"), MountainCar.gymnasium(), np.random.default_rng(0)
    seen, _ = env.reset(seed=0)
    state, visited = torch.tensor(seen), []
    for _ in range(999):
        action = np.sign(seen[1:] + 1e-9) if pumped else draws.uniform(-1.5, 1.5, 1)
        alone = car.step(torch.tensor(seen), torch.tensor(action).float())
        action = action.astype(np.float64)
        env.state = seen.astype(np.float64)
        state, seen = car.step(state.double(), torch.tensor(action)).float(), env.step(action)[0]
        assert np.abs(state.numpy() - seen).max() < 1e-6 and np.abs(alone.numpy() - seen).max() < 1e-7
        visited.append(seen)
    if pumped:
        low, high = np.min(visited, 0), np.max(visited, 0)
        assert np.allclose([low[0], high[0], high[1]], [-1.2, 0.6, 0.07]), "both ends and the greatest speed were met"


def follow(env, arm, actions, start):
    """Largest errors of joint angles (rad), of the fingertip and of the fingertip as gymnasium reports it (m), and the
    largest elbow angle."""
    import mujoco

    env.reset(seed=0)
    env.set_state(np.concatenate([start[:2], [0.1, 0.1]]), np.concatenate([start[2:], [0, 0]]))
    state, errors = torch.tensor(start), []
    for action in actions:
        state = arm.step(state, torch.tensor(action))
        env.step(action)
        reported = env.get_body_com("fingertip")[:2].copy()
        mujoco.mj_kinematics(env.model, env.data)
        tip, ours = env.get_body_com("fingertip")[:2], arm.fingertip(state).numpy()
        angles = env.data.qpos[:2] - state[:2].numpy()
        errors.append([*(np.abs(e).max() for e in (angles, tip - ours, reported - ours)), abs(float(state[1]))])
    return np.max(errors, 0)


def test_reacher_is_gymnasiums():
    """Joint angles and fingertip to 1e-12 over 50 random torques.

    Gymnasium's own report of the fingertip is that of the last stage of MuJoCo's Runge-Kutta step, not of its end: up
    to 1e-5 m away.
    """
    env, draws = theirs("Reacher-v5"), np.random.default_rng(0)
    angle, tip, reported, elbow = follow(env, Reacher(), draws.uniform(-0.3, 0.3, (50, 2)), np.array([0.3, 1, -0.2, 1]))
    assert elbow < 3, "the elbow's limit, which is not modelled, is not met"
    assert angle < 1e-12 and tip < 1e-12 and reported < 1e-5


def test_coupled_arm_is_mujocos():
    """Without armature, with full torques and without the elbow's limit, to 1e-12."""
    env, draws = theirs("Reacher-v5"), np.random.default_rng(1)
    import mujoco

    env.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_LIMIT
    env.model.dof_armature[:2], env.model.dof_damping[:2] = LIGHT["armature"], LIGHT["damping"]
    env.model.actuator_gear[:, 0] = LIGHT["gear"]
    start = np.array([0.3, 1, -0.2, 0.4])
    angle, tip, *_ = follow(env, Reacher(**LIGHT), draws.uniform(-1.2, 1.2, (50, 2)), start)
    assert angle < 1e-12 and tip < 1e-12


# The arm's mechanics


def energy(arm, state):
    v = state[..., 2:]
    return (v * (arm.mass_matrix(state) @ v[..., None])[..., 0]).sum(-1) / 2


def test_free_arm_keeps_its_energy():
    """And the loss is of fourth order or better in the step: halving it divides the drift by 16 at least."""
    start, drifts = torch.tensor([[0.1, 1.0, 3.0, -5.0], [2.0, -2.0, 4.0, 4.0]], dtype=torch.float64), []
    for dt, steps in ((0.01, 50), (0.005, 100)):
        arm = Reacher(armature=0.0, damping=0.0, dt=dt)
        state, first = start, energy(arm, start)
        for _ in range(steps):
            state = arm.step(state, torch.zeros(2, 2, dtype=torch.float64))
        drifts.append((energy(arm, state) / first - 1).abs())
        assert (state[:, 2:] - start[:, 2:]).abs().max() > 1, "energy went from joint to joint"
    assert drifts[0].max() < 1e-5 and (drifts[1] < drifts[0] / 16).all()


@pytest.mark.parametrize("arm", [Reacher(), Reacher(**LIGHT)], ids=["heavy", "light"])
def test_inverse_dynamics_inverts_forward_dynamics(arm):
    draws = generator(0)
    state = 4 * torch.randn(5, 7, 4, generator=draws, dtype=torch.float64)
    wanted = torch.randn(5, 7, 2, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(arm.acceleration(state, arm.inverse_dynamics(state, wanted)), wanted)
    torch.testing.assert_close(arm.inverse_dynamics(state, arm.acceleration(state, wanted)), wanted)


def test_inverse_kinematics_inverts_forward_kinematics():
    arm = Reacher()
    goals = arm.goals(500, generator(0), torch.float64)
    points = arm.fingertip(goals)
    radius = points.norm(dim=-1)
    assert 0.02 <= radius.min() < 0.04 and 0.198 < radius.max() <= 0.2
    assert (0 <= goals[:, 1]).all() and (goals[:, 1] < 3).all() and (goals[:, 0].abs() <= math.pi).all()
    torch.testing.assert_close(arm.inverse_kinematics(points), goals)
    assert arm.inverse_kinematics(torch.tensor([0.0, 5.0])).tolist() == pytest.approx([math.pi / 2, 0])


def test_forward_kinematics():
    joints = Reacher().joints(torch.tensor([math.pi / 2, -math.pi / 2, 9.0, 9.0]))
    torch.testing.assert_close(joints, torch.tensor([[0, 0], [0, 0.1], [0.11, 0.1]]))


def test_what_a_policy_sees():
    state, goal = torch.tensor([0.1, 0.2, 8.0, -4.0]), torch.tensor([0.5, 0.6])
    torch.testing.assert_close(Reacher().observe(state, goal), torch.tensor([0.1, 0.2, 1, -0.5, 0.5, 0.6, 0, 0]))
    torch.testing.assert_close(PointMass().observe(state, goal), torch.cat([state, goal]))
    assert MountainCar().observe(goal) is goal


def test_starts_and_goals():
    """Where the car and the point mass start is given; the arm starts as Reacher-v5 does."""
    assert torch.equal(MountainCar().reset(2, generator(0)), torch.tensor([[-0.55, 0]]).expand(2, 2))
    assert not PointMass().reset(2, generator(0)).any()
    spread = Reacher().reset(5000, generator(0)).abs().amax(0)
    assert (torch.tensor([0.099, 0.099, 0.00495, 0.00495]) < spread).all()
    assert (spread <= torch.tensor([0.1, 0.1, 0.005, 0.005])).all()
    assert 0.99 < PointMass().goals(5000, generator(0)).abs().max() <= 1
    car = MountainCar.gymnasium().reset(5000, generator(0))
    assert -0.6 <= car[:, 0].min() < -0.599 and -0.401 < car[:, 0].max() < -0.4 and not car[:, 1].any()


# Derivatives, batches, repeatability


@pytest.mark.parametrize("env", [*ENVIRONMENTS, Reacher(**LIGHT)], ids=name)
def test_gradient_is_that_of_central_differences(env):
    """With respect to every parameter of the policy, in float64."""
    losses, params = problem(env)
    gradient = grad(lambda p: losses(p).sum())(params)
    sizes, flat = [v.numel() for v in params.values()], torch.cat([v.flatten() for v in params.values()])
    shifts = 1e-6 * torch.eye(len(flat), dtype=flat.dtype)

    def along(vector):
        parts = vector.split(sizes)
        return losses({k: p.view(v.shape) for (k, v), p in zip(params.items(), parts, strict=True)}).sum()

    differences = (vmap(along)(flat + shifts) - vmap(along)(flat - shifts)) / 2e-6
    analytic = torch.cat([v.flatten() for v in gradient.values()])
    assert analytic.norm() > 1e-4
    torch.testing.assert_close(analytic, differences, rtol=1e-5, atol=1e-7 * analytic.norm().item())


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=name)
def test_second_derivatives_are_finite(env):
    """Also where a norm is 0, as the velocity of a start at rest."""
    env = Reacher(start_speed=0.0) if isinstance(env, Reacher) else env
    losses, params = problem(env, horizon=3)
    squared = grad(lambda p: sum(g.square().sum() for g in grad(lambda q: losses(q).sum())(p).values()))(params)
    assert all(value.isfinite().all() for value in squared.values())


def test_derivative_of_a_norm_at_its_zero_is_zero():
    path = Trajectory(torch.zeros(2, 4), torch.zeros(1, 2))
    for env in (PointMass(), Reacher()):
        first = grad(lambda states, env=env: env.loss(Trajectory(states, path.actions), torch.zeros(2)))
        assert not first(path.states).any()
        assert grad(lambda states, first=first: first(states).sum())(path.states).isfinite().all()


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=name)
def test_batch_equals_loop(env):
    """Leading axes, vmap over parameters, and one by one."""
    losses, params = problem(env)
    stacked = {key: torch.stack([value, -value]) for key, value in params.items()}
    batch = vmap(losses)(stacked)
    assert batch.shape == (2, 3)
    torch.testing.assert_close(batch, torch.stack([losses({k: v[i] for k, v in stacked.items()}) for i in (0, 1)]))

    steps = random_rollouts(env, 4, 5, generator(0), torch.float64)
    assert steps.state.shape == steps.next_state.shape == (4, 5, env.state_size)
    assert steps.action.shape == (4, 5, env.action_size) and steps.action.abs().max() <= env.max_action
    torch.testing.assert_close(env.step(steps.state, steps.action), steps.next_state)
    torch.testing.assert_close(vmap(vmap(env.step))(steps.state, steps.action), steps.next_state)
    torch.testing.assert_close(env.step(steps.state[1, 2], steps.action[1, 2]), steps.next_state[1, 2])
    assert torch.equal(steps.state[:, 1:], steps.next_state[:, :-1])


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=name)
def test_rollout(env):
    """Shapes and types; the policy's words are cut; other dynamics can take the environment's place."""
    goal = None if isinstance(env, MountainCar) else env.goals(6, generator(0)).view(2, 3, 2)
    start = env.reset(6, generator(0)).view(2, 3, -1)
    path = rollout(env, lambda _, x: 9 + x[:, : env.action_size], None, start, goal, 4)
    assert path.states.shape == (2, 3, 5, env.state_size) and path.states.dtype == torch.float32
    assert path.actions.shape == (2, 3, 4, env.action_size) and (path.actions == env.max_action).all()
    assert torch.equal(path.states[..., 0, :], start)
    still = rollout(env, lambda _, x: x[:, : env.action_size], None, start, goal, step=lambda state, action: state)
    assert still.states.shape == (2, 3, env.horizon + 1, env.state_size)
    assert (still.states == start[..., None, :]).all()


@pytest.mark.parametrize("env", [*ENVIRONMENTS, MountainCar.gymnasium()], ids=name)
def test_randomness_comes_from_the_generator_alone(env):
    state = torch.random.get_rng_state()
    first, again, other = (random_rollouts(env, 4, 5, generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.action, other.action)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_constant_observations_cut_the_feedback():
    """Values stay; the derivative with respect to the start no longer passes the policy."""
    env, start, one = PointMass(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), torch.ones(2).double()

    def end(start, cut):
        path = rollout(env, lambda _, x: 0.1 * x[:, :2], None, start, one, 2, constant_observations=cut)
        return path.states[-1, 0]

    assert end(start, True) == end(start, False)
    deaf, heard = (grad(end)(start, cut) for cut in (True, False))
    assert deaf[0] == 1 and heard[0] > 1


# Limits


def test_mountain_car_keeps_its_limits():
    car = MountainCar()
    states = torch.tensor([[-1.2, -1.5], [0.5, 1.5], [0.0, 1.5], [-1.2, 1.0]], dtype=torch.float64)
    ahead = car.step(states, torch.full((4, 1), 9.0, dtype=torch.float64))
    assert ahead[0].tolist() == [-1.2, 0.0], "the left wall stops the car"
    assert ahead[1, 0] == 0.5 and ahead[1, 1] > 0, "the right end holds its position only"
    assert torch.equal(ahead, car.step(states, torch.full((4, 1), 0.25, dtype=torch.float64)))
    by_hand = 1 + 0.1 * (0.25 / 0.2 - 9.8 * 0.2 * math.cos(-3.6) - 0.3)
    assert ahead[3].tolist() == pytest.approx([-1.2 + 0.1 * by_hand, by_hand])
    assert car.step(torch.tensor([-1.3, 1.0]), torch.zeros(1))[1] > 0, "and only one that drives into it"
    state = torch.tensor([0.0, 1.5], dtype=torch.float64)
    for first, way in ((False, 0.1 * (1.5 + 0.1 * (5 - 0.45))), (True, 0.15)):
        ahead = MountainCar(pull=-5.0, speed_first=first).step(state, state[:1])
        assert ahead.tolist() == pytest.approx([way, 1.5]), "cut after or before it moves the car"


def test_derivatives_can_pass_the_limits():
    """The same values; at the walls the derivatives of the car without walls, as in the ML3 public code."""
    states = torch.tensor([[-1.2, -1.5], [0.5, 1.5], [-0.5, 0.1]])
    action = torch.tensor([[0.1], [0.2], [0.0]])
    real, open_ = MountainCar(), MountainCar(through=True)
    assert torch.equal(real.step(states, action), open_.step(states, action))
    by_force = [torch.func.vmap(torch.func.jacrev(env.step, 1))(states, action)[..., 0] for env in (real, open_)]
    assert by_force[0].tolist()[0] == [0, 0] and by_force[0][1, 0] == 0
    torch.testing.assert_close(by_force[1], torch.tensor([0.05, 0.5]).expand(3, 2))


def test_point_mass_keeps_its_limits():
    env = PointMass()
    state = torch.tensor([[1.95, -1.95, 2.0, -2.0], [0.0, 0.0, 2.0, 0.0]])
    ahead = env.step(state, torch.tensor([[1.0, -1.0], [9.0, 9.0]]))
    assert ahead[0].tolist() == [2, -2, 0, 0]
    assert ahead[1].tolist() == pytest.approx([0.2, 0.01, 2.0, 0.1])
    slow = PointMass(mass=2.0, damping=0.5).step(torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 0.4]))
    assert slow.tolist() == pytest.approx([0.0975, 0.002, 0.975, 0.02])


def test_reacher_cuts_its_torques():
    arm, state = Reacher(), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(arm.step(state, torch.tensor([7.0, -7.0])), arm.step(state, torch.tensor([1.0, -1.0])))


# Losses


def test_losses_by_hand():
    car, length = MountainCar(), math.hypot(0.5, 1.0375)
    path = Trajectory(torch.zeros(36, 2), torch.zeros(35, 1))
    assert car.loss(path).item() == pytest.approx(6 * length)
    way = math.hypot(0.947, 0.0055)
    assert car.loss(path, shaped=True).item() == pytest.approx(15**0.5 * way + 21**0.5 * length)

    states = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 4.0, 0.6, 0.8]])
    path, goal = Trajectory(states, torch.tensor([[1.0, 2.0]])), torch.zeros(2)
    assert PointMass().loss(path, goal).item() == pytest.approx(2.5 + 1e-3 * 5)
    assert Reacher().loss(path, goal).item() == pytest.approx(50 + 2.5 + 1e-4 * 0.5)


def test_how_far_from_the_goal_by_hand():
    assert PointMass().distance(torch.tensor([3.0, 4.0, 9.0, 9.0]), torch.zeros(2)).item() == 5.0
    arm = Reacher()
    state = torch.tensor([math.pi, 0.0, 1.0, 1.0])  # stretched out, to the other side
    assert arm.distance(state, torch.zeros(2)).item() == pytest.approx(2 * (arm.upper + arm.tip))
    way = torch.tensor([[-0.5, 0.0], [0.3, 0.1], [-0.9, 0.0]])
    assert MountainCar().gap(Trajectory(way, torch.zeros(2, 1))).item() == pytest.approx(0.2)


def test_mountain_car_goals_are_states():
    """Full force back for 15 steps, then forwards, meets both to the four digits that the public code gives."""
    car, state, path = MountainCar(), MountainCar().reset(1, generator(0), torch.float64)[0], []
    for t in range(30):
        state = car.step(state, state.new_tensor([-0.25 if t < 15 else 0.25]))
        path.append(state)
    torch.testing.assert_close(path[14], state.new_tensor(car.waypoint), rtol=0, atol=5e-5)
    torch.testing.assert_close(path[29], state.new_tensor(car.goal), rtol=0, atol=5e-5)
    for position, value in (car.goal, car.waypoint):
        assert abs(car.height(torch.tensor(position)).item() - value) > 0.03, "not points of the hill"


# Refusals


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MountainCar(dt=0.0), "dt of MountainCar must be a finite number greater than 0"),
        (lambda: MountainCar(positions=(0.5, -1.2)), "left end"),
        (lambda: MountainCar(horizon=0), "whole number"),
        (lambda: PointMass(mass=-1.0), "mass of PointMass"),
        (lambda: PointMass(horizon=1.5), "whole number"),
        (lambda: Reacher(gear=math.nan), "gear of Reacher"),
        (lambda: Reacher(substeps=0), "number of substeps"),
        (lambda: Reacher(substeps=True), "number of substeps"),
        (lambda: Reacher(armature=-1.0), "armature of Reacher"),
        (lambda: Reacher(damping=math.nan), "damping of Reacher"),
        (lambda: MountainCar(power=math.inf), "power of MountainCar"),
        (lambda: MountainCar(positions=(math.nan, 0.5)), "left end"),
        (lambda: PointMass(mass="1"), "mass of PointMass"),
        (lambda: PointMass(control_cost=-1.0), "control_cost of PointMass"),
        (lambda: PointMass().goals(1.5, generator(0)), "number of goals"),
        (lambda: Reacher(goal_radii=(0.0, 0.2)), "within the arm's reach"),
        (lambda: Reacher(goal_radii=(0.1, 0.3)), "within the arm's reach"),
    ],
)
def test_bad_constants_are_refused(make, message):
    assert message in refused(make)


def test_bad_arguments_are_refused():
    car, mass, arm = ENVIRONMENTS
    four, two = torch.zeros(3, 4), torch.zeros(3, 2)
    assert "state must have 2 numbers" in refused(lambda: car.step(four, torch.zeros(3, 1)))
    assert "action must have 1 number" in refused(lambda: car.step(two, two))
    assert "agree in all axes" in refused(lambda: arm.step(four, two[0]))
    assert "acceleration must have 2" in refused(lambda: arm.inverse_dynamics(four, four))
    assert "needs a goal" in refused(lambda: mass.observe(four))
    assert "goal must have 2" in refused(lambda: arm.observe(four, four))
    assert "do not fit" in refused(lambda: arm.observe(four, torch.zeros(5, 2)))
    assert "horizon" in refused(lambda: rollout(car, lambda p, x: x[:, :1], None, two, horizon=0))
    assert "state must have 4" in refused(lambda: rollout(arm, lambda p, x: x[:, :2], None, two, two))
    assert "number of rollouts" in refused(lambda: random_rollouts(car, 0, 5, generator(0)))
    for env in ENVIRONMENTS:
        assert "number of starts" in refused(lambda env=env: env.reset(0, generator(0)))
    assert "number of goals" in refused(lambda: arm.goals(-1, generator(0)))
    short = Trajectory(torch.zeros(15, 2), torch.zeros(14, 1))
    assert "more than 15 states" in refused(lambda: car.loss(short, shaped=True))
    assert "no intermediate goal" in refused(lambda: MountainCar.gymnasium().loss(short, shaped=True))


def test_a_length_of_zero_has_derivatives_zero_of_every_order():
    x = torch.zeros(3, 2, dtype=torch.float64)
    x[1] = torch.tensor([3.0, 4.0])
    assert length_of(x).tolist() == [0, 5, 0]
    function = length_of
    for _ in range(4):
        function = jacrev(function)
        derivative = function(x[0])
        assert torch.equal(derivative, torch.zeros_like(derivative)) and function(x[1]).abs().max() > 0
    assert torch.equal(hessian(length_of)(x[0]), torch.zeros(2, 2, dtype=torch.float64))
    away = x[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(length_of, (away,)) and torch.autograd.gradgradcheck(length_of, (away,))
