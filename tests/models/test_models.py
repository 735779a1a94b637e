"""Networks: convolution and normalisation against torch's own, shapes, initial values, and refusals."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from families import error
from refusals import refused
from torch.nn import functional

from helpers import losses
from helpers.errors import UserError
from helpers.estimators.explicit import maml
from helpers.learners.descent import GradientDescent
from helpers.models.convnet import ConvNet
from helpers.models.deep_sets import DeepSets
from helpers.models.layers import EPSILON, layer_norm, normalize
from helpers.models.mixed import MixedConvNet, MixedMLP
from helpers.models.mlp import MLP
from helpers.models.seq2seq import Seq2Seq, greedy
from helpers.models.wide_resnet import WideResNet
from helpers.numerics.conv_ops import patches
from helpers.numerics.differences import central_differences, objective
from helpers.runtime import generator
from helpers.types import Examples, Tasks

MODELS = {
    "mlp": (MLP((3, 8, 7, 2)), (3,)),
    "mlp-norm": (MLP((12, 8, 7, 2), norm=True), (1, 3, 4)),
    "conv": (ConvNet(ways=4, filters=3, blocks=3, channels=2), (2, 9, 7)),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height,width", [(28, 28), (7, 7), (8, 5), (2, 3), (1, 1), (14, 1)])
def test_patches_times_weights_is_convolution(height, width, stride):
    """TensorFlow's "SAME" puts an odd line of zeros at the far side, which torch's padding=1 does not."""
    x, weight = normal(2, height, width, 3), normal(3, 3, 3, 5, seed=1)
    ours = patches(x, stride) @ weight.flatten(0, 2)

    def zeros(size):  # as TensorFlow documents it
        total = max((math.ceil(size / stride) - 1) * stride + 3 - size, 0)
        return total // 2, total - total // 2

    padded = functional.pad(x.movedim(-1, 1), (*zeros(width), *zeros(height)))
    reference = functional.conv2d(padded, weight.permute(3, 2, 0, 1), stride=stride).movedim(1, -1)
    assert ours.shape == (2, math.ceil(height / stride), math.ceil(width / stride), 5)
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_same_padding_of_an_even_size_starts_at_the_first_pixel():
    """By hand: on 4 pixels with stride 2 the windows are 0 1 2 and 2 3 –, so nothing is padded in front."""
    x = torch.arange(1.0, 17).reshape(1, 4, 4, 1)
    expected = torch.tensor([[1, 2, 3, 5, 6, 7, 9, 10, 11], [11, 12, 0, 15, 16, 0, 0, 0, 0]])
    found = patches(x)[0]
    assert torch.equal(found[0, 0], expected[0])
    assert torch.equal(found[1, 1], expected[1])


@pytest.mark.parametrize("shape", [(9, 5), (4, 3, 2, 5)])
def test_normalize_is_batch_norm_in_training(shape):
    x, shift = 3 * normal(*shape) + 2, normal(5, seed=1)
    x_channels_second = x.movedim(-1, 1)
    reference = functional.batch_norm(x_channels_second, None, None, None, shift, training=True, eps=EPSILON)
    torch.testing.assert_close(normalize(x, shift), reference.movedim(1, -1), rtol=1e-12, atol=1e-12)
    plain = functional.batch_norm(x_channels_second, None, None, training=True, eps=1e-5).movedim(1, -1)
    torch.testing.assert_close(normalize(x, epsilon=1e-5), plain, rtol=1e-12, atol=1e-12)


def test_normalize_has_right_derivatives_of_first_and_second_order():
    """Of itself, also where every task has its own batch; in the meta-gradient tests more is mixed in."""
    x, shift = normal(4, 3, 2).requires_grad_(), normal(2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(normalize, (x, shift))
    assert torch.autograd.gradgradcheck(normalize, (x, shift))
    tasks = normal(3, 5, 2, seed=2).requires_grad_()
    mapped = torch.func.vmap(normalize)
    assert torch.autograd.gradcheck(mapped, (tasks,)) and torch.autograd.gradgradcheck(mapped, (tasks,))
    torch.testing.assert_close(mapped(tasks), torch.stack([normalize(x) for x in tasks]), rtol=1e-13, atol=1e-13)


def test_normalize_of_one_value_is_zero():
    """A batch of one example has no spread: the answer is 0, not a division by zero."""
    assert torch.equal(normalize(torch.full((1, 3), 7.0)), torch.zeros(1, 3))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_names_and_types(name):
    model, shape = MODELS[name]
    for dtype in (torch.float32, torch.float64):
        params = model.init(generator(0), dtype)
        assert {value.dtype for value in params.values()} == {dtype}
        out = model(params, torch.rand(6, *shape, dtype=dtype))
        assert out.shape == (6, 4 if name == "conv" else 2) and out.dtype == dtype and out.isfinite().all()
    fixed = {key for key in params if not model.is_adapted(key)}
    assert fixed == {key for key in params if key.endswith(".shift")}
    assert bool(fixed) == (name != "mlp")


def test_papers_networks_have_their_parameters():
    sinusoid = MLP((1, 40, 40, 1)).init(generator(0))
    assert sum(value.numel() for value in sinusoid.values()) == 1 * 40 + 40 + 40 * 40 + 40 + 40 + 1
    conv = ConvNet(5).init(generator(0))
    assert {key: tuple(value.shape) for key, value in conv.items() if key.startswith("conv")} == {
        "conv1.weight": (3, 3, 1, 64), "conv2.weight": (3, 3, 64, 64),
        "conv3.weight": (3, 3, 64, 64), "conv4.weight": (3, 3, 64, 64),
    }  # fmt: skip
    assert sum(value.numel() for value in conv.values()) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 64 + 64 * 5 + 5


def test_initial_values():
    conv = ConvNet(5, head_scale=0.5).init(generator(0))
    bound = math.sqrt(6 / (9 * 64 + 9 * 64))
    assert bound * 0.99 < conv["conv2.weight"].abs().max() <= bound
    assert conv["head.weight"].std().item() == pytest.approx(0.5, rel=0.1)
    mlp = MLP((784, 64, 5), norm=True).init(generator(0))
    assert 0.0195 < mlp["linear1.weight"].abs().max() <= 0.02  # cut at two deviations of 0.01
    for params in (conv, mlp):
        assert all(not value.any() for key, value in params.items() if key.endswith(("bias", "shift")))


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_parameters(name):
    model, _ = MODELS[name]
    first, again, other = (model.init(generator(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_conv_net_by_torchs_layers():
    """The whole network against conv2d and batch_norm, at the sizes of the experiments (28 → 14 → 7 → 4 → 2)."""
    model = ConvNet(ways=5, filters=6)
    params = {key: value + 0.1 * normal(*value.shape) for key, value in model.init(generator(0), torch.float64).items()}
    x = normal(4, 1, 28, 28, seed=1)
    hidden, sizes = x, []
    for block in range(1, 5):
        zeros = max((math.ceil(hidden.shape[2] / 2) - 1) * 2 + 3 - hidden.shape[2], 0)
        hidden = functional.pad(hidden, (zeros // 2, zeros - zeros // 2) * 2)
        hidden = functional.conv2d(hidden, params[f"conv{block}.weight"].permute(3, 2, 0, 1), stride=2)
        shift = params[f"norm{block}.shift"]
        hidden = functional.batch_norm(hidden, None, None, None, shift, training=True, eps=EPSILON).relu()
        sizes.append(hidden.shape[2])
    reference = hidden.mean((2, 3)) @ params["head.weight"] + params["head.bias"]
    assert sizes == [14, 7, 4, 2]
    torch.testing.assert_close(model(params, x), reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 28, 28), (4, 3, 28, 28), (28, 28)])
def test_images_of_a_wrong_shape_are_refused(shape):
    model = ConvNet(5)
    with pytest.raises(UserError, match=r"this network takes images \[n, 1, height, width\], not"):
        model(model.init(generator(0)), torch.zeros(shape))


# ---------------------------------------- taggers: nothing is judged together

IMAGES = ConvNet(3, filters=2, blocks=2, head_scale=None, flatten=True, size=5, norm=False)


def scattered(model, seed=0):
    """Parameters in float64, also the biases away from 0."""
    params = model.init(generator(seed), torch.float64)
    return {key: value + 0.3 * normal(*value.shape, seed=i) for i, (key, value) in enumerate(params.items())}


def jets(*shape, seed=0):
    """Shares of pT that sum to 1, and positions: ``[*shape, 3]``."""
    x = normal(*shape, 3, seed=seed)
    return torch.cat([x[..., :1].softmax(-2), x[..., 1:]], -1)


def test_without_normalisation_every_image_is_judged_by_itself():
    x = normal(6, 1, 9, 8)
    for norm in (False, True):
        model = ConvNet(3, filters=4, blocks=2, norm=norm)
        params = scattered(model)
        apart = torch.cat([model(params, one[None]) for one in x])
        assert torch.allclose(model(params, x), apart, rtol=1e-12, atol=1e-12) != norm


def test_without_normalisation_shifts_are_adapted_biases():
    params, x = scattered(IMAGES), normal(4, 1, 5, 5, seed=1)
    assert all(IMAGES.is_adapted(key) for key in params) and {"norm1.shift", "norm2.shift"} <= params.keys()
    hidden = x
    for block in (1, 2):  # 5 → 3 → 2 pixels: a line of zeros on every side
        weight, bias = params[f"conv{block}.weight"].permute(3, 2, 0, 1), params[f"norm{block}.shift"]
        hidden = functional.conv2d(hidden, weight, bias, stride=2, padding=1).relu()
    reference = hidden.movedim(1, -1).flatten(1) @ params["head.weight"] + params["head.bias"]
    torch.testing.assert_close(IMAGES(params, x), reference, rtol=1e-12, atol=1e-12)


def test_shapes_of_a_network_of_sets():
    params = DeepSets(3, hidden=5).init(generator(0))
    assert {key: tuple(value.shape) for key, value in params.items()} == {
        "each.linear1.weight": (2, 5), "each.linear1.bias": (5,),
        "each.linear2.weight": (5, 5), "each.linear2.bias": (5,),
        "all.linear1.weight": (5, 5), "all.linear1.bias": (5,),
        "all.linear2.weight": (5, 3), "all.linear2.bias": (3,),
    }  # fmt: skip
    assert all(DeepSets().is_adapted(key) for key in params)
    for particles in (1, 7):
        assert DeepSets(3, hidden=5)(params, torch.rand(4, particles, 3)).shape == (4, 3)
    again, other = (DeepSets(3, hidden=5).init(generator(seed)) for seed in (0, 1))
    assert all(torch.equal(params[key], again[key]) and not torch.equal(params[key], other[key]) for key in params)


def test_a_network_of_sets_by_hand():
    model, x = DeepSets(3, hidden=4), jets(5, 6)
    params = scattered(model)

    def layer(name, values):
        return values @ params[f"{name}.weight"] + params[f"{name}.bias"]

    for jet, found in zip(x, model(params, x), strict=True):
        mean = sum(one[0] * layer("each.linear2", layer("each.linear1", one[1:]).relu()).relu() for one in jet)
        torch.testing.assert_close(found, layer("all.linear2", layer("all.linear1", mean).relu()))


def test_order_empty_slots_and_splitting_change_nothing_in_a_set():
    model, x = DeepSets(3, hidden=8), jets(5, 6)
    params = scattered(model)
    expected = model(params, x)

    def same(changed):
        return torch.allclose(model(params, changed), expected, rtol=1e-10, atol=1e-12)

    assert same(x[:, torch.randperm(6, generator=generator(1))])
    empty = torch.cat([torch.zeros(5, 2, 1), 9 * torch.randn(5, 2, 2, generator=generator(2))], -1).double()
    assert same(torch.cat([x[:, :3], empty, x[:, 3:]], 1))
    part = torch.tensor([0.3, 1, 1], dtype=torch.float64)
    rest = torch.tensor([0.7, 1, 1], dtype=torch.float64)
    assert same(torch.cat([x[:, :1] * part, x[:, 1:], x[:, :1] * rest], 1))
    for column in range(3):  # and what should matter does
        moved = x.clone()
        moved[:, 0, column] += 0.5
        assert not same(moved)
    assert len(expected.unique(dim=0)) == 5


@pytest.mark.parametrize(
    "model, draw", [(IMAGES, partial(normal, 3, 6, 1, 5, 5)), (DeepSets(3, hidden=4), partial(jets, 3, 6, 4))],
    ids=["images", "particles"],
)  # fmt: skip
def test_the_meta_gradient_of_a_tagger(model, draw):
    theta, parts = scattered(model, seed=3), [draw(seed=seed) for seed in (4, 5)]
    tasks = Tasks(*(Examples(x, torch.arange(3).repeat(3, 2)) for x in parts))
    learner = GradientDescent(model, losses.cross_entropy, 0.5, 2)
    gradient, _ = maml(learner, theta, tasks)
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta)) <= 1e-6
    assert error(gradient, maml(learner.replace(first_order=True), theta, tasks)[0]) > 1e-3


# ---------------------------------------- the last layer, and what is no network


@pytest.mark.parametrize(
    "model, head",
    [
        (MLP((1, 4, 4, 1)), {"linear3.weight", "linear3.bias"}),
        (MLP((1, 4, 1), bias=False), {"linear2.weight"}),
        (ConvNet(3), {"head.weight", "head.bias"}),
        (DeepSets(3), {"all.linear2.weight", "all.linear2.bias"}),
        (WideResNet(10), {"head.weight", "head.bias"}),
        (MixedMLP((1, 4, 1)), {"linear2.weight", "linear2.bias"}),
        (MixedConvNet(3), {"head.weight", "head.bias"}),
        (Seq2Seq(5, 4), {"head.weight", "head.bias"}),
    ],
)
def test_every_model_names_its_last_layer(model, head):
    assert {name for name in model.init(generator(0)) if name.startswith(model.head)} == head


NO_NETWORK = {
    "sizes of an MLP are the numbers": [lambda: MLP(5), lambda: MLP((5,)), lambda: MLP("12"), lambda: MixedMLP(5)],
    "sizes of an MLP must be a whole number": [
        lambda: MLP((1, -4, 1)), lambda: MLP((1, 0, 1)), lambda: MLP((1, 4.0, 1)), lambda: MixedMLP((1, True, 1)),
    ],
    "no activation 'gulu': use one of relu, tanh, elu, identity": [lambda: MLP((1, 4, 1), activation="gulu")],
    "scale of an MLP": [lambda: MLP((1, 1), scale=-1), lambda: MLP((1, 1), scale=math.nan)],
    "distribution of first weights 'he': use one of xavier": [lambda: MLP((1, 1), scale="he")],
    "ways of a ConvNet": [lambda: ConvNet(0), lambda: ConvNet(-1), lambda: ConvNet(2.5), lambda: MixedConvNet(0)],
    "filters of a ConvNet": [lambda: ConvNet(5, filters=0), lambda: MixedConvNet(5, filters=0)],
    "blocks of a ConvNet": [lambda: ConvNet(5, blocks=0)],
    "channels of a ConvNet": [lambda: ConvNet(5, channels=0)],
    "size of a ConvNet": [lambda: ConvNet(5, size=0)],
    "head_scale of a ConvNet": [lambda: ConvNet(5, head_scale=-1.0)],
    "gain of a ConvNet": [lambda: ConvNet(5, gain=math.inf)],
    "images of 3 x 3 pixels are too small for 4 blocks": [
        lambda: ConvNet(5, size=3, flatten=True),
        lambda: ConvNet(5)(ConvNet(5).init(generator(0)), torch.zeros(2, 1, 3, 3)),
        lambda: MixedConvNet(5)({}, torch.zeros(2, 1, 3, 3)),
    ],
    "images of 0 x 0 pixels": [lambda: WideResNet(10)({}, torch.zeros(2, 3, 0, 0))],
    "images of one size": [
        lambda: ConvNet(5, flatten=True)(ConvNet(5, flatten=True).init(generator(0)), torch.zeros(2, 1, 40, 40))
    ],
    "inputs [n, 3], not [4, 2]": [
        lambda: MLP((3, 1))({}, torch.zeros(4, 2)), lambda: MixedMLP((3, 1))({}, torch.zeros(4, 2)),
    ],
    "inputs [n, 3], not [3]": [lambda: MLP((3, 1))({}, torch.zeros(3))],
    "particles [n, particles, 3], not [4, 3]": [lambda: DeepSets()({}, torch.zeros(4, 3))],
    "ways of a network of sets": [lambda: DeepSets(0)],
    "hidden units of a network of sets": [lambda: DeepSets(hidden=0.5)],
    "width of a wide residual network": [lambda: WideResNet(width=1.5)],
    "classes of a wide residual network": [lambda: WideResNet(classes=0)],
    "tuple of names": [lambda: MixedMLP((1, 4, 1), activations="relu")],
    "epsilon of a normalisation": [
        lambda: normalize(torch.zeros(2, 3), epsilon=-1), lambda: layer_norm(torch.zeros(2, 3), epsilon=0),
    ],
    "vocabulary of a translating network": [lambda: Seq2Seq(5.5, 4)],
    "number of tokens to write": [lambda: greedy(Seq2Seq(5, 4), {}, torch.zeros(2, 4, dtype=torch.int64), 0)],
    "source of int64 [n, 4] tokens": [lambda: greedy(Seq2Seq(5, 4), {}, torch.zeros(2, 4), 3)],
}  # fmt: skip


@pytest.mark.parametrize("words", NO_NETWORK)
def test_what_is_no_network_is_refused(words):
    for action in NO_NETWORK[words]:
        assert words in refused(action)


def test_the_smallest_images():
    """The last of four blocks needs more than one pixel to halve: nine, or nine on one side."""
    model = ConvNet(5, filters=2)
    params = model.init(generator(0))
    for shape in ((9, 9), (9, 1)):
        assert model(params, torch.rand(2, 1, *shape)).isfinite().all()
    assert "too small" in refused(lambda: model(params, torch.rand(2, 1, 8, 8)))
    one = ConvNet(5, filters=2, blocks=1)
    assert one(one.init(generator(0)), torch.rand(2, 1, 1, 1)).shape == (2, 5)
