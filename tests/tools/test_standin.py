"""The stand-in for a GPU raises where a GPU would, and nowhere else. Where there is a real one, that is tested."""

from __future__ import annotations

import copy
import operator
import subprocess
import sys
from pathlib import Path

import pytest
import standin
import torch
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map

from helpers import estimators, losses, runtime
from helpers.lab import training
from helpers.learners.descent import GradientDescent
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks


@pytest.fixture(autouse=True)
def _card():
    with standin.card():
        yield


def here(*shape, **settings):
    return torch.rand(*shape, device="cuda", **settings)


def index(*rows, device="cuda"):
    return torch.tensor(rows, device=device)


def in_place(f):
    """An operation on a copy of its first argument."""
    return lambda x, *rest: f(x.clone(), *rest)


def put(x, rows, value):
    x = x.clone()
    x[rows] = value
    return x


def added_up(x, y):
    x = x.clone()
    x += y
    return x


MIXTURES = {  # an operation and what it is given: "gpu" and "cpu" stand for a matrix, "gpu0" and "cpu0" for a number
    "add": (torch.add, "gpu", "cpu"),
    "divide by a matrix": (torch.div, "cpu", "gpu"),
    "product": (torch.matmul, "gpu", "cpu"),
    "a number there": (torch.mul, "cpu", "gpu0"),
    "cat": (lambda x, y: torch.cat([x, y]), "gpu", "cpu"),
    "stack of numbers": (lambda x, y: torch.stack([x, y]), "gpu0", "cpu0"),
    "where": (lambda x, y: torch.where(x > 0.5, x, y), "gpu", "cpu"),
    "in place": (added_up, "gpu", "cpu"),
    "in place, a number": (added_up, "cpu0", "gpu0"),
    "index there": (lambda x: x[index(0, 1)], "cpu"),
    "mask there": (lambda x, y: x[y > 0.5], "cpu", "gpu"),
    "gather": (lambda x, y: x.gather(0, (y > 2).long()), "gpu", "cpu"),
    "values put": (lambda x, y: put(x, index(0, 1, 2), y), "gpu", "cpu"),
    "masked_fill": (lambda x, y: x.masked_fill(y > 0.5, 0.0), "gpu", "cpu"),
    "cross-entropy": (lambda x: torch.nn.functional.cross_entropy(x, index(0, 1, 2, device="cpu")), "gpu"),
    "mse_loss": (torch.nn.functional.mse_loss, "gpu", "cpu"),
    "allclose": (torch.allclose, "gpu", "cpu"),
    "equal": (torch.equal, "gpu", "cpu"),
    "linear": (torch.nn.functional.linear, "gpu", "cpu"),
    "lstsq": (lambda x, y: torch.linalg.lstsq(x, y), "gpu", "cpu"),
    "under vmap": (vmap(torch.mul, (0, None)), "gpu", "cpu"),
    "under grad": (lambda x, y: grad(lambda x: (x * y).sum())(x), "gpu", "cpu"),
    "cotangent": (lambda x, y: vjp(torch.sin, x)[1](y), "gpu", "cpu"),
    "in a backward pass": (lambda x, y: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x)[0] + y, "gpu", "cpu"),
}
ALLOWED = {
    "add": (torch.add, "gpu", "gpu"),
    "a number here": (torch.mul, "gpu", "cpu0"),
    "two numbers": (torch.add, "gpu0", "cpu0"),
    "where with a number": (lambda x, y: torch.where(x > 0.5, x, y), "gpu", "cpu0"),
    "in place, a number here": (added_up, "gpu", "cpu0"),
    "index here": (lambda x: x[index(0, 1, device="cpu")], "gpu"),
    "mask here": (lambda x, y: x[y > 0.5], "gpu", "cpu"),
    "copied": (in_place(lambda x, y: x.copy_(y)), "gpu", "cpu"),
    "slice assigned": (lambda x, y: put(x, slice(0, 3), y), "gpu", "cpu"),
    "a number put": (lambda x, y: put(x, index(0, 1), y), "gpu", "cpu0"),
    "masked_fill": (lambda x, y: x.masked_fill(x > 0.5, y), "gpu", "cpu0"),
    "sent": (lambda x: x.to("cuda"), "cpu"),
    "like another": (lambda x, y: y.to(x), "gpu", "cpu"),
    "new_tensor": (lambda x: x.new_tensor([1.0, 2.0]), "gpu"),
    "zeros_like": (torch.zeros_like, "gpu"),
    "as_tensor": (torch.as_tensor, "gpu"),
    "one_hot": (lambda x: torch.nn.functional.one_hot((x > 0.5).long(), 2), "gpu"),
    "deepcopy": (copy.deepcopy, "gpu"),
    "sort": (lambda x: x.sort(0).values, "gpu"),
    "float64": (torch.Tensor.double, "gpu"),
    "under vmap": (vmap(torch.mul, (0, None)), "gpu", "gpu"),
    "split and one part used": (lambda x: grad(lambda x: x.unbind(0)[0].sum())(x), "gpu"),
    "jacrev": (jacrev(lambda x: x.sum(0).sin()), "gpu"),
    "jvp": (lambda x, y: jvp(torch.sin, (x,), (y,))[1], "gpu", "gpu"),
    "second order": (lambda x: grad(lambda x: grad(lambda y: y.pow(3).sum())(x).square().sum())(x), "gpu"),
    "under vmap, grad": (vmap(grad(lambda x: x.square().sum())), "gpu"),
}


def given(kinds):
    make = {"g": here, "c": torch.rand}
    return [make[kind[0]](() if kind.endswith("0") else (3, 3)) for kind in kinds]


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_raise(name):
    operation, *kinds = MIXTURES[name]
    arguments = given(kinds)
    with pytest.raises(RuntimeError, match="device"):
        operation(*arguments)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_right_stays_there(name):
    operation, *kinds = ALLOWED[name]
    result = operation(*given(kinds))
    assert result.device.type == "cuda" and result.is_cuda and not result.is_cpu


def test_the_way_back():
    x = here(3)
    back = x.cpu()
    assert back.device.type == x.to("cpu").device.type == "cpu" and x.is_cuda
    assert (back + torch.ones(3)).is_cpu and back.tolist() == x.tolist()
    assert torch.tensor([x[0], x[1]]).is_cpu, "numbers are read out"
    for use in (torch.Tensor.numpy, torch.Tensor.__array__):
        with pytest.raises(TypeError, match="cuda"):
            use(x)
    assert x.sum().item() == pytest.approx(back.numpy().sum())


def test_the_device_is_seen_inside_transformations():
    seen = []

    def look(x):
        seen.append(x.device.type)
        return x.square().sum()

    vmap(grad(look))(here(2, 3))
    vmap(look)(torch.rand(2, 3))
    assert seen == ["cuda", "cpu"]


def test_generators_are_of_a_kind():
    there, on_cpu = runtime.generator(3, "cuda"), runtime.generator(3)
    assert (there.device.type, on_cpu.device.type) == ("cuda", "cpu")
    assert (len(there.get_state()), len(on_cpu.get_state())) == (16, 5056)
    for wrong in (
        lambda: torch.rand(3, generator=there),
        lambda: torch.rand(3, generator=on_cpu, device="cuda"),
        lambda: torch.randperm(3, generator=there),
        lambda: here(3).multinomial(1, generator=on_cpu),
        lambda: torch.rand(3).uniform_(generator=there),
        lambda: there.set_state(on_cpu.get_state()),
        lambda: on_cpu.set_state(there.get_state()),
    ):
        with pytest.raises(RuntimeError):
            wrong()
    state = there.get_state()
    first = torch.rand(3, generator=there, device="cuda")
    assert not torch.equal(first, torch.rand(3, generator=there, device="cuda"))
    assert torch.equal(first, torch.rand(3, generator=there.set_state(state), device="cuda"))


def test_runtime_finds_it():
    assert runtime.pick_device("auto") == runtime.pick_device("cuda") == torch.device("cuda")
    assert runtime.machine("cuda")["device"] == torch.cuda.get_device_name() != runtime.machine("cpu")["device"]
    assert runtime.peak_memory(lambda: here(1000), "cuda") > 0


@pytest.mark.parametrize(
    "network, form",
    [
        (MLP((1, 8, 1)), estimators.maml),
        (MLP((1, 8, 1)), tracing.traced(estimators.maml)),
        (MLP((1, 8, 1)), estimators.stepwise()),
        (ConvNet(ways=5, filters=2), estimators.maml),
    ],
    ids=["mlp", "mlp-traced", "mlp-stepwise", "conv"],
)
def test_meta_gradients_live_there(network, form):
    """The values are those of the CPU, and tasks of the other device are refused."""

    def tasks(device):
        draws = runtime.generator(0)
        if isinstance(network, MLP):
            made = Sinusoids(4, 4).sample(3, draws)
        else:
            x, y = torch.rand(3, 10, 1, 28, 28, generator=draws), torch.arange(5).repeat(3, 2)
            made = Tasks(Examples(x, y), Examples(x, y))
        return tree_map(lambda t: t.to(device), made)

    loss = losses.mean_squared_error if isinstance(network, MLP) else losses.cross_entropy
    learner, theta = GradientDescent(network, loss, 0.1), network.init(runtime.generator(0))
    there = {name: value.to("cuda") for name, value in theta.items()}
    expected, values = form(learner, theta, tasks("cpu"))
    found, others = form(learner, there, tasks("cuda"))
    assert values.is_cpu and others.is_cuda and all(g.is_cuda for g in found.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-5)
    with pytest.raises(RuntimeError, match="device"):
        form(learner, there, tasks("cpu"))


@pytest.mark.parametrize("outer", ["adam", "sgd"])
def test_the_outer_loop_runs_there(outer):
    draws, learner = runtime.generator(0, "cuda"), GradientDescent(MLP((1, 8, 1)), losses.mean_squared_error, 0.01)
    theta = learner.init(draws)
    step = operator.itemgetter(0, 1)
    trained, history = training.fit(
        lambda theta, _: step(estimators.maml(learner, theta, Sinusoids(4, 4).sample(2, draws))),
        theta,
        3,
        outer=outer,
    )
    assert history.is_cuda and all(value.is_cuda and not torch.equal(value, theta[n]) for n, value in trained.items())


def test_it_leaves_nothing_behind():
    """In a process of its own, since the fixture is around every test here."""
    program = (
        "import torch, standin\n"
        "zeros, stay = torch.zeros, torch.utils._python_dispatch._get_current_dispatch_mode\n"
        "with standin.card():\n"
        "    x = torch.zeros(2, device='cuda') + 1\n"
        "assert torch.zeros is zeros and stay() is None and not torch.cuda.is_available()\n"
        "assert not {'device', 'to', 'numpy'} & set(vars(torch.Tensor)) and x.device.type == 'cpu'\n"
    )
    folder = Path(standin.__file__).parent
    ran = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
