"""Sines of unknown frequency, what a learned loss sees of them, and how far off a frequency or a prediction is.

Outputs are those of :class:`~helpers.models.physics.Frequency`, (f(x), ω).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.losses import input_prediction_and_target, mean_squared_error
from helpers.types import Examples, Tasks


@dataclass(frozen=True)
class Frequencies:
    """Tasks of learning ω* from sin(ω*x); the query set is the support set.

    Attributes:
        points: of a task, drawn uniformly from [−5, 5].
        truths: range of the true frequencies.
    """

    points: int = 64
    truths: tuple[float, float] = (-5.0, 5.0)

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Frequencies and inputs drawn uniformly."""
        (low, high), device = self.truths, generator.device
        truth = low + (high - low) * torch.rand(n_tasks, 1, 1, generator=generator, device=device)
        x = -5 + 10 * torch.rand(n_tasks, self.points, 1, generator=generator, device=device)
        examples = waves(truth, x)
        return Tasks(examples, examples)


def waves(truth: Tensor, x: Tensor) -> Examples:
    """The examples at x ``[T, n, 1]``: y ``[T, n, 2]`` holds sin(ω*x) and ω*, of ``truth`` ``[T, 1, 1]``."""
    return Examples(x, torch.cat([torch.sin(truth * x), truth.expand_as(x)], -1))


def whole_waves(truth: Tensor) -> Examples:
    """The examples at a hundred x from −5 to 5, of each of the frequencies ``[T]``."""
    x = torch.arange(-5.0, 5.0, 0.1, device=truth.device)[:, None]
    return waves(truth[:, None, None], x.expand(len(truth), -1, -1))


def seen_of_frequency(x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
    """(x, ŷ, y), without the frequencies beside them."""
    return input_prediction_and_target(x, outputs[:, :1], y[:, :1])


def frequency_error(outputs: Tensor, y: Tensor) -> Tensor:
    """(ω − ω*)²: the extra information."""
    return mean_squared_error(outputs[:, 1], y[:, 1])


def prediction_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of f(x) alone."""
    return mean_squared_error(outputs[:, :1], y[:, :1])
