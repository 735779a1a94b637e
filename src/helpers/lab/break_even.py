"""When what was dearer to train has paid for itself, from records with the metrics that this takes.

These are ``seconds_training``, of one iteration of one seed's training, ``seconds_new_family``, of one iteration on a
new family, ``iterations_to_{100 · level}``, and ``reached_{100 · level}``, the share of seeds that got there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helpers.lab import records
from helpers.lab.records import Record
from helpers.lab.statistics import Interval, over_seeds


def first_below(iterations: Sequence[int], curve: Sequence[float], level: float) -> float:
    """After how many iterations a curve is first at or below a level, straight lines between the points; or infinity.

    Args:
        iterations: where the curve was measured, increasing.
        curve: its values.
    """
    for k, (n, value) in enumerate(zip(iterations, curve, strict=True)):
        if value <= level:
            if k == 0:
                return float(n)
            before, above = iterations[k - 1], curve[k - 1]
            return before + (n - before) * (above - level) / (above - value)
    return math.inf


def reaching(iterations: Sequence[int], curves: Tensor, levels: Sequence[float]) -> dict[str, Interval]:
    """When curves first reach levels, over seeds: ``iterations_to_{100 · level}`` and ``reached_{100 · level}``.

    A level that a seed did not reach counts with the largest number of iterations, which is then a lower bound.

    Args:
        iterations: where the curves were measured, increasing.
        curves: ``[seeds, len(iterations)]``.
    """
    metrics = {}
    for level in levels:
        needed = torch.tensor([first_below(iterations, curve, level) for curve in curves.tolist()])
        metrics[f"iterations_to_{round(100 * level)}"] = over_seeds(needed.clamp(max=iterations[-1]))
        metrics[f"reached_{round(100 * level)}"] = over_seeds(needed.isfinite().double())
    return metrics


def seconds_of(once: Callable[[], object], times: int = 20) -> float:
    """Processor seconds of a call, the mean of several; the first ones, which record programs, do not count."""
    for _ in range(3):
        once()
    begin = time.process_time()
    for _ in range(times):
        once()
    return (time.process_time() - begin) / times


def training_seconds(record: Record) -> float:
    """Processor seconds that one seed's training took."""
    return record["iterations"]["done"] * records.metric(record, "seconds_training").value


def break_even(one: Record, other: Record, level: float) -> float:
    """After how many new families the dearer of two starts has paid for itself in processor time.

    With T the seconds of training, n the iterations that a new family needs to reach the level, and τ the seconds of
    such an iteration it is (T₁ − T₂) / (τ (n₂ − n₁)).

    Returns:
        0 if ``one`` was not dearer; infinity if it saves nothing on a family, or does not reach the level with all its
        seeds. Where only ``other`` did not, the saving is a lower bound and so the number an upper one.
    """
    key = f"{round(100 * level)}"
    if records.metric(one, f"reached_{key}").value < 1:
        return math.inf
    saved = records.metric(other, f"iterations_to_{key}").value - records.metric(one, f"iterations_to_{key}").value
    dearer = training_seconds(one) - training_seconds(other)
    if dearer <= 0:
        return 0.0 if saved >= 0 else math.inf
    seconds = records.metric(one, "seconds_new_family").value
    return dearer / (seconds * saved) if saved > 0 else math.inf
