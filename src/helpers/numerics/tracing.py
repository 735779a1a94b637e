"""Faster execution of the same functions: their tensor operations are written down once, then replayed or compiled.

``grad`` inside ``vmap`` inside ``grad`` costs far more Python than the small tensors of meta-learning cost
arithmetic. The list of operations that remains when all transformations are carried out is the same every time, so it
is recorded at the first call, freed of repetitions, and used from then on. Nothing here knows about meta-learning.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from helpers import runtime
from helpers.numerics.recording import Given, Program, Recording, Shell, halves, is_number, record, tidied

KEPT = 32  # recordings of one function; the one unused for longest goes first


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
        UserError: by the returned function, where PyTorch would give a wrong derivative
            (:class:`~helpers.numerics.derivative_checks.DerivativeCheck`).

    >>> import helpers, torch
    >>> quick = helpers.traced(lambda x, rate: x - rate * x.sin())
    >>> x = torch.linspace(0, 1, 5)
    >>> torch.equal(quick(x, 0.5), x - 0.5 * x.sin()), torch.equal(quick(x, 0.1), x - 0.1 * x.sin())
    (True, True)
    """
    return _specialized(function, Recording.program)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like :func:`traced`, with the operations fused by ``torch.compile``.

    Compilation happens at the first call for each set of shapes. Where there is no compiler this is :func:`traced`, and
    where the compiler fails at a program, too; one line on standard error then says so.
    """
    return _specialized(function, _compile)


@contextmanager
def unchanged(tensors: Sequence[Tensor], generators: Sequence[torch.Generator]) -> Iterator[None]:
    """What is done within this to tensors and generators is undone after it, where they lie."""
    before, states = [t.clone() for t in tensors], [g.get_state() for g in generators]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def captured(
    function: Callable[..., Any], changes: Callable[..., tuple] = lambda *_, **__: ((), ()), strict: bool = False
) -> Callable[..., Any]:
    """The same function, all its kernels captured in one CUDA graph at the first call and launched together afterwards.

    A GPU then computes without waiting for Python, which on networks as small as this book's takes most of the time.
    The first replay is held against the function itself. Where capturing fails, where the two differ, or on a CPU,
    this is ``function``; on a GPU one line on standard error says so.

    Args:
        function: as for :func:`traced`; it never waits for the GPU.
        changes: from its arguments to the tensors that a call writes into, which must stay where they are, and to the
            generators that it draws from. Trying leaves both as they were.
        strict: let the error of a capture that fails through.
    """

    def make(given: Given, fixed: bool) -> Callable[[Given], Any]:
        def plain(given: Given) -> Any:
            return given.call(function)

        if given.device.type != "cuda":
            return plain
        try:
            return _capture(function, given, fixed, *given.call(changes))
        except Exception as error:  # whatever a driver may say: the function itself still works
            if strict:
                raise
            _say(f"no CUDA graph ({(str(error).splitlines() or [type(error).__name__])[0]}); going on without")
            return plain

    made = _Cache(function, make)

    @functools.wraps(function)
    def run(*arguments, **keywords):
        given = Given(*arguments, **keywords)
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

    def make(given: Given, fixed: bool):
        arguments, keywords = given.arguments()
        with torch.no_grad():
            value = function(*arguments, **keywords)
        results, form = tree_flatten(value)
        _, form_pulled = tree_flatten(tuple(arguments[number] for number in by))
        like = tree_map(Tensor.contiguous, value)  # cotangents lie in memory in this one way
        recording, _ = record(joint, Given(arguments, keywords, like), fixed)
        forward, backward = halves(tidied(recording), len(given.data), len(results))
        return forward.program(), backward.program(), len(results), form, form_pulled

    made = _Cache(function, make)

    @functools.wraps(function)
    def run(*arguments, **keywords):
        given = Given(*arguments, **keywords)
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


# ---------------------------------------- running and keeping recordings
def _say(line: str) -> None:
    print(f"metabook: {line}", file=sys.stderr)


def _capture(
    function: Callable, given: Given, fixed: bool, tensors: Sequence[Tensor], generators: Sequence[torch.Generator]
) -> Callable[[Given], Any]:
    """``function`` as one CUDA graph for arguments of this kind; ``tensors`` and ``generators`` are what it changes.

    Raises:
        RuntimeError: if a replay gives something else than the function; and whatever else capturing may raise.
    """
    static, stream = [t.clone() for t in given.tensors()], torch.cuda.Stream()

    def flat() -> tuple[list[Tensor], TreeSpec]:
        return tree_flatten(given.call(function, static, fixed))

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once, such as a recording, is made before the capture
        for _ in range(3):
            with unchanged(tensors, generators):
                expected, form = flat()
    torch.cuda.current_stream().wait_stream(stream)
    graph, spare = torch.cuda.CUDAGraph(), [generator.clone_state() for generator in generators]
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            results, _ = flat()
    except Exception:
        for generator, state in zip(generators, spare, strict=True):
            generator.graphsafe_set_state(state)  # that of a capture which failed draws no more
        raise

    def replay(given: Given) -> Any:
        if static:
            torch._foreach_copy_(static, given.tensors())
        graph.replay()
        copies = [torch.empty_like(result) for result in results]
        torch._foreach_copy_(copies, results)
        return tree_unflatten(copies, form)

    with unchanged(tensors, generators):
        for one, other in zip(tree_leaves(replay(given)), expected, strict=True):
            error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12)
            if not error < 1e-3:
                raise RuntimeError(f"a replay differs by {error.item():.1e}")
    return replay


def _compile(recording: Recording) -> Program:
    """The recorded operations, fused into a few kernels; as they are, where that cannot be done."""
    program = recording.program()
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

    def __init__(self, function: Callable, make: Callable[[Given, bool], Any]) -> None:
        self.function, self.make, self.warned = function, make, False
        self.entries: OrderedDict[_Key, Any] = OrderedDict()
        self.fixed: set[_Key] = set()  # kinds whose floats have to be constants

    def forget(self) -> None:
        """Free all of it."""
        self.entries.clear()
        self.fixed.clear()
        if hasattr(self.function, "forget"):
            self.function.forget()

    def get(self, given: Given) -> Any:
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
            if fixed or not any(map(is_number, given.data)):
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
    if type(new) is Shell and type(old) is Shell and (new.kind, new.names) == (old.kind, old.names):
        for one, other in zip(new.holds, old.holds, strict=False):
            if one != other:
                return _changed(one, other)
    return new


def _specialized(function: Callable[..., Any], build: Callable[[Recording], Program]) -> Callable[..., Any]:
    """``function`` by programs that ``build`` makes of its operations."""

    def make(given: Given, fixed: bool) -> tuple[Program, TreeSpec]:
        recording, form = record(function, given, fixed)
        return build(tidied(recording)), form

    made = _Cache(function, make)

    @functools.wraps(function)
    def run(*arguments, **keywords):
        given = Given(*arguments, **keywords)
        program, form = made.get(given)
        with torch.no_grad():
            return tree_unflatten(program(*given.tensors()), form)

    run.forget = made.forget
    return run


# ---------------------------------------- choosing
# How a function of tensors can be run, by name; all give the same numbers to rounding.
FORMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "eager": lambda function: function,
    "traced": traced,
    "captured": lambda function: captured(traced(function)),
    "compiled": compiled,
}
