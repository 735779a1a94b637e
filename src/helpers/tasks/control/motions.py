"""Motions of a two-link arm to learn its mass matrix from, what a learned loss sees of them, and two errors.

Outputs and targets are those of :class:`~helpers.models.physics.InertiaNetwork`: two torques, and M11, M12, M22.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from helpers.losses import input_prediction_and_target, mean_squared_error
from helpers.models.physics import InertiaNetwork
from helpers.tasks.control.reacher import Reacher
from helpers.types import Examples
from helpers.validate import same_shape


def motions(
    arm: Reacher,
    model: InertiaNetwork,
    count: int,
    generator: torch.Generator,
    points: int = 64,
    seconds: float = 4.0,
    waves: int = 3,
) -> Examples:
    """Smooth random motions: ``x`` ``[count, points, 4]``, ``y`` ``[count, points, 5]``, in the network's units.

    Args:
        seconds: that a motion lasts.
        waves: of a joint's motion: sines up to so many periods.
    """
    device = generator.device
    draw = torch.rand(count, 1, 2, waves, 2, generator=generator, device=device)
    number = torch.arange(1, waves + 1, device=device)
    at = torch.linspace(0, seconds, points, device=device)
    frequency = 2 * math.pi * number / seconds
    angle = frequency * at[:, None, None] + 2 * math.pi * draw[..., 0]
    size = draw[..., 1] / number
    middle = math.pi * (2 * torch.rand(count, 1, 2, generator=generator, device=device) - 1)
    q = middle + (size * angle.sin()).sum(-1)
    acceleration = -(size * frequency**2 * angle.sin()).sum(-1) / model.acceleration
    m = arm.mass_matrix(torch.cat([q, torch.zeros_like(q)], -1)) / model.inertia
    entries = torch.stack([m[..., 0, 0], m[..., 0, 1], m[..., 1, 1]], -1)
    y = torch.cat([model.torque(entries, acceleration), entries], -1)
    return Examples(torch.cat([q, acceleration], -1), y)


def seen_of_dynamics(x: Tensor, outputs: Tensor, y: Tensor) -> Tensor:
    """(q, q̈, predicted torque, measured torque), without the mass matrix."""
    return input_prediction_and_target(x, outputs[:, :2], y[:, :2])


def torque_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of the torques."""
    return mean_squared_error(outputs[:, :2], y[:, :2])


def inertia_error(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of the mass matrix, all four entries: the extra information."""
    same_shape(outputs, y, "outputs and targets")
    first, cross, last = (outputs[:, 2:] - y[:, 2:]).square().mean(0)
    return (first + 2 * cross + last) / 4
