"""The network of the iMAML runs: convolution, ReLU, normalisation; scale and shift adapted; a head that begins at 0."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import FAMILIES, Family, case, error, plain_loop
from refusals import refused
from torch.nn import functional

from helpers import losses
from helpers.estimators.explicit import fomaml, maml
from helpers.estimators.implicit import ImplicitGradient
from helpers.learners.proximal import HessianFree, Proximal
from helpers.models.convnet import ConvNet
from helpers.models.layers import EPSILON
from helpers.numerics.differences import central_differences, objective
from helpers.numerics.solvers import conjugate_gradient
from helpers.numerics.tracing import captured, traced
from helpers.runtime import generator

NETWORK = ConvNet(3, filters=2, blocks=2, head_scale=0.0, flatten=True, affine=True, size=5, norm_last=True)
EXACT = partial(conjugate_gradient, steps=60, tolerance=1e-14)


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setitem(FAMILIES, "norm-last", Family(NETWORK, losses.cross_entropy, (1, 5, 5), 0.05))


def test_it_is_what_pytorch_computes():
    params = {
        name: value + torch.randn_like(value) for name, value in NETWORK.init(generator(1), torch.float64).items()
    }
    images = torch.randn(6, 1, 5, 5, generator=generator(2), dtype=torch.float64)
    x = images
    for block in (1, 2):
        x = functional.conv2d(x, params[f"conv{block}.weight"].permute(3, 2, 0, 1), stride=2, padding=1)
        scale, shift = params[f"norm{block}.scale"], params[f"norm{block}.shift"]
        x = functional.batch_norm(torch.relu(x), None, None, scale, shift, training=True, eps=EPSILON)
    expected = x.movedim(1, -1).flatten(1) @ params["head.weight"] + params["head.bias"]
    torch.testing.assert_close(NETWORK(params, images), expected, rtol=1e-9, atol=1e-9)


def test_the_first_predictions_are_uniform_and_everything_is_adapted():
    params = NETWORK.init(generator(0))
    assert not NETWORK(params, torch.randn(4, 1, 5, 5, generator=generator(1))).any()
    assert all(NETWORK.is_adapted(name) for name in params)


def test_there_must_be_something_to_put_last():
    for wrong in ({"affine": False}, {"affine": True, "norm": False}):
        assert "scale and shift" in refused(lambda wrong=wrong: ConvNet(3, norm_last=True, **wrong))


@pytest.mark.parametrize("steps", [1, 2])
def test_maml_and_first_order_maml(steps):
    learner, theta, tasks = case("norm-last", steps)
    gradient, _ = maml(learner, theta, tasks)
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta)) <= 1e-6
    assert error(gradient, plain_loop(learner, theta, tasks, True)[0]) <= 1e-10
    first, _ = fomaml(learner, theta, tasks)
    assert error(first, plain_loop(learner, theta, tasks, False)[0]) <= 1e-10 < error(first, gradient)
    assert error(traced(maml)(learner, theta, tasks)[0], gradient) <= 1e-10
    # On a CPU there are no graphs to capture, and the function itself is what remains.
    assert error(captured(maml)(learner, theta, tasks)[0], gradient) == 0


@pytest.mark.parametrize("newton", [False, True], ids=["gradient", "hessian-free"])
def test_implicit(newton):
    plain, theta, tasks = case("norm-last")
    strength = 300.0
    path = Proximal(plain.model, plain.loss, 0.9 / strength, 30, strength=strength)
    learner = path
    if newton:
        learner = HessianFree(plain.model, plain.loss, 0.01, 5, strength=strength, solver_steps=25)
    found = ImplicitGradient(EXACT).solve(learner, theta, tasks)
    assert found.stationarity.max() < 1e-7, "the inner problem is not solved, so the test would say nothing"
    reference = central_differences(lambda t: objective(path, t, tasks), theta)
    assert error(found.gradient, reference) <= 1e-6
