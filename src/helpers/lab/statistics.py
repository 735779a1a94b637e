"""Means with the interval that what varied gives them, and areas under ROC curves."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from helpers.errors import UserError
from helpers.validate import positive


class Interval(NamedTuple):
    """A mean, the half-width of its 95 % interval, and the number of independent samples behind it."""

    value: float
    ci95: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.ci95:.4f} (n = {self.n})"


def interval(samples: Tensor) -> Interval:
    """Mean and 1.96 σ/√n of independent samples ``[n]``, as the few-shot literature reports them.

    Raises:
        UserError: without a sample.

    >>> import torch
    >>> found = interval(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    >>> found.value, found.n
    (0.5, 4)
    """
    samples = samples.double().flatten()
    if not len(samples):
        raise UserError("an interval needs at least one sample: there is none")
    deviation = samples.std().item() if len(samples) > 1 else float("nan")
    return Interval(samples.mean().item(), 1.96 * deviation / len(samples) ** 0.5, len(samples))


@lru_cache
def student(degrees: int) -> float:
    """The number that Student's t of so many degrees of freedom stays within, either way, in 95 of 100 cases.

    What ``scipy.stats.t.ppf(0.975, degrees)`` gives, without SciPy, which a machine that only trains need not have.

    Source: Abramowitz and Stegun (1964), equations 26.7.3 and 26.7.4, whose finite sums are solved by bisection.
    """
    odd = degrees % 2

    def within(angle: float) -> float:
        sine, cosine, total, term = math.sin(angle), math.cos(angle), 0.0, math.cos(angle) ** odd
        for power in range(odd, degrees - 1, 2):
            total += term
            term *= cosine * cosine * (power + 1) / (power + 2)
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(55):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def over_seeds(samples: Tensor) -> Interval:
    """Mean and Student's 95 % interval over a few independent runs ``[seeds]``: they are few, and 1.96 would flatter.

    Raises:
        UserError: without a run.

    >>> import torch
    >>> runs = torch.tensor([0.1, 0.2, 0.3])
    >>> over_seeds(runs).value == interval(runs).value, over_seeds(runs).ci95 > 2 * interval(runs).ci95
    (True, True)
    """
    result = interval(samples)
    return result._replace(ci95=result.ci95 / 1.96 * student(result.n - 1)) if result.n > 1 else result


def auc(background: Tensor, signal: Tensor) -> Tensor:
    """Area under the ROC curve: how often a signal example has a larger score than one of the background.

    Args:
        background: scores ``[n]``.
        signal: scores ``[m]``. Ties count half. None may be NaN: it is larger than nothing.

    Raises:
        UserError: if either has more axes than one, or no score.
    """
    _scores(background, signal)
    larger, same = signal[:, None] > background, signal[:, None] == background
    return larger.to(signal.dtype).mean() + same.to(signal.dtype).mean() / 2


def background_efficiency(background: Tensor, signal: Tensor, signal_efficiency: float = 0.5) -> Tensor:
    """The share of the background above the threshold that lets ``signal_efficiency`` of the signal pass.

    Its inverse is the background rejection. What equals the threshold passes.

    Args:
        background: scores ``[n]``.
        signal: scores ``[m]``.
        signal_efficiency: in (0, 1].

    Returns:
        At least 1/n: that none of n passes does not say that none would.

    Raises:
        UserError: if scores have more axes than one or there are none, or for another efficiency.
    """
    _scores(background, signal)
    positive(signal_efficiency, "efficiency of the signal", most=1)
    passing = max(1, round(signal_efficiency * len(signal)))
    threshold = signal.sort(descending=True).values[passing - 1]
    return (background >= threshold).to(signal.dtype).mean().clamp(min=1 / len(background))


def _scores(background: Tensor, signal: Tensor) -> None:
    for name, scores in (("background", background), ("signal", signal)):
        if scores.dim() != 1 or not len(scores):
            raise UserError(f"the scores of the {name} must be [n] with n at least 1, not {list(scores.shape)}")
