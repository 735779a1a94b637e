"""Faster execution of the same functions: their tensor operations are written down once, then replayed or compiled.

``grad`` inside ``vmap`` inside ``grad`` costs far more Python than the small tensors of meta-learning cost
arithmetic. The list of operations that remains when all transformations are carried out is the same every time, so it
is recorded at the first call, freed of repetitions, and used from then on. Nothing here knows about meta-learning.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize, vjp
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from helpers import runtime

Program = Callable[..., Sequence[Tensor]]  # from tensors to tensors

_ATEN = torch.ops.aten
_RESHAPES = {_ATEN.view.default, _ATEN._unsafe_view.default}
_VIEWS = _RESHAPES | {
    _ATEN.detach.default, _ATEN.expand.default, _ATEN.permute.default, _ATEN.reshape.default, _ATEN.select.int,
    _ATEN.slice.Tensor, _ATEN.squeeze.dim, _ATEN.t.default, _ATEN.transpose.int, _ATEN.unfold.default,
    _ATEN.unsqueeze.default,
}  # fmt: skip


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its tensor operations recorded at the first call (some seconds) and replayed from then on.

    Args:
        function: an estimator, or any function of nested dictionaries and tuples of tensors. What is not a tensor, such
            as the learner, is a constant; control flow must not depend on the values of tensors.

    Returns:
        A function of the same signature, without a gradient. It keeps one recording for each set of shapes and
        constants.
    """
    return _specialized(function, _replay)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like :func:`traced`, with the operations fused by ``torch.compile``.

    Compilation happens at the first call for each set of shapes. Where there is no compiler this is :func:`traced`.
    """
    return _specialized(function, _compile)


def captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, all its kernels captured in one CUDA graph at the first call and launched together afterwards.

    A GPU then computes without waiting for Python, which on networks as small as this book's takes most of the time.
    The first replay is held against the function itself. Where capturing fails, where the two differ, or on a CPU,
    this is ``function``; on a GPU one line on standard error says so.

    Args:
        function: as for :func:`traced`; it draws no random numbers and never waits for the GPU.
    """
    made = _Cache()

    def make(leaves: list, layout: TreeSpec) -> Callable[[list], Any]:
        tensors, given = _tensors(leaves), [isinstance(leaf, Tensor) for leaf in leaves]
        constants = [None if tensor else leaf for leaf, tensor in zip(leaves, given, strict=True)]

        def flat(values: Sequence[Tensor]) -> tuple[list[Tensor], TreeSpec]:
            values = iter(values)
            filled = [next(values) if tensor else leaf for leaf, tensor in zip(constants, given, strict=True)]
            return tree_flatten(function(*tree_unflatten(filled, layout)))

        def plain(values: Sequence[Tensor]) -> Any:
            return tree_unflatten(*flat(values))

        if not tensors or tensors[0].device.type != "cuda":
            return plain
        try:
            static, stream = [t.clone() for t in tensors], torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is made once, such as a recording, is made before the capture
                for _ in range(3):
                    expected, form = flat(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results, _ = flat(static)

            def replay(values: Sequence[Tensor]) -> Any:
                torch._foreach_copy_(static, list(values))
                graph.replay()
                copies = [torch.empty_like(result) for result in results]
                torch._foreach_copy_(copies, results)
                return tree_unflatten(copies, form)

            again, _ = tree_flatten(replay(tensors))
            for one, other in zip(again, expected, strict=True):
                error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12)
                if not error < 1e-3:
                    raise RuntimeError(f"a replay differs by {error.item():.1e}")
        except Exception as error:  # whatever a driver may say: the function itself still works
            print(f"metabook: no CUDA graph ({str(error).splitlines()[0]}); going on without", file=sys.stderr)
            return plain
        return replay

    def run(*arguments):
        leaves, layout = tree_flatten(arguments)
        with torch.no_grad():
            return made.get(leaves, layout, make)(_tensors(leaves))

    return run


def linearized(function: Callable[..., Any], by: Sequence[int]) -> Callable[..., tuple[Any, Callable]]:
    """``torch.func.vjp`` of ``function`` by its arguments number ``by``, traced.

    Args:
        function: as for :func:`traced`.
        by: the arguments to differentiate by.

    Returns:
        A function with the arguments of ``function`` that returns its value and a function ``pull``: from a cotangent
        of the value to a tuple of cotangents, one for each argument in ``by``.
    """
    made = _Cache()

    def joint(arguments: tuple, cotangent: Any) -> tuple[Any, tuple]:
        """Value and pulled-back cotangent, in one function."""

        def chosen(*primals):
            every = list(arguments)
            for number, primal in zip(by, primals, strict=True):
                every[number] = primal
            return function(*every)

        value, pull = vjp(chosen, *(arguments[number] for number in by))
        return value, pull(cotangent)

    def make(leaves: list, layout: TreeSpec):
        arguments = tree_unflatten(leaves, layout)
        with torch.no_grad():
            value = function(*arguments)
        results, form = tree_flatten(value)
        _, form_pulled = tree_flatten(tuple(arguments[number] for number in by))
        program, _ = _record(joint, *tree_flatten((arguments, value)))
        given = sum(isinstance(leaf, Tensor) for leaf in leaves)
        forward, backward = _halves(_tidy(program), given, len(results))
        return _replay(forward), _replay(backward), len(results), form, form_pulled

    def run(*arguments):
        leaves, layout = tree_flatten(arguments)
        forward, backward, results, form, form_pulled = made.get(leaves, layout, make)
        with torch.no_grad():
            out = forward(*_tensors(leaves))

        def pull(cotangent: Any) -> tuple:
            with torch.no_grad():
                return tree_unflatten(backward(*_tensors(tree_flatten(cotangent)[0]), *out[results:]), form_pulled)

        return tree_unflatten(out[:results], form), pull

    return run


# ---------------------------------------- recording


def _replay(program: GraphModule) -> Program:
    """The recorded operations as they are, one call of PyTorch each."""
    return program


def _compile(program: GraphModule) -> Program:
    """The recorded operations, fused into a few kernels; as they are, where there is no compiler."""
    return torch.compile(program, dynamic=False) if runtime.can_compile() else program


class _Cache:
    """What was made for each set of shapes and constants."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, Any]] = []  # compared, not hashed: constants need not have a hash

    def get(self, leaves: list, layout: TreeSpec, make: Callable[[list, TreeSpec], Any]) -> Any:
        kind = [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves], layout
        for known, entry in self.entries:
            if known == kind:
                return entry
        self.entries.append((kind, make(leaves, layout)))
        return self.entries[-1][1]


def _specialized(function: Callable[..., Any], build: Callable[[GraphModule], Program]) -> Callable[..., Any]:
    """``function`` by programs that ``build`` makes of its operations."""
    made = _Cache()

    def make(leaves: list, layout: TreeSpec) -> tuple[Program, TreeSpec]:
        program, form = _record(function, leaves, layout)
        return build(_tidy(program)), form

    def run(*arguments):
        leaves, layout = tree_flatten(arguments)
        program, form = made.get(leaves, layout, make)
        with torch.no_grad():
            return tree_unflatten(program(*_tensors(leaves)), form)

    return run


def _tensors(leaves: list) -> list[Tensor]:
    """The tensors among them, without their history."""
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _record(function: Callable, leaves: list, layout: TreeSpec) -> tuple[GraphModule, TreeSpec]:
    """The operations of ``function`` at these arguments, from tensors to tensors, and how the result is nested."""
    forms = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        values = iter(tensors)
        filled = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        out, form = tree_flatten(function(*tree_unflatten(filled, layout)))
        forms.append(form)
        return out

    # Fake tensors have shapes but no values: nothing is computed here.
    record = partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
    program = record(flat)(*_tensors(leaves))
    if _mutates(program):  # some derivatives of PyTorch's own work in place; their order would have to be kept
        program = record(functionalize(program))(*_tensors(leaves))
    return program, forms[0]


def _mutates(program: GraphModule) -> bool:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return any(node.target is not operator.getitem and node.target._schema.is_mutable for node in calls)


# ---------------------------------------- on recorded operations


def _tidy(program: GraphModule) -> GraphModule:
    """Leave out views that change nothing, results that nobody uses, and what was computed before."""
    graph = program.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if _mutates(program):
        return program  # the order matters then
    seen: dict[Any, Node] = {}
    for node in calls:
        while node.target in _RESHAPES and node.args[0].target in _RESHAPES:
            node.update_arg(0, node.args[0].args[0])
        same = node
        if node.target in _VIEWS:
            new, old = node.meta["val"], node.args[0].meta["val"]
            if (new.shape, new.stride(), new.storage_offset()) == (old.shape, old.stride(), old.storage_offset()):
                same = node.args[0]
        if same is node and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            same = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in graph.nodes:
        if node.target is _ATEN.view.default:  # what is recorded may be laid out in another way than what is computed
            node.target = _ATEN.reshape.default
    graph.eliminate_dead_code()
    program.recompile()
    return program


def _halves(program: GraphModule, given: int, results: int) -> tuple[GraphModule, GraphModule]:
    """Cut a program in two, at what its first ``given`` inputs determine.

    Returns:
        The first half, from these inputs to the first ``results`` outputs and everything that the second half needs;
        and the second half, from the remaining inputs and that to the remaining outputs.
    """
    *nodes, last = program.graph.nodes
    outputs, inputs = last.args[0], [node for node in nodes if node.op == "placeholder"]
    late: dict[Node, None] = dict.fromkeys(inputs[given:])
    for node in nodes:
        if any(source in late for source in node.all_input_nodes):
            late[node] = None
    first, second, in_first, in_second, kept = Graph(), Graph(), {}, {}, []
    for node in nodes:
        if node not in late:
            in_first[node] = first.node_copy(node, in_first.__getitem__)

    def needed(node: Node) -> None:
        """Find what the second half must be given; views it can make again."""
        if node in late or node in in_second:
            return
        if node.target in _VIEWS:
            needed(node.args[0])
            in_second[node] = None
        else:
            kept.append(node)
            in_second[node] = None

    for node in [*late, *(node for node in outputs[results:] if node not in late)]:
        for source in node.all_input_nodes if node in late else [node]:
            needed(source)
    remade = [node for node in nodes if node in in_second and node not in set(kept)]
    in_second = {node: second.placeholder(node.name) for node in [*inputs[given:], *kept]}
    for node in [*remade, *(node for node in late if node.op != "placeholder")]:
        in_second[node] = second.node_copy(node, in_second.__getitem__)
    first.output([in_first[node] for node in [*outputs[:results], *kept]])
    second.output([in_second[node] for node in outputs[results:]])
    for graph in (first, second):
        graph.eliminate_dead_code()
    return GraphModule(program, first), GraphModule(program, second)


# ---------------------------------------- choosing

# How a function of tensors can be run, by name; all give the same numbers to rounding.
FORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda function: function,
    "traced": traced,
    "captured": lambda function: captured(traced(function)),
    "compiled": compiled,
}
