"""Time one meta-gradient of MAML with this book's engine and with other libraries, side by side.

    make bench                        # or: metabook bench, or: python benchmarks/bench.py
    python benchmarks/bench.py --case omniglot-conv-1 --quick

Every library gets the same numbers to work on and is written as its own documentation would have it. First, all of them
must return the same meta-gradient (in float64, to 1e-8, and at the timed size in float32); otherwise nothing is timed.
Then they take turns, round after round, so that whatever else the machine does hits all alike; the table shows medians.

The matrix-product ceiling is the time that the case's matrix products would take at the rate at which this machine
multiplies large matrices, measured in the same rounds: no method that does this arithmetic can be faster.

Writes ``_build/bench.json``; with ``--record`` also ``data/benchmarks/bench.json``, with machine, threads and versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from helpers import errors, estimators, losses, runtime
from helpers.learners.descent import GradientDescent
from helpers.models.convnet import ConvNet
from helpers.models.layers import EPSILON
from helpers.models.mlp import MLP
from helpers.numerics import tracing
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Params, Tasks

Gradient = Callable[[], Params]  # computes one meta-gradient
EAGER, TRACED, COMPILED = "this engine, eager", "this engine, traced", "this engine, compiled"
LOOP, HIGHER, TORCHOPT = "plain loop", "higher", "TorchOpt"
PEERS = (LOOP, HIGHER, TORCHOPT)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


# ---------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """What is timed: a learner and a batch of tasks."""

    name: str
    learner: GradientDescent
    tasks: int
    chunk: int | None  # tasks that this engine differentiates at once

    def draw(self, tasks: int, dtype: torch.dtype) -> tuple[Params, Tasks]:
        """Meta-parameters, moved away from their symmetric beginning, and tasks."""
        generator = runtime.generator(0)
        theta = self.learner.init(generator, torch.float64)
        theta = {name: (p + 0.1 * torch.randn(p.shape, generator=generator)).to(dtype) for name, p in theta.items()}
        if isinstance(self.learner.model, MLP):
            batch = Sinusoids(10, 10).sample(tasks, generator)
        else:
            ways = self.learner.model.ways
            x, y = torch.rand(2, tasks, ways, 1, 28, 28, generator=generator), torch.arange(ways).repeat(tasks, 1)
            batch = Tasks(Examples(x[0], y), Examples(x[1], y))
        return theta, tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)

    def products(self) -> int:
        """Floating-point operations of the matrix products in one meta-gradient.

        A network evaluation has one product a layer. Its gradient has two more, by weight and by input, except by the
        first layer's input. Differentiating an inner gradient doubles that: each product has two factors. The first
        layer's input is data, so its products with a derivative of the input fall away.
        """
        model = self.learner.model
        if isinstance(model, MLP):
            examples, sizes = 10, [a * b for a, b in zip(model.sizes, model.sizes[1:], strict=False)]
        else:
            examples, sizes, side, inputs = model.ways, [], 28, model.channels
            for _ in range(model.blocks):
                side = -(-side // 2)
                sizes.append(side * side * 9 * inputs * model.filters)
                inputs = model.filters
            sizes.append(model.filters * model.ways)
        first, rest = sizes[0], sum(sizes[1:])
        plain, second = 2 * first + 3 * rest, 2 * first + 6 * rest
        return 2 * self.tasks * examples * (self.learner.steps * (plain + second) + plain)


def cases() -> list[Case]:
    """The three cases of the book."""
    sinusoid = GradientDescent(MLP((1, 40, 40, 1)), losses.mean_squared_error, 0.01, 5)
    omniglot = GradientDescent(ConvNet(ways=5), losses.cross_entropy, 0.4, 1)
    return [
        Case("sinusoid-mlp", sinusoid, 25, None),
        Case("omniglot-conv-1", omniglot, 32, 4),
        Case("omniglot-conv-5", omniglot.replace(steps=5), 32, 4),
    ]


# ---------------------------------------- this engine


def engine(case: Case, theta: Params, tasks: Tasks, form: str) -> Gradient:
    """The meta-gradient by this engine: as it is, traced, or compiled."""
    estimator = estimators.maml
    if form == TRACED:
        estimator = tracing.traced(estimator)
    elif form == COMPILED:
        estimator = tracing.compiled(estimator)
    # Eager, the whole batch at once: fewer operations. Otherwise a few tasks at a time: they stay in the cache.
    estimator = estimators.chunked(estimator, None if form == EAGER else case.chunk)
    return lambda: estimator(case.learner, theta, tasks)[0]


# ---------------------------------------- the others


class Network(nn.Module):
    """The same network as their users write it: images [n, channels, h, w], convolutions, batch normalisation.

    The normalisation shifts belong to the meta-parameters but are not adapted, so they stay outside the module's
    parameters.
    """

    def __init__(self, case: Case, theta: Params) -> None:
        super().__init__()
        self.conv, self.depth = isinstance(case.learner.model, ConvNet), 0
        self.shifts = []
        for name, value in theta.items():
            if name.endswith(".shift"):
                self.shifts.append(value)
            else:
                self.register_parameter(name.replace(".", "_"), nn.Parameter(value.detach().clone()))
            self.depth += name.startswith(("conv", "linear")) and name.endswith(".weight")

    def weights(self) -> Params:
        """The adapted parameters."""
        return dict(self.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        return evaluate(self.weights(), self.shifts, self.conv, self.depth, x)


def evaluate(weights: Params, shifts: list[Tensor], conv: bool, depth: int, x: Tensor) -> Tensor:
    """Outputs of the network with these weights."""
    if not conv:
        for layer in range(1, depth + 1):
            x = F.linear(x, weights[f"linear{layer}_weight"], weights[f"linear{layer}_bias"])
            x = F.relu(x) if layer < depth else x
        return x
    for block in range(1, depth + 1):
        size = x.shape[-1]
        missing = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
        x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = F.conv2d(x, weights[f"conv{block}_weight"], stride=2)
        x = F.relu(F.batch_norm(x, None, None, None, shifts[block - 1], training=True, eps=EPSILON))
    return F.linear(x.mean((2, 3)), weights["head_weight"], weights["head_bias"])


def theirs(theta: Params) -> Params:
    """Meta-parameters in PyTorch's layout: linear [out, in], convolution [out, in, 3, 3]."""
    turn = {2: lambda p: p.t(), 4: lambda p: p.permute(3, 2, 0, 1), 1: lambda p: p}
    return {name: turn[p.dim()](p).contiguous().requires_grad_() for name, p in theta.items()}


def ours(theta: Params) -> Params:
    """The way back."""
    turn = {2: lambda p: p.t(), 4: lambda p: p.permute(2, 3, 1, 0), 1: lambda p: p}
    return {name: turn[p.dim()](p) for name, p in theta.items()}


def plain_loop(case: Case, theta: Params, tasks: Tasks) -> Gradient:
    """``torch.autograd.grad(..., create_graph=True)``, one task after another."""
    theta, learner = theirs(theta), case.learner
    start = {name.replace(".", "_"): p for name, p in theta.items() if not name.endswith(".shift")}
    network = Network(case, theta)  # for its form; the weights are passed in

    def run() -> Params:
        total = 0
        for xs, ys, xq, yq in zip(*tasks.support, *tasks.query, strict=True):
            phi = start
            for _ in range(learner.steps):
                loss = learner.loss(evaluate(phi, network.shifts, network.conv, network.depth, xs), ys)
                gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
                phi = {name: p - learner.rate * g for (name, p), g in zip(phi.items(), gradients, strict=True)}
            total = total + learner.loss(evaluate(phi, network.shifts, network.conv, network.depth, xq), yq)
        gradient = torch.autograd.grad(total / len(tasks.support.x), list(theta.values()))
        return ours(dict(zip(theta, gradient, strict=True)))

    return run


def collect(network: Network, theta: Params) -> Params:
    """The gradient that ``backward`` left in the module and in the shifts."""
    weights = network.weights()
    found = {name: theta[name] if name.endswith(".shift") else weights[name.replace(".", "_")] for name in theta}
    gradient = ours({name: p.grad for name, p in found.items()})
    for p in found.values():
        p.grad = None
    return gradient


def with_higher(case: Case, theta: Params, tasks: Tasks) -> Gradient:
    """``higher.innerloop_ctx``, as in its MAML example."""
    import higher

    theta, learner = theirs(theta), case.learner
    network = Network(case, theta)
    optimizer = torch.optim.SGD(network.parameters(), lr=learner.rate)

    def run() -> Params:
        for xs, ys, xq, yq in zip(*tasks.support, *tasks.query, strict=True):
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (adapted, inner):
                for _ in range(learner.steps):
                    inner.step(learner.loss(adapted(xs), ys))
                (learner.loss(adapted(xq), yq) / len(tasks.support.x)).backward()
        return collect(network, theta)

    return run


def with_torchopt(case: Case, theta: Params, tasks: Tasks) -> Gradient:
    """``torchopt.MetaSGD``, as in its MAML example."""
    import torchopt

    theta, learner = theirs(theta), case.learner
    network = Network(case, theta)
    optimizer = torchopt.MetaSGD(network, lr=learner.rate)
    # Extracting puts the state's own tensors into the network when recovered, so the parameters are kept by name.
    parameters = network.weights()

    def run() -> Params:
        state = torchopt.extract_state_dict(network, by="reference")
        inner = torchopt.extract_state_dict(optimizer, by="reference")
        total = 0
        for xs, ys, xq, yq in zip(*tasks.support, *tasks.query, strict=True):
            for _ in range(learner.steps):
                optimizer.step(learner.loss(network(xs), ys))
            total = total + learner.loss(network(xq), yq)
            torchopt.recover_state_dict(network, state)
            torchopt.recover_state_dict(optimizer, inner)
        (total / len(tasks.support.x)).backward()
        found = {n: theta[n] if n.endswith(".shift") else parameters[n.replace(".", "_")] for n in theta}
        gradient = ours({name: p.grad for name, p in found.items()})
        for p in found.values():
            p.grad = None
        return gradient

    return run


def libraries() -> dict[str, Callable[[Case, Params, Tasks], Gradient]]:
    """What can be timed here; what cannot is said."""
    found = {form: lambda *case, form=form: engine(*case, form) for form in (EAGER, TRACED, COMPILED)}
    found |= {LOOP: plain_loop, HIGHER: with_higher, TORCHOPT: with_torchopt}
    if not runtime.can_compile():
        print("no C++ compiler was found, so the compiled engine is left out: install g++ to time it")
        del found[COMPILED]
    for library in (HIGHER, TORCHOPT):
        if importlib.util.find_spec(library.lower()) is None:
            print(f"{library} is not installed and is left out: pip install {library.lower()}")
            del found[library]
    return found


# ---------------------------------------- measuring


def error(gradient: Params, reference: Params) -> float:
    """Norm of the difference, relative to the norm of the reference, over all parameters."""
    if gradient.keys() != reference.keys():
        return float("inf")
    square = lambda tensors: sum(t.double().square().sum() for t in tensors)  # noqa: E731
    apart = square(gradient[name].double() - reference[name].double() for name in reference)
    return (apart / square(reference.values())).sqrt().item()


def agree(
    case: Case, makers: dict, tasks: int, dtype: torch.dtype, reference: Params | None = None
) -> dict[str, Gradient]:
    """Build all libraries' meta-gradients and compare them with the plain loop's, or with ``reference``.

    Raises:
        UserError: if one differs.
    """
    theta, batch = case.draw(tasks, dtype)
    built = {name: make(case, theta, batch) for name, make in makers.items()}
    found = {}
    for name, run in (bar := tqdm(built.items(), desc=f"{case.name}: compare in {dtype}"[:60], leave=False)):
        bar.set_postfix_str(name)
        found[name] = run()
    reference = reference or found[LOOP]
    errors = {name: error(gradient, reference) for name, gradient in found.items()}
    wrong = [f"{name} ({e:.1e})" for name, e in errors.items() if not e <= TOLERANCE[dtype]]
    if wrong:
        raise errors.UserError(
            f"{case.name}: the meta-gradient of {', '.join(wrong)} is off by over {TOLERANCE[dtype]:g} in {dtype}, "
            "so nothing was timed: mend that first"
        )
    kind = str(dtype).removeprefix("torch.")
    print(f"{case.name}: all {len(found)} agree in {kind} on {tasks} tasks, to {max(errors.values()):.0e}")
    return built


def clock(run: Callable[[], object], seconds: float) -> float:
    """Milliseconds a call: the mean over as many calls as fit into ``seconds``, at least one."""
    begin, calls = time.perf_counter(), 0
    while True:
        run()
        calls += 1
        if (elapsed := time.perf_counter() - begin) >= seconds:
            return 1e3 * elapsed / calls


def multiply(size: int = 1024) -> Callable[[], Tensor]:
    """A large matrix product, to measure the machine with."""
    a, b = torch.randn(2, size, size, generator=runtime.generator(0))
    return lambda: a @ b


def measure(case: Case, makers: dict, rounds: int) -> list[dict]:
    """Check and time one case."""
    exact = {name: make for name, make in makers.items() if name != COMPILED}  # compiled once only, at the timed size
    agree(case, exact, 3, torch.float64)
    theta, batch = case.draw(case.tasks, torch.float64)
    truth = plain_loop(case, theta, batch)()
    built = agree(case, makers, case.tasks, torch.float32, truth)
    product = multiply()
    times, rates = {name: [] for name in built}, []
    for _ in tqdm(range(rounds), desc=f"{case.name}: {rounds} rounds", leave=False):
        rates.append(2 * 1024**3 / clock(product, 0.05))
        for name, run in built.items():
            run()  # its own data into the cache, its memory out of the others' hands
            times[name].append(clock(run, 0.1))
    ceiling = case.products() / max(rates)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((medians[name] for name in PEERS if name in medians), default=float("nan"))
    return [
        {
            "case": case.name,
            "library": name,
            "ms": round(ms, 3),
            "ratio_to_best_peer": round(best / ms, 3),
            "gemm_ceiling_ms": round(ceiling, 3),
            "ms_low": round(min(times[name]), 3),
            "ms_high": round(max(times[name]), 3),
        }
        for name, ms in medians.items()
    ]


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'case':<16} {'library':<22} {'ms':>9} {'low':>9} {'high':>9} {'× best peer':>12} {'× ceiling':>10}"]
    for row in rows:
        lines.append(
            f"{row['case']:<16} {row['library']:<22} {row['ms']:9.2f} {row['ms_low']:9.2f} {row['ms_high']:9.2f} "
            f"{row['ratio_to_best_peer']:12.2f} {row['ms'] / row['gemm_ceiling_ms']:10.1f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    known = {case.name: case for case in cases()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(known), help="time this case only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="three rounds and no compilation: do all agree?")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default 15)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as PyTorch chooses)")
    parser.add_argument("--record", action="store_true", help="also write data/benchmarks/bench.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    runtime.keep_memory()
    warnings.filterwarnings("ignore", module="higher|torchopt")
    makers = libraries()
    if options.quick:
        makers.pop(COMPILED, None)
    rows = []
    for name in options.case or known:
        # Five unrolled steps of the convolutional network take the compiler longer than all the rest takes together.
        chosen = {form: make for form, make in makers.items() if (form, name) != (COMPILED, "omniglot-conv-5")}
        rows += measure(known[name], chosen, 3 if options.quick else options.rounds)
    keys = ("case", "library", "ms", "ratio_to_best_peer", "gemm_ceiling_ms")
    short = [{key: row[key] for key in keys} for row in rows]
    path = runtime.root() / "_build" / "bench.json"
    runtime.write_atomically(path, (json.dumps(short, indent=1) + "\n").encode())
    print(table(rows))
    print(f"{torch.get_num_threads()} threads; written to {path}")
    if options.record:
        versions = {
            package: importlib.metadata.version(package)
            for package in ("torch", "higher", "torchopt")
            if importlib.util.find_spec(package)
        }
        record = {
            "machine": runtime.machine(), "commit": runtime.commit(), "versions": versions,
            "date": time.strftime("%Y-%m-%d"), "rounds": options.rounds, "results": rows,
        }  # fmt: skip
        path = runtime.root() / "data" / "benchmarks" / "bench.json"
        runtime.write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        print(f"recorded in {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except errors.UserError as mistake:
        print(f"metabook: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
