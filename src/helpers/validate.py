"""Checks of arguments that public functions share: each refuses in one sentence that names the argument.

Tensors pass :func:`positive` and :func:`finite` unread: a value under ``vmap`` or in a recording cannot be looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from helpers.errors import UserError

__all__ = ["finite", "one_of", "positive", "same_shape", "whole"]


def whole(value: Any, what: str, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``; NumPy's whole numbers are taken, truth values are not.

    >>> whole(3, "number of steps")
    3

    Raises:
        UserError: for anything else.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, Tensor)) or number < least or (most is not None and number > most):
        raise UserError(f"the {what} must be a whole number of at least {least}{_to(most)}, not {value!r}")
    return number


def finite(value: Any, what: str) -> Any:
    """``value``, a finite number.

    Raises:
        UserError: for NaN, an infinity, or what is no number.
    """
    if not isinstance(value, Tensor) and not _is_finite(value):
        raise UserError(f"the {what} must be a finite number, not {value!r}")
    return value


def positive(value: Any, what: str, zero: bool = False, most: float | None = None) -> Any:
    """``value``, a finite number greater than 0, or with ``zero`` at least 0, and not above ``most``.

    Raises:
        UserError: for anything else.
    """
    if isinstance(value, Tensor):
        return value
    if not _is_finite(value) or value < 0 or (value == 0 and not zero) or (most is not None and value > most):
        least = "of at least 0" if zero else "greater than 0"
        raise UserError(f"the {what} must be a finite number {least}{_to(most)}, not {value!r}")
    return value


def one_of(value: Any, what: str, allowed: Iterable[Any]) -> Any:
    """``value``, which is among ``allowed``.

    Raises:
        UserError: if it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"there is no {what} {value!r}: use one of {', '.join(map(str, allowed))}")
    return value


def same_shape(first: Tensor | Sequence[int], second: Tensor | Sequence[int], names: str) -> None:
    """Refuse two tensors that would be broadcast against each other; their shapes will do.

    Raises:
        UserError: if their shapes differ.
    """
    one, other = (list(t.shape if isinstance(t, Tensor) else t) for t in (first, second))
    if one != other:
        raise UserError(f"{names} must have the same shape, not {one} and {other}")


def _to(most: float | None) -> str:
    return "" if most is None else f" and at most {most}"


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False
