"""Scores of jets without a network, from mass and τ₂₁."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.tasks.jets.substructure import Observables


def mass_window(seen: Observables, low: float, high: float) -> Tensor:
    """Inside the mass window the smaller τ₂₁ the better; outside all are worse, the farther the worse.

    Args:
        seen: mass and τ₂₁ of n jets.
        low, high: edges of the window, GeV.

    Returns:
        ``[n]``.
    """
    outside = (low - seen.mass).clamp(min=0) + (seen.mass - high).clamp(min=0)
    return torch.where(outside > 0, -outside, 1 - seen.tau21)


def cells(seen: Observables, bins: int) -> Tensor:
    """Number of the cell in mass, from 0 to 160 GeV, and τ₂₁, of so many bins each, ``[n]``."""
    mass, shape = ((value * bins).long().clamp(0, bins - 1) for value in (seen.mass / 160, seen.tau21))
    return mass * bins + shape
