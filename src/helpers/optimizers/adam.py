"""Adam as a pure function: a gradient and a state in, a direction and the next state out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from helpers.types import Params

__all__ = ["Adam", "adam"]


class Adam(NamedTuple):
    """What Adam remembers between two steps.

    Attributes:
        first, second: running means of the gradient and of its square, in the shapes of the parameters.
        steps: that were made.
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    steps: int = 0

    @classmethod
    def of(cls, params: Params) -> Adam:
        """The state before the first step."""
        zeros = {name: torch.zeros_like(value) for name, value in params.items()}
        return cls(zeros, zeros)


def adam(
    gradient: Params, state: Adam, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8
) -> tuple[Params, Adam]:
    """The direction of one step, to be multiplied by the rate and subtracted, and the state after it.

    Any leading axes, ``vmap`` and recordings will do. Its derivative by the gradient is infinite where the gradient has
    been 0 in every step.

    Source: Kingma and Ba (2015), arXiv:1412.6980, algorithm 1.
    """
    (decay, slow), steps = betas, state.steps + 1
    first = {n: decay * state.first[n] + (1 - decay) * g for n, g in gradient.items()}
    second = {n: slow * state.second[n] + (1 - slow) * g * g for n, g in gradient.items()}
    here, spread = 1 - decay**steps, 1 - slow**steps
    direction = {n: first[n] / here / ((second[n] / spread).sqrt() + epsilon) for n in gradient}
    return direction, Adam(first, second, steps)
