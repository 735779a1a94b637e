"""Recorded and compiled functions return what the functions themselves return."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch.func import vjp
from torch.nn import functional
from torch.utils._pytree import tree_map

from helpers import losses, runtime
from helpers.errors import UserError
from helpers.estimators import explicit
from helpers.estimators.explicit import chunked, fomaml, maml, stepwise
from helpers.estimators.nested import MetaLearner
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchAdam
from helpers.learners.proximal import HessianFree
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.numerics.conv_ops import convolve, patches, standardize
from helpers.numerics.tracing import captured, compiled, traced
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks


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
@pytest.mark.parametrize("steps", [0, 2])
def test_traced_and_stepwise_are_maml(case, steps, learn_rates):
    learner, theta, tasks = CASES[case](steps, learn_rates=learn_rates)
    expected = maml(learner, theta, tasks)
    for fast in (traced(maml), stepwise(), chunked(stepwise(), 2)):
        assert_same(fast(learner, theta, tasks), expected)


def test_stepwise_on_a_first_order_learner_is_fomaml():
    learner, theta, tasks = image_case(3)
    assert_same(stepwise()(learner.replace(first_order=True), theta, tasks), fomaml(learner, theta, tasks))


def test_a_recording_belongs_to_its_shapes_and_constants():
    """New values, rates among them, reuse the recording; another batch size, precision or number of steps does not."""
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
        ((learner.replace(rate=0.01), theta, tasks), 1),
        ((learner.replace(steps=1), theta, tasks), 2),
        ((learner, theta, tree_map(lambda t: t[:2], tasks)), 3),
        ((learner, *tree_map(torch.Tensor.float, (theta, tasks))), 4),
        ((learner.replace(), theta, tasks), 4),
    ):
        single = arguments[1]["linear1.bias"].dtype == torch.float32
        assert_same(fast(*arguments), maml(*arguments), rtol=1e-4 if single else 1e-11)
        assert len(calls) == recordings


def minibatch_tasks():
    tasks = Sinusoids(4, 4).sample(3, generator(0))
    return Tasks(minibatches(tasks.support, 2, 2, generator(0)), tasks.query)


def family_tasks():
    tasks = tree_map(lambda t: t.unflatten(0, (1, -1)), Sinusoids(4, 4).sample(4, generator(0)))
    return Tasks(Tasks(*tasks), Tasks(*tasks))


NETWORK = MLP((1, 6, 5, 1), scale=0.5, activation="tanh")
DESCENT = GradientDescent(NETWORK, losses.mean_squared_error, 0.05, 2)
ADAM = MinibatchAdam(NETWORK, losses.mean_squared_error, 0.01, carry=False)
NEWTON = HessianFree(NETWORK, losses.mean_squared_error, 0.05, 1, strength=2.0, solver_steps=2)
SCHEDULES = {
    "descent": (DESCENT, {"rate": 0.07}, lambda: Sinusoids(4, 4).sample(3, generator(0))),
    "adam": (ADAM, {"rate": 0.02, "decay": 0.9, "epsilon": 1e-3}, minibatch_tasks),
    "newton": (NEWTON, {"strength": 1.5, "damping": 0.3}, lambda: Sinusoids(4, 4).sample(3, generator(0))),
    "meta": (MetaLearner(DESCENT, 0.1), {"rate": 0.2, "inner": DESCENT.replace(rate=0.01)}, family_tasks),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_numbers_of_a_learner_are_data(name, dtype):
    """To the last bits, in single precision too: 1 - 0.999 is Python's."""
    learner, changes, tasks = SCHEDULES[name]
    theta, tasks = learner.init(generator(0), dtype), tree_map(lambda t: t.to(dtype), tasks())
    calls = []

    def counted(*arguments):
        calls.append(1)
        return maml(*arguments)

    fast = traced(counted)
    for one in (learner, learner.replace(**changes), learner):
        assert_same(fast(one, theta, tasks), maml(one, theta, tasks), rtol=10 * torch.finfo(dtype).eps)
    assert len(calls) == 1


def test_a_rate_may_follow_a_schedule():
    learner, theta, tasks = sinusoid_case()
    fast, estimator = traced(maml), stepwise()
    for iteration in range(4):
        annealed = learner.replace(rate=0.1 * 0.5**iteration)
        assert_same(fast(annealed, theta, tasks), maml(annealed, theta, tasks))
        assert_same(estimator(annealed, theta, tasks), maml(annealed, theta, tasks))


def test_numbers_behave_as_pythons_do():
    """Beside whole numbers, 0-dim tensors, other numbers and tensors of either precision."""

    def function(x, count, number):
        small = 1 - number
        return {
            "x": number * x + x / number - x**number,
            "0-dim": x.sum() * small,
            "count": count * number,
            "where": torch.where(x > number, x, small),
            "power": number ** x.sum().abs(),
            "clamp": x.clamp(min=small),
        }

    x = torch.rand(4, generator=generator(0)) + 0.5
    fast = traced(function)
    for x in (x, x.double()):  # noqa: B020
        for number in (0.999, 0.3):
            found, expected = fast(x, torch.tensor(3), number), function(x, torch.tensor(3), number)
            for name, value in expected.items():
                assert found[name].dtype == value.dtype
                torch.testing.assert_close(found[name], value, rtol=4 * torch.finfo(value.dtype).eps, atol=1e-12)


def test_where_python_needs_a_number_it_is_a_constant():
    def function(x, slope, limit):
        return torch.nn.functional.leaky_relu(x, slope) if limit > 0 else x

    x, fast = torch.tensor([-1.0, 2.0]), traced(function)
    for slope, limit in ((0.5, 1.0), (0.25, 1.0), (0.25, -1.0), (float("nan"), 1.0), (0.5, 1.0)):
        torch.testing.assert_close(fast(x, slope, limit), function(x, slope, limit), equal_nan=True)


def test_constants_of_different_kinds_are_told_apart():
    fast = traced(lambda x, how: x + 1 if how is True else x - how)
    x = torch.zeros(2)
    assert fast(x, 1).tolist() == [-1, -1] and fast(x, True).tolist() == [1, 1] and fast(x, 1.0).tolist() == [-1, -1]
    assert fast(x, how=2).tolist() == [-2, -2]


def test_a_traced_function_keeps_its_name_and_takes_keywords():
    learner, theta, tasks = sinusoid_case(1)
    for fast in (traced(maml), captured(maml), chunked(traced(maml), 2)):
        assert (fast.__name__, fast.__doc__) == (maml.__name__, maml.__doc__)
        assert_same(fast(learner, tasks=tasks, theta=theta), maml(learner, theta, tasks))
    value, pull = tracing.linearized(lambda a, scale=2.0: (a * scale).sin(), by=(0,))(torch.ones(2), scale=3.0)
    torch.testing.assert_close(pull(torch.ones(2))[0], 3 * torch.full((2,), 3.0).cos())


def test_recordings_are_bounded_and_can_be_forgotten(monkeypatch):
    monkeypatch.setattr(tracing, "KEPT", 3)
    calls = []

    def function(x, loss):
        calls.append(1)
        return loss(x)

    fast = traced(function)
    for size in (1, 2, 3, 1):
        fast(torch.zeros(size), torch.sin)
    assert len(calls) == 3
    with pytest.warns(RuntimeWarning, match="function has more than 3 .* constants change, such as <fun"):
        fast(torch.zeros(1), lambda x: x + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(torch.zeros(1), lambda x: x + 2)  # said once
    fast(torch.zeros(1), torch.sin)  # used last, so still there
    assert len(calls) == 5
    fast(torch.zeros(2), torch.sin)
    assert len(calls) == 6
    fast.forget()
    fast(torch.zeros(2), torch.sin)
    assert len(calls) == 7


def test_equal_results_stay_two_tensors():
    one, other = traced(lambda x: (x + 1, x + 1))(torch.zeros(2))
    one += 1
    assert other.tolist() == [1, 1]


@dataclass(frozen=True)
class Small:
    """Images, a convolution, an activation, perhaps another layer, and a matrix."""

    layers: str
    activation: str

    def is_adapted(self, name):
        return True

    def init(self, draws, dtype=torch.float64):
        shapes = {"c": (4, 1, 3, 3), "scale": (4,), "h": (4 * 36, 3)}
        return {name: 0.3 * torch.randn(shape, generator=draws, dtype=dtype) for name, shape in shapes.items()}

    def __call__(self, params, x):
        stride = 2 if self.layers == "strided" else 1
        z = getattr(functional, self.activation)(functional.conv2d(x, params["c"], stride=stride, padding=1))
        match self.layers:
            case "average":
                z = functional.avg_pool2d(z, 2)
            case "maximum":
                z = functional.max_pool2d(z, 2)
            case "group":
                z = functional.group_norm(z, 2, params["scale"])
            case "layer":
                z = (z - z.mean((1, 2, 3), keepdim=True)) / (z.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
            case "transposed":
                z = z.transpose(1, 3).flip(2).mT
            case "last":
                z = z.permute(0, 2, 3, 1) * params["scale"]
            case "embedding":
                z = z + functional.embedding(torch.arange(z.shape[-1]) % 4, params["c"].flatten(1))[:, :1].flatten()
        z = z.flatten(1)
        return z @ params["h"][: z.shape[1]]


ACTIVATIONS = ["softplus", "elu", "silu", "gelu", "tanh", "relu", "leaky_relu", "logsigmoid", "selu", "mish"]
LAYERS = ["strided", "average", "maximum", "group", "layer", "transposed", "last", "embedding"]
PAIRS = [("", activation) for activation in ACTIVATIONS] + [(one, "elu") for one in LAYERS]


@pytest.mark.parametrize("layers, activation", PAIRS)
def test_traced_is_plain_whatever_the_layers(layers, activation):
    learner = GradientDescent(Small(layers, activation), losses.cross_entropy, 0.1)
    draws = generator(0)
    parts = torch.randn(2, 2, 6, 1, 6, 6, generator=draws).double()
    tasks = Tasks(*(Examples(part, torch.arange(3).repeat(2, 2)) for part in parts))
    theta = learner.init(draws, torch.float64)
    expected = maml(learner, theta, tasks)
    for fast in (traced(maml), stepwise()):
        assert_same(fast(learner, theta, tasks), expected, rtol=1e-10)


@dataclass(frozen=True)
class Normalised:
    """A hidden layer that is normalised by PyTorch, with a scale or without."""

    kind: str
    scaled: bool

    def is_adapted(self, name):
        return True

    def __call__(self, params, x):
        z, scale = x @ params["a"], (params["w"], params["b"]) if self.scaled else (None, None)
        match self.kind:
            case "layer":
                z = functional.layer_norm(z, (8,), *scale)
            case "batch":
                z = functional.batch_norm(z, None, None, *scale, training=True)
            case "group":
                z = functional.group_norm(z, 2, *scale)
            case "instance":
                z = functional.instance_norm(z.mT[None], None, None, torch.ones(8).double(), None)[0].mT
        return z.tanh() @ params["h"]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", ["layer", "batch", "group", "instance"])
def test_a_normalisation_is_differentiated_rightly_or_refused(kind, scaled, monkeypatch):
    """Refused is exactly what is wrong: held against gradients without vmap."""
    draws = generator(0)
    shapes = {"a": (4, 8), "w": (8,), "b": (8,), "h": (8, 3)}
    theta = {name: torch.randn(shape, generator=draws).double() for name, shape in shapes.items()}
    x, y = torch.randn(2, 3, 6, 4, generator=draws).double(), torch.arange(3).repeat(3, 2)
    tasks = Tasks(Examples(x[0], y), Examples(x[1], y))
    learner = GradientDescent(Normalised(kind, scaled), losses.cross_entropy, 0.5)

    def reference(first_order):
        leaves, total = {name: value.clone().requires_grad_() for name, value in theta.items()}, 0.0
        for k in range(3):
            loss = losses.cross_entropy(learner.model(leaves, x[0, k]), y[k])
            used = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
            phi = {
                n: v - 0.5 * (g.detach() if first_order else g) for (n, v), g in zip(leaves.items(), used, strict=True)
            }
            total = total + losses.cross_entropy(learner.model(phi, x[1, k]), y[k]) / 3
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    first = learner.replace(first_order=True)
    for name, value in traced(maml)(first, theta, tasks)[0].items():
        torch.testing.assert_close(value, reference(True)[name], rtol=1e-10, atol=1e-12)
    if scaled and kind in ("layer", "batch"):
        with monkeypatch.context() as patch:
            patch.setattr(explicit, "watched", lambda learner: nullcontext())
            wrong, right = maml(learner, theta, tasks)[0], reference(False)
        assert not all(torch.allclose(wrong[name], right[name]) for name in right)  # else the check is out of date
        with pytest.raises(UserError, match="wrong second derivative of .*_norm under vmap: write the normalisation"):
            traced(maml)(learner, theta, tasks)
        for _ in range(2):  # at the first call, and at any other
            with pytest.raises(UserError, match="wrong second derivative"):
                maml(learner, theta, tasks)
    else:
        for name, value in traced(maml)(learner, theta, tasks)[0].items():
            torch.testing.assert_close(value, reference(False)[name], rtol=1e-10, atol=1e-12)


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
def test_compiled_is_maml():
    if not runtime.can_compile():
        pytest.skip("torch.compile needs a C++ compiler")
    learner, theta, tasks = sinusoid_case(1)
    assert_same(compiled(maml)(learner, theta, tasks), maml(learner, theta, tasks))


def test_without_a_compiler_compiled_falls_back(monkeypatch):
    monkeypatch.setattr(runtime, "can_compile", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("torch.compile was called"))
    learner, theta, tasks = sinusoid_case()
    assert_same(compiled(maml)(learner, theta, tasks), maml(learner, theta, tasks))


def test_a_compiler_that_fails_is_gone_on_without(monkeypatch, capsys):
    """At one program, or, found out once, at all of them."""

    def broken(*_, **__):
        def run(*_):
            raise RuntimeError("g++: no such thing\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    runtime._compiles.cache_clear()
    assert not runtime._compiles("cpu")
    runtime._compiles.cache_clear()
    monkeypatch.setattr(runtime, "can_compile", lambda: True)
    learner, theta, tasks = sinusoid_case(1)
    fast = compiled(maml)
    for _ in range(2):
        assert_same(fast(learner, theta, tasks), maml(learner, theta, tasks))
    assert capsys.readouterr().err == "metabook: torch.compile failed (g++: no such thing); going on without\n"


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


# ---------------------------------------- what a recording must not ask, use up or change
@pytest.mark.parametrize(
    "asking",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x.sum()),
        lambda x: x * x.argmax().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x * torch.equal(x, x.flip(0)),
    ],
    ids=["if", "float", "item", "mask", "nonzero", "equal"],
)
def test_asking_for_values_is_refused(asking):
    """A recording would go on with the answer of its first call."""
    with pytest.raises(UserError, match="must not ask for the values of tensors.*torch.where"):
        traced(asking)(torch.rand(3))


def test_the_values_of_constants_may_be_asked_for():
    found = traced(lambda x: x * float(torch.arange(3).sum()) + x[[0, 0]])
    for x in (torch.ones(2), torch.tensor([2.0, 3.0])):
        assert torch.equal(found(x), 3 * x + x[[0, 0]])


def test_a_constant_that_is_written_into_is_a_new_one_at_every_call():
    found, x = traced(lambda x: torch.tensor([1.0, 2.0]).add_(x)), torch.ones(2)
    for _ in range(3):
        assert found(x).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("own", [True, False], ids=["own generator", "default generator"])
def test_recording_uses_up_no_draw(own):
    draws = torch.Generator() if own else torch.default_generator

    def draw(x):
        return x + torch.rand(3, generator=draws if own else None)

    with torch.random.fork_rng([]):
        draws.manual_seed(5)
        expected = [draw(torch.zeros(3)) for _ in range(3)]
        draws.manual_seed(5)
        found = traced(draw)
        for one in expected:
            assert torch.equal(found(torch.zeros(3)), one)
