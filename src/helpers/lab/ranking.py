"""Judging classifiers of two classes by how they rank: areas and background efficiencies, after adaptation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers.lab import statistics
from helpers.lab.statistics import Interval
from helpers.learners.descent import GradientDescent
from helpers.numerics import tracing
from helpers.tasks.jets import protocol
from helpers.types import Examples, Params, Tasks


def ranking(background: Tensor, signal: Tensor) -> Tensor:
    """Area under the ROC curve, and the background efficiency at signal efficiencies of 0.5 and 0.3: ``[3]``."""
    passing = (statistics.background_efficiency(background, signal, part) for part in (0.5, 0.3))
    return torch.stack([statistics.auc(background, signal), *passing])


def in_parts(background: Tensor, signal: Tensor, parts: int) -> Tensor:
    """The :func:`ranking` of every one of so many parts into which the scores are dealt, ``[parts, 3]``."""
    return torch.stack([ranking(background[n::parts].double(), signal[n::parts].double()) for n in range(parts)])


class Judge:
    """How well adapted taggers rank query jets; its two pieces are recorded once for each shape, whatever the rate.

    Args:
        chunk: tasks at a time.
    """

    def __init__(self, chunk: int = 2) -> None:
        self.chunk = chunk
        self._step, self._quality = tracing.traced(_step), tracing.traced(_quality)

    def __call__(self, learner: GradientDescent, theta: Params, tasks: Tasks, steps: Sequence[int]) -> Tensor:
        """Adapt and judge.

        Args:
            learner: adapts.
            theta: several taggers, tensors ``[seeds, ...]``.
            tasks: T tasks; in the query sets the background comes first, then as much signal.
            steps: increasing numbers of inner steps.

        Returns:
            ``[seeds, T, len(steps), 3]``: area under the ROC curve, and the background efficiency at signal
            efficiencies of 0.5 and 0.3. Scores that are no numbers count as 0, so a diverged tagger is one that cannot
            tell anything.
        """
        count, seeds = len(tasks.query.y), len(next(iter(theta.values())))
        learner, start, parts = learner.replace(steps=1), learner.start(theta), []
        for begin in range(0, count, self.chunk):
            rows = torch.arange(begin, begin + self.chunk).clamp(max=count - 1)  # the last chunk is filled up
            some = tree_map(lambda t, rows=rows: t[rows.to(t.device)], tasks)
            phi = {n: v[:, None].expand(seeds, self.chunk, *v.shape[1:]).contiguous() for n, v in start.items()}
            done, values = 0, []
            for target in steps:
                for _ in range(target - done):
                    phi = self._step(learner, theta, phi, some.support)
                done = target
                values.append(self._quality(learner, phi, some.query.x))
            parts.append(torch.stack(values, 2))
        return torch.cat(parts, 1)[:, :count]


def _step(learner: GradientDescent, theta: Params, phi: Params, support: Examples) -> Params:
    """One inner step of every seed on every task."""
    return vmap(vmap(learner.step, in_dims=(None, 0, 0)), in_dims=(0, 0, None))(theta, phi, support)


def _quality(learner: GradientDescent, phi: Params, x: Tensor) -> Tensor:
    """``[seeds, T, 3]``, see :class:`Judge`."""

    def one(phi: Params, x: Tensor) -> Tensor:
        outputs = learner.model(phi, x)
        background, signal = (outputs[:, 1] - outputs[:, 0]).nan_to_num().view(2, -1)
        return ranking(background, signal)

    return vmap(vmap(one), in_dims=(0, None))(phi, x)


def named(rankings: dict[str, Tensor], how: str, summary: Callable[[Tensor], Interval]) -> dict[str, Interval]:
    """Metrics of rankings ``[samples, 3]`` by place, with the windows among them: ``auc_{where}_{how}``, also for
    their ``mean``, ``rejection_{where}_{how}`` and ``rejection30_{where}_{how}``."""
    mean = torch.stack([rankings[edge] for edge in protocol.EDGES]).mean(0)
    metrics = {f"auc_mean_{how}": summary(mean[:, 0])}
    for where, values in rankings.items():
        area, half, third = values.unbind(1)
        metrics[f"auc_{where}_{how}"] = summary(area)
        metrics[f"rejection_{where}_{how}"] = summary(1 / half)
        metrics[f"rejection30_{where}_{how}"] = summary(1 / third)
    return metrics


def best(grid: Sequence[Tensor], rates: Sequence[float], steps: Sequence[int]) -> tuple[float, int]:
    """The rate and number of steps with the largest entry of ``grid``, ``[len(steps)]`` for each rate."""
    rate, step = divmod(int(torch.stack(list(grid)).argmax()), len(steps))
    return rates[rate], steps[step]
