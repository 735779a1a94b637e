"""Families of functions: shapes, ranges, noise, and functions that do not fit."""

from __future__ import annotations

import pytest
import torch
from refusals import refused

from helpers.runtime import generator
from helpers.tasks.functions import Functions


def line(x, a, b):
    return a * x + b


RANGES = {"a": (1.0, 2.0), "b": (-1.0, 1.0)}


def test_every_task_is_one_function():
    tasks = Functions(line, RANGES, shots=3, queries=4, inputs=(0.0, 1.0)).sample(50, generator(0))
    x, y = (torch.cat([one, other], 1) for one, other in zip(*tasks, strict=True))
    assert x.shape == y.shape == (50, 7, 1) and tasks.support.x.shape == (50, 3, 1)
    assert x.min() >= 0 and x.max() <= 1
    slope = (y[:, 1:] - y[:, :1]) / (x[:, 1:] - x[:, :1])
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), rtol=0, atol=0.01)
    assert slope[:, 0].min() > 0.98 and slope[:, 0].max() < 2.02 and slope[:, 0].std() > 0.2


def test_the_same_seed_gives_the_same_tasks_and_noise_is_added():
    family, noisy = Functions(line, RANGES), Functions(line, RANGES, noise=0.5)
    first, again, other = (f.sample(200, generator(1)) for f in (family, family, noisy))
    assert torch.equal(first.query.y, again.query.y) and torch.equal(first.query.x, other.query.x)
    assert (other.query.y - first.query.y).std() == pytest.approx(0.5, rel=0.05)


def test_several_inputs_and_outputs():
    tasks = Functions(lambda x, a: torch.cat([a * x.sum(-1, keepdim=True), x], -1), {"a": (0, 1)}, dimensions=2)
    assert tasks.sample(4, generator(0)).query.y.shape == (4, 10, 3)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Functions(line, {"a": (0, 1)}), "the function must take x, a, as in lambda x, a: …"),
        (lambda: Functions(line, RANGES | {"c": (0, 1)}), "the function must take x, a, b, c"),
        (lambda: Functions(line, RANGES | {"a": 1.0}), "the range of a must be two numbers, such as (-1, 1), not 1.0"),
        (lambda: Functions(line, RANGES | {"a": (0, float("inf"))}), "ends of the range of a must be a finite number"),
        (lambda: Functions(line, RANGES, shots=0), "shots of a family of functions"),
        (lambda: Functions(line, RANGES, noise=-1.0), "noise of a family of functions"),
        (lambda: Functions(lambda x: x.sum(-1), {}).sample(2, generator(0)), "must return a tensor [2, 20, outputs]"),
        (lambda: Functions(lambda x: 1.0, {}).sample(2, generator(0)), "not float: keep the last axis"),
        (lambda: Functions(line, RANGES).sample(0, generator(0)), "number of tasks"),
    ],
)
def test_refusals(make, sentence):
    assert sentence in refused(make)
