"""Scores of jets without a network, from mass and τ₂₁."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import runtime
from helpers.tasks.jets.protocol import TEST_SEED, training_domains
from helpers.tasks.jets.samples import JetSamples
from helpers.tasks.jets.substructure import Observables, observables
from helpers.tasks.jets.tasks import Domain


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


def seen(samples: JetSamples, domain: Domain, process: str, split: str) -> Observables:
    """Mass and τ₂₁ of the jets of a process as the domain's detector measures them, the same on every call."""
    rows = samples.select(process, domain.shower, split, domain.window)
    generator = runtime.generator(TEST_SEED + 2, samples.codes.device)
    return observables(domain.detector(samples.particles(rows), generator))


def likelihood_ratio(samples: JetSamples, bins: int) -> Tensor:
    """The logarithm of signal over background in every cell, over the domains of training: ``[bins²]``."""
    counts = torch.ones(2, bins**2, dtype=torch.float64, device=samples.codes.device)
    for domain in training_domains():
        for row, process in enumerate(("QCD", domain.signal)):
            counts[row] += cells(seen(samples, domain, process, "train"), bins).bincount(minlength=bins**2)
    background, signal = counts.log()
    return signal - background
