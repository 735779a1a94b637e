"""Convolution and standardisation: derivatives in forward mode. Backward mode is in ``test_models``."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from helpers.models.convnet import ConvNet
from helpers.models.layers import normalize
from helpers.runtime import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


NETWORK = ConvNet(3, filters=2, blocks=2, affine=True)


def value(params, x):
    return NETWORK(params, x).tanh().square().sum()


def case():
    params = NETWORK.init(generator(0), torch.float64)
    return {k: v + 0.3 * normal(*v.shape, seed=i) for i, (k, v) in enumerate(params.items())}, normal(4, 1, 5, 6)


def test_forward_mode_is_the_gradient_along_a_direction():
    params, x = case()
    direction = {name: normal(*v.shape, seed=9) for name, v in params.items()}
    by_params, by_x = grad(value, (0, 1))(params, x)
    along = sum((g * direction[name]).sum() for name, g in by_params.items()) + (by_x * x).sum()
    torch.testing.assert_close(jvp(value, (params, x), (direction, x))[1], along, rtol=1e-12, atol=1e-12)
    only = jvp(lambda x: value(params, x), (x,), (x,))[1]
    torch.testing.assert_close(only, (by_x * x).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [None, 2])
def test_forward_over_backward_is_backward_over_backward(tasks):
    params, x = case()
    objective = lambda params: value(params, x)  # noqa: E731
    if tasks:
        params, many = {k: torch.stack([v, 0.7 * v]) for k, v in params.items()}, torch.stack([x, x.flip(0)])
        objective = lambda params: vmap(value)(params, many).sum()  # noqa: E731
    ours, reference = hessian(objective)(params), jacrev(jacrev(objective))(params)
    for name in params:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-10, atol=1e-12)


def test_normalize_in_forward_mode_at_first_and_second_order():
    x = normal(4, 3, 2)
    torch.testing.assert_close(jacfwd(normalize)(x), jacrev(normalize)(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacfwd(jacrev(normalize))(x), jacrev(jacrev(normalize))(x), rtol=1e-11, atol=1e-12)
    assert torch.autograd.gradcheck(normalize, (x.requires_grad_(),), check_forward_ad=True)


def test_forward_over_forward_is_refused():
    """PyTorch drops the outer tangent of such functions: the answer would be wrong."""
    params, x = case()
    for function in (lambda x: normalize(x).square().sum(), lambda x: value(params, x)):
        assert "torch.func.hessian" in refused(lambda function=function: jacfwd(jacfwd(function))(x))
