"""When levels of a loss are reached, and when what was dearer to train has paid for itself."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.lab import break_even


def test_first_below():
    assert break_even.first_below((0, 1, 3), (2.0, 1.0, 0.5), 0.75) == 2.0
    assert break_even.first_below((0, 1, 3), (2.0, 1.0, 0.5), 2.5) == 0.0
    assert math.isinf(break_even.first_below((0, 1, 3), (2.0, 1.0, 0.5), 0.1))


def test_break_even():
    def record(iterations, seconds, needed, reached=1.0):
        values = {"seconds_training": seconds, "seconds_new_family": 0.01}
        values |= {"iterations_to_50": needed, "reached_50": reached}
        metrics = {name: {"value": value, "ci95": None, "n": 1} for name, value in values.items()}
        return {"experiment": "x", "iterations": {"done": iterations}, "metrics": metrics}

    dear, cheap = record(100, 0.3, 5), record(100, 0.1, 45)
    assert break_even.break_even(dear, cheap, 0.5) == pytest.approx(20 / (0.01 * 40))
    assert math.isinf(break_even.break_even(dear, record(100, 0.1, 5), 0.5))  # nothing saved
    assert math.isinf(break_even.break_even(record(100, 0.3, 5, reached=0.8), cheap, 0.5))
    assert break_even.break_even(cheap, record(100, 0.3, 50), 0.5) == 0.0


def test_levels_that_some_seeds_reach():
    curves = torch.tensor([[2.0, 1.0, 0.5], [2.0, 1.5, 1.0]])
    found = break_even.reaching((0, 1, 3), curves, (1.0, 0.75))
    assert {name: value.value for name, value in found.items()} == {
        "iterations_to_100": 2.0, "reached_100": 1.0, "iterations_to_75": 2.5, "reached_75": 0.5,
    }  # fmt: skip
    assert all(value.n == 2 and value.per == "seed" for value in found.values())


def test_the_first_calls_are_not_timed(monkeypatch):
    clock, costs = [0.0], iter([100.0] * 3 + [2.0] * 4)

    def once():
        clock[0] += next(costs)

    monkeypatch.setattr(break_even.time, "process_time", lambda: clock[0])
    assert break_even.seconds_of(once, times=4) == 2.0
