"""The shared checks say what is wrong in one sentence and give back what is right; those of runtime, which use them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refusals import refused

from helpers import runtime
from helpers.tasks.images import contact_sheet
from helpers.validate import finite, one_of, positive, same_shape, whole


def test_what_is_right_is_given_back():
    assert whole(3, "n") == whole(np.int64(3), "n", 3, 3) == 3 and type(whole(np.uint8(3), "n")) is int
    assert whole(0, "n", 0) == 0 and whole(-2, "n", -2) == -2
    assert positive(0.5, "x") == 0.5 and positive(0, "x", zero=True) == 0 and positive(1, "x", most=1) == 1
    assert finite(-1.5, "x") == -1.5 and finite(np.float32(2), "x") == 2
    assert one_of(None, "kind", (None, "a")) is None and one_of("a", "kind", {"a": 1}) == "a"
    unread = torch.tensor(math.nan)
    assert positive(unread, "x") is unread and finite(unread, "x") is unread
    same_shape(torch.zeros(2, 3), torch.ones(2, 3), "both")
    same_shape(torch.zeros(2, 3).shape, (2, 3), "both")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        *((lambda v=v: whole(v, "n"), "the n must be a whole") for v in (0, 1.0, True, "1", None, torch.tensor(1))),
        (lambda: whole(5, "n", 1, 4), "of at least 1 and at most 4, not 5"),
        *((lambda v=v: positive(v, "x"), "greater than 0") for v in (0, -1, math.nan, math.inf, True, "1", None, [])),
        (lambda: positive(-1, "x", zero=True), "of at least 0, not -1"),
        (lambda: positive(2, "x", most=1), "greater than 0 and at most 1, not 2"),
        *((lambda v=v: finite(v, "x"), "must be a finite number") for v in (math.nan, -math.inf, "1", True, None)),
        (lambda: one_of("c", "kind", ("a", "b")), "there is no kind 'c': use one of a, b"),
        (lambda: same_shape(torch.zeros(2), torch.zeros(2, 1), "both"), "both must have the same shape, not [2] and"),
        *((lambda v=v: runtime.generator(v), "the seed must") for v in (2**64, -1, 1.5, "x", None, True)),
        *((lambda v=v: runtime.pick_device(v), "there is no device") for v in (None, "x", 1.5)),
        (lambda: runtime.pick_device("meta"), "is not supported"),
        (lambda: contact_sheet(torch.zeros(3, 4, 4), 0), "number of columns"),
        (lambda: contact_sheet(torch.zeros(3, 4, 4), 1, -1), "gap"),
        (lambda: contact_sheet(torch.zeros(4, 4), 1), "not [4, 4]"),
    ],
)
def test_nonsense_is_refused(action, message):
    assert message in refused(action)


def test_seeds_may_be_as_large_as_there_are():
    for seed in (0, np.int64(7), 2**64 - 1):
        assert runtime.generator(seed).initial_seed() == seed
