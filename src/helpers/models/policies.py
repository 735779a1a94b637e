"""Policies: networks that draw actions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.models.mlp import MLP
from helpers.types import Params


@dataclass(frozen=True)
class GaussianPolicy:
    """Actions from a normal distribution with independent coordinates: its mean is a network's, its deviation free.

    Parameters are those of ``mean`` and ``log_std`` ``[actions]``; the deviation is ``smallest_std`` + exp(log_std), so
    that no update ends the exploration. Called, it gives mean and deviation ``[..., 2 actions]``.

    Attributes:
        mean: from an observation to an action, in units of ``max_action``.
        first_std: the deviation before any update.
        smallest_std: its lower bound.
        first_scale: factor of the last layer's first values, so that all policies begin with hardly any force.
    """

    mean: MLP
    first_std: float = 0.5
    smallest_std: float = 0.1
    first_scale: float = 0.1

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        params = self.mean.init(generator, dtype)
        params |= {name: self.first_scale * value for name, value in params.items() if name.startswith(self.head)}
        log_std = torch.full_like(params["linear1.bias"][:1], self.first_std - self.smallest_std).log()
        return params | {"log_std": log_std.repeat(self.mean.sizes[-1])}

    @property
    def head(self) -> str:
        """The last layer of the mean."""
        return self.mean.head

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Mean and deviation, ``[..., 2 actions]``, at observations ``x`` ``[..., observation]``."""
        mean = self.mean(params, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
        return torch.cat([mean, (self.smallest_std + params["log_std"].exp()).expand_as(mean)], -1)

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all."""
        return True


def log_probability(outputs: Tensor, action: Tensor) -> Tensor:
    """Log density of actions ``[..., actions]`` under ``outputs`` ``[..., 2 actions]``, mean and deviation; ``[...]``.

    The density is that of the action as it was drawn, before the environment's limits cut it.
    """
    mean, std = outputs.chunk(2, -1)
    return (-((action - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2).sum(-1)
