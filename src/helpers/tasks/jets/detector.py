"""From particles to what a detector shows: cells and oriented pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from helpers.tasks.jets.samples import CHUNK, PARTICLES, check_particles
from helpers.validate import one_of, positive, whole

__all__ = ["Detector", "View", "orient", "picture"]

CORE = 0.12  # radius of the cones that find prongs: a cell of 0.1 and its neighbours, less than W prongs at 800 GeV


@dataclass(frozen=True)
class Detector:
    """What a calorimeter makes of the particles of a jet; the default does nothing.

    In this order: soft particles of other collisions are added, what falls into one cell is summed and sits in its
    middle, cells are dropped, the others' pT is smeared, and those below the threshold are removed. The cells' edges
    lie differently for each jet, as jets are anywhere in a detector.

    Pile-up is an approximation: particles that are evenly spread over the disc of radius 1 around the axis, with
    exponentially distributed pT, laid over jets that have been found and trimmed already. In an experiment they change
    which jets are found, and trimming removes most of them.

    Attributes:
        cell: side of a cell in η and φ; 0 leaves the particles as they are, each of which then counts as a cell.
        threshold: GeV.
        smearing: relative deviation of the measured pT of a cell, log-normal with the true pT as its mean.
        dropped: probability that a cell is dead.
        pileup: mean number of particles that are added (Poisson).
        pileup_pt: their mean pT, GeV.

    Raises:
        UserError: for a number out of its range.
    """

    cell: float = 0.0
    threshold: float = 0.0
    smearing: float = 0.0
    dropped: float = 0.0
    pileup: float = 0.0
    pileup_pt: float = 0.8

    def __post_init__(self) -> None:
        limits = {"cell": 1.0, "threshold": None, "smearing": 2.0, "dropped": 1.0, "pileup": 1000.0, "pileup_pt": None}
        for name, limit in limits.items():
            positive(getattr(self, name), f"{name} of a detector", zero=True, most=limit)

    def __call__(self, particles: Tensor, generator: torch.Generator) -> Tensor:
        """Measure jets.

        Args:
            particles: ``[n, slots, 3]``, pT in GeV, η, φ.
            generator: the only source of randomness, on the device of the particles.

        Returns:
            Cells ``[n, more slots, 3]`` in the same form, in no particular order.

        Raises:
            UserError: for particles that are none, see :func:`~helpers.tasks.jets.samples.check_particles`.
        """
        check_particles(particles)
        n, device = len(particles), particles.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        if self.pileup:
            slots = math.ceil(self.pileup + 5 * math.sqrt(self.pileup))
            number = torch.poisson(torch.full((n, 1), float(self.pileup), device=device), generator=generator)
            there = torch.arange(slots, device=device) < number
            pt = -self.pileup_pt * torch.log1p(-uniform(n, slots)) * there
            radius, angle = uniform(n, slots).sqrt(), 2 * math.pi * uniform(n, slots)
            soft = torch.stack([pt, radius * angle.cos(), radius * angle.sin()], -1)
            particles = torch.cat([particles, soft], 1)
        if self.cell:
            particles = _cells(particles, self.cell, self.cell * uniform(n, 1, 2))
        pt = particles[..., 0]
        if self.dropped:
            pt = pt * (uniform(*pt.shape) >= self.dropped)
        if self.smearing:
            deviation = math.sqrt(math.log1p(self.smearing**2))
            normal = torch.randn(*pt.shape, generator=generator, device=device)
            pt = pt * (deviation * normal - deviation**2 / 2).exp()
        if self.threshold:
            pt = pt * (pt >= self.threshold)
        return torch.cat([pt.unsqueeze(-1), particles[..., 1:]], -1)


def _cells(particles: Tensor, side: float, offset: Tensor) -> Tensor:
    """Sum what falls into the same cell; as many slots as before, sorted by cell.

    Args:
        particles: ``[n, slots, 3]``.
        side: of a cell.
        offset: where an edge lies, ``[n, 1, 2]``.
    """
    pt, position = particles[..., 0], ((particles[..., 1:] + offset) / side).floor()
    number = (position[..., 0] * 65_536 + position[..., 1]).long()
    number = number.masked_fill(pt == 0, torch.iinfo(torch.int64).max)
    number, order = number.sort(dim=1, stable=True)
    segment = _after_zero(number[:, 1:] != number[:, :-1]).cumsum(1)
    total = torch.zeros_like(pt).scatter_add_(1, segment, pt.gather(1, order))
    middle = (position + 0.5) * side - offset
    middle = middle.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    middle = torch.zeros_like(middle).scatter_(1, segment.unsqueeze(-1).expand(-1, -1, 2), middle)
    return torch.cat([total.unsqueeze(-1), middle * (total > 0).unsqueeze(-1)], -1)


def _after_zero(changes: Tensor) -> Tensor:
    """A first column of zeros in front of ``changes``, as whole numbers."""
    return torch.nn.functional.pad(changes.long(), (1, 0))


def _prongs(particles: Tensor, radius: float = CORE) -> tuple[Tensor, Tensor, Tensor]:
    """The middle of the hardest cone around a particle, and of the hardest one around those outside of it.

    Returns:
        ``first`` and ``second``, ``[n, 2]``, and whether there is a second, ``[n]``; where not, both are the same.
    """
    pt, position = particles[..., 0], particles[..., 1:]
    near = (torch.cdist(position, position) < radius).to(pt.dtype)

    def hardest(pt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        around = torch.where(pt > 0, (near @ pt.unsqueeze(-1)).squeeze(-1), 0)
        inside = near.gather(1, around.argmax(1).view(-1, 1, 1).expand(-1, 1, pt.shape[1])).squeeze(1)
        weight = inside * pt
        total = weight.sum(1, keepdim=True)
        return (weight.unsqueeze(1) @ position).squeeze(1) / total.clamp(min=1e-12), inside, total.squeeze(1)

    first, inside, _ = hardest(pt)
    second, _, total = hardest(pt * (1 - inside))
    there = total > 0
    return first, torch.where(there.unsqueeze(-1), second, first), there


def orient(particles: Tensor, rotate: bool = True, flip: bool = True, zoom: float | None = None) -> Tensor:
    """Move the hardest prong to the origin, turn the second one below it, and mirror the heavier side to the right.

    Args:
        particles: ``[n, slots, 3]``.
        rotate: turn the second prong to φ < 0, η = 0. A jet without a second prong is turned by its longest axis.
        flip: mirror η where pT times distance from the axis is larger at η < 0.
        zoom: the mass in GeV of what decayed: angles are multiplied by pT/2m, of the jet's pT as it is here, so that
            two prongs are about 1 apart at any pT. Prongs are looked for after that.

    Returns:
        ``[n, slots, 3]``; pT is unchanged, η and φ are those in the new frame.

    Raises:
        UserError: for a mass that is not positive, or particles that are none, see
            :func:`~helpers.tasks.jets.samples.check_particles`.

    Source: de Oliveira et al. (2016), section 3; zooming as in Barnard et al. (2017), arXiv:1609.00607, with a fixed
    mass.
    """
    check_particles(particles)
    if zoom is not None:
        positive(zoom, "mass in GeV by which angles are zoomed")
    parts = [_orient(part, rotate, flip, zoom) for part in particles.split(CHUNK)]
    return torch.cat(parts) if parts else particles


def _orient(particles: Tensor, rotate: bool, flip: bool, zoom: float | None) -> Tensor:
    pt, position = particles[..., 0], particles[..., 1:]
    if zoom is not None:
        phi = position[..., 1]
        total = torch.hypot((pt * phi.cos()).sum(1), (pt * phi.sin()).sum(1))
        position = position * (total / (2 * zoom)).view(-1, 1, 1)
    first, second, there = _prongs(torch.cat([pt.unsqueeze(-1), position], -1))
    position = position - first.unsqueeze(1)
    if rotate:
        x, y = (second - first).unbind(-1)
        angle = torch.where(there, torch.atan2(y, x), _longest(pt, position))
        turn = -math.pi / 2 - angle  # to straight below
        cos, sin = turn.cos().unsqueeze(1), turn.sin().unsqueeze(1)
        x, y = position.unbind(-1)
        position = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
    if flip:
        x = position[..., 0]
        # Times distance, because the prongs lie on the axis but for rounding, which may be on either side.
        side = torch.where((pt * x).sum(1) < 0, -1.0, 1.0)
        position = torch.stack([x * side.unsqueeze(1), position[..., 1]], -1)
    return torch.cat([pt.unsqueeze(-1), position * (pt > 0).unsqueeze(-1)], -1)


def _longest(pt: Tensor, position: Tensor) -> Tensor:
    """The direction in which a jet is longest, on the side with more pT times distance; an angle ``[n]``."""
    x, y = position.unbind(-1)
    angle = torch.atan2((2 * pt * x * y).sum(1), (pt * (x**2 - y**2)).sum(1)) / 2
    along = (pt * (x * angle.cos().unsqueeze(1) + y * angle.sin().unsqueeze(1))).sum(1)
    return torch.where(along < 0, angle + math.pi, angle)


def picture(particles: Tensor, size: int = 25, half_width: float = 1.25) -> Tensor:
    """Images of jets: the share of the jet's pT in each pixel.

    The pT of a particle is split among the four pixels around it in proportion to closeness, so nothing is lost inside
    the image, and a turned picture does not flicker between pixels.

    Args:
        particles: ``[n, slots, 3]``, such as ``orient`` returns.
        size: pixels of a side.
        half_width: where the image ends, in η and φ.

    Returns:
        ``[n, size, size]``: rows from high φ to low, columns from low η to high. Sums are 1, less what lies outside.

    Raises:
        UserError: for a size or a width that is not positive, or particles that are none, see
            :func:`~helpers.tasks.jets.samples.check_particles`.
    """
    check_particles(particles)
    whole(size, "number of pixels of a side")
    positive(half_width, "half width of an image")
    pt = particles[..., 0]
    share = pt / pt.sum(1, keepdim=True).clamp(min=1e-12)
    step = 2 * half_width / size
    column = (particles[..., 1] + half_width) / step - 0.5
    row = (half_width - particles[..., 2]) / step - 0.5
    image = torch.zeros(len(pt), size * size, dtype=pt.dtype, device=pt.device)
    left, top = column.floor(), row.floor()
    for down, right in product((0, 1), (0, 1)):
        i, j = top + down, left + right
        weight = (1 - (row - i).abs()) * (1 - (column - j).abs())
        inside = (i >= 0) & (i < size) & (j >= 0) & (j < size)
        place = torch.where(inside, i * size + j, 0).long()
        image.scatter_add_(1, place, share * weight * inside)
    return image.view(-1, size, size)


@dataclass(frozen=True)
class View:
    """What a tagger sees of measured jets.

    Attributes:
        kind: ``"image"``, 25×25 pixels with shares of the jet's pT, or ``"particles"``, the 40 hardest cells: share of
            pT, η and φ, the hardest first, zeros where there are fewer.
        rotate: as in :func:`orient`.
        flip: as in :func:`orient`.
        zoom: as in :func:`orient`.

    Raises:
        UserError: for an unknown kind or a mass that is not positive.
    """

    kind: str = "image"
    rotate: bool = True
    flip: bool = True
    zoom: float | None = None

    def __post_init__(self) -> None:
        one_of(self.kind, "view of jets", ("image", "particles"))
        if self.zoom is not None:
            positive(self.zoom, "mass in GeV by which angles are zoomed")

    def __call__(self, particles: Tensor) -> Tensor:
        """Inputs of a tagger, ``[n, 1, 25, 25]`` or ``[n, 40, 3]``, of ``particles`` ``[n, slots, 3]``."""
        turned = orient(particles, self.rotate, self.flip, self.zoom)
        if self.kind == "image":
            return picture(turned).unsqueeze(1)
        pt = turned[..., 0] / turned[..., 0].sum(1, keepdim=True).clamp(min=1e-12)
        turned = torch.cat([pt.unsqueeze(-1), turned[..., 1:]], -1)
        order = pt.argsort(dim=1, descending=True, stable=True)[:, :PARTICLES]
        return turned.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
