"""What physicists cut on: transverse momentum, mass and N-subjettiness of jets."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.tasks.jets.samples import CHUNK, check_particles

__all__ = ["Observables", "momentum", "observables"]


class Observables(NamedTuple):
    """What physicists cut on, of measured jets; each float32 ``[n]``.

    Attributes:
        pt: GeV.
        mass: of massless cells, GeV.
        tau21: τ₂/τ₁ with axes that start at exclusive kT jets and descend; 0 where τ₁ is.
    """

    pt: Tensor
    mass: Tensor
    tau21: Tensor


def momentum(particles: Tensor) -> tuple[Tensor, Tensor]:
    """Transverse momentum and mass of jets of massless particles, GeV, each ``[n]``.

    Args:
        particles: ``[n, slots, 3]``.

    Raises:
        UserError: for particles that are none, see :func:`~helpers.tasks.jets.samples.check_particles`.
    """
    check_particles(particles)
    # In double precision, as the mass is a small difference of large numbers.
    pt, eta, phi = particles.double().unbind(-1)
    energy, x, y, z = torch.stack([pt * eta.cosh(), pt * phi.cos(), pt * phi.sin(), pt * eta.sinh()]).sum(-1)
    mass = (energy**2 - x**2 - y**2 - z**2).clamp(min=0).sqrt()
    return torch.hypot(x, y).to(particles.dtype), mass.to(particles.dtype)


def observables(particles: Tensor) -> Observables:
    """Transverse momentum, mass and τ₂₁ of jets as they are now, for example after the detector.

    τ₂₁ agrees with FastJet's for the same cells (``OnePass_WTA_KT_Axes``, β = 1). Of 200 test jets of each process and
    window, seen by the detector that stands for data, the mean absolute difference is 0.002, and at most 0.005 for any
    process and window; 1 jet in 100 differs by more than 0.05, and 1 in 400 by more than 0.1. It is not that of
    ``Measured``, which was computed before the detector and with all particles.

    Args:
        particles: ``[n, slots, 3]``.

    Example:
        >>> import torch
        >>> three = torch.tensor([[[200.0, 0.0, 0.2], [100.0, 0.1, -0.3], [50.0, 0.1, -0.2]]])
        >>> print(f"{observables(three).tau21.item():.2f}")
        0.07

    Raises:
        UserError: for particles that are none, see :func:`~helpers.tasks.jets.samples.check_particles`.

    Source: Thaler and Van Tilburg (2011), arXiv:1011.2268, equation 2.1, β = 1.
    """
    check_particles(particles)
    parts = [_observables(part) for part in particles.split(CHUNK)]
    return Observables(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _observables(particles: Tensor) -> Observables:
    particles = _hardest_first(particles)
    axes = _kt_axes(particles)
    one, two = _subjettiness(particles, axes[:, :1]), _subjettiness(particles, axes)
    there = one > 1e-6 * particles[..., 0].sum(1)  # a single cell has τ₁ = 0, but for rounding
    tau21 = torch.where(there, (two / one.clamp(min=1e-12)).clamp(max=1), 0.0)
    return Observables(*momentum(particles), tau21)


def _hardest_first(particles: Tensor) -> Tensor:
    """The particles by falling pT, without the slots that are empty in all jets; at least one slot is left."""
    pt, order = particles[..., 0].sort(dim=1, descending=True, stable=True)
    used = max(1, int((pt > 0).any(0).sum()))
    return particles.gather(1, order[:, :used].unsqueeze(-1).expand(-1, -1, 3))


def _kt_axes(particles: Tensor) -> Tensor:
    """The directions of the two exclusive kT jets in each jet, recombined by "the winner takes all".

    That is, the pair with the least min(pT) · distance is merged, and keeps the direction of the harder one, until two
    are left. So directions never change, and distances are computed once.

    Args:
        particles: ``[n, slots, 3]``.

    Returns:
        ``[n, 2, 2]``, the harder first, which is also the axis of a single kT jet; ``[n, 1, 2]`` for one slot. Where
        there is one particle, the second is the place of an empty slot.
    """
    pt, position = particles[..., 0].clone(), particles[..., 1:]
    distance = _distances(position, position)
    distance.diagonal(dim1=1, dim2=2).fill_(math.inf)
    # The pair to merge is a particle and its nearest neighbour, hence only those are kept up to date.
    near, neighbour = torch.where(pt.unsqueeze(1) > 0, distance, math.inf).min(-1)
    for _ in range(pt.shape[1] - 2):
        jet = ((pt > 0).sum(1) > 2).nonzero()[:, 0]
        soft = torch.where(pt[jet] > 0, pt[jet] * near[jet], math.inf).argmin(1)
        pt[jet, neighbour[jet, soft]] += pt[jet, soft]
        pt[jet, soft] = 0
        row, orphan = (neighbour[jet] == soft.unsqueeze(1)).nonzero().unbind(1)
        jet = jet[row]
        left = torch.where(pt[jet] > 0, distance[jet, orphan], math.inf)
        near[jet, orphan], neighbour[jet, orphan] = left.min(-1)
    hardest = pt.argsort(dim=1, descending=True, stable=True)[:, :2]
    return position.gather(1, hardest.unsqueeze(-1).expand(-1, -1, 2))


def _subjettiness(particles: Tensor, axes: Tensor, steps: int = 16) -> Tensor:
    """Σ pT · distance to the nearest axis, after some steps towards the best axes (Weiszfeld's algorithm).

    Args:
        particles: ``[n, slots, 3]``.
        axes: where to start, ``[n, axes, 2]``.
        steps: FastJet goes on until no axis moves by more than 0.0001; 16 agree with it better than 8 or 40 do.
    """
    pt, position = particles[..., 0], particles[..., 1:]
    for _ in range(steps):
        distance = _distances(position, axes)  # [n, slots, axes]
        nearest = torch.nn.functional.one_hot(distance.argmin(-1), axes.shape[1])
        weight = nearest * pt.unsqueeze(-1) / torch.hypot(distance, distance.new_tensor(1e-4))
        total = weight.sum(1).unsqueeze(-1)
        axes = torch.where(total > 0, weight.transpose(1, 2) @ position / total.clamp(min=1e-12), axes)
    return (pt * _distances(position, axes).min(-1).values).sum(-1)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Between all places of each jet; exact, where a product of matrices is off by 0.0003 near 0."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
