"""Settings as texts: the ``value`` of ``name=value``, read by the kind that a field or a parameter declares.

A kind is a type as ``typing.get_type_hints`` gives it: ``bool``, ``int``, ``float``, ``str``, tuples and lists of
these, a dataclass, and any of them or None.
"""

from __future__ import annotations

import ast
import math
import types
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from helpers.errors import UserError

WORDS = {"true": True, "false": False, "none": None}
NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", type(None): "none"}


def read(text: str, kind: Any, what: str) -> Any:
    """The value that a text stands for.

    Args:
        text: such as ``3``, ``1e-3``, ``true``, ``none``, ``conv``, or ``1,3,10`` for a tuple.
        kind: what it is to be.
        what: its name, for the message.

    Raises:
        UserError: if the text is not of that kind.

    >>> read("1,3,10", tuple[int, ...], "test_steps"), read("none", int | None, "starts")
    ((1, 3, 10), None)
    """
    if not text.isprintable():
        raise UserError(f"{what} holds a character that cannot be printed: write {text[:60]!r} without it")
    for one in sorted(_kinds(kind), key=lambda kind: kind is str):  # any text is a text, so that is asked last
        try:
            return conform(_literal(text, one), one)
        except ValueError:
            pass
    raise UserError(f"{what} must be {described(kind)}, not {text[:60]!r}")


def conform(value: Any, kind: Any) -> Any:
    """A value, such as one from JSON, as the kind wants it: lists become tuples, whole numbers floats.

    Raises:
        ValueError: if it is not of that kind.

    >>> conform([[1, 2]], tuple[tuple[float, int], ...])
    ((1.0, 2),)
    """
    kinds = _kinds(kind)
    if len(kinds) > 1:
        for one in kinds:
            try:
                return conform(value, one)
            except ValueError:
                pass
        raise ValueError(value)
    if get_origin(kind) in (tuple, list):
        return _sequence(value, get_origin(kind), get_args(kind))
    if kind is float and type(value) is int:
        value = float(value)
    if is_dataclass(kind) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if not value.keys() <= hints.keys():
            raise ValueError(value)
        return kind(**{name: conform(part, hints[name]) for name, part in value.items()})
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(value)
    return value


def written(value: Any) -> str:
    """The text that stands for a value: :func:`read` makes the value of it again.

    >>> written((1, 3, 10)), written(None), written(True), written(0.1)
    ('1,3,10', 'none', 'true', '0.1')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)) and value and not any(isinstance(part, (tuple, list)) for part in value):
        return ",".join(map(written, value))
    return str(value)


def described(kind: Any) -> str:
    """What a value of that kind is, in words.

    >>> described(tuple[int, ...]), described(str | None)
    ('a list of whole numbers such as 1,3,10', 'a text or none')
    """
    kinds = _kinds(kind)
    if len(kinds) > 1:
        return " or ".join(map(described, kinds))
    if get_origin(kind) in (tuple, list):
        parts = get_args(kind)
        if len(parts) == 1 or parts[1] is Ellipsis:
            many = {int: "whole numbers such as 1,3,10", float: "numbers such as 0.1,0.3", str: "words such as a,b"}
            return f"a list of {many.get(parts[0], 'lists such as ((1,2),(3,4))')}"
        return f"{len(parts)} values such as {','.join('1' if part is int else '0.5' for part in parts)}"
    return NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")


def kind_of(value: Any) -> Any:
    """The kind of a default, where nothing else declares it.

    >>> kind_of(0.5), kind_of([])
    (<class 'float'>, list[str])
    """
    if isinstance(value, (list, tuple)):
        part = kind_of(value[0]) if value else str
        return list[part] if isinstance(value, list) else tuple[part, ...]
    return type(value)


def _kinds(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _sequence(value: Any, make: type, parts: tuple[Any, ...]) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(value)
    if make is list or parts[1:] == (Ellipsis,):
        parts = parts[:1] * len(value)
    return make(conform(item, part) for item, part in zip(value, parts, strict=True))


def _literal(text: str, kind: Any) -> Any:
    """The value as Python writes it; what is no literal is a text, or several between commas."""
    if kind is str:
        return text
    if text.strip().lower() in WORDS:
        return WORDS[text.strip().lower()]
    sequence = get_origin(kind) in (tuple, list)
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = tuple(part.strip() for part in text.split(",") if part.strip()) if sequence else text
    return (value,) if sequence and not isinstance(value, (list, tuple)) else value
