"""Faster execution of the same functions: their tensor operations are written down once, then replayed or compiled.

``grad`` inside ``vmap`` inside ``grad`` costs far more Python than the small tensors of meta-learning cost
arithmetic. The list of operations that remains when all transformations are carried out is the same every time, so it
is recorded at the first call, freed of repetitions, and used from then on. Nothing here knows about meta-learning.
"""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.func import functionalize, vjp
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from helpers import runtime
from helpers.runtime import UserError

Program = Callable[..., Sequence[Tensor]]  # from tensors to tensors

KEPT = 32  # recordings of one function; the one unused for longest goes first

_ATEN = torch.ops.aten
_RESHAPES = {_ATEN.view.default, _ATEN._unsafe_view.default}
_VIEWS = _RESHAPES | {
    _ATEN.detach.default, _ATEN.expand.default, _ATEN.permute.default, _ATEN.reshape.default, _ATEN.select.int,
    _ATEN.slice.Tensor, _ATEN.squeeze.dim, _ATEN.t.default, _ATEN.transpose.int, _ATEN.unfold.default,
    _ATEN.unsqueeze.default,
}  # fmt: skip


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its tensor operations recorded at the first call (some seconds) and replayed from then on.

    Data, which may change from call to call, are tensors and floats: among the arguments, in nested dictionaries and
    tuples of them, and in the fields of a frozen dataclass such as a learner (its rate) or the learner below it. A
    float acts as Python's floats do, whatever the precision of the tensors. All else is constant: whole numbers, truth
    values, texts, functions, networks. Control flow must not depend on the values of tensors; where it depends on a
    float, or an operation takes no tensor in its place, the floats are constants too.

    Args:
        function: an estimator, or any function of such arguments.

    Returns:
        A function of the same signature, without a gradient. It keeps one recording for each set of shapes and
        constants, at most :data:`KEPT`; its method ``forget()`` frees them.

    Raises:
        UserError: by the returned function, where PyTorch would give a wrong derivative (:class:`NormalisationCheck`).
    """
    return _specialized(function, _replay)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like :func:`traced`, with the operations fused by ``torch.compile``.

    Compilation happens at the first call for each set of shapes. Where there is no compiler this is :func:`traced`, and
    where the compiler fails at a program, too; one line on standard error then says so.
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

    def make(given: _Given, fixed: bool) -> Callable[[_Given], Any]:
        def plain(given: _Given) -> Any:
            return given.call(function)

        if given.device.type != "cuda":
            return plain
        try:
            tensors = given.tensors()
            static, stream = [t.clone() for t in tensors], torch.cuda.Stream()

            def flat() -> tuple[list[Tensor], TreeSpec]:
                return tree_flatten(given.call(function, static))

            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is made once, such as a recording, is made before the capture
                for _ in range(3):
                    expected, form = flat()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results, _ = flat()

            def replay(given: _Given) -> Any:
                torch._foreach_copy_(static, given.tensors())
                graph.replay()
                copies = [torch.empty_like(result) for result in results]
                torch._foreach_copy_(copies, results)
                return tree_unflatten(copies, form)

            for one, other in zip(tree_leaves(replay(given)), expected, strict=True):
                error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12)
                if not error < 1e-3:
                    raise RuntimeError(f"a replay differs by {error.item():.1e}")
        except Exception as error:  # whatever a driver may say: the function itself still works
            _say(f"no CUDA graph ({str(error).splitlines()[0]}); going on without")
            return plain
        return replay

    made = _Cache(function, make)

    @functools.wraps(function)
    def run(*arguments, **keywords):
        given = _Given(*arguments, **keywords)
        with torch.no_grad():
            return made.get(given)(given)

    run.forget = made.forget
    return run


def linearized(function: Callable[..., Any], by: Sequence[int]) -> Callable[..., tuple[Any, Callable]]:
    """``torch.func.vjp`` of ``function`` by its arguments number ``by``, traced.

    Args:
        function: as for :func:`traced`.
        by: the arguments to differentiate by, tensors that are not given as keywords.

    Returns:
        A function with the arguments of ``function`` that returns its value and a function ``pull``: from a cotangent
        of the value to a tuple of cotangents, one for each argument in ``by``.
    """

    def joint(arguments: tuple, keywords: dict, cotangent: Any) -> tuple[Any, tuple]:
        """Value and pulled-back cotangent, in one function."""

        def chosen(*primals):
            every = list(arguments)
            for number, primal in zip(by, primals, strict=True):
                every[number] = primal
            return function(*every, **keywords)

        value, pull = vjp(chosen, *(arguments[number] for number in by))
        return value, pull(cotangent)

    def make(given: _Given, fixed: bool):
        arguments, keywords = given.arguments()
        with torch.no_grad():
            value = function(*arguments, **keywords)
        results, form = tree_flatten(value)
        _, form_pulled = tree_flatten(tuple(arguments[number] for number in by))
        like = tree_map(Tensor.contiguous, value)  # cotangents lie in memory in this one way
        program, _ = _record(joint, _Given(arguments, keywords, like), fixed)
        forward, backward = _halves(_tidy(program), len(given.data), len(results))
        return _replay(forward), _replay(backward), len(results), form, form_pulled

    made = _Cache(function, make)

    @functools.wraps(function)
    def run(*arguments, **keywords):
        given = _Given(*arguments, **keywords)
        forward, backward, results, form, form_pulled = made.get(given)
        with torch.no_grad():
            out = forward(*given.tensors())

        def pull(cotangent: Any) -> tuple:
            with torch.no_grad():
                tensors = [leaf.detach().contiguous() for leaf in tree_leaves(cotangent)]
                return tree_unflatten(backward(*tensors, *out[results:]), form_pulled)

        return tree_unflatten(out[:results], form), pull

    run.forget = made.forget
    return run


# ---------------------------------------- arguments


class _Number(Tensor):
    """A float that is data: a 0-dim double that mixes with tensors as a Python float does, and takes their precision.

    A plain tensor would not do. In single precision 1 − 0.999 is off by 3e-5 of its value, where Python subtracts in
    double precision; and a double one would turn the single precision of other 0-dim tensors into double.
    """

    value: Tensor

    @staticmethod
    def of(value: Tensor) -> _Number:
        """A number whose value is this 0-dim double."""
        with _disable_current_modes():  # holds nothing itself
            number = Tensor._make_subclass(_Number, torch.empty(0))
        number.value = value
        return number

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        others = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, _Number)]
        floating = [x.dtype for x in others if x.is_floating_point() or x.is_complex()]
        dtype = floating[0] if floating else torch.get_default_dtype() if others else torch.float64

        def plain(x: Any) -> Any:
            return x.value.to(dtype) if isinstance(x, _Number) else x

        with torch._C.DisableTorchFunctionSubclass():
            out = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return _Number.of(out) if not others and isinstance(out, Tensor) and out.dtype == torch.float64 else out


class _Shell(NamedTuple):
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
        return _Shell(bool, None, (value,))  # else True would be 1
    if not within:
        if kind is dict or kind is OrderedDict:
            return _Shell(kind, tuple(value), tuple([_take(one, data) for one in value.values()]))
        if kind is tuple or kind is list or (isinstance(value, tuple) and hasattr(kind, "_fields")):
            return _Shell(kind, None, tuple([_take(one, data) for one in value]))
    names = _fields(kind)
    if not names or (within and not hasattr(kind, "task_loss")):
        return value
    return _Shell(kind, names, tuple([_take(getattr(value, name), data, within=True) for name in names]))


def _put(constant: Any, data: Any) -> Any:
    """The opposite of :func:`_take`, from an iterator of data; nothing is checked again."""
    if constant is _HOLE:
        return next(data)
    if type(constant) is not _Shell:
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


class _Given:
    """The arguments of a call, taken apart.

    Attributes:
        data: tensors and floats.
        kind: what is the same for all calls that share a recording: shapes and the like of the data, and the rest.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.data: list = []
        rest = _take((arguments, keywords), self.data)
        shapes = tuple([None if _is_number(x) else (x.shape, x.stride(), x.dtype, x.device) for x in self.data])
        self.kind = shapes, rest

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return next((x.device for x in self.data if not _is_number(x)), torch.device("cpu"))

    def floats(self) -> list[float]:
        """The floats among the data."""
        return [float(x) for x in self.data if _is_number(x)]

    def tensors(self) -> list[Tensor]:
        """The data as tensors without their history, floats as doubles."""
        device, found = self.device, []
        for x in self.data:
            if isinstance(x, float):
                found.append(torch.full((), x, dtype=torch.float64, device=device))
            else:
                found.append(x.value if isinstance(x, _Number) else x.detach())
        return found

    def arguments(self, tensors: Sequence[Tensor] | None = None, fixed: bool = False) -> tuple[tuple, dict]:
        """Arguments and keywords, with ``tensors`` in the place of the data; floats that are ``fixed`` stay floats."""
        data = self.data
        if tensors is not None:
            data = [new if not _is_number(old) else float(old) if fixed else _Number.of(new)
                    for old, new in zip(data, tensors, strict=True)]  # fmt: skip
        return _put(self.kind[1], iter(data))

    def call(self, function: Callable, tensors: Sequence[Tensor] | None = None, fixed: bool = False) -> Any:
        """``function`` of :meth:`arguments`."""
        arguments, keywords = self.arguments(tensors, fixed)
        return function(*arguments, **keywords)


def _is_number(x: Any) -> bool:
    return isinstance(x, (float, _Number))


# ---------------------------------------- recording


def _say(line: str) -> None:
    print(f"metabook: {line}", file=sys.stderr)


def _replay(program: GraphModule) -> Program:
    """The recorded operations as they are, one call of PyTorch each."""
    return program


def _compile(program: GraphModule) -> Program:
    """The recorded operations, fused into a few kernels; as they are, where that cannot be done."""
    if not runtime.can_compile():
        return program
    chosen: Program = torch.compile(program, dynamic=False)
    tried = False

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        nonlocal chosen, tried
        if tried:
            return chosen(*tensors)
        try:
            found = chosen(*tensors)
        except Exception as error:  # the compiler may fail in many ways; where the program itself does, it does again
            chosen = program
            found = program(*tensors)
            _say(f"torch.compile failed ({(str(error).splitlines() or [type(error).__name__])[0]}); going on without")
        tried = True
        return found

    return run


class _Key:
    """Something to look up by: by its hash, where all constants have one."""

    def __init__(self, kind: tuple, floats: str | None) -> None:
        self.parts = (*kind, floats)
        try:
            self.hash = hash(self.parts)
        except TypeError:
            self.hash = hash(self.parts[0])

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


class _Cache:
    """What was made of a function for each set of shapes and constants, the last used :data:`KEPT` of them.

    Args:
        function: of which it is made.
        make: ``make(given, fixed)``; with ``fixed`` floats are constants.
    """

    def __init__(self, function: Callable, make: Callable[[_Given, bool], Any]) -> None:
        self.function, self.make, self.warned = function, make, False
        self.entries: OrderedDict[_Key, Any] = OrderedDict()
        self.fixed: set[_Key] = set()  # kinds whose floats have to be constants

    def forget(self) -> None:
        """Free all of it."""
        self.entries.clear()
        self.fixed.clear()
        if hasattr(self.function, "forget"):
            self.function.forget()

    def get(self, given: _Given) -> Any:
        """What there is for these arguments; made where there is nothing."""
        key = _Key(given.kind, None)
        fixed = bool(self.fixed) and key in self.fixed
        if fixed:  # as texts NaN is like itself, and 0 unlike -0
            key = _Key(given.kind, repr(given.floats()))
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key]
        try:
            made = self.make(given, fixed)
        except Exception:
            if fixed or not any(map(_is_number, given.data)):
                raise
            made = None
        if made is None:  # Python may ask for the value of a float
            self.fixed.add(key)
            try:
                return self.get(given)
            except Exception:
                self.fixed.discard(key)
                raise
        if len(self.entries) == KEPT:
            self._warn(key)
            self.entries.popitem(last=False)
        self.entries[key] = made
        return made

    def _warn(self, key: _Key) -> None:
        """Say once that calls keep differing, and in what."""
        if self.warned:
            return
        self.warned = True
        shapes, rest, floats = next(reversed(self.entries)).parts
        if key.parts[0] != shapes:
            cause = "the shapes of its tensors change"
        elif key.parts[2] != floats:
            cause = "it needs the values of its floats, and they change"
        else:
            cause = f"constants change, such as {_changed(key.parts[1], rest)!r:.200}"
        warnings.warn(
            f"{getattr(self.function, '__name__', self.function)} has more than {KEPT} recordings, since {cause}: "
            "keep shapes, and define functions such as a loss once, outside the loop; the oldest recording is dropped",
            RuntimeWarning,
            stacklevel=4,
        )


def _changed(new: Any, old: Any) -> Any:
    """The first constant in which two calls differ, as the newer has it."""
    if type(new) is _Shell and type(old) is _Shell and (new.kind, new.names) == (old.kind, old.names):
        for one, other in zip(new.holds, old.holds, strict=False):
            if one != other:
                return _changed(one, other)
    return new


def _specialized(function: Callable[..., Any], build: Callable[[GraphModule], Program]) -> Callable[..., Any]:
    """``function`` by programs that ``build`` makes of its operations."""

    def make(given: _Given, fixed: bool) -> tuple[Program, TreeSpec]:
        program, form = _record(function, given, fixed)
        return build(_tidy(program)), form

    made = _Cache(function, make)

    @functools.wraps(function)
    def run(*arguments, **keywords):
        given = _Given(*arguments, **keywords)
        program, form = made.get(given)
        with torch.no_grad():
            return tree_unflatten(program(*given.tensors()), form)

    run.forget = made.forget
    return run


def _record(function: Callable, given: _Given, fixed: bool) -> tuple[GraphModule, TreeSpec]:
    """The operations of ``function`` at these arguments, from tensors to tensors, and how the result is nested."""
    forms = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        out, form = tree_flatten(given.call(function, tensors, fixed))
        forms.append(form)
        return [x.value if isinstance(x, _Number) else x for x in out]

    tensors = given.tensors()
    with NormalisationCheck():
        # Fake tensors have shapes but no values: nothing is computed here.
        program = _without_mutation(make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True), tensors)
        if not _faithful(program, tensors):
            program = _without_mutation(make_fx(flat, tracing_mode="real"), tensors)
    return program, forms[0]


def _without_mutation(record: Callable[..., GraphModule], tensors: Sequence[Tensor]) -> GraphModule:
    """A recording free of operations in place, as some derivatives of PyTorch's own have: their order would matter."""
    program = record(*tensors)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if any(node.target is not operator.getitem and node.target._schema.is_mutable for node in calls):
        program = make_fx(functionalize(program), tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    return program


def _faithful(program: GraphModule, tensors: Sequence[Tensor]) -> bool:
    """Whether real results lie in memory as the fake ones of a recording do: views, and some kernels, rest on that."""
    faithful = True

    def layout(t: Tensor) -> list[int]:
        return [step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1]

    class Compare(Interpreter):
        def run_node(self, node: Node) -> Any:
            nonlocal faithful
            result = super().run_node(node)
            fake = node.meta.get("val")
            if isinstance(result, Tensor) and isinstance(fake, Tensor) and result.numel():
                faithful = faithful and layout(result) == layout(fake)
            return result

    devices = [t.device for t in tensors if t.device.type == "cuda"][:1]
    draws = any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in program.graph.nodes)
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=draws):  # no draw is used up
        try:
            Compare(program).run(*tensors)
        except RuntimeError:  # a view that is none
            return False
    return faithful


class NormalisationCheck(TorchFunctionMode):
    """Within it, a normalisation of which PyTorch takes a wrong derivative is refused. It costs about as much as the
    operations themselves, so that a function is run in it once.

    Where layer, batch or instance normalisation has an adapted scale, the batching rule of its derivative takes mean
    and variance for constants (pytorch/functorch#534), so that what the derivative of a derivative under ``vmap`` gets
    through them is missing; nothing fails. First-order methods, normalisation without a scale, group and RMS
    normalisation are right.

    Raises:
        UserError: at such an operation.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("layer_norm", "batch_norm", "instance_norm"):
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            own = kwargs.get("training", kwargs.get("use_input_stats", args[5] if len(args) > 5 else True))
            if (own or name == "layer_norm") and _differentiated_twice(given[0], given[1:]):
                raise UserError(
                    f"PyTorch gives a wrong second derivative of {name} under vmap: write the normalisation out from "
                    "mean and variance, as helpers.models.normalize and helpers.models.layer_norm do"
                )
        return func(*args, **kwargs)


def _differentiated_twice(x: Tensor, scales: list[Tensor]) -> bool:
    """Whether the derivative by one of ``scales`` is taken inside a ``vmap``, and one of that outside of it."""

    def levels(t: Tensor) -> list[int]:
        """The levels of transformation by which a derivative of ``t`` is taken."""
        found = []
        while _functorch.is_functorch_wrapped_tensor(t):
            if _functorch.is_gradtrackingtensor(t) and t.requires_grad:
                found.append(_functorch.maybe_get_level(t))
            t = _functorch.get_unwrapped(t)
        return found

    inner = max((level for t in scales for level in levels(t)), default=0)
    outer = min((level for t in (x, *scales) for level in levels(t)), default=inner)
    maps = (one for one in retrieve_all_functorch_interpreters() if one.key() == TransformType.Vmap)
    return any(outer < one.level() < inner for one in maps)


# ---------------------------------------- on recorded operations


def _tidy(program: GraphModule) -> GraphModule:
    """Leave out views that change nothing, results that nobody uses, and what was computed before."""
    graph = program.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.target is not operator.getitem and node.target._schema.is_mutable for node in calls):
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
