"""Losses, as functions ``loss(outputs, y) -> scalar`` of one task's predictions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def mean_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean of the squared errors; ``outputs`` and ``y`` ``[n, d]``."""
    return (outputs - y).square().mean()


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``outputs`` ``[n, ways]`` against labels ``y`` ``[n]``.

    The official MAML code differentiates the *sum* over the N classes instead: its inner rate acts N times as strongly.
    """
    return functional.cross_entropy(outputs, y)


def accuracy(outputs: Tensor, y: Tensor) -> Tensor:
    """Share of the examples whose largest logit is the label's; a fraction in ``[0, 1]``."""
    return (outputs.argmax(-1) == y).to(outputs.dtype).mean()
