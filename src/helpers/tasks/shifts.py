"""Tasks of another kind than those of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.nn import functional

from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks


def of_sinusoids(own: Sinusoids) -> dict[str, Sinusoids]:
    """Sinusoids outside the ranges of those given."""
    return {
        "larger": replace(own, amplitudes=(5.0, 7.0)),
        "later": replace(own, phases=(math.pi, 2 * math.pi)),
        "elsewhere": replace(own, inputs=(5.0, 10.0)),
    }


def of_images() -> dict[str, Callable[[Tasks], Tasks]]:
    """Changes of the images of tasks: turned by a right angle, negative, half as large."""

    def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Tasks], Tasks]:
        return lambda tasks: Tasks(*(Examples(change(examples.x), examples.y) for examples in tasks))

    def smaller(x: Tensor) -> Tensor:
        half = functional.avg_pool2d(x.flatten(0, 1), 2)
        lack = x.shape[-1] - half.shape[-1]
        before, after = lack // 2, lack - lack // 2
        return functional.pad(half, (before, after, before, after)).view_as(x)

    return {
        "turned": changed(lambda x: x.rot90(1, (-2, -1))),
        "negative": changed(lambda x: 1 - x),
        "smaller": changed(smaller),
    }
