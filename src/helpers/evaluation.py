"""Judging meta-parameters on new tasks: accuracy or loss after 0, 1, 2 … inner steps, with intervals over tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from helpers.learners import GradientDescent, MinibatchDescent
from helpers.models import Params
from helpers.runtime import UserError
from helpers.tasks import Examples, Tasks
from helpers.validate import positive, whole


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
    """
    result = interval(samples)
    return result._replace(ci95=result.ci95 / 1.96 * student(result.n - 1)) if result.n > 1 else result


def one_by_one(learner: GradientDescent, phi: Params, support: Examples, query: Examples) -> Tensor:
    """Predictions without transduction: each query example is normalised together with the support set alone.

    Returns:
        Outputs ``[queries, ...]``, as the model gives them for the joint batch.
    """

    def predict(x: Tensor) -> Tensor:
        return learner.outputs(phi, torch.cat([support.x, x[None]]))[-1]

    return vmap(predict)(query.x)


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


def adaptation_curve(
    learner: GradientDescent,
    theta: Params,
    tasks: Tasks,
    steps: Sequence[int],
    metric: Callable[[Tensor, Tensor], Tensor],
    transductive: bool = True,
    chunk: int | None = 50,
) -> Tensor:
    """A metric on the query set after each of several numbers of inner steps, each on the whole support set.

    Args:
        learner: one that goes step by step; a minibatch learner too sees the whole support set at every step.
        theta: meta-parameters.
        tasks: a batch of T tasks, which also give the start where the learner wants one.
        steps: increasing numbers of inner steps, from 0.
        metric: ``metric(outputs, y) -> scalar``, such as ``losses.accuracy``.
        transductive: predict all query examples as one batch, so that batch normalisation sees them together (as MAML's
            code does), or one by one, each beside the support set.
        chunk: tasks at a time.

    Returns:
        ``[len(steps), T]``.

    Raises:
        UserError: if ``steps`` do not increase or are none, without tasks, for a learner without steps, or where the
            support set has been cut into minibatches.
    """
    if not isinstance(learner, GradientDescent):
        raise UserError(
            f"a curve is over inner steps, such as those of GradientDescent: {type(learner).__name__} has none"
        )
    if not len(steps) or not len(tasks.query.x):
        raise UserError("a curve needs at least one number of inner steps and one task")
    if chunk is not None:
        whole(chunk, "number of tasks at a time")
    if isinstance(learner, MinibatchDescent) and tasks.support.x.dim() > tasks.query.x.dim():
        raise UserError("every step of a curve sees the whole support set: pass it without cutting it into minibatches")
    if any(after < before for before, after in zip((0, *steps), steps, strict=False)):  # else adapted too far
        raise UserError(f"the numbers of inner steps must increase from 0, not be {list(steps)}")

    for count in steps:
        whole(count, "number of inner steps", least=0)

    def curve(task: Tasks) -> Tensor:
        phi, done, values = learner.begin(theta, task), 0, []
        for target in steps:
            for _ in range(target - done):
                phi = learner.step(theta, phi, task.support)
            done = target
            outputs = learner.outputs(phi, task.query.x) if transductive else one_by_one(learner, phi, *task)
            values.append(metric(outputs, task.query.y))
        return torch.stack(values)

    return vmap(curve, chunk_size=chunk)(tasks).T
