"""Outer rates and inner seeds by iteration, and when a watched run goes back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from helpers.lab.experiment import Experiment
from helpers.learners.descent import CARRIED
from helpers.types import Params

RETURNS = 6  # at most so often does a watched run go back


def seed_at(seed: int, iteration: int) -> int:
    """The seed of a generator that takes over a run at an iteration: no other run or iteration has the same."""
    return int.from_bytes(hashlib.sha256(f"{seed} {iteration}".encode()).digest()[:7])


def steady(values: Sequence[float]) -> bool | None:
    """Whether a watched run stands at a quiet point: a rule that is fixed before any run.

    Args:
        values: the watched metric at all points so far, the present one last.

    Returns:
        True at a quiet point: the metric is at most twice the median of the five points before (or there are not yet
        five). False where the run has lost its footing: the metric has doubled twice, to more than four times that
        median. None in between. A value that is not finite is beyond every bound.
    """
    *before, now = values
    if len(before) < 5:
        return True if math.isfinite(now) else None
    usual = median(before[-5:])
    return True if now <= 2 * usual else None if now <= 4 * usual else False


def halved(theta: Params) -> Params:
    """θ in half precision, but for what is carried along, and tensors that lose more than rounding by it."""

    def half(name: str, value: Tensor) -> Tensor:
        if value.dtype != torch.float32 or name.startswith(CARRIED):
            return value
        short = value.half()
        error, size = (short.to(value.dtype) - value).abs(), value.abs()
        fits = value.numel() and bool((error <= size / 1024 + 1e-6 * size.max()).all())
        return short if fits else value

    return {name: half(name, value) for name, value in theta.items()}


def outer_rate_at(experiment: Experiment, iteration: int) -> float:
    """The outer rate of an iteration, counted from 0: held for ``outer_rate_hold`` iterations, then annealed to
    ``outer_rate_final`` at the end; where that is None always ``outer_rate``. At each of ``outer_rate_restarts`` an
    annealing ends and the next begins (warm restarts, Loshchilov and Hutter 2017)."""
    final = experiment.outer_rate if experiment.outer_rate_final is None else experiment.outer_rate_final
    begin = experiment.outer_rate_hold
    for end in (*experiment.outer_rate_restarts, experiment.iterations):
        if iteration < end:
            break
        begin = end
    return annealed(experiment.outer_rate, final, (iteration - begin) / max(1, end - begin))


def annealed(rate: float, final: float, part: float) -> float:
    """The outer rate when ``part`` of the way is done: ``rate`` up to 0, then a straight line to ``final`` at 1."""
    return rate + (final - rate) * max(0.0, part)
