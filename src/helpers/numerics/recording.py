"""Recording the tensor operations of a function, tidying them, and cutting them in two."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from helpers.errors import UserError
from helpers.numerics.derivative_checks import DerivativeCheck

Program = Callable[..., Sequence[Tensor]]  # from tensors to tensors
_ATEN = torch.ops.aten
_RESHAPES = {_ATEN.view.default, _ATEN._unsafe_view.default}
_VIEWS = _RESHAPES | {
    _ATEN.detach.default, _ATEN.expand.default, _ATEN.permute.default, _ATEN.reshape.default, _ATEN.select.int,
    _ATEN.slice.Tensor, _ATEN.squeeze.dim, _ATEN.t.default, _ATEN.transpose.int, _ATEN.unfold.default,
    _ATEN.unsqueeze.default,
}  # fmt: skip


class Number(Tensor):
    """A float that is data: a 0-dim double that mixes with tensors as a Python float does, and takes their precision.

    A plain tensor would not do. In single precision 1 − 0.999 is off by 3e-5 of its value, where Python subtracts in
    double precision; and a double one would turn the single precision of other 0-dim tensors into double.
    """

    value: Tensor

    @staticmethod
    def of(value: Tensor) -> Number:
        """A number whose value is this 0-dim double."""
        with _disable_current_modes():  # holds nothing itself
            number = Tensor._make_subclass(Number, torch.empty(0))
        number.value = value
        return number

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        others = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, Number)]
        floating = [x.dtype for x in others if x.is_floating_point() or x.is_complex()]
        dtype = floating[0] if floating else torch.get_default_dtype() if others else torch.float64

        def plain(x: Any) -> Any:
            return x.value.to(dtype) if isinstance(x, Number) else x

        with torch._C.DisableTorchFunctionSubclass():
            out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return Number.of(out) if not others and isinstance(out, Tensor) and out.dtype == torch.float64 else out


class Shell(NamedTuple):
    """Something nested without its data; ``holds`` has a hole for each of them."""

    kind: type
    names: tuple | None  # of the entries of a dictionary, of the fields of a dataclass
    holds: tuple


_HOLE = object()


@functools.cache
def _fields(kind: type) -> tuple[str, ...]:
    """The fields of a class whose instances are values, that is, of a frozen dataclass; else nothing."""
    if not is_dataclass(kind) or not kind.__dataclass_params__.frozen or not kind.__dataclass_params__.eq:
        return ()
    return tuple(field.name for field in fields(kind))


def _take(value: Any, data: list, within: bool = False) -> Any:
    """What is constant in ``value``; the data in it are appended to ``data``.

    In the fields ``within`` a dataclass only learners are looked into: a network's numbers are settings of it.
    """
    kind = type(value)
    if isinstance(value, (Tensor, float)):
        data.append(value)
        return _HOLE
    if kind is bool:
        return Shell(bool, None, (value,))  # else True would be 1
    if not within:
        if kind is dict or kind is OrderedDict:
            return Shell(kind, tuple(value), tuple([_take(one, data) for one in value.values()]))
        if kind is tuple or kind is list or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            return Shell(kind, None, tuple([_take(one, data) for one in value]))
    names = _fields(kind)
    if not names or (within and not hasattr(kind, "task_loss")):
        return value
    return Shell(kind, names, tuple([_take(getattr(value, name), data, within=True) for name in names]))


def _put(constant: Any, data: Any) -> Any:
    """The opposite of :func:`_take`, from an iterator of data; nothing is checked again."""
    if constant is _HOLE:
        return next(data)
    if type(constant) is not Shell:
        return constant
    kind, names, holds = constant
    if kind is bool:
        return holds[0]
    values = [_put(value, data) for value in holds]
    if kind is tuple or kind is list:
        return kind(values)
    if names is None:
        return kind(*values)
    if kind is dict or kind is OrderedDict:
        return kind(zip(names, values, strict=True))
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


class Given:
    """The arguments of a call, taken apart.

    Attributes:
        data: tensors and floats.
        kind: what is the same for all calls that share a recording: shapes and the like of the data, and the rest.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.data: list = []
        rest = _take((arguments, keywords), self.data)
        shapes = tuple([None if is_number(x) else (x.shape, x.stride(), x.dtype, x.device) for x in self.data])
        self.kind = shapes, rest

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return next((x.device for x in self.data if not is_number(x)), torch.device("cpu"))

    def floats(self) -> list[float]:
        """The floats among the data."""
        return [float(x) for x in self.data if is_number(x)]

    def tensors(self) -> list[Tensor]:
        """The data as tensors without their history, floats as doubles."""
        device, found = self.device, []
        for x in self.data:
            if isinstance(x, float):
                found.append(torch.full((), x, dtype=torch.float64, device=device))
            else:
                found.append(x.value if isinstance(x, Number) else x.detach())
        return found

    def arguments(self, tensors: Sequence[Tensor] | None = None, fixed: bool = False) -> tuple[tuple, dict]:
        """Arguments and keywords, with ``tensors`` in the place of the data; floats that are ``fixed`` stay floats."""
        data = self.data
        if tensors is not None:
            data = [new if not is_number(old) else float(old) if fixed else Number.of(new)
                    for old, new in zip(data, tensors, strict=True)]  # fmt: skip
        return _put(self.kind[1], iter(data))

    def call(self, function: Callable, tensors: Sequence[Tensor] | None = None, fixed: bool = False) -> Any:
        """What ``function`` gives for these arguments, see :meth:`arguments`."""
        arguments, keywords = self.arguments(tensors, fixed)
        return function(*arguments, **keywords)


def is_number(x: Any) -> bool:
    return isinstance(x, (float, Number))


class Recording(NamedTuple):
    """Operations that were written down; Python is made of them, which takes as long again, by :meth:`program` only."""

    holder: Module  # of the constants
    graph: Graph

    def program(self) -> GraphModule:
        """From the given tensors to the results."""
        return GraphModule(self.holder, self.graph)

    @property
    def mutates(self) -> bool:
        """Whether anything is written into a tensor."""
        calls = (node for node in self.graph.nodes if node.op == "call_function")
        return any(node.target is not operator.getitem and node.target._schema.is_mutable for node in calls)


class Recorder(TorchDispatchMode):
    """Within it, every operation that reaches tensors, below autograd and ``torch.func``, is carried out and written
    down. What is not computed from the given tensors is a constant.

    Args:
        tensors: what is given.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.holder, self.varying = Graph(), Module(), set()
        self.nodes = WeakTensorKeyDictionary()  # of the tensors that are alive
        self.states: dict[torch.Generator, Tensor] = {}
        for number, tensor in enumerate(tensors):
            self.varying.add(self._keep(tensor, self.graph.placeholder(f"given{number}")))

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for generator, state in self.states.items():  # no draw is used up
            generator.set_state(state)

    def recording(self, results: Sequence[Any]) -> Recording:
        """What was written down, from the given tensors to ``results``."""
        self.graph.output([self._node(x) for x in results])
        return Recording(self.holder, self.graph)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What torch.tensor makes is a constant, until it is written into.
        fresh = func is _ATEN.lift_fresh.default and args[0] not in self.nodes
        nodes: list[Node] = []  # of the tensors that go in
        places = self._placed((args[0].clone(),) if fresh else args, nodes)
        named = {name: self._placed(x, nodes) for name, x in kwargs.items()}
        varying = not self.varying.isdisjoint(nodes)
        if varying and _asks_for_values(func, args):
            raise UserError(
                f"a recorded function must not ask for the values of tensors ({func}), as they change from call to "
                "call: write the choice with torch.where, or run the function as it is, without recording it"
            )
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn:
            named_in_call = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
            for generator in named_in_call or (torch.default_generator, *torch.cuda.default_generators):
                self.states.setdefault(generator, generator.get_state())
        out = func(*args, **kwargs)
        results = out if isinstance(out, (tuple, list)) else (out,)
        if not any(isinstance(x, Tensor) for x in results) and not func._schema.is_mutable:
            return out  # of constants, or of shapes
        node = self.graph.call_function(_ATEN.clone.default if fresh else func, places, named)
        if varying or drawn:
            self.varying.add(node)
        if isinstance(out, Tensor):
            self._keep(out, node)
        else:
            for number, one in enumerate(results):
                if isinstance(one, Tensor):
                    part = self._keep(one, self.graph.call_function(operator.getitem, (node, number)))
                    self.varying |= {part} if varying or drawn else set()
        return out

    def _keep(self, tensor: Tensor, node: Node) -> Node:
        node.meta["layout"] = (tensor.shape, tensor.stride(), tensor.storage_offset())
        self.nodes[tensor] = node
        return node

    def _placed(self, x: Any, nodes: list[Node]) -> Any:
        """What an operation is given, which holds tensors in lists at most, with their nodes, which join ``nodes``."""
        if isinstance(x, (tuple, list)):
            return type(x)([self._placed(one, nodes) for one in x])
        place = self._node(x)
        if isinstance(place, Node):
            nodes.append(place)
        return place

    def _node(self, x: Any) -> Any:
        if isinstance(x, torch.Generator):
            return self._constant(x)
        if not isinstance(x, Tensor):
            return x
        node = self.nodes.get(x)
        return self._keep(x, self._constant(x.detach())) if node is None else node

    def _constant(self, value: Any) -> Node:
        name = f"constant{len(self.graph.nodes)}"
        setattr(self.holder, name, value)
        return self.graph.get_attr(name)


def _asks_for_values(operation: torch._ops.OpOverload, args: tuple) -> bool:
    """Whether what comes of an operation is no tensor, or its shape depends on values."""
    if operation is _ATEN.index.Tensor:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags))


def record(function: Callable, given: Given, fixed: bool) -> tuple[Recording, TreeSpec]:
    """The operations of ``function`` at these arguments, from tensors to tensors, and how the result is nested."""
    tensors = given.tensors()
    with DerivativeCheck(), Recorder(tensors) as recorder:
        out, form = tree_flatten(given.call(function, tensors, fixed))
        recording = recorder.recording([x.value if isinstance(x, Number) else x for x in out])
    if recording.mutates:  # as some derivatives of PyTorch's own do: their order would matter
        constants = _lifted(recording)
        with Recorder(tensors) as recorder:
            recording = recorder.recording(functionalize(recording.program())(*tensors, *constants))
    return recording, form


def _lifted(recording: Recording) -> list[Tensor]:
    """Make inputs of the tensors that a recording holds: what is not given cannot be freed of operations in place."""
    held = {node: getattr(recording.holder, node.target) for node in recording.graph.nodes if node.op == "get_attr"}
    held = {node: value for node, value in held.items() if isinstance(value, Tensor)}
    for node in held:
        node.op, node.target = "placeholder", node.name
    return list(held.values())


def tidied(recording: Recording) -> Recording:
    """Leave out views that change nothing, results that nobody uses, and what was computed before."""
    if recording.mutates:
        return recording  # the order matters then
    graph, seen = recording.graph, {}
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        while node.target in _RESHAPES and node.args[0].target in _RESHAPES:
            node.update_arg(0, node.args[0].args[0])
        same = node
        if node.target in _VIEWS:
            if node.meta["layout"] == node.args[0].meta["layout"]:
                same = node.args[0]
        if same is node and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
            same = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    (last,) = (node for node in graph.nodes if node.op == "output")
    given: set[Node] = set()
    for place, node in enumerate(last.args[0]):  # two results stay two tensors
        if node in given:
            with graph.inserting_before(last):
                node = graph.call_function(_ATEN.clone.default, (node,))
            last.args = ([*last.args[0][:place], node, *last.args[0][place + 1 :]],)
        if isinstance(node, Node):
            given.add(node)
    graph.eliminate_dead_code()
    return recording


def halves(recording: Recording, given: int, results: int) -> tuple[Recording, Recording]:
    """Cut a recording in two, at what its first ``given`` inputs determine.

    Returns:
        The first half, from these inputs to the first ``results`` outputs and everything that the second half needs;
        and the second half, from the remaining inputs and that to the remaining outputs.
    """
    *nodes, last = recording.graph.nodes
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
    return Recording(recording.holder, first), Recording(recording.holder, second)
