"""Reptile: what one step is, what two are, minibatches, the inner Adam, and the outer step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, TASKS, case, error
from refusals import refused
from torch.func import grad, vmap

from helpers import losses
from helpers.estimators.explicit import combination, fomaml, maml, reptile
from helpers.lab import checkpoints, schedules, training
from helpers.learners.descent import CARRIED
from helpers.learners.minibatch import MinibatchAdam, MinibatchDescent
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences
from helpers.numerics.tracing import traced
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.episodes import FewShot
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks


def batched(family, steps, seed=0, rate=None):
    """A learner on minibatches, θ, and tasks whose support is ``steps`` minibatches of three examples each."""
    plain, theta, tasks = case(family, seed=seed)
    f, draws = FAMILIES[family], generator(seed + 100)
    parts = [f.examples(3, draws) for _ in range(steps)]
    support = Examples(*(torch.stack(part, 1) for part in zip(*parts, strict=True)))
    learner = MinibatchDescent(plain.model, plain.loss, f.rate if rate is None else rate)
    return learner, theta, Tasks(support, tasks.query)


def mean_loss(learner, theta, tasks, batch):
    """The loss of θ itself on one minibatch of every task."""

    def one(support):
        return learner.loss(learner.model(theta, support.x[batch]), support.y[batch])

    return vmap(one)(tasks.support).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_is_joint_training_and_two_are_not(family):
    """(θ − φ̄) / α is ∇ of the expected loss, to rounding; the gradient of that loss by central differences."""
    learner, theta, tasks = batched(family, 1)
    step, _ = reptile(learner, theta, tasks)
    moving, fixed = learner.split(theta)
    joint = grad(lambda p: mean_loss(learner, p | fixed, tasks, 0))(moving)
    assert error({n: step[n] / learner.rate for n in moving} | fixed, joint | fixed) <= 1e-9
    assert all(step[name].abs().max() < 1e-15 for name in fixed), "what is not adapted does not move"
    differences = central_differences(lambda t: mean_loss(learner, t | fixed, tasks, 0), theta)
    assert error(joint | fixed, {n: differences[n] for n in moving} | fixed) <= 1e-6
    learner, theta, tasks = batched(family, 2)
    two, _ = reptile(learner, theta, tasks)
    both = grad(lambda p: mean_loss(learner, p | fixed, tasks, 0) + mean_loss(learner, p | fixed, tasks, 1))(moving)
    apart = error({n: two[n] for n in moving} | fixed, {n: learner.rate * g for n, g in both.items()} | fixed)
    assert apart > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_reptile_is_the_sum_of_the_gradients_on_the_way(family, steps):
    learner, theta, tasks = batched(family, steps)
    step, values = reptile(learner, theta, tasks)
    total, same = combination((1.0,) * steps)(learner, theta, tasks)
    moving, _ = learner.split(theta)
    for name in moving:
        torch.testing.assert_close(step[name], learner.rate * total[name], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(values, same, rtol=1e-12, atol=0)
    assert values.shape == (TASKS,)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_gradient_alone_is_first_order_maml(family):
    """Judged on the last minibatch: FOMAML whose query set it is."""
    learner, theta, tasks = batched(family, 3)
    last, _ = combination((0.0, 0.0, 1.0))(learner, theta, tasks)
    support = Examples(*(t[:, :2] for t in tasks.support))
    judged = Tasks(support, Examples(*(t[:, 2] for t in tasks.support)))
    first, _ = fomaml(learner.replace(first_order=True), theta, judged)
    moving, _ = learner.split(theta)
    for name in moving:
        torch.testing.assert_close(last[name], first[name], rtol=1e-9, atol=1e-14)


def test_the_second_order_term_is_the_gradient_of_the_inner_product():
    """Over both orders of two minibatches, g1 + g2 = ∇(L1 + L2) − (α/2) ∇⟨∇L1, ∇L2⟩ + O(α²): by central differences."""
    model, draws = MLP((2, 5, 1), activation="tanh", scale=0.5), generator(0)
    x = torch.randn(1, 2, 4, 2, generator=draws, dtype=torch.float64)
    y = torch.randn(1, 2, 4, 1, generator=draws, dtype=torch.float64)
    theta = MinibatchDescent(model, losses.mean_squared_error, 0.1).init(draws, torch.float64)

    def loss(theta, batch):
        return losses.mean_squared_error(model(theta, x[0, batch]), y[0, batch])

    def surrogate(theta, rate):
        g1, g2 = (grad(loss)(theta, batch) for batch in (0, 1))
        return loss(theta, 0) + loss(theta, 1) - rate / 2 * sum((g1[n] * g2[n]).sum() for n in g1)

    left = []
    for rate in (4e-3, 2e-3, 1e-3):
        learner = MinibatchDescent(model, losses.mean_squared_error, rate)
        orders = [Tasks(Examples(x[:, o], y[:, o]), Examples(x[:, 0], y[:, 0])) for o in ([0, 1], [1, 0])]
        found = [combination((1.0, 1.0))(learner, theta, tasks)[0] for tasks in orders]
        mean = {name: (found[0][name] + found[1][name]) / 2 for name in theta}
        expected = central_differences(lambda t, rate=rate: surrogate(t, rate), theta, everywhere=True)
        left.append(sum((mean[n] - expected[n]).square().sum() for n in theta).sqrt().item())
    for large, small in zip(left, left[1:], strict=False):
        assert 3.8 < large / small < 4.2, "what is left is of order α²"


def test_a_batch_of_tasks_is_the_loop_over_them():
    learner, theta, tasks = batched("conv", 3)
    step, _ = reptile(learner, theta, tasks)
    each = []
    for i in range(TASKS):
        phi = {name: value.clone().requires_grad_() for name, value in learner.split(theta)[0].items()}
        optimiser = torch.optim.SGD(phi.values(), lr=learner.rate)
        for batch in range(3):
            optimiser.zero_grad()
            outputs = learner.model(theta | phi, tasks.support.x[i, batch])
            learner.loss(outputs, tasks.support.y[i, batch]).backward()
            optimiser.step()
        each.append({name: theta[name] - value.detach() for name, value in phi.items()})
    for name in each[0]:
        torch.testing.assert_close(step[name], sum(one[name] for one in each) / TASKS, rtol=1e-9, atol=1e-14)
    same, _ = traced(reptile)(learner, theta, tasks)
    assert error(same, step) <= 1e-12 if all(value.norm() for value in step.values()) else True
    assert not torch.allclose(step["head.weight"], maml(learner.replace(), theta, tasks)[0]["head.weight"])


# ---------------------------------------- the inner Adam


@pytest.mark.parametrize("carry", [True, False])
def test_the_inner_adam_is_torchs(carry):
    """With β₁ = 0, over 6 steps, in the memory as well; carried into a second task or begun anew there."""
    plain, theta, tasks = batched("conv", 6)
    learner = MinibatchAdam(plain.model.__class__(**vars(plain.model)), plain.loss, 0.01, carry=carry)
    theta = {n: v for n, v in theta.items()} | {
        n: v for n, v in learner.init(generator(0), torch.float64).items() if n.startswith(CARRIED)
    }
    assert any(name.startswith(CARRIED) for name in theta) == carry
    moving, fixed = learner.split(theta)
    phi = {name: value.clone().requires_grad_() for name, value in moving.items()}
    # The two place ε differently, before and after the correction of the bias; it is small enough not to show.
    optimiser = torch.optim.Adam(phi.values(), lr=0.01, betas=(0.0, 0.999), eps=1e-16)
    learner = learner.replace(epsilon=1e-16)
    for task in range(2):
        support = Examples(tasks.support.x[task], tasks.support.y[task])
        ours = learner.adapt(theta, support)
        with torch.no_grad():  # the parameters go back to θ, the memory stays
            for name, value in phi.items():
                value.copy_(theta[name])
        if not carry:
            optimiser = torch.optim.Adam(phi.values(), lr=0.01, betas=(0.0, 0.999), eps=1e-16)
        for batch in range(6):
            optimiser.zero_grad()
            outputs = learner.model(fixed | phi, support.x[batch])
            learner.loss(outputs, support.y[batch]).backward()
            optimiser.step()
        for name, value in phi.items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=1e-9, atol=1e-12)
        theta = theta | {name: value for name, value in ours.items() if name.startswith(CARRIED) and carry}
    assert ours[f"{CARRIED}count"] == (12 if carry else 6)


def test_what_is_carried_is_replaced_by_an_outer_step_and_not_scaled():
    model = ConvNet(3, filters=2, blocks=2, size=8)
    learner, draws = MinibatchAdam(model, losses.cross_entropy, 0.01), generator(0)
    theta = learner.init(draws)
    tasks = FewShot(torch.randint(0, 256, (5, 4, 8, 8), generator=draws).byte(), 3, 3, 1).sample(2, draws)
    step, _ = reptile(learner, theta, Tasks(minibatches(tasks.support, 3, 2, draws), tasks.query))
    state = checkpoints.State(theta, 0.5, draws, "sgd")
    state.apply(step, rate=0.25)
    after = state.values()
    for name in theta:
        if name.startswith(CARRIED):
            torch.testing.assert_close(after[name], theta[name] - step[name])
        else:
            torch.testing.assert_close(after[name], theta[name] - 0.25 * step[name])
    assert after[f"{CARRIED}count"] == 2


def test_an_unknown_outer_optimiser_is_refused():
    assert "sgd" in refused(lambda: checkpoints.State({"w": torch.ones(1)}, 0.1, generator(0), "newton"))


def test_annealing():
    assert [schedules.annealed(1.0, 0.0, part) for part in (0, 0.25, 1)] == [1.0, 0.75, 0.0]
    rates = []

    def gradient(theta, iteration):
        rates.append(theta["w"].item())
        return {"w": torch.ones(1)}, torch.zeros(1)

    training.fit(gradient, {"w": torch.zeros(1)}, 4, 1.0, outer="sgd", final_rate=0.0)
    assert rates == [0.0, -1.0, -1.75, -2.25]


def test_the_outer_rate_is_held_annealed_and_begun_again():
    def rates(**settings):
        whole = {"outer_rate": 1.0, "iterations": 8, "outer_rate_final": None, "outer_rate_hold": 0}
        experiment = SimpleNamespace(**(whole | {"outer_rate_restarts": ()} | settings))
        return [round(schedules.outer_rate_at(experiment, i), 12) for i in range(8)]

    assert rates() == [1.0] * 8
    assert rates(outer_rate_final=0.0) == [1 - i / 8 for i in range(8)]
    assert rates(outer_rate_final=0.0, outer_rate_hold=4) == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates(outer_rate_final=0.0, outer_rate_hold=2, outer_rate_restarts=(4,)) == [
        1,
        1,
        1,
        0.5,
        1,
        0.75,
        0.5,
        0.25,
    ]
    assert rates(outer_rate_final=0.0, outer_rate_hold=8) == [1.0] * 8


# ---------------------------------------- minibatches


def numbered(tasks=3, n=6):
    x = torch.arange(float(tasks * n)).view(tasks, n, 1)
    return Examples(x, 10 * x)


@pytest.mark.parametrize("size, count", [(2, 3), (2, 7), (4, 3), (6, 1), (5, 2), (8, 3)])
def test_minibatches_deal_out_all_examples_equally(size, count):
    batches = minibatches(numbered(), size, count, generator(0))
    assert batches.x.shape == (3, count, size, 1) and torch.equal(batches.y, 10 * batches.x)
    for task in range(3):
        seen = batches.x[task].flatten().long() - 6 * task
        assert ((0 <= seen) & (seen < 6)).all()
        for begin in range(0, len(seen) - 5, 6):  # every round holds each example once
            assert sorted(seen[begin : begin + 6].tolist()) == list(range(6))
        assert seen.bincount(minlength=6).max() - seen.bincount(minlength=6).min() <= 1


def test_minibatches_with_replacement_repeat_nothing_inside_one():
    batches = minibatches(numbered(), 4, 50, generator(0), replacement=True)
    assert all(len(set(batch.flatten().tolist())) == 4 for batch in batches.x.flatten(0, 1))
    counts = (batches.x[0].flatten().long()).bincount(minlength=6)
    assert counts.max() - counts.min() > 1, "not dealt out"
    assert "smaller" in refused(lambda: minibatches(numbered(), 7, 1, generator(0), replacement=True))


def test_minibatches_depend_on_the_generator_alone():
    first, again, other = (minibatches(numbered(), 2, 3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)


def test_whole_waves():
    wave = Sinusoids(phases=(0.0, 6.28)).wave(4, 50, generator(0))
    assert wave.x.shape == wave.y.shape == (4, 50, 1)
    assert wave.x[0, 0] == -5 and wave.x[0, -1] == 5 and (wave.y.abs() <= 5).all()
    step = 10 / 49  # y'' = −y
    second = (wave.y[:, 2:] - 2 * wave.y[:, 1:-1] + wave.y[:, :-2]) / step**2
    torch.testing.assert_close(second, -wave.y[:, 1:-1], atol=0.05, rtol=0.01)
