"""The wide residual network: against torch's own layers, its size, its derivatives, populations, and refusals."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.layers import EPSILON, stacked
from helpers.models.wide_resnet import WideResNet
from helpers.runtime import generator

SMALL = WideResNet(depth=10, channels=2, classes=4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def drawn(model, seed=0):
    """Parameters in float64, also scales and shifts away from their first values."""
    params = model.init(generator(seed), torch.float64)
    draws = generator(seed + 100)
    return {k: v + 0.1 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for k, v in params.items()}


def counted(depth, width, channels=3, classes=10):
    """Number of parameters, added up from the paper's table 1."""
    n, before, total = (depth - 4) // 6, 16, 9 * channels * 16
    for filters in (16 * width, 32 * width, 64 * width):
        total += 2 * before + 9 * before * filters + 2 * filters + 9 * filters**2  # the first block
        total += before * filters if before != filters else 0  # its projection
        total += (n - 1) * 2 * (2 * filters + 9 * filters**2)
        before = filters
    return total + 2 * before + before * classes + classes


class Normed(nn.Module):
    """Batch normalisation in training, then ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x):
        return functional.batch_norm(x, None, None, self.scale, self.shift, training=True, eps=EPSILON).relu()


class Convolution(nn.Module):
    def __init__(self, size, fan_in, out, stride=1):
        super().__init__()
        self.weight, self.stride, self.padding = nn.Parameter(torch.empty(out, fan_in, size, size)), stride, size // 2

    def forward(self, x):
        return functional.conv2d(x, self.weight, stride=self.stride, padding=self.padding)


class Block(nn.Module):
    def __init__(self, fan_in, out, stride):
        super().__init__()
        self.norm1, self.conv1 = Normed(fan_in), Convolution(3, fan_in, out, stride)
        self.norm2, self.conv2 = Normed(out), Convolution(3, out, out)
        self.project = Convolution(1, fan_in, out, stride) if fan_in != out else None

    def forward(self, x):
        ready = self.norm1(x)
        return self.conv2(self.norm2(self.conv1(ready))) + (x if self.project is None else self.project(ready))


class Reference(nn.Module):
    """The network of the paper in PyTorch's usual way, images ``[n, channels, h, w]``."""

    def __init__(self, depth, width, channels, classes):
        super().__init__()
        self.conv, before = Convolution(3, channels, 16), 16
        for group, filters in enumerate((16 * width, 32 * width, 64 * width), start=1):
            blocks = OrderedDict()
            for block in range(1, (depth - 4) // 6 + 1):
                blocks[f"block{block}"] = Block(before, filters, 2 if group > 1 and block == 1 else 1)
                before = filters
            self.add_module(f"group{group}", nn.Sequential(blocks))
        self.norm, self.head = Normed(before), nn.Linear(before, classes)

    def forward(self, x):
        x = self.group3(self.group2(self.group1(self.conv(x))))
        return self.head(self.norm(x).mean((2, 3)))


def translated(params):
    """Our parameters in torch's order of axes."""
    found = {}
    for name, value in params.items():
        if value.dim() == 4:
            value = value.permute(3, 2, 0, 1)
        elif name.endswith("project.weight"):
            value = value.mT[..., None, None]
        elif name == "head.weight":
            value = value.mT
        found[name] = value
    return found


@pytest.mark.parametrize("depth,width,size", [(10, 1, (8, 8)), (16, 1, (9, 6)), (10, 2, (7, 8))])
def test_network_by_torchs_layers(depth, width, size):
    model = WideResNet(depth, width, channels=2, classes=5)
    params, x = drawn(model), normal(4, 2, *size)
    reference = Reference(depth, width, 2, 5)
    assert reference.state_dict().keys() == params.keys()
    expected = functional_call(reference, translated(params), (x,))
    torch.testing.assert_close(model(params, x), expected, rtol=1e-10, atol=1e-10)


def test_number_of_parameters():
    """WRN-16-1 has 0.175 million; WRN-40-4 has the paper's 8.9 million."""
    assert counted(16, 1) == 175_066 and round(counted(40, 4) / 1e6, 1) == 8.9
    for depth, width in ((16, 1), (10, 1), (16, 4)):
        params = WideResNet(depth, width).init(generator(0))
        assert sum(value.numel() for value in params.values()) == counted(depth, width)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (7, 5), (1, 1)])
def test_shapes_names_and_types(size):
    model = WideResNet()
    for dtype in (torch.float32, torch.float64):
        params = model.init(generator(0), dtype)
        assert {value.dtype for value in params.values()} == {dtype}
        out = model(params, torch.rand(3, 3, *size, dtype=dtype))
        assert out.shape == (3, 10) and out.dtype == dtype and out.isfinite().all()
    assert params["group1.block1.conv1.weight"].shape == (3, 3, 16, 16)
    assert params["group3.block1.project.weight"].shape == (32, 64)
    assert [name for name in params if name.endswith("project.weight")] == [
        "group2.block1.project.weight", "group3.block1.project.weight",
    ]  # fmt: skip
    assert "group1.block1.project.weight" in WideResNet(width=2).init(generator(0))
    assert all(model.is_adapted(name) for name in params)


def test_initial_values():
    params = WideResNet(width=4).init(generator(0))
    for name, inputs in {"group3.block2.conv2.weight": 9 * 256, "group2.block1.project.weight": 64}.items():
        assert params[name].std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.02)
    assert all((value == 1).all() for name, value in params.items() if name.endswith("scale"))
    assert all((value == 0).all() for name, value in params.items() if name.endswith(("shift", "bias")))
    again, other = WideResNet(width=4).init(generator(0)), WideResNet(width=4).init(generator(1))
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert not torch.equal(params["conv.weight"], other["conv.weight"])


def scalar(params, x):
    return SMALL(params, x).square().sum()


def test_gradient_by_finite_differences():
    """Along random directions, one for each parameter and one for the images; and that of the gradient itself."""
    params, x = drawn(SMALL), normal(3, 2, 6, 5)
    gradient = torch.func.grad(scalar, (0, 1))
    by_params, by_x = gradient(params, x)
    h = 1e-6
    for seed, (name, value) in enumerate(params.items()):
        v = normal(*value.shape, seed=seed)
        ahead, back = (scalar(params | {name: value + s * h * v}, x) for s in (1, -1))
        assert ((ahead - back) / (2 * h)).item() == pytest.approx((by_params[name] * v).sum().item(), rel=1e-6), name
    v = normal(*x.shape, seed=99)
    difference = (scalar(params, x + h * v) - scalar(params, x - h * v)) / (2 * h)
    assert difference.item() == pytest.approx((by_x * v).sum().item(), rel=1e-6)

    way = {name: normal(*value.shape, seed=seed) for seed, (name, value) in enumerate(params.items())}
    second = torch.func.grad(lambda p: sum((gradient(p, x)[0][name] * way[name]).sum() for name in way))(params)
    ahead, back = (gradient({k: p + s * h * way[k] for k, p in params.items()}, x)[0] for s in (1, -1))
    for name in params:
        expected = (ahead[name] - back[name]) / (2 * h)
        assert (second[name] - expected).norm() < 1e-6 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("shared", [True, False])
def test_a_population_is_what_its_members_are(shared):
    """Values and gradients under ``vmap``, with images for all or for each."""
    members = [drawn(SMALL, seed) for seed in range(3)]
    x = normal(4, 2, 6, 6) if shared else normal(3, 4, 2, 6, 6)
    axes = (0, None if shared else 0)
    population = {name: value.requires_grad_() for name, value in stacked(members).items()}
    out = vmap(SMALL, axes)(population, x)
    outside = torch.autograd.grad(out.square().sum(), list(population.values()))
    inside = vmap(torch.func.grad(scalar), axes)({k: v.detach() for k, v in population.items()}, x)
    for i, params in enumerate(members):
        own = x if shared else x[i]
        torch.testing.assert_close(out[i], SMALL(params, own), rtol=1e-10, atol=1e-10)
        expected = torch.func.grad(scalar)(params, own)
        for name, gradient in zip(population, outside, strict=True):
            torch.testing.assert_close(gradient[i], expected[name], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(inside[name][i], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [4, 12, 15, 17])
def test_depths_that_do_not_exist_are_refused(depth):
    with pytest.raises(UserError, match=f"has depth 6 n \\+ 4, not {depth}"):
        WideResNet(depth=depth)


def test_width_and_images_are_checked():
    with pytest.raises(UserError, match="width of a wide residual network must be a whole number of at least 1, not 0"):
        WideResNet(width=0)
    with pytest.raises(UserError, match=r"this network takes images \[n, 3, height, width\], not \[2, 1, 8, 8\]"):
        WideResNet()(WideResNet().init(generator(0)), torch.zeros(2, 1, 8, 8))
