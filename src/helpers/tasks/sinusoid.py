"""Sinusoid regression: the task family in which MAML was introduced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from helpers.types import Examples, Tasks
from helpers.validate import finite, whole


@dataclass(frozen=True)
class Sinusoids:
    """Regression of y = A sin(x − b) with A ~ U[0.1, 5], b ~ U[0, π] and x ~ U[−5, 5].

    Args:
        shots: support points of a task, K.
        queries: query points of a task.
        oracle: give amplitude and phase as further inputs, so that ``x`` is ``[T, n, 3]`` (the paper's upper bound).

    Raises:
        UserError: when a number of points is not positive, or a range is not finite.

    Source: Finn, Abbeel and Levine (2017), section 5.1.

    >>> import helpers
    >>> support, query = helpers.Sinusoids(shots=5, queries=10).sample(4, helpers.generator(0))
    >>> support.x.shape, query.y.shape
    (torch.Size([4, 5, 1]), torch.Size([4, 10, 1]))
    """

    shots: int = 10
    queries: int = 10
    oracle: bool = False
    amplitudes: tuple[float, float] = (0.1, 5.0)
    phases: tuple[float, float] = (0.0, math.pi)
    inputs: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        for name in ("shots", "queries"):
            whole(getattr(self, name), f"{name} of a sinusoid task")
        for name in ("amplitudes", "phases", "inputs"):
            for end in getattr(self, name):
                finite(end, f"ends of the {name} of a sinusoid task")

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` sinusoids with their points.

        Returns:
            ``Tasks`` with ``x`` ``[T, n, 1]`` (``[T, n, 3]`` for the oracle) and ``y`` ``[T, n, 1]``, float32, on the
            generator's device.

        Raises:
            UserError: for a number of tasks below 1.
        """
        amplitude, phase = self._curves(n_tasks, generator)
        x = _uniform(*self.inputs, n_tasks, self.shots + self.queries, generator)
        y = amplitude * torch.sin(x - phase)
        if self.oracle:
            x = torch.cat([x, amplitude.expand_as(x), phase.expand_as(x)], dim=-1)
        return Tasks(Examples(x[:, : self.shots], y[:, : self.shots]), Examples(x[:, self.shots :], y[:, self.shots :]))

    def wave(self, n_tasks: int, points: int, generator: torch.Generator) -> Examples:
        """Draw ``n_tasks`` sinusoids as a whole: y at equally spaced x over the range of inputs.

        Returns:
            ``x`` and ``y`` ``[T, points, 1]``, float32, on the generator's device.

        Raises:
            UserError: for a number of tasks or points below 1.
        """
        whole(points, "number of points")
        amplitude, phase = self._curves(n_tasks, generator)
        x = torch.linspace(*self.inputs, points, device=generator.device).view(1, -1, 1).expand(n_tasks, -1, -1)
        return Examples(x, amplitude * torch.sin(x - phase))

    def _curves(self, n_tasks: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Amplitudes and phases, each ``[T, 1, 1]``."""
        whole(n_tasks, "number of tasks")
        return _uniform(*self.amplitudes, n_tasks, 1, generator), _uniform(*self.phases, n_tasks, 1, generator)


def _uniform(low: float, high: float, n_tasks: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform draws ``[T, n, 1]`` on the generator's device."""
    return low + (high - low) * torch.rand(n_tasks, n, 1, generator=generator, device=generator.device)


def without_oracle(tasks: Tasks) -> Tasks:
    """The tasks without the oracle's inputs: only x is left of (x, amplitude, phase)."""
    return Tasks(*(Examples(examples.x[..., :1], examples.y) for examples in tasks))


def halves(tasks: Tasks) -> Tasks:
    """The same sinusoids, drawn with ``oracle``: support points in the right half of inputs, queries in the left."""

    def moved(examples: Examples, sign: int) -> Examples:
        x, amplitude, phase = examples.x.split(1, -1)
        x = sign * x.abs()
        return Examples(torch.cat([x, amplitude, phase], -1), amplitude * torch.sin(x - phase))

    return Tasks(moved(tasks.support, 1), moved(tasks.query, -1))
