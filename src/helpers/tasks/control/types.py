"""What a control environment offers, and what comes of acting in it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Control", "Trajectory", "Transitions"]


class Trajectory(NamedTuple):
    """What happened in a rollout.

    Attributes:
        states: ``[..., horizon + 1, state_size]``; the first is the start.
        actions: ``[..., horizon, action_size]``, within the limits.
    """

    states: Tensor
    actions: Tensor


class Transitions(NamedTuple):
    """Single steps, to fit a model of the dynamics to.

    Attributes:
        state: ``[n, horizon, state_size]``.
        action: ``[n, horizon, action_size]``, within the limits.
        next_state: ``[n, horizon, state_size]``.
    """

    state: Tensor
    action: Tensor
    next_state: Tensor


class Control(Protocol):
    """An environment: how it starts, how it moves, and what a policy sees of it."""

    state_size: ClassVar[int]
    action_size: ClassVar[int]
    max_action: float
    horizon: int

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor: ...

    def step(self, state: Tensor, action: Tensor) -> Tensor: ...

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor: ...
