"""Means with the interval that what varied gives them, and areas under ROC curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from helpers.errors import UserError
from helpers.validate import positive


class _Summary(NamedTuple):
    value: float
    ci95: float
    n: int


class Interval(_Summary):
    """A mean, the half-width of its 95 % interval, and the number of independent samples behind it.

    Attributes:
        samples: the values themselves ``[n]``, in double precision; None where they were not kept.
        per: what a sample belongs to, ``"task"`` or ``"seed"``; empty where it is not known.

    It unpacks into its three numbers, and two with the same numbers are equal.

    >>> value, ci95, n = Interval(0.5, 0.1, 4)
    >>> value, n, Interval(0.5, 0.1, 4).samples
    (0.5, 4, None)
    """

    samples: Tensor | None
    per: str

    def __new__(cls, value: float, ci95: float, n: int, samples: Tensor | None = None, per: str = "") -> Interval:
        """Args: as the attributes."""
        self = super().__new__(cls, value, ci95, n)
        self.samples, self.per = samples, per
        return self

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.ci95:.4f} (n = {self.n})"


class Tolerance(NamedTuple):
    """How far a metric may be from its record when the checkpoint is evaluated again; the terms are added up.

    Rounding differs between machines and is amplified by what follows it, for each kind of metric in another way.

    Attributes:
        absolute: in units of the metric.
        relative: in units of its value.
        intervals: in units of its 95 % interval, if it has one.
        per_sample: in units of what one of its samples contributes to the mean.
    """

    absolute: float = 0.0
    relative: float = 0.0
    intervals: float = 0.0
    per_sample: float = 0.0

    def of(self, metric: Interval) -> float:
        """The largest difference from a recorded metric.

        >>> Tolerance(0.5, relative=0.25).of(Interval(2.0, float("nan"), 1))
        1.0
        """
        spread = metric.ci95 if metric.ci95 > 0 else 0.0  # not a number: there is no interval
        allowed = self.absolute + self.relative * abs(metric.value) + self.intervals * spread
        return allowed + self.per_sample / metric.n


def interval(samples: Tensor) -> Interval:
    """Mean and Student's 95 % interval of independent samples ``[n]``, one a task.

    For hundreds of tasks it is the 1.96 σ/√n of the few-shot literature; for ten it is 15 % wider.

    Raises:
        UserError: without a sample.

    >>> import torch
    >>> found = interval(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    >>> found.value, found.n
    (0.5, 4)
    """
    return _summarised(samples, "task")


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
    """Mean and Student's 95 % interval over independent runs ``[seeds]``.

    Raises:
        UserError: without a run.

    >>> import torch
    >>> runs = torch.tensor([0.1, 0.2, 0.3])
    >>> f"{over_seeds(runs).ci95:.3f}", over_seeds(runs).per
    ('0.248', 'seed')
    """
    return _summarised(samples, "seed")


def over_runs(values: Tensor) -> Interval:
    """Mean of ``[seeds, tasks]`` with an interval over seeds; over tasks where no seed differs from another.

    A baseline that uses nothing of what was learned is the same for every seed: an interval over its copies would have
    no width, and say nothing.

    >>> import torch
    >>> over_runs(torch.tensor([[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]])).per
    'seed'
    >>> over_runs(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])).per
    'task'
    """
    values = values.double()
    apart = (values - values[:1]).abs().max()
    if len(values) > 1 and values.shape[1] > 1 and apart <= 1e-6 * values.abs().max().clamp(min=1e-12):
        return interval(values[0])
    return over_seeds(values.mean(1))


def _summarised(samples: Tensor, per: str) -> Interval:
    samples = samples.detach().double().flatten().cpu()
    count = len(samples)
    if not count:
        raise UserError("an interval needs at least one sample: there is none")
    half = student(count - 1) * samples.std().item() / count**0.5 if count > 1 else math.nan
    return Interval(samples.mean().item(), half, count, samples, per)


class Spread(NamedTuple):
    """A mean with the standard error that its samples give it, their degrees of freedom, and the samples if kept."""

    mean: float
    error: float
    degrees: float
    samples: Sequence[float] | None


class Difference(NamedTuple):
    """The difference of two means, ``lead``, with its standard error and the degrees of freedom of that.

    An error that is not a number belongs to one measurement without a spread, and then nothing is significant; an error
    of 0 to what is counted, and then the values decide.
    """

    lead: float
    error: float
    degrees: float

    def times(self, sign: int) -> Difference:
        """The same in the other direction, or in this."""
        return self._replace(lead=sign * self.lead)

    def p_above(self, bound: float) -> float:
        """p of the hypothesis that the true lead is at most ``bound``: small if it is larger.

        >>> Difference(1.0, 0.5, 4.0).p_above(0.0) < 0.06, Difference(1.0, 0.0, 1.0).p_above(0.0)
        (True, 0.0)
        """
        from scipy import stats

        if math.isnan(self.error):
            return 1.0
        if self.error == 0:
            return 0.5 if self.lead == bound else float(self.lead < bound)
        return float(stats.t.sf((self.lead - bound) / self.error, self.degrees))

    def p_below(self, bound: float) -> float:
        """p of the hypothesis that the true lead is at least ``bound``: small if it is smaller."""
        return self.times(-1).p_above(-bound)

    @property
    def detectable(self) -> float:
        """The lead that a one-sided test at 5 % finds in 80 of 100 cases."""
        from scipy import stats

        if math.isnan(self.error) or self.error == 0:
            return self.error
        return float((stats.t.ppf(0.95, self.degrees) + stats.t.ppf(0.80, self.degrees)) * self.error)


def of_interval(measured: Interval, exact: bool = False) -> Spread:
    """The standard error behind an interval, by its samples where they are kept and else by its half-width.

    Args:
        measured: with ``n`` of 0 for a number of a paper, whose half-width is 1.96 standard errors.
        exact: it was counted, so that there is no error.
    """
    if exact or measured.n == 0:
        error = 0.0 if exact or math.isnan(measured.ci95) else measured.ci95 / 1.96
        return Spread(measured.value, error, math.inf, None)
    if measured.samples is not None:
        values = np.asarray(measured.samples, dtype=float)
        return Spread(measured.value, float(values.std(ddof=1)) / len(values) ** 0.5, len(values) - 1, list(values))
    if measured.n == 1:
        return Spread(measured.value, math.nan, 1, None)
    return Spread(measured.value, measured.ci95 / student(measured.n - 1), measured.n - 1, None)


def difference(left: Spread, right: Spread, paired: bool = False) -> Difference:
    """What ``left`` leads ``right`` by: paired, sample by sample, or as Welch (1947) has it.

    >>> import torch
    >>> one, other = (of_interval(over_seeds(torch.tensor(x))) for x in ([1.0, 2.0, 4.0], [0.5, 1.4, 3.6]))
    >>> difference(one, other, paired=True).error < difference(one, other).error
    True
    """
    if paired:
        apart = np.subtract(left.samples, right.samples)
        return Difference(float(apart.mean()), float(apart.std(ddof=1)) / len(apart) ** 0.5, len(apart) - 1)
    parts = [side.error**2 for side in (left, right)]
    error = math.sqrt(sum(parts))
    weights = sum(part**2 / side.degrees for part, side in zip(parts, (left, right), strict=True))
    return Difference(left.mean - right.mean, error, error**4 / weights if weights else math.inf)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of one family, corrected so that the chance of one false claim or more stays at the level.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.

    >>> holm([0.03, 0.01, 0.5])
    [0.06, 0.03, 0.5]
    """
    adjusted, so_far = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = so_far
    return adjusted


def by_steps(kind: str, steps: Sequence[int], values: Iterable[Tensor]) -> dict[str, Interval]:
    """``{kind}_{steps}`` with intervals over seeds, of values ``[seeds]`` for each number of steps."""
    return {f"{kind}_{number}": over_seeds(row) for number, row in zip(steps, values, strict=True)}


def chosen(value: float) -> Interval:
    """A number that was set or picked, not measured: no interval."""
    return Interval(value, float("nan"), 1)


def both_names(spot: dict[str, Interval]) -> dict[str, Interval]:
    """Metrics of a spot check that is as thorough as the evaluation: once as ``spot_…`` and once without."""
    return spot | {name.removeprefix("spot_"): value for name, value in spot.items()}


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
