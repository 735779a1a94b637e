"""Recorded and compiled functions return what the functions themselves return."""

from __future__ import annotations

import pytest
import torch
from torch.func import vjp
from torch.utils._pytree import tree_map

from helpers import losses, runtime, tracing
from helpers.learners import GradientDescent
from helpers.metagradients import chunked, compiled, fomaml, maml, stepwise, traced
from helpers.models import MLP, ConvNet
from helpers.operations import convolve, patches, standardize
from helpers.runtime import generator
from helpers.tasks import Examples, Sinusoids, Tasks


def sinusoid_case(steps: int = 2, **settings):
    learner = GradientDescent(MLP((1, 6, 5, 1), scale=0.5), losses.mean_squared_error, 0.05, steps, **settings)
    draws = generator(0)
    tasks = tree_map(torch.Tensor.double, Sinusoids(4, 3).sample(5, draws))
    return learner, learner.init(draws, torch.float64), tasks


def image_case(steps: int = 2, **settings):
    learner = GradientDescent(ConvNet(ways=3, filters=2, blocks=2), losses.cross_entropy, 0.4, steps, **settings)
    draws = generator(1)
    x = torch.rand(2, 4, 3, 1, 5, 6, generator=draws).double()
    tasks = Tasks(*(Examples(part, torch.arange(3).repeat(4, 1)) for part in x))
    return learner, learner.init(draws, torch.float64), tasks


CASES = {"sinusoid": sinusoid_case, "images": image_case}


def assert_same(found, expected, rtol=1e-11):
    (gradient, values), (reference, reference_values) = found, expected
    assert list(gradient) == list(reference)
    scale = max(g.abs().max() for g in reference.values()).item()
    for name, g in gradient.items():
        torch.testing.assert_close(g, reference[name], rtol=rtol, atol=rtol * scale)
    torch.testing.assert_close(values, reference_values, rtol=rtol, atol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("learn_rates", [False, True], ids=["maml", "meta-sgd"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_traced_and_stepwise_are_maml(case, steps, learn_rates):
    learner, theta, tasks = CASES[case](steps, learn_rates=learn_rates)
    expected = maml(learner, theta, tasks)
    for fast in (traced(maml), stepwise(), chunked(stepwise(), 2)):
        assert_same(fast(learner, theta, tasks), expected)


def test_stepwise_on_a_first_order_learner_is_fomaml():
    learner, theta, tasks = image_case(3)
    assert_same(stepwise()(learner.with_(first_order=True), theta, tasks), fomaml(learner, theta, tasks))


def test_a_recording_belongs_to_its_shapes_and_constants():
    """New values reuse the recording; another batch size, precision, rate or number of steps gets its own."""
    learner, theta, tasks = sinusoid_case()
    calls = []

    def counted(*arguments):
        calls.append(1)
        return maml(*arguments)

    fast = traced(counted)
    moved = {name: value + 1 for name, value in theta.items()}
    for arguments, recordings in (
        ((learner, theta, tasks), 1),
        ((learner, moved, tasks), 1),
        ((learner.with_(rate=0.01), theta, tasks), 2),
        ((learner.with_(steps=1), theta, tasks), 3),
        ((learner, theta, tree_map(lambda t: t[:2], tasks)), 4),
        ((learner, *tree_map(torch.Tensor.float, (theta, tasks))), 5),
        ((learner.with_(), theta, tasks), 5),
    ):
        assert_same(fast(*arguments), maml(*arguments), rtol=1e-4 if recordings == 5 and len(calls) == 5 else 1e-11)
        assert len(calls) == recordings


def test_results_carry_no_gradient_and_inputs_stay_as_they_are():
    learner, theta, tasks = sinusoid_case()
    theta = {name: value.requires_grad_() for name, value in theta.items()}
    before = tree_map(torch.clone, tasks)
    gradient, values = traced(maml)(learner, theta, tasks)
    assert not any(t.requires_grad for t in (*gradient.values(), values))
    pairs = zip(before.support + before.query, tasks.support + tasks.query, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_linearized_is_vjp():
    def function(a, scale, b):
        return {"sum": (a * b).sin() * scale, "b": b.flip(0)}

    draws = generator(0)
    a, b, other = torch.randn(3, 4, 2, generator=draws).double()
    expected, pull = vjp(lambda a, b: function(a, 3.0, b), a, b)
    found, pull_traced = tracing.linearized(function, by=(0, 2))(a, 3.0, b)
    assert found.keys() == expected.keys()
    cotangent = {"sum": other, "b": a}
    ours, theirs = (*found.values(), *pull_traced(cotangent)), (*expected.values(), *pull(cotangent))
    for ours, theirs in zip(ours, theirs, strict=True):  # noqa: B020
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.slow
@pytest.mark.skipif(not runtime.can_compile(), reason="torch.compile needs a C++ compiler")
def test_compiled_is_maml():
    learner, theta, tasks = sinusoid_case(1)
    assert_same(compiled(maml)(learner, theta, tasks), maml(learner, theta, tasks))


def test_without_a_compiler_compiled_falls_back(monkeypatch):
    monkeypatch.setattr(runtime, "can_compile", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("torch.compile was called"))
    learner, theta, tasks = sinusoid_case()
    assert_same(compiled(maml)(learner, theta, tasks), maml(learner, theta, tasks))


@pytest.mark.parametrize("size", [(4, 4), (5, 6), (7, 7), (9, 4)])
def test_convolution_and_its_derivatives_of_every_order(size):
    draws = generator(0)
    x = torch.randn(2, *size, 2, generator=draws).double().requires_grad_()
    weight = torch.randn(3, 3, 2, 3, generator=draws).double().requires_grad_()
    torch.testing.assert_close(convolve(x, weight), patches(x) @ weight.flatten(0, 2), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(convolve, (x, weight))
    assert torch.autograd.gradgradcheck(convolve, (x, weight))


def test_standardisation_and_its_derivatives():
    x = torch.randn(7, 3, generator=generator(0)).double().requires_grad_()
    plain = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-3).sqrt()
    torch.testing.assert_close(standardize(x, 1e-3), plain, rtol=1e-12, atol=1e-12)

    def function(x):
        return standardize(x, 1e-3)

    def first(x, g):  # the gradient of ⟨g, standardize(x)⟩, so that a second derivative of it is a third one
        return torch.autograd.grad(function(x), x, g, create_graph=True)[0]

    g = torch.randn(7, 3, generator=generator(1)).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(first, (x, g))
