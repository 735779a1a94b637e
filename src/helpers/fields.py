"""Which values the fields of a configuration, such as an experiment's, may have: one place for types and limits.

A field's type is its annotation. Its limit follows from its name (``LIMITS``) or, where a name means something else
in one class, from its declaration (:func:`limited`, :func:`among`). What neither names is, for a whole number, at least
1, and for another number finite and at least 0. A limit of a tuple is one of its entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from helpers.errors import UserError
from helpers.validate import finite, positive, whole

Limit = Callable[[Any, str], Any]  # ``limit(value, what)`` raises a UserError that names ``what``


def listed(value: str, what: str, names: tuple[str, ...]) -> None:
    """A limit: one of some names."""
    if value not in names:
        raise UserError(f"the {what} must be one of {', '.join(names)}, not {value!r}")


AT_LEAST_0: Limit = partial(whole, least=0)
MORE_THAN_0: Limit = positive
SHARE: Limit = partial(positive, zero=True, most=1.0)
ANY: Limit = finite
DEFAULTS: dict[type, Limit] = {int: whole, float: partial(positive, zero=True)}
LIMITS: dict[str, Limit] = {
    name: limit
    for limit, names in {
        AT_LEAST_0: "seed split_seed inner_steps test_steps outer_rate_hold outer_rate_restarts members found sizes"
        " test_updates ppo_updates measured",
        MORE_THAN_0: "strength first_std max_action seconds close levels",
        SHARE: "late baseline hopeless",
        ANY: "phases inputs truths truth reach",
        partial(listed, names=("adam", "sgd")): "outer",
    }.items()
    for name in names.split()
}
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def limited(limit: Limit, default: Any = dataclasses.MISSING) -> Any:
    """A field with a limit of its own."""
    return dataclasses.field(default=default, metadata={"limit": limit})


def among(*names: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that is one of some texts, or a tuple of them."""
    return limited(partial(listed, names=names), default)


@cache
def hints(kind: type) -> dict[str, Any]:
    """The types of a class's fields."""
    return get_type_hints(kind)


def check_fields(instance: Any, label: str) -> None:
    """Refuse a dataclass with a field of another type than its annotation's, or beyond its limit.

    Args:
        instance: the dataclass.
        label: what the sentence calls it, such as an experiment's name.

    Raises:
        UserError: names the field, the value and what it may be.
    """
    for field in dataclasses.fields(instance):
        limit = field.metadata.get("limit") or LIMITS.get(field.name)
        _check(getattr(instance, field.name), hints(type(instance))[field.name], f"{field.name} of {label}", limit)


def _check(value: Any, hint: Any, what: str, limit: Limit | None) -> None:
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):  # there is no other union than that with None
        if value is not None:
            _check(value, next(part for part in parts if part is not NoneType), what, limit)
        return
    if get_origin(hint) is tuple:
        count = len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else len(parts)
        if not isinstance(value, tuple) or len(value) != count:
            many = "any number of" if parts[-1] is Ellipsis else str(count)
            raise UserError(f"the {what} must be a tuple of {many} entries, not {value!r}")
        for entry, part in zip(value, parts[:1] * count if parts[-1] is Ellipsis else parts, strict=True):
            _check(entry, part, what, limit)
        return
    fits = isinstance(value, (int, float) if hint is float else hint)
    if not fits or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"the {what} must be {KINDS.get(hint, f'of the kind {hint.__name__}')}, not {value!r}")
    if limit := limit or DEFAULTS.get(hint):
        limit(value, what)
