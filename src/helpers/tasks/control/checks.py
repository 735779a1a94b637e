"""Checks and a norm that the environments share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.tasks.control.types import Control
from helpers.validate import positive


def length_of(x: Tensor) -> Tensor:
    """Euclidean norm over the last axis; at 0 all its derivatives are 0, where those of torch's are NaN from the second
    on: a start at rest is exactly there."""
    square = x.square().sum(-1)
    zero = square == 0
    return torch.where(zero, torch.zeros_like(square), torch.where(zero, torch.ones_like(square), square).sqrt())


def uniform_between(
    shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype, device=generator.device)


def check_positive(env: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        positive(getattr(env, name), f"{name} of {type(env).__name__}", zero)


def check_size(x: Tensor, size: int, what: str) -> None:
    if x.dim() == 0 or x.shape[-1] != size:
        raise UserError(f"the {what} must have {size} numbers on its last axis, not the shape {list(x.shape)}")


def check_matching(env: Control, state: Tensor, action: Tensor) -> None:
    check_size(state, env.state_size, "state")
    check_size(action, env.action_size, "action")
    if state.shape[:-1] != action.shape[:-1]:
        raise UserError(
            f"states {list(state.shape)} and actions {list(action.shape)} must agree in all axes but the last: "
            "expand one of them"
        )


def goal_for(goal: Tensor | None, state: Tensor) -> Tensor:
    """The goal with the leading axes of ``state``."""
    if goal is None:
        raise UserError("this task needs a goal: draw some with its function goals")
    check_size(goal, 2, "goal")
    try:
        return goal.expand(*state.shape[:-1], 2)
    except RuntimeError:
        raise UserError(f"goals {list(goal.shape)} do not fit states {list(state.shape)}: give one for each") from None
