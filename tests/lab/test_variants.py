"""Variants: fields checked and named; checkpoints lead back to their experiments."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from refusals import refused
from tiny import Tiny

from helpers import experiments
from helpers.lab import checkpoints, variants


@dataclass(frozen=True)
class Inner:
    """What is inside.

    Attributes:
        epochs: how often.
    """

    epochs: int = 2


@dataclass(frozen=True)
class Rich(Tiny):
    """Many kinds of fields.

    Attributes:
        rates: of ``this`` and
            of :func:`~helpers.lab.training.fit`.
        inner: what is inside.
    """

    rates: tuple[float, ...] = (0.1,)
    steps: tuple[int, ...] = (1, 3)
    start: str | None = None
    carry: bool = True
    inner: Inner = field(default_factory=Inner)


def test_a_variant_is_named_after_what_differs_in_the_order_of_the_fields():
    made = variants.variant(Rich(), {"steps": "1,5", "carry": "false", "seed": "3", "hidden": "8", "inner.epochs": "4"})
    assert made.name == "tiny_seed-3_steps-1-5_carry-false_inner.epochs-4"
    assert made == replace(Rich(), name=made.name, seed=3, steps=(1, 5), carry=False, inner=Inner(4))
    assert variants.variant(Rich(), {"hidden": "8"}) == Rich(), "as it was"
    odd = variants.variant(Rich(), {"start": "../a b", "rates": "1e-3,2"}).name
    assert odd == "tiny_rates-0.001-2.0_start-..-a-b", "part of a file's name"


def test_long_names_are_cut_and_stay_apart():
    names = {variants.variant(Rich(), {"start": "x" * 200 + end}).name for end in "ab"}
    assert len(names) == 2 and all(len(name) < 140 for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stpes": "1"}, "tiny has no field 'stpes' (did you mean steps or"),
        ({"steps": "one"}, "steps of tiny must be a list of whole numbers such as 1,3,10, not 'one'"),
        ({"carry": "5"}, "carry of tiny must be true or false, not '5'"),
        ({"inner.epoch": "5"}, "inner of tiny has no field 'epoch' (did you mean epochs?)"),
        ({"inner": "5"}, "inner of tiny has fields of its own: set one of them, as in inner.epochs=VALUE"),
        ({"steps.first": "5"}, "steps of tiny is (1, 3) and has no field 'first'"),
        ({"seed": "-1"}, "the seed of tiny must be a whole number of at least 0"),
        ({"name": "mine"}, "leave `name` out"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    assert message in refused(lambda: variants.variant(Rich(), changes))


def test_configurations_lead_back_to_their_experiments():
    known = {"tiny": Rich(), "tiny-two": Rich("tiny-two"), "other": Tiny("other")}
    for made in (*known.values(), variants.variant(known["tiny-two"], {"inner.epochs": "5", "start": "x"})):
        assert variants.restored(checkpoints.configuration(made), known) == made
    config = checkpoints.configuration(Rich())
    assert "no experiment here" in refused(lambda: variants.restored(config | {"name": "tinyx"}, known))
    assert "another version" in refused(lambda: variants.restored(config | {"depth": 3}, known))
    assert "another version" in refused(lambda: variants.restored(config | {"steps": "x"}, known))


def test_committed_configurations_lead_back_too():
    known = experiments.catalogue()
    assert all(variants.restored(checkpoints.configuration(one), known) == one for one in known.values())


def test_fields_are_described_by_docstrings():
    found = {field.name: field for field in variants.described(Rich())}
    assert found["rates"].meaning == "of this and of fit" and not found["steps"].meaning
    assert found["seed"].meaning.startswith("of first parameters") and found["inner.epochs"][1:] == (
        2,
        "a whole number",
        "how often",
    )
    assert (found["start"].kind, found["pause"].meaning) == ("a text or none", "")
