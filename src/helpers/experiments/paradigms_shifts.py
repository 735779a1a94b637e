"""Tasks of another kind than those of training, for the ways to learn of the first chapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional

from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks


def shifted(experiment: Any) -> dict[str, Callable[[Tasks], Tasks] | Sinusoids]:
    """Families that training never saw: other sinusoids, or a change of the test images.

    Args:
        experiment: a :class:`~helpers.experiments.paradigms.ParadigmExperiment`.
    """
    if experiment.family == "sinusoid":
        own = Sinusoids(experiment.shots, experiment.queries)
        return {
            "larger": replace(own, amplitudes=(5.0, 7.0)),
            "later": replace(own, phases=(math.pi, 2 * math.pi)),
            "elsewhere": replace(own, inputs=(5.0, 10.0)),
        }

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
