"""The learner: steps by hand, what it leaves alone, learned rates."""

from __future__ import annotations

import pytest
import torch
from refusals import refused

from helpers import losses
from helpers.learners.descent import RATE, GradientDescent, detached
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.runtime import generator
from helpers.types import Examples


def support(seed=0, n=6):
    draws = generator(seed)
    x = torch.randn(n, 2, generator=draws, dtype=torch.float64)
    return Examples(x, torch.randn(n, 1, generator=draws, dtype=torch.float64))


def make(steps=1, learn_rates=False, **settings):
    learner = GradientDescent(MLP((2, 5, 1), scale=0.5), losses.mean_squared_error, 0.1, steps, learn_rates, **settings)
    return learner, learner.init(generator(0), torch.float64)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_adaptation_is_gradient_descent(steps):
    learner, theta = make(steps)
    examples, phi = support(), {name: value.clone().requires_grad_() for name, value in theta.items()}
    optimiser = torch.optim.SGD(phi.values(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        losses.mean_squared_error(learner.model(phi, examples.x), examples.y).backward()
        optimiser.step()
    adapted = learner.adapt(theta, examples)
    assert adapted.keys() == theta.keys()
    for name in theta:
        torch.testing.assert_close(adapted[name], phi[name].detach(), rtol=1e-13, atol=1e-15)
    again = learner.replace(steps=99).adapt(theta, examples, steps=steps)
    assert all(torch.equal(adapted[name], again[name]) for name in theta)


@pytest.mark.parametrize("steps", [1, 3])
def test_equal_learned_rates_are_the_fixed_rate(steps):
    learner, theta = make(steps)
    other, with_rates = make(steps, learn_rates=True)
    assert {name for name in with_rates if name.startswith(RATE)} == {RATE + name for name in theta}
    assert all(
        (with_rates[RATE + name] == 0.1).all() and with_rates[RATE + name].shape == theta[name].shape for name in theta
    )
    fixed, learned = learner.adapt(theta, support()), other.adapt(with_rates, support())
    assert fixed.keys() == learned.keys(), "the rates are no parameters of the network"
    assert all(torch.equal(fixed[name], learned[name]) for name in fixed)


def test_learned_rates_act_entry_by_entry():
    learner, theta = make(learn_rates=True)
    gradient = learner.support_gradient(learner.start(theta), support())
    theta[RATE + "linear1.weight"] = torch.rand(2, 5, dtype=torch.float64)
    theta[RATE + "linear2.bias"] = torch.zeros(1, dtype=torch.float64)
    phi = learner.adapt(theta, support())
    step = theta["linear1.weight"] - theta[RATE + "linear1.weight"] * gradient["linear1.weight"]
    torch.testing.assert_close(phi["linear1.weight"], step, rtol=1e-14, atol=0)
    assert torch.equal(phi["linear2.bias"], theta["linear2.bias"])


@pytest.mark.parametrize("model", [MLP((784, 6, 5, 5), norm=True), ConvNet(5, filters=3, blocks=2)])
def test_shifts_are_meta_parameters_that_adaptation_leaves_alone(model):
    learner = GradientDescent(model, losses.cross_entropy, 0.4, 2, learn_rates=True)
    theta = learner.init(generator(0))
    examples = Examples(torch.rand(5, 1, 28, 28, generator=generator(1)), torch.arange(5))
    phi = learner.adapt(theta, examples)
    shifts = {name for name in phi if name.endswith(".shift")}
    assert shifts and not any(RATE + name in theta for name in shifts)
    # A bias before a normalisation has no effect, so its gradient is rounding only: it may or may not move.
    hidden = {name for name in phi if name.endswith("bias") and f"norm{name[6]}.shift" in phi}
    for name in phi.keys() - hidden:
        assert torch.equal(phi[name], theta[name]) == (name in shifts), name


def test_outer_loss_may_differ_from_the_inner_loss():
    def absolute(outputs, y):
        return (outputs - y).abs().mean()

    learner, theta = make(outer_loss=absolute)
    same, _ = make()
    phi, query = learner.adapt(theta, support()), support(1)
    assert all(torch.equal(phi[name], value) for name, value in same.adapt(theta, support()).items())
    assert torch.equal(learner.query_loss(phi, query), absolute(learner.model(phi, query.x), query.y))


def test_first_order_changes_no_value_only_derivatives():
    learner, theta = make(3)
    exact, first = learner.adapt(theta, support()), learner.replace(first_order=True).adapt(theta, support())
    assert all(torch.equal(exact[name], first[name]) for name in theta)
    theta = {name: value.requires_grad_() for name, value in theta.items()}
    phi = learner.replace(first_order=True).adapt(theta, support())
    for name in theta:  # ∂φ/∂θ = I: the gradient of the sum over φ is one everywhere
        (slope,) = torch.autograd.grad(phi[name].sum(), theta[name], retain_graph=True)
        assert torch.equal(slope, torch.ones_like(slope))


def test_detached_keeps_values():
    theta = {"w": torch.ones(2, requires_grad=True)}
    assert not detached(theta)["w"].requires_grad and torch.equal(detached(theta)["w"], theta["w"])


# ---------------------------------------- which parameters adapt


@pytest.mark.parametrize("model", [MLP((784, 6, 5, 5), norm=True), ConvNet(5, filters=3, blocks=2)])
@pytest.mark.parametrize("chosen", [(), ("norm1.shift",)], ids=["head", "head-and-a-shift"])
def test_the_learner_says_which_parameters_adapt(model, chosen):
    """The head alone is ANIL; a shift that the model would leave alone may be named too."""
    learner = GradientDescent(model, losses.cross_entropy, 0.4, 2, learn_rates=True, adapted=(model.head, *chosen))
    theta = learner.init(generator(0))
    names = {name for name in theta if name.startswith((model.head, *chosen))}
    assert {name for name in theta if name.startswith(RATE)} == {RATE + name for name in names}
    phi = learner.adapt(theta, Examples(torch.rand(5, 1, 28, 28, generator=generator(1)), torch.arange(5)))
    assert set(learner.split(theta)[0]) == names == {name for name in phi if not torch.equal(phi[name], theta[name])}


def test_all_names_are_what_the_model_adapts():
    learner, theta = make(3)
    every, phi = learner.replace(adapted=("linear",)), learner.adapt(theta, support())
    assert all(torch.equal(value, phi[name]) for name, value in every.adapt(theta, support()).items())


def test_names_of_nothing_are_refused():
    learner, theta = make()
    for chosen in (("head.",), ("linear2.", "head.")):
        other = learner.replace(adapted=chosen)
        for action in (lambda one=other: one.split(theta), lambda one=other: one.adapt(theta, support())):
            assert "'head.'" in refused(action) and "linear1, linear2" in refused(action)
    for chosen in ((), "linear2.", ["linear2."], (2,)):
        assert "adapted" in refused(lambda chosen=chosen: learner.replace(adapted=chosen))


# ---------------------------------------- losses


def test_losses_by_hand():
    outputs, y = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])
    assert losses.mean_squared_error(outputs, y) == (1 + 4) / 2
    logits, labels = torch.tensor([[0.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 0])
    expected = (torch.log(torch.tensor(2.0)) + torch.log1p(torch.exp(torch.tensor(3.0)))) / 2
    torch.testing.assert_close(losses.cross_entropy(logits, labels), expected)
    assert losses.accuracy(
        torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 1.0]]), torch.tensor([1, 0, 0])
    ) == pytest.approx(2 / 3)
