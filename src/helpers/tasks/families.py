"""Families of sinusoids: a distribution over task distributions, for learners one level up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.types import Examples, Tasks
from helpers.validate import finite, whole

Bands = tuple[tuple[float, float], ...]
# Frequencies ω of a family, in radians per unit of x. No two splits share one, so no family is in two of them.
SPLITS: dict[str, Bands] = {
    "train": ((0.5, 0.8), (1.0, 1.3), (1.5, 1.8), (2.0, 2.3)),
    "validation": ((0.9, 1.0), (1.4, 1.5), (1.9, 2.0)),
    "test": ((0.8, 0.9), (1.3, 1.4), (1.8, 1.9)),
    "shifted": ((2.4, 2.8),),
}
"""Bands of frequencies by split: the test bands lie between those of training, the shifted ones beyond them."""


class Family(NamedTuple):
    """What the tasks of a family share; every tensor has a leading family axis, ``[families]``.

    Attributes:
        frequency: ω.
        phase: φ₀, where the family's range of phases, a quarter turn wide, begins.
        amplitude: A₀, the lower end of the family's range of amplitudes, whose upper end is twice that.
    """

    frequency: Tensor
    phase: Tensor
    amplitude: Tensor


@dataclass(frozen=True)
class SinusoidFamilies:
    """Families of sinusoids: y = A sin(ω x − b) with A ~ U[A₀, 2 A₀], b ~ U[φ₀, φ₀ + π/2] and x ~ U[−5, 5].

    A family fixes ω, A₀ ~ U[1, 1.5] and φ₀ ~ U[0, 2π]; a task draws A and b.

    Args:
        support_tasks: tasks of a family to meta-train on.
        query_tasks: tasks of a family to judge by.
        shots: support points of a task.
        queries: query points of a task.
        frequencies: bands from which ω is drawn, each as likely as it is wide; see :data:`SPLITS`.

    Raises:
        UserError: when a number is not positive, or a band is empty.

    Source: Finn, Abbeel and Levine (2017), section 5.1, for a single family; the families are this book's.
    """

    support_tasks: int = 10
    query_tasks: int = 10
    shots: int = 10
    queries: int = 10
    frequencies: Bands = SPLITS["train"]
    amplitudes: tuple[float, float] = (1.0, 1.5)
    inputs: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        for name in ("support_tasks", "query_tasks", "shots", "queries"):
            whole(getattr(self, name), f"{name} of sinusoid families")
        for name in ("amplitudes", "inputs"):
            for end in getattr(self, name):
                finite(end, f"ends of the {name} of sinusoid families")
        if not self.frequencies or any(not 0 < low < high < math.inf for low, high in self.frequencies):
            raise UserError(f"every band of frequencies must be positive and not empty, unlike {self.frequencies}")

    def draw(self, n_families: int, generator: torch.Generator) -> Family:
        """Draw ``n_families`` families, without tasks; on the generator's device.

        Raises:
            UserError: for a number of families below 1.
        """
        whole(n_families, "number of families")
        low, high = torch.tensor(self.frequencies, device=generator.device).unbind(1)
        u, v, w = torch.rand(3, n_families, generator=generator, device=generator.device)
        ends = (high - low).cumsum(0)
        along = u * ends[-1]  # a point on the bands laid end to end
        band = torch.bucketize(along, ends).clamp(max=len(ends) - 1)
        frequency = high[band] - (ends[band] - along)
        least, most = self.amplitudes
        return Family(frequency, 2 * math.pi * v, least + (most - least) * w)

    def tasks(self, family: Family, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Fresh tasks of given families.

        Args:
            family: F families.
            n_tasks: tasks a family.

        Returns:
            ``x`` and ``y`` ``[F, n_tasks, examples, 1]``, float32, on the generator's device.

        Raises:
            UserError: for a number of tasks below 1.
        """
        whole(n_tasks, "number of tasks")
        count, device = len(family.frequency), generator.device
        frequency, phase, amplitude = (t.view(-1, 1, 1, 1) for t in family)
        a, b = torch.rand(2, count, n_tasks, 1, 1, generator=generator, device=device)
        x = torch.rand(count, n_tasks, self.shots + self.queries, 1, generator=generator, device=device)
        x = self.inputs[0] + (self.inputs[1] - self.inputs[0]) * x
        y = amplitude * (1 + a) * torch.sin(frequency * x - phase - math.pi / 2 * b)
        near, far = (slice(None), slice(None), slice(self.shots)), (slice(None), slice(None), slice(self.shots, None))
        return Tasks(Examples(x[near], y[near]), Examples(x[far], y[far]))

    def sample(self, n_families: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_families`` families with their tasks.

        Returns:
            ``Tasks`` of ``Tasks``: support and query tasks, ``[families, tasks, examples, 1]``.
        """
        family = self.draw(n_families, generator)
        return Tasks(self.tasks(family, self.support_tasks, generator), self.tasks(family, self.query_tasks, generator))
