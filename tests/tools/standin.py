"""A stand-in for a GPU: ``with standin.card():`` and ``device="cuda"`` works on a machine without one.

Values are computed on the CPU. What is faithful is where tensors lie: inside the block ``.device`` says ``cuda:0`` for
what was put there, and an operation raises where a real card would, above all where it mixes the two devices.

A device belongs to a storage, so that is what is marked: views, saved tensors, gradients and the wrappers of
``torch.func`` all lead to one. A ``TorchDispatchMode`` sees every operation below autograd and ``torch.func``, checks
the marks of what goes in and marks what comes out; what Python asks of a tensor without an operation (``.device``,
``.to``, ``.numpy``) is replaced on ``torch.Tensor``. ``torch.compile`` is the identity, and :class:`Graph` stands for a
CUDA graph. :class:`Launches` counts what a program asks of the card, and where it waits for it.

Where PyTorch itself makes a tensor inside a composite operation or a backward pass, it makes it on what it takes for
the device, the CPU. Such a tensor is marked as neutral: it goes with either device and takes on that of its company.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch._decomp.decompositions_for_jvp  # compiles Python source at import: before anything is replaced
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")
NEUTRAL = "neutral"
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm",
             "zeros", "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")  # fmt: skip

_ATEN = torch.ops.aten
# Between devices, as they like; and a tensor put onto another storage is where that is.
_COPIES = {_ATEN.copy_, _ATEN.copy, _ATEN._foreach_copy_, _ATEN.set_}
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_, _ATEN._unsafe_index}
_SCALARS = {_ATEN.where, _ATEN.masked_fill, _ATEN.masked_fill_, _ATEN.fill_, _ATEN.fill}  # like pointwise operations

_to, _numpy, _deepcopy = Tensor.to, Tensor.numpy, Tensor.__deepcopy__
_device, _on_cpu = torch._C.TensorBase.device.__get__, torch._C.TensorBase.is_cpu.__get__
_marks: dict[int, tuple[StorageWeakRef, Any]] = {}  # by the address of a storage, which a weak reference keeps its own
_generators: set[int] = set()
_capturing: set[int] = set()  # those with which a capture began, and did not end well
_asked = 0  # whether a device was named from Python at this moment, and not by PyTorch


def _base(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of ``torch.func``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _mark(tensor: Tensor) -> Any:
    """``CARD``, ``NEUTRAL`` or ``CPU``."""
    kept = _marks.get(tensor.untyped_storage()._cdata)
    return kept[1] if kept else CPU


def _set(tensor: Tensor, mark: Any) -> None:
    storage = tensor.untyped_storage()
    kept = _marks.get(storage._cdata)
    if kept and kept[1] is mark:
        return
    if mark is CPU:
        if kept:
            del _marks[storage._cdata]
        return
    _marks[storage._cdata] = (StorageWeakRef(storage), mark)
    if len(_marks) > _set.limit:
        for key in [key for key, (kept, _) in _marks.items() if kept.expired()]:
            del _marks[key]
        _set.limit = 1000 + 2 * len(_marks)


_set.limit = 1000


def device_of(tensor: Tensor) -> torch.device:
    """Where the tensor lies, as the stand-in has it."""
    tensor = _base(tensor)
    actual = _device(tensor)
    return CARD if actual.type == "cpu" and _mark(tensor) is CARD else actual


def _tensors(values) -> list[Tensor]:
    """Those among the arguments or results of an operation, which holds them in lists at most."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


class _Card(TorchDispatchMode):
    """Checks and marks every operation on tensors that have values."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # nothing is compiled here, and the guard would cost as much

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = _tensors(args)
        if not kwargs and tensors:
            mark = _mark(tensors[0])
            for tensor in tensors:
                if type(tensor) is not Tensor or _mark(tensor) is not mark:
                    break
            else:  # all lie together, as in most operations
                results = function(*args)
                if mark is not CPU and function.overloadpacket not in _COPIES:
                    for result in (results,) if isinstance(results, Tensor) else _tensors((results,)):
                        _set(result, mark)
                return results
        kwargs = dict(kwargs or {})
        tensors += _tensors(kwargs.values())
        asked = kwargs.get("device")
        if not all(map(_on_cpu, tensors)):
            return function(*args, **kwargs)
        if asked is not None and asked.type not in ("cpu", "cuda"):
            return function(*args, **kwargs)
        packet = function.overloadpacket
        mark = _checked(function, packet, args, tensors)
        if asked is not None:
            kwargs["device"] = CPU
            if asked.type == "cuda":
                mark = CARD
            elif _asked:
                mark = CPU
            elif packet is _ATEN._to_copy and mark is CPU:
                mark = NEUTRAL  # replayed: a recording says "cpu" of either device
        elif not tensors and not _asked:
            mark = NEUTRAL
        if kwargs.get("generator") is not None:
            theirs = CARD if kwargs["generator"]._cdata in _generators else CPU
            if kwargs["generator"]._cdata in _capturing and _Capture.current is None:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
            if mark is not NEUTRAL and mark is not theirs:
                raise RuntimeError(
                    f"Expected a '{mark.type}' device type for generator but found '{theirs.type}' ({function})"
                )
        results = function(*args, **kwargs)
        if packet not in _COPIES:
            for result in _tensors((results,)):
                _set(result, mark)
        return results


def _checked(function, packet, args: tuple, tensors: list[Tensor]) -> Any:
    """The mark of the results, or the error that a card would raise."""
    if not tensors:
        return NEUTRAL
    marks = [_mark(t) for t in tensors]
    if all(mark is marks[0] for mark in marks) or packet in _COPIES:
        return marks[0]
    if packet in _INDEXING:
        into = _mark(args[0])
        if into is CPU and any(_mark(t) is CARD for t in args[1] if t is not None):
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor (cpu) ({function})"
            )
        # The index may lie on the CPU, and a single value anywhere.
        values = [t for t in args[2:3] if t.dim()]
        marks = [into, *(_mark(t) for t in values)]
    elif torch.Tag.pointwise in function.tags or packet in _SCALARS or packet.__name__.startswith("_foreach"):
        written = function._schema.is_mutable  # then the first may not be on another device than the result
        pairs = enumerate(zip(tensors, marks, strict=True))
        marks = [m for n, (t, m) in pairs if t.dim() or m is not CPU or (written and not n)]
    found = {mark for mark in marks if mark is not NEUTRAL}
    if len(found) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({function})"
        )
    return found.pop() if found else NEUTRAL


# ---------------------------------------- launches, and graphs of them
_NO_KERNEL = {_ATEN._unsafe_view, _ATEN.lift_fresh, _ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty,
              _ATEN.new_empty_strided, _ATEN._local_scalar_dense}  # fmt: skip
_OF_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # what the host must know to go on
_running: list[Launches] = []


def _on_card(function, args, kwargs, results) -> bool:
    """Whether an operation runs on the card: what PyTorch made by itself would lie there."""
    found = _tensors((*args, *kwargs.values())) + _tensors((results,))
    return any(_mark(tensor) is not CPU for tensor in found)


def _waits(function, args, kwargs, results) -> bool:
    """Whether the host waits for the card: it asks for values, or copies to or from memory that is not pinned."""
    packet, given = function.overloadpacket, _tensors((*args, *kwargs.values()))
    if packet is _ATEN.index:  # by truth values, of which the number decides the shape
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) and _mark(t) is CARD for t in args[1])
    if _OF_VALUES & set(function.tags):
        return any(_mark(tensor) is not CPU for tensor in given)
    if packet in (_ATEN._to_copy, _ATEN.copy_):
        ends = [_mark(tensor) for tensor in (*given, results)]
        return CARD in ends and CPU in ends
    return False


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel on the card, a replay of a graph as one, and lists those that wait.

    An operation of PyTorch launches one kernel as a rule, and sometimes a few; a view launches none.
    """

    _should_skip_dynamo = _Card._should_skip_dynamo

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, []

    def __enter__(self):
        _running.append(self)
        return super().__enter__()

    def __exit__(self, *exception):
        _running.remove(self)
        super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        call = function, args, kwargs or {}, results
        if _on_card(*call):
            self.count += not function.is_view and function.overloadpacket not in _NO_KERNEL
            if _waits(*call):
                self.waits.append(str(function))
        return results


class Graph:
    """A CUDA graph: what is captured is written down, takes effect when it is replayed, and then in the same places.

    As on a card the results hold nothing before the first replay, what a captured program writes into is as it was
    before, floats and the host's own work are constants, an operation that waits is an error, and so is a generator
    that was not registered; one that was in use when a capture failed draws no more.
    """

    def __init__(self) -> None:
        self.generators: dict[int, Generator] = {}
        self.calls: list[tuple] = []

    def register_generator_state(self, generator: Generator) -> None:
        self.generators[generator._cdata] = generator

    def replay(self) -> None:
        for counter in _running:
            counter.count += 1
        with _disable_current_modes(), torch.no_grad():
            for function, args, kwargs, results in self.calls:
                made = function(*args, **kwargs)
                if not function._schema.is_mutable:
                    for old, new in zip(_tensors((results,)), _tensors((made,)), strict=True):
                        old.copy_(new)


class _Capture(TorchDispatchMode):
    """``torch.cuda.graph``."""

    _should_skip_dynamo = _Card._should_skip_dynamo
    current: _Capture | None = None

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.before, self.made = graph, {}, set()

    def __enter__(self):
        _Capture.current = self
        _capturing.update(self.graph.generators)
        self.states = [(generator, generator.get_state()) for generator in self.graph.generators.values()]
        return super().__enter__()

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        _Capture.current = None
        with _disable_current_modes(), torch.no_grad():
            for storage, values in self.before.values():
                storage.copy_(values)
            for _, _, _, results in self.graph.calls:
                for one in _tensors((results,)):
                    if one.is_floating_point() and one.untyped_storage()._cdata in self.made:
                        one.fill_(torch.nan)
        for generator, state in self.states:
            generator.set_state(state)
        if kind is None:
            _capturing.difference_update(self.graph.generators)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = kwargs.get("generator")
        if drawn is not None and drawn._cdata not in self.graph.generators:
            raise RuntimeError("the generator of a capture must be registered with its graph")
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors((given.get(argument.name),)):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.made and _mark(tensor) is not CPU:
                        self.before.setdefault(storage._cdata, (storage, storage.clone()))
        results = function(*args, **kwargs)
        call = function, args, kwargs, results
        if not _on_card(*call):
            return results
        if _waits(*call):
            raise RuntimeError(f"operation not permitted when stream is capturing ({function})")
        if not function.is_view and function.overloadpacket not in (_ATEN._unsafe_view, _ATEN.lift_fresh):
            if not function._schema.is_mutable:
                self.made |= {one.untyped_storage()._cdata for one in _tensors((results,))}
            placed = kwargs | ({"device": CPU} if kwargs.get("device") is not None else {})
            self.graph.calls.append((function, args, placed, results))
        return results


class _Stream:
    """``torch.cuda.Stream``: there is one order of things."""

    wait_stream = staticmethod(lambda other: None)


# ---------------------------------------- what Python asks without an operation


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    global _asked
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1


def _factory(function):
    def make(*args, **kwargs):
        with _naming() if kwargs.get("device") is not None or not any(isinstance(a, Tensor) for a in args) else _idle:
            return function(*args, **kwargs)

    return make


_idle = contextlib.nullcontext()


def _moved(self: Tensor, *args, **kwargs) -> Tensor:
    """``Tensor.to``."""
    device, dtype, rest = kwargs.pop("device", None), kwargs.pop("dtype", None), list(args)
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
        device, dtype = other.device, other.dtype
    elif rest and isinstance(rest[0], str | int | torch.device):
        device = rest.pop(0)
    if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
        dtype = rest.pop(0) or dtype
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device) if device else None
    if device is None or device.type == device_of(self).type:
        return _to(self, dtype or self.dtype, *rest, **kwargs)
    with _naming():
        return _ATEN._to_copy.default(self, dtype=dtype or self.dtype, device=device)


def _array(self: Tensor, *, force: bool = False):
    """``Tensor.numpy``."""
    if device_of(self).type == "cuda":
        if not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        self = self.detach().cpu()
    return _numpy(self, force=force)


def _copied(self: Tensor, memo) -> Tensor:
    """``copy.deepcopy``."""
    result = _deepcopy(self, memo)
    _set(result, _mark(_base(self)))
    return result


def _from_data(make):
    """``torch.tensor`` and ``torch.as_tensor``."""

    def run(data, *, device=None, dtype=None, **kwargs):
        if isinstance(data, Tensor):
            device = data.device if device is None else device
            if device_of(data).type == "cuda" or torch.device(device).type == "cuda":
                made = data.to(device, dtype or data.dtype)
                return made.detach().clone() if make is _tensor else made
        gradient = kwargs.pop("requires_grad", False)
        made = make(data, dtype=dtype, **kwargs)
        made = made.to(device) if device is not None else made
        return made.requires_grad_() if gradient else made

    return run


_tensor, _as_tensor = torch.tensor, torch.as_tensor


def _like(self: Tensor, data, *, dtype=None, device=None, **kwargs) -> Tensor:
    """``Tensor.new_tensor``."""
    return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)


class Generator(torch.Generator):
    """A generator of either kind. One of the card keeps its state in 16 bytes and takes no other number of them."""

    _states: dict[bytes, Tensor] = {}  # what the 16 bytes stand for

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.kind = CARD if torch.device(device).type == "cuda" else CPU
        if self.kind is CARD:
            _generators.add(self._cdata)
        return self

    def __del__(self):
        _generators.discard(self._cdata)
        _capturing.discard(self._cdata)

    device = property(lambda self: self.kind)

    def clone_state(self) -> Generator:
        other = Generator(self.kind)
        super(Generator, other).set_state(super().get_state())
        return other

    def graphsafe_set_state(self, other: Generator) -> None:
        super().set_state(super(Generator, other).get_state())
        _capturing.discard(self._cdata)

    def get_state(self) -> Tensor:
        state = super().get_state()
        if self.kind is CPU:
            return state
        seed, place = self.initial_seed(), hash(state.numpy().tobytes())
        key = seed.to_bytes(8, "little") + place.to_bytes(8, "little", signed=True)
        self._states[key] = state
        return torch.frombuffer(bytearray(key), dtype=torch.uint8)

    def set_state(self, state: Tensor) -> Generator:
        if self.kind is CARD:
            if len(state) != 16:
                raise RuntimeError("RNG state is wrong size")
            state = self._states[state.numpy().tobytes()]
        return super().set_state(state)


@contextlib.contextmanager
def card() -> Iterator[None]:
    """Inside, there is a device ``cuda``. On a machine that has one it is the real one, and nothing is changed."""
    if torch.cuda.is_available():
        yield
        return
    with contextlib.ExitStack() as stack:

        def replace(where, name: str, value) -> None:
            stack.enter_context(mock.patch.object(where, name, value, create=True))

        for name in FACTORIES:
            replace(torch, name, _factory(getattr(torch, name)))
        replace(torch, "tensor", _from_data(_tensor))
        replace(torch, "as_tensor", _from_data(_as_tensor))
        replace(torch, "Generator", Generator)
        replace(torch, "compile", lambda program, **_: program)
        methods = {
            "device": property(device_of),
            "is_cuda": property(lambda self: device_of(self).type == "cuda"),
            "is_cpu": property(lambda self: device_of(self).type == "cpu"),
            "get_device": lambda self: 0 if device_of(self).type == "cuda" else -1,
            "to": _moved,
            "cuda": lambda self, *_, **__: self.to(CARD),
            "cpu": lambda self, *_, **__: self.to(CPU),
            "numpy": _array,
            "new_tensor": _like,
            "__deepcopy__": _copied,
        }
        for name, value in methods.items():
            replace(Tensor, name, value)
        card = {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "stand-in",
            "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "memory_allocated": 0,
            "max_memory_allocated": 1 << 20, "_lazy_init": None, "manual_seed_all": None,
            "current_stream": _Stream(), "stream": contextlib.nullcontext(),
        }  # fmt: skip
        for name, value in card.items():
            replace(torch.cuda, name, lambda *_, value=value, **__: value)
        graphs = {"CUDAGraph": Graph, "graph": _Capture, "Stream": _Stream}
        graphs["is_current_stream_capturing"] = lambda: _Capture.current is not None
        for name, value in graphs.items():
            replace(torch.cuda, name, value)
        grouped = Optimizer._group_tensors_by_device_and_dtype

        def groups(lists, with_indices=False):
            found = grouped(lists, with_indices)
            return {(device_of(group[0][0][0]), kind[1]): group for kind, group in found.items()}

        replace(Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(groups))
        stack.enter_context(_Card())
        yield
