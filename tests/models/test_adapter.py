"""PyTorch's operations under ``vmap``, and its modules as models: derivatives against plain autograd, and refusals."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from refusals import refused
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from helpers import losses
from helpers.estimators import explicit
from helpers.estimators.explicit import maml, stepwise
from helpers.learners.descent import GradientDescent
from helpers.models.adapter import from_module, translated
from helpers.models.layers import layer_norm
from helpers.numerics.tracing import traced
from helpers.runtime import generator
from helpers.types import Examples, Tasks

TASKS, WAYS = 3, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Network:
    """A model of a function ``forward(params, x)`` and the parameters that it begins with."""

    def __init__(self, forward, params):
        self.forward, self.params = forward, params

    def __call__(self, params, x):
        return self.forward(params, x)

    def is_adapted(self, name):
        return True


def drawn(shape, seed=0):
    """Tasks of 6 and 5 examples; ``"tokens"`` are 7 numbers below 5."""
    draws, sets = generator(seed), []
    for n in (6, 5):
        if shape == "tokens":
            x = torch.randint(5, (TASKS, n, 7), generator=draws)
        else:
            x = torch.randn(TASKS, n, *shape, generator=draws, dtype=torch.float64)
        sets.append(Examples(x, torch.randint(WAYS, (TASKS, n), generator=draws)))
    return Tasks(*sets)


def by_autograd(forward, theta, tasks, loss=losses.cross_entropy, rate=0.5, steps=2):
    """The meta-gradient by a loop over tasks and PyTorch's ordinary autograd: no vmap, no torch.func."""
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    total = 0
    for i in range(TASKS):
        phi = theta
        for _ in range(steps):
            value = loss(forward(phi, tasks.support.x[i]), tasks.support.y[i])
            inner = torch.autograd.grad(value, list(phi.values()), create_graph=True, materialize_grads=True)
            phi = {name: old - rate * g for (name, old), g in zip(phi.items(), inner, strict=True)}
        total = total + loss(forward(phi, tasks.query.x[i]), tasks.query.y[i]) / TASKS
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values()), materialize_grads=True), strict=True))


def distance(gradient, reference):
    """The largest relative error of a tensor; of one that is 0, as of a padding row alone, the absolute error."""
    assert gradient.keys() == reference.keys()
    return max(
        ((gradient[name] - r).norm() / (r.norm() if r.norm() > 1e-12 else 1)).item() for name, r in reference.items()
    )


# ---------------------------------------- single operations

VECTORS = {
    "in": normal(4, 8, seed=1), "scale": 1 + 0.3 * normal(8, seed=2), "shift": 0.3 * normal(8, seed=3),
    "square": 0.5 * normal(8, 8, seed=4), "out": normal(8, WAYS, seed=5),
}  # fmt: skip
IMAGES = {
    "kernel": 0.5 * normal(4, 2, 3, 3, seed=1), "scale": 1 + 0.3 * normal(4, seed=2), "shift": 0.3 * normal(4, seed=3),
    "second": 0.5 * normal(4, 4, 3, 3, seed=4), "out": normal(4, WAYS, seed=5),
}  # fmt: skip
TOKENS = {"table": normal(5, 8, seed=1), "out": normal(8, WAYS, seed=2)}


def on_vectors(operation):
    """``operation(params, z)`` of ``z`` ``[n, 8]`` between two linear maps."""
    return Network(lambda p, x: torch.tanh(operation(p, x @ p["in"])) @ p["out"], VECTORS), (4,)


def on_images(operation):
    """``operation(params, z)`` of ``z`` ``[n, 4, 6, 6]`` between a convolution and a linear map of the means."""

    def forward(p, x):
        z = operation(p, F.conv2d(x, p["kernel"], p["shift"], padding=1))
        return torch.tanh(z).mean((2, 3)) @ p["out"]

    return Network(forward, IMAGES), (2, 6, 6)


def on_tokens(operation):
    return Network(lambda p, x: torch.tanh(operation(x, p["table"]).mean(1)) @ p["out"], TOKENS), "tokens"


def heads(z):
    return z.unflatten(-1, (2, 4))[None]


WRONG = {  # PyTorch's own derivatives, of second order under vmap
    "layer_norm": on_vectors(lambda p, z: F.layer_norm(z, (8,), p["scale"], p["shift"])),
    "torch.layer_norm": on_vectors(lambda p, z: torch.layer_norm(z, (8,), p["scale"])),
    "batch_norm": on_vectors(lambda p, z: F.batch_norm(z, None, None, p["scale"], p["shift"], training=True)),
    "batch_norm of images": on_images(lambda p, z: F.batch_norm(z, None, None, p["scale"], p["shift"], training=True)),
    "instance_norm": on_images(lambda p, z: F.instance_norm(z, weight=p["scale"], bias=p["shift"])),
    "embedding, padding": on_tokens(lambda x, table: F.embedding(x, table, padding_idx=0)),
    "embedding, last is padding": on_tokens(lambda x, table: F.embedding(x, table, padding_idx=-1)),
}
MISSING = {  # PyTorch has none
    "attention": on_vectors(
        lambda p, z: F.scaled_dot_product_attention(heads(z), heads(z * p["scale"]), heads(z))[0].flatten(1)
    ),
    "hardsigmoid": on_vectors(lambda p, z: F.hardsigmoid(3 * z)),
}
RIGHT = {
    "layer_norm without scale": on_vectors(lambda p, z: F.layer_norm(z, (8,)) * p["scale"] + p["shift"]),
    "our layer_norm": on_vectors(lambda p, z: layer_norm(z, p["scale"], p["shift"])),
    "batch_norm without scale": on_images(lambda p, z: F.batch_norm(z, None, None, training=True)),
    "batch_norm in evaluation": on_vectors(
        lambda p, z: F.batch_norm(z, z.new_zeros(8), 2 * z.new_ones(8), p["scale"], p["shift"])
    ),
    "instance_norm without scale": on_images(lambda p, z: F.instance_norm(z)),
    "rms_norm": on_vectors(lambda p, z: F.rms_norm(z, (8,), p["scale"])),
    "group_norm": on_vectors(lambda p, z: F.group_norm(z, 2, p["scale"], p["shift"])),
    "group_norm of images": on_images(lambda p, z: F.group_norm(z, 2, p["scale"], p["shift"])),
    "local_response_norm": on_images(lambda p, z: F.local_response_norm(z, 2)),
    "normalize": on_vectors(lambda p, z: F.normalize(z, dim=-1)),
    "linear": on_vectors(lambda p, z: F.linear(z, p["square"], p["shift"])),
    "bilinear": on_vectors(lambda p, z: F.bilinear(z, z, p["square"].expand(8, 8, 8), p["shift"])),
    "conv2d": on_images(lambda p, z: F.conv2d(z, p["second"], p["shift"], stride=2)),
    "conv2d, dilated": on_images(lambda p, z: F.conv2d(z, p["second"], dilation=2)),
    "conv2d, grouped": on_images(lambda p, z: F.conv2d(z, p["second"][:, :1], groups=4)),
    "conv_transpose2d": on_images(lambda p, z: F.conv_transpose2d(z, p["second"], stride=2)),
    "max_pool2d": on_images(lambda p, z: F.max_pool2d(z, 2)),
    "avg_pool2d": on_images(lambda p, z: F.avg_pool2d(z, 2)),
    "adaptive_avg_pool2d": on_images(lambda p, z: F.adaptive_avg_pool2d(z, 4)),
    "adaptive_max_pool2d": on_images(lambda p, z: F.adaptive_max_pool2d(z, 4)),
    "interpolate": on_images(lambda p, z: F.interpolate(z, scale_factor=2, mode="bilinear")),
    "pad": on_images(lambda p, z: F.pad(z, (1, 1, 1, 1), mode="reflect")),
    "prelu": on_images(lambda p, z: F.prelu(z, p["scale"])),
    "embedding": on_tokens(F.embedding),
    "softmax": on_vectors(lambda p, z: F.softmax(z, -1)),
    "glu": on_vectors(lambda p, z: F.glu(z).repeat(1, 2)),
    "cumsum": on_vectors(lambda p, z: z.cumsum(-1)),
    "logsumexp": on_vectors(lambda p, z: z - z.logsumexp(-1, keepdim=True)),
    "std": on_vectors(lambda p, z: z / z.std(-1, keepdim=True)),
    "einsum": on_vectors(lambda p, z: torch.einsum("ni,ij,j->nj", z, p["square"], p["scale"])),
    "sort": on_vectors(lambda p, z: z.sort(-1).values * p["scale"]),
    "prod": on_vectors(lambda p, z: z * z.prod(-1, keepdim=True)),
} | {
    name: on_vectors(lambda p, z, name=name: getattr(F, name)(z * p["scale"] + p["shift"]))
    for name in (
        "relu", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "softplus", "mish", "hardswish", "hardtanh",
        "relu6", "softsign", "tanhshrink", "softshrink", "hardshrink", "logsigmoid",
    )
}  # fmt: skip


def of_labels(loss):
    """Of logits and the labels as rows of 0.9 and 0.05."""
    return lambda outputs, y: loss(outputs, torch.where(y[:, None] == torch.arange(WAYS), 0.9, 0.05).to(outputs))


LOSSES = {
    "label_smoothing": lambda outputs, y: F.cross_entropy(outputs, y, label_smoothing=0.1),
    "weighted": lambda outputs, y: F.cross_entropy(outputs, y, weight=outputs.new_tensor([1, 2, 3])),
    "ignore_index": lambda outputs, y: F.cross_entropy(outputs, y, ignore_index=0),
    "soft labels": of_labels(F.cross_entropy),
    "nll": lambda outputs, y: F.nll_loss(outputs.log_softmax(-1), y),
    "mse": of_labels(F.mse_loss),
    "binary": of_labels(F.binary_cross_entropy_with_logits),
    "kl_div": of_labels(lambda outputs, y: F.kl_div(outputs.log_softmax(-1), y, reduction="batchmean")),
    "huber": of_labels(F.huber_loss),
    "smooth_l1": of_labels(F.smooth_l1_loss),
}


def engine(network, tasks, loss=losses.cross_entropy):
    return maml(GradientDescent(network, loss, 0.5, 2), network.params, tasks)[0]


@pytest.mark.parametrize("name", RIGHT)
def test_most_operations_of_pytorch_are_right_under_vmap(name):
    network, shape = RIGHT[name]
    tasks = drawn(shape)
    assert distance(engine(network, tasks), by_autograd(network, network.params, tasks)) < 1e-11


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_pytorch_are_right_under_vmap(name):
    (network, shape), loss = on_vectors(lambda p, z: z), LOSSES[name]
    tasks = drawn(shape)
    assert distance(engine(network, tasks, loss), by_autograd(network, network.params, tasks, loss)) < 1e-11


@pytest.mark.parametrize("name", [*WRONG, *MISSING])
def test_the_wrong_ones_are_refused_or_made_right(name, monkeypatch):
    """What PyTorch gets wrong is wrong still, or this fails, and then the sentences of ``models`` change."""
    network, shape = (WRONG | MISSING)[name]
    tasks = drawn(shape)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        by_hand = {"hardsigmoid": on_vectors(lambda p, z: F.relu6(3 * z + 3) / 6)[0]}  # it has none without vmap either
        reference = by_autograd(by_hand.get(name, network), network.params, tasks)
    if name in WRONG:
        assert "wrong second derivative" in refused(lambda: engine(network, tasks))
        with monkeypatch.context() as patch:
            patch.setattr(explicit, "watched", lambda learner: nullcontext())
            assert distance(engine(network, tasks), reference) > 1e-3
    else:
        with pytest.raises(RuntimeError):
            engine(network, tasks)
    safe = Network(safely(network), network.params)
    assert distance(engine(safe, tasks), reference) < 1e-11


def safely(network):
    def forward(params, x):
        with translated():
            return network(params, x)

    return forward


def test_layer_norm_is_right_to_third_order_under_vmap():
    x, weight, bias = (normal(*shape, seed=i) for i, shape in enumerate([(3, 2, 4), (3, 4), (3, 4)]))
    torch.testing.assert_close(layer_norm(x), F.layer_norm(x, (4,)))
    torch.testing.assert_close(layer_norm(x[0], weight[0], bias[0]), F.layer_norm(x[0], (4,), weight[0], bias[0]))
    mapped = vmap(lambda x, w, b: layer_norm(x, w, b).tanh())
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
    assert torch.autograd.gradcheck(mapped, inputs) and torch.autograd.gradgradcheck(mapped, inputs)

    def twice(weight):
        def once(weight):
            return grad(lambda w: mapped(x, w, bias).square().sum())(weight).square().sum()

        return grad(once)(weight)

    assert torch.autograd.gradgradcheck(twice, (weight,))  # of twice: derivatives 3 and 4


# ---------------------------------------- modules


class Cell(nn.Module):
    """A recurrent cell along a sequence ``[n, time, 2]``, and a linear map of its last state."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.last = cell, nn.Linear(4, WAYS)

    def forward(self, x):
        state = None
        for one in x.unbind(1):
            state = self.cell(one, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


class Tied(nn.Module):
    """An embedding that is also the last layer."""

    def __init__(self, **settings):
        super().__init__()
        self.table, self.last = nn.Embedding(WAYS + 2, 6, **settings), nn.Linear(6, WAYS + 2)
        self.last.weight = self.table.weight

    def forward(self, x):
        return self.last(torch.tanh(self.table(x).mean(1)))[:, :WAYS]


class OwnLayerNorm(nn.Module):
    """Written out by hand, with a constant in a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, WAYS)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.register_buffer("epsilon", torch.tensor(0.1))

    def forward(self, x):
        x = self.first(x)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + self.epsilon).sqrt()
        return self.last(torch.tanh(x * self.scale))


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")
        self.last = nn.Linear(4, WAYS)

    def forward(self, x):
        return self.last(self.layer(x).mean(1))


def convolutional(norm):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), norm, nn.SiLU(), nn.Conv2d(4, 4, 3), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WAYS),
    )  # fmt: skip


def connected(*layers):
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Tanh(), nn.Linear(6, WAYS))


MODULES = {
    "convolution, group norm": (lambda: convolutional(nn.GroupNorm(2, 4)), (2, 6, 6)),
    "convolution, batch norm": (lambda: convolutional(nn.BatchNorm2d(4, track_running_stats=False)), (2, 6, 6)),
    "convolution, batch norm in evaluation": (lambda: convolutional(nn.BatchNorm2d(4)).eval(), (2, 6, 6)),
    "convolution, instance norm": (lambda: convolutional(nn.InstanceNorm2d(4, affine=True)), (2, 6, 6)),
    "layer norm": (lambda: connected(nn.LayerNorm(6), nn.GELU()), (4,)),
    "own layer norm": (OwnLayerNorm, (4,)),
    "RMS norm": (lambda: connected(nn.RMSNorm(6)), (4,)),
    "weight norm": (lambda: connected(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))), (4,)),
    "dropout in evaluation": (lambda: connected(nn.Dropout(0.5)).eval(), (4,)),
    "GRU cell": (lambda: Cell(nn.GRUCell(2, 4)), (3, 2)),
    "LSTM cell": (lambda: Cell(nn.LSTMCell(2, 4)), (3, 2)),
    "recurrent cell": (lambda: Cell(nn.RNNCell(2, 4, nonlinearity="relu")), (3, 2)),
    "tied embedding": (Tied, "tokens"),
    "tied embedding, padding": (lambda: Tied(padding_idx=1), "tokens"),
    "transformer": (Attentive, (3, 4)),
    "transformer in evaluation": (lambda: Attentive().eval(), (3, 4)),
}

RECORDED = (
    "convolution, batch norm", "convolution, group norm", "convolution, batch norm in evaluation", "layer norm",
    "own layer norm", "GRU cell", "tied embedding, padding", "transformer",
)  # fmt: skip


def made(build):
    """The module in float64, all parameters and buffers away from special values; the generator is PyTorch's own."""
    torch.manual_seed(0)
    module = build().double()
    with torch.no_grad():
        for i, value in enumerate(module.parameters()):
            value += 0.2 * normal(*value.shape, seed=i)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_the_meta_gradient_of_a_module(name):
    build, shape = MODULES[name]
    module, tasks = made(build), drawn(shape)
    model = from_module(module)
    theta = model.init(generator(0), torch.float64)
    assert theta.keys() == dict(module.named_parameters()).keys()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slow = module.train() if "transformer" in name else module  # its fast path is without derivatives
        reference = by_autograd(lambda p, x: functional_call(slow, p, (x,)), theta, tasks)
    learner = GradientDescent(model, losses.cross_entropy, 0.5, 2)
    for estimator in (maml, traced(maml), stepwise()) if name in RECORDED else (maml,):
        gradient, found = estimator(learner, theta, tasks)
        assert distance(gradient, reference) < 1e-10 and found.shape == (TASKS,)


def test_a_module_begins_at_its_own_weights_and_stays_as_it_is():
    module = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    before, model = {name: value.clone() for name, value in module.state_dict().items()}, from_module(module)
    theta, again = (model.init(generator(seed)) for seed in (0, 1))
    x = torch.rand(5, 1)
    assert torch.equal(model(theta, x), module(x))
    for name, value in theta.items():
        assert torch.equal(value, before[name]) and torch.equal(value, again[name]) and not value.requires_grad
        value += 1
        assert torch.equal(model.init(generator(0))[name], before[name])  # θ is a copy
    nn.init.zeros_(module[0].weight)
    assert torch.equal(model.init(generator(0))["0.weight"], before["0.weight"])  # and so is the model


def test_buffers_and_frozen_parameters_are_constants_of_thetas_type():
    module = OwnLayerNorm()
    module.first.requires_grad_(False)
    model, double = from_module(module), from_module(OwnLayerNorm().double())
    theta = model.init(generator(0), torch.float64)
    assert theta.keys() == {"last.weight", "last.bias", "scale"}
    x = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(theta, x), module.double()(x))
    assert double(double.init(generator(0)), x.float()).dtype == torch.float32


def test_the_head_of_a_module():
    assert from_module(connected()).head == "2."
    assert from_module(Cell(nn.GRUCell(2, 4))).head == "last." and from_module(nn.Linear(2, 1)).head == ""
    assert from_module(Cell(nn.GRUCell(2, 4)), head="cell.").head == "cell."
    assert "'2.bias'" in refused(lambda: from_module(connected(), head="fc."))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, WAYS)

    def forward(self, x):
        return self.last(x + torch.randn_like(x))


REFUSED = {
    "p=0": lambda: connected(nn.Dropout(0.5)),
    "eval()": lambda: nn.TransformerEncoderLayer(4, 2),
    "track_running_stats=False": lambda: connected(nn.BatchNorm1d(6)),
    "nn.GRUCell": lambda: nn.GRU(4, 4),
    "nn.LSTMCell": lambda: nn.LSTM(4, 4),
    "nn.RNNCell": lambda: nn.RNN(4, 4),
    "nn.Embedding": lambda: nn.EmbeddingBag(4, 4),
    "without max_norm": lambda: nn.Embedding(4, 4, max_norm=1.0),
    "scale_grad_by_freq": lambda: nn.Embedding(4, 4, scale_grad_by_freq=True),
    "and sparse": lambda: nn.Embedding(4, 4, sparse=True),
    "on an example": lambda: nn.LazyLinear(4),
    "no parameter": lambda: nn.ReLU(),
    "script": lambda: torch.jit.script(nn.Linear(4, 4)),
    "takes a torch.nn.Module": lambda: nn.Linear,
}


@pytest.mark.parametrize("word", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_meta_learned_is_refused_when_it_is_made(word):
    assert word in refused(lambda: from_module(REFUSED[word]()))


def test_what_cannot_be_meta_learned_is_refused_when_it_is_called():
    def run(module, x=(4,)):
        learner = GradientDescent(from_module(module.double()), losses.cross_entropy, 0.1)
        return lambda: maml(learner, learner.init(generator(0), torch.float64), drawn(x))

    class Functional(nn.Module):
        def __init__(self, operation):
            super().__init__()
            self.last, self.operation = nn.Linear(4, WAYS), operation

        def forward(self, x):
            return self.last(self.operation(x))

    assert "random" in refused(run(Noisy()))
    assert "random" in refused(run(Functional(F.dropout)))
    assert "functional.batch_norm" in refused(
        run(Functional(lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)))
    )
    assert "write (a[:, None]" in refused(run(Functional(lambda x: torch.cdist(x, x)[:, :4])))
    mean = torch.zeros(4, dtype=torch.float64)
    assert "running_mean" in refused(run(Functional(lambda x: F.batch_norm(x, mean, mean + 1, training=True))))
    assert "running_mean" in refused(
        run(Functional(lambda x: F.instance_norm(x[:, :, None].repeat(1, 1, 2), mean, mean + 1)[..., 0]))
    )
    model = from_module(nn.Linear(4, WAYS))
    assert "'bias'" in refused(lambda: model({"weight": torch.zeros(3, 4)}, torch.zeros(2, 4)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # not ours: said as PyTorch says it
        model(model.init(generator(0)), torch.zeros(2, 5))
