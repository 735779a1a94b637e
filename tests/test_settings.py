"""Texts become values of the declared kind, or one sentence says what would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import pytest
from refusals import refused

from helpers import settings


@dataclass(frozen=True)
class Point:
    x: float
    y: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5", int, 5),
        ("-5", int, -5),
        ("60_000", int, 60_000),
        ("5", float, 5.0),
        ("3e-4", float, 3e-4),
        ("true", bool, True),
        ("False", bool, False),
        ("5", str, "5"),
        ("", str, ""),
        ("a=b", str, "a=b"),
        ("1,3,10", tuple[int, ...], (1, 3, 10)),
        ("[1, 3]", tuple[int, ...], (1, 3)),
        ("5", tuple[int, ...], (5,)),
        ("", tuple[int, ...], ()),
        ("0.1, 2", tuple[float, float], (0.1, 2.0)),
        ("loss, rule", tuple[str, ...], ("loss", "rule")),
        ("maml", list[str], ["maml"]),
        ("((1e-3,10,0.9),)", tuple[tuple[float, int, float], ...], ((1e-3, 10, 0.9),)),
        ("none", int | None, None),
        ("3", Optional[int], 3),  # noqa: UP045
        ("none", str | None, None),
        ("mass", str | None, "mass"),
    ],
)
def test_texts_that_are_right(text, kind, value):
    found = settings.read(text, kind, "x")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("five", int, "a whole number"),
        ("5.0", int, "a whole number"),
        ("true", int, "a whole number"),
        ("none", int, "a whole number"),
        ("[" * 5000, int, "a whole number"),
        ("nan", float, "a finite number"),
        ("1e999", float, "a finite number"),
        ("1", bool, "true or false"),
        ("1,x", tuple[int, ...], "a list of whole numbers such as 1,3,10"),
        ("1,2,3", tuple[float, float], "2 values such as 0.5,0.5"),
        ("x", int | None, "a whole number or none"),
        ("{1: 2}", int, "a whole number"),
        ("x", Any, "a "),
    ],
)
def test_texts_that_are_wrong(text, kind, wanted):
    message = refused(lambda: settings.read(text, kind, "x"))
    assert message.startswith(f"x must be {wanted}") and len(message) < 200


def test_values_from_json_become_what_fields_hold():
    assert settings.conform({"x": 1, "y": [2, 3]}, Point) == Point(1.0, (2, 3))
    assert settings.conform(None, int | None) is None
    for value, kind in (({"z": 1}, Point), ([1, "2"], tuple[int, ...]), ("1", int | None), (True, int)):
        with pytest.raises(ValueError):
            settings.conform(value, kind)


def test_the_kind_of_a_default():
    defaults = [0, 0.5, True, "cpu", [], [1], (0.5,)]
    assert list(map(settings.kind_of, defaults)) == [int, float, bool, str, list[str], list[int], tuple[float, ...]]
