"""What transfer learns from: one source or many, curves or images with their classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import runtime
from helpers.tasks.episodes import pooled
from helpers.tasks.images import ImageClasses
from helpers.types import Examples


@dataclass(frozen=True, eq=False)
class CurveSources:
    """Sinusoids that are learned together, an output each.

    Attributes:
        amplitude, phase: ``[outputs]``.
    """

    amplitude: Tensor
    phase: Tensor

    @classmethod
    def draw(cls, count: int, seed: int, device: torch.device | str = "cpu") -> CurveSources:
        """So many sinusoids of the usual range, the same on every device."""
        generator = runtime.generator(seed)
        amplitude = 0.1 + 4.9 * torch.rand(count, generator=generator)
        return cls(amplitude.to(device), (math.pi * torch.rand(count, generator=generator)).to(device))

    @property
    def outputs(self) -> int:
        """Outputs of a network that learns from them."""
        return len(self.amplitude)

    def batch(self, size: int, generator: torch.Generator) -> Examples:
        """A minibatch: x ``[size, 1]``, y ``[size, outputs]``."""
        x = -5 + 10 * torch.rand(size, 1, generator=generator, device=generator.device)
        return Examples(x, self.amplitude * torch.sin(x - self.phase))


@dataclass(frozen=True, eq=False)
class ImageSources:
    """Images with their classes.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
    """

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, classes: ImageClasses, one: int | None, device: torch.device | str = "cpu") -> ImageSources:
        """One script, the largest for 0, or all of them. A reader's own training classes are all of one group."""
        scripts = sorted(set(classes.groups), key=lambda script: -classes.groups.count(script))
        wanted = scripts if one is None else [scripts[one % len(scripts)]]
        rows = [i for i, script in enumerate(classes.groups) if script in wanted]
        pool = pooled(classes.select(rows).to(device).images)
        return cls(pool.images, torch.arange(len(rows), device=device).repeat_interleave(pool.sizes))

    @property
    def outputs(self) -> int:
        """Outputs of a network that learns from them."""
        return int(self.labels.max()) + 1

    def batch(self, size: int, generator: torch.Generator) -> Examples:
        """A minibatch."""
        rows = torch.randint(len(self.images), (size,), generator=generator, device=generator.device)
        return Examples(self.images[rows].to(torch.float32) / 255, self.labels[rows])
