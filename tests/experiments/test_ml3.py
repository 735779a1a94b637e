"""The studies of the ML3 chapter: their meta-gradients, their problems, and how they are judged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.estimators.explicit import maml
from helpers.experiments import ml3, ml3_control
from helpers.learners.learned import LossDescent
from helpers.learners.paths import CAPPED, along, descent
from helpers.losses import LOSS
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, error, objective
from helpers.numerics.landscapes import downhill_share
from helpers.runtime import generator
from helpers.tasks import control
from helpers.tasks.control.ensemble import ensemble_step, fit_ensemble
from helpers.tasks.control.mountain_car import MountainCar
from helpers.tasks.control.reacher import Reacher
from helpers.types import Examples, Started

SMALL = {
    "sine": ml3.SineStudy("s", points=7, hidden=(5,)),
    "shaped": ml3.ShapedSine("s", points=6),
    "inverse": ml3.InverseDynamics("s", points=6, hidden=(5,)),
    "inverse-plain": ml3.InverseDynamics("s", points=6, hidden=(5,), shaped=False),
    "car": ml3_control.Car("s", hidden=3, loss_width=5),
    "car-plain": ml3_control.Car("s", hidden=3, loss_width=5, shaped=False),
    "mass": ml3_control.Reaching("s", body="mass", hidden=(4,), loss_width=5, horizon=4),
    "arm": ml3_control.Reaching(
        "s", hidden=(4,), loss_width=5, members=2, member_hidden=(5, 4), sees_goal=False, horizon=4
    ),
}


def fitted_ensemble(e, draws):
    """An ensemble of the sizes of an experiment."""
    return fit_ensemble(e.env(), draws, e.members, e.member_hidden, e.member_epochs, e.rollouts)


def double(tree):
    return tree_map(lambda t: t.double(), tree)


def every_step(x, trajectory, y):
    """State and action of every step."""
    return torch.cat([trajectory.states[..., :-1, :], trajectory.actions], -1).flatten(0, -2)


def prepared(name: str, steps: int):
    """Learner, ψ and tasks in float64; the losses without kinks, rollouts of a few steps, rates that matter."""
    e = SMALL[name]
    learner = e.learner().replace(steps=steps)
    features, width = learner.learned.features, learner.learned.body.sizes[0]
    control = name in ("car", "car-plain", "mass", "arm")
    if control and steps > 1:  # what is declared a constant differs from step to step, as differences see
        features, width = every_step, 6 if name == "arm" else 3 if "car" in name else 6
    body = replace(learner.learned.body, sizes=(width, 5, 1), activation="tanh", scale=None)
    learner = learner.replace(learned=replace(learner.learned, body=body, features=features))
    draws = generator(5)
    tasks = double(e.tasks(3, draws))
    model = learner.model
    if name in ("mass", "arm"):
        learner = learner.replace(rate=1e-2 if name == "mass" else 0.3)
    if name in ("car", "car-plain"):
        horizon = 17 if name == "car" else 4  # the shaped loss needs more than 15 states
        learner = learner.replace(model=replace(model, horizon=horizon), rate=1e-2)
    if name == "arm":
        dynamics = double(fitted_ensemble(replace(e, rollouts=2, member_epochs=1), generator(1)))
        step = lambda s, a: ensemble_step(e.env(), dynamics, s, a)  # noqa: E731
        learner = learner.replace(model=replace(learner.model, step=step, constant_observations=False))
    if name == "sine":
        learner = learner.replace(model=replace(model, activation="tanh"), rate=0.1)
    if name in ("shaped", "inverse", "inverse-plain"):
        learner = learner.replace(rate=0.1 if name == "shaped" else 1.0)
    theta = learner.init(draws, torch.float64)
    return learner, {n: v + 0.3 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for n, v in theta.items()}, tasks


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", SMALL)
def test_meta_gradient_of_every_application(name, steps):
    learner, theta, tasks = prepared(name, steps)
    gradient, _ = maml(learner, theta, tasks)
    if not learner.learned.positive:  # a constant is no part of a loss
        last = f"{LOSS}linear2.bias"
        assert gradient.pop(last).abs().max() < 1e-12
        constant = {last: theta.pop(last)}
    else:
        constant = {}
    reference = central_differences(lambda t: objective(learner, t | constant, tasks), theta)
    assert error(gradient, reference) <= 1e-6
    assert max(g.abs().max() for g in gradient.values()) > 1e-8, "nothing was compared"


def test_the_way_is_that_of_single_steps():
    learner, theta, tasks = prepared("sine", 1)
    longer = along(learner, theta, tasks, 3)
    assert len(longer.support.x) == 9
    second = {n: v[1] for n, v in tasks.start.items()}
    phi = learner.adapt(theta, tree_map(lambda t: t[1], tasks.support), steps=2, start=second)
    for name, value in phi.items():
        torch.testing.assert_close(longer.start[name][3], second[name])
        torch.testing.assert_close(longer.start[name][5], value)
    torch.testing.assert_close(longer.query.y[5], tasks.query.y[1])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_descent_is_that_of_torch(optimizer):
    learner, theta, tasks = prepared("sine", 1)
    curve = descent(
        lambda p, s: learner.inner_gradient(theta, p, s), learner.query_loss, tasks, (0, 4), 0.01, optimizer
    )
    phi = {name: value[2].clone().requires_grad_() for name, value in tasks.start.items()}
    support = tree_map(lambda t: t[2], tasks.support)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    optimiser = kind(phi.values(), lr=0.01)
    for _ in range(4):
        optimiser.zero_grad()
        learner.learned(theta, support.x, learner.model(phi, support.x), support.y).backward()
        optimiser.step()
    torch.testing.assert_close(curve[1, 2], learner.query_loss(phi, support).detach(), rtol=1e-6, atol=1e-9)
    assert curve[0, 2] != curve[1, 2]


def test_what_diverges_is_capped():
    tasks = Started(*[Examples(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1))] * 2, {"a": torch.ones(2, 1)})
    curve = descent(lambda p, s: {"a": -p["a"] * 1e30}, lambda p, q: p["a"].square().sum(), tasks, (0, 9), 1.0)
    assert curve.tolist() == [[1.0, 1.0], [CAPPED, CAPPED]]


def test_downhill_share():
    omegas = torch.linspace(-7, 7, 1401)
    truth = torch.tensor([0.5])
    bowl = (omegas - 0.5).square()[None]
    assert downhill_share(bowl, omegas, truth, 0.25).item() == 1.0
    assert downhill_share(bowl, omegas, truth + 1, 0.25).item() == 0.0
    # Two valleys, at -3.5 and 3.5, with the ridge between them at 0.
    valleys = torch.minimum((omegas + 3.5).square(), (omegas - 3.5).square())[None]
    assert abs(downhill_share(valleys, omegas, torch.tensor([3.5]), 0.25).item() - 0.5) < 2e-3
    # Where it is flat nothing moves: only those that are there already count.
    flat = torch.zeros(1, 1401)
    assert abs(downhill_share(flat, omegas, truth, 0.25).item() - 0.5 / 14) < 2e-3


def test_torques_are_those_of_the_arm():
    e = ml3.InverseDynamics("s", points=9)
    arm, model = e.arm(), e.learner().model
    motion = double(e.motions(3, generator(0)))
    state = torch.cat([motion.x[..., :2], torch.zeros(3, 9, 2, dtype=torch.float64)], -1)
    torque = arm.inverse_dynamics(state, motion.x[..., 2:] * model.acceleration)
    unit = model.inertia * model.acceleration
    torch.testing.assert_close(motion.y[..., :2], torque / unit, rtol=1e-4, atol=1e-4)
    assert motion.y[..., 2].std() / motion.y[..., 2].mean() > 0.1, "the mass matrix hardly changes"


def test_accelerations_are_those_of_the_motion():
    e = ml3.InverseDynamics("s", points=2_001)
    motion = double(e.motions(2, generator(0)))
    q, dt = motion.x[..., :2], e.seconds / 2_000
    second = (q[:, 2:] - 2 * q[:, 1:-1] + q[:, :-2]) / dt**2
    # Single precision motions: q is rounded at 1e-7, over dt² = 4e-6.
    assert (second / 10 - motion.x[:, 1:-1, 2:]).abs().max() < 0.1 and motion.x[..., 2:].abs().max() > 0.5


def test_few_starts_come_again_and_fresh_ones_do_not():
    few, fresh = (ml3.SineStudy("s", starts=s, points=3, hidden=(4,)) for s in (3, None))
    draws = [e.tasks(10, generator(2)).start["linear1.weight"] for e in (few, fresh)]
    again = [e.tasks(10, generator(3)).start["linear1.weight"] for e in (few, fresh)]
    distinct = [len({tuple(w.flatten().tolist()) for w in torch.cat(pair)}) for pair in zip(draws, again, strict=True)]
    assert distinct[1] == 20 and distinct[0] <= 5 * 3


def test_the_arm_can_be_learned_from_random_motion():
    e = ml3_control.Reaching("s", members=2, member_epochs=10, rollouts=20)
    env, fitted = e.env(), fitted_ensemble(e, generator(0))
    data = control.random_rollouts(env, 5, env.horizon, generator(9))
    after = ensemble_step(env, fitted, data.state, data.action)
    wrong = (after - data.next_state)[..., 2:].square().mean()
    assert wrong < 0.1 * (data.next_state - data.state)[..., 2:].square().mean()


@pytest.mark.parametrize("name", SMALL)
def test_a_run_trains_and_is_judged(name, monkeypatch):
    short = MountainCar(through=True, horizon=4, waypoint_until=2)
    monkeypatch.setattr(ml3_control.Car, "env", lambda _: short)  # to differentiate 35 steps takes long
    e = replace(SMALL[name], seeds=2, meta_batch=2, way=2)
    few = {"test_tasks": 2, "test_policies": 2, "test_goals": 2, "far": 3, "test_steps": (0, 1, 2)}
    few["tuning_rates"] = (0.01, 0.1)
    if name == "sine":
        few["test_steps"] = (0, 1, 10)  # it asks for the loss after ten
    if name == "arm":
        few |= {"rollouts": 2, "member_epochs": 1}
    known = {f: v for f, v in few.items() if hasattr(e, f)}
    e = replace(e, **known)
    run = e.setup(torch.device("cpu"), compiled=False)
    theta = run.init(generator(0))
    gradient, loss = run.gradient(theta, generator(1), 0)
    assert gradient.keys() == theta.keys() and loss.isfinite()
    for key, value in gradient.items():
        assert value.shape == theta[key].shape and value.isfinite().all()
        assert (value == 0).all() == key.startswith(ml3_control.DYNAMICS) or key.endswith("bias")
    metrics = run.evaluate(theta)
    again = run.evaluate(theta)
    assert len(metrics) > 5 and all(math.isfinite(m.value) for m in metrics.values())
    assert {k: m.value for k, m in metrics.items()} == {k: m.value for k, m in again.items()}


def test_a_loss_that_knows_the_frequency_leads_to_it():
    """200 iterations are enough for half of the starts on the way to come closer."""
    e = ml3.ShapedSine("s", seeds=2, meta_batch=8)
    run = e.setup(torch.device("cpu"), compiled=False)
    theta, draws = run.init(generator(0)), generator(0)
    first = run.draw(64, generator(7))

    def distance(theta):
        return run.learned(theta, first, (10,)).median()

    before, moving = distance(theta), {n: v.clone().requires_grad_() for n, v in theta.items()}
    optimizer = torch.optim.Adam(moving.values(), lr=1e-2)
    for _ in range(200):
        gradient, _ = run.gradient({n: v.detach() for n, v in moving.items()}, draws, 0)
        for name, value in moving.items():
            value.grad = gradient[name]
        optimizer.step()
    assert distance({n: v.detach() for n, v in moving.items()}) < before


def test_networks_that_the_studies_need():
    linear = MLP((2, 3, 1), scale="xavier", activation="identity", bias=False)
    params = linear.init(generator(0))
    x = torch.randn(5, 2)
    torch.testing.assert_close(linear(params, x), x @ params["linear1.weight"] @ params["linear2.weight"])
    weight = MLP((300, 500), scale="xavier").init(generator(0))["linear1.weight"]
    bound = (6 / 800) ** 0.5
    assert weight.abs().max() <= bound and abs(weight.std().item() - bound / 3**0.5) < 0.01 * bound
    assert isinstance(SMALL["car"].learner(), LossDescent) and losses.LOSS == "loss:"
    assert Reacher(armature=0.0).armature == 0
