"""Checks of arguments that public functions share: each refuses in one sentence that names the argument.

Tensors pass :func:`positive` and :func:`finite` unread: a value under ``vmap`` or in a recording cannot be looked at.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from helpers.runtime import UserError

__all__ = ["finite", "one_of", "positive", "same_shape", "whole"]


def whole(value: Any, what: str, least: int = 1) -> int:
    """``value`` as an int of at least ``least``; NumPy's whole numbers are taken, truth values are not.

    >>> whole(3, "number of steps")
    3

    Raises:
        UserError: for anything else.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, (bool, Tensor)) or number < least:
        raise UserError(f"the {what} must be a whole number of at least {least}, not {value!r}")
    return number


def finite(value: Any, what: str) -> Any:
    """``value``, a finite number.

    Raises:
        UserError: for NaN, an infinity, or what is no number.
    """
    if not isinstance(value, Tensor) and not _is_finite(value):
        raise UserError(f"the {what} must be a finite number, not {value!r}")
    return value


def positive(value: Any, what: str, zero: bool = False) -> Any:
    """``value``, a finite number greater than 0, or with ``zero`` at least 0.

    Raises:
        UserError: for anything else.
    """
    if isinstance(value, Tensor):
        return value
    if not _is_finite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(
            f"the {what} must be a finite number {'of at least' if zero else 'greater than'} 0, not {value!r}"
        )
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


def same_shape(first: Tensor, second: Tensor, names: str) -> None:
    """Refuse two tensors that would be broadcast against each other.

    Raises:
        UserError: if their shapes differ.
    """
    if first.shape != second.shape:
        raise UserError(f"{names} must have the same shape, not {list(first.shape)} and {list(second.shape)}")


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False
