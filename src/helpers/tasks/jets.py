"""Jets of one or more prongs, across phase space: the file of simulated jets, a detector, images, and tasks.

``data/jets.npz`` holds what :mod:`helpers.tasks.jet_simulation` made: trimmed jets of five processes in five windows of
transverse momentum, with several showers, in three splits whose generators had different seeds. Reading it needs
neither Pythia nor FastJet. Detector and images come after: functions of ``particles``, a float tensor ``[n, slots, 3]``
whose rows are pT (GeV), η and φ relative to the jet's axis; slots without a particle have pT 0.

Inside a window the shape of the pT spectrum is chosen, not predicted: flat in steps of a fifth, the same for signal and
background.
"""

from __future__ import annotations

import io
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.runtime import UserError, root
from helpers.runtime import generator as seeded
from helpers.tasks import Examples, Tasks
from helpers.tasks.episodes import check_draw
from helpers.tasks.images import sha256
from helpers.validate import one_of, positive, whole

__all__ = [
    "PROCESSES", "SHOWERS", "SPLITS", "WINDOWS", "Detector", "Domain", "JetSamples", "JetTasks", "Observables", "View",
    "domains", "load", "observables", "orient", "picture", "window_name",
]  # fmt: skip

PROCESSES = ("W", "WT", "Z", "top", "QCD")  # W: longitudinal, from W' → WZ; WT: transverse, of the continuum
SHOWERS = ("fsr-half", "fsr-one", "fsr-two", "monash", "vincia")  # scales of α_s; the tune to data with MPI; another
SPLITS = ("train", "validation", "test")
WINDOWS = (250, 300, 400, 500, 600, 800)  # edges, GeV
FIFTHS = 5  # parts of a window that have equally many jets
PARTICLES = 40  # of a jet, the hardest ones
W_MASS = 80.4  # GeV

FORMAT = 1
MEASURED = ("pt", "rapidity", "mass", "tau21", "tau32")
STEPS = {"pt": 0.02, "rapidity": 1e-3, "mass": 0.01, "tau21": 1e-4, "tau32": 1e-4}  # of the whole numbers in the file
SOFTEST, RATIO, ANGLE = 0.1, math.exp(0.0375), 0.01  # GeV; between neighbouring codes of pT; between those of angles
CHUNK = 2000  # jets seen at a time, since distances between all particles of each are needed
CORE = 0.12  # radius of the cones that find prongs: a cell of 0.1 and its neighbours, less than W prongs at 800 GeV


# ---------------------------------------- the file


class Measured(NamedTuple):
    """What was measured of the trimmed jets when they were simulated, with all their particles; each ``[n]``, float32.

    Attributes:
        pt: transverse momentum, GeV.
        rapidity: of the jet's axis.
        mass: GeV.
        tau21: τ₂/τ₁, in [0, 1].
        tau32: τ₃/τ₂, in [0, 1].
    """

    pt: Tensor
    rapidity: Tensor
    mass: Tensor
    tau21: Tensor
    tau32: Tensor


@dataclass(frozen=True, eq=False)
class JetSamples:
    """Simulated jets, n of them, sample by sample.

    Attributes:
        codes: pT of the particles, as the file has them: uint8 ``[n, 40]``, 0 where there is none.
        angles: η and φ relative to the axis, in hundredths: int8 ``[n, 40, 2]``.
        measured: what was measured of each jet.
        process: position in ``PROCESSES``, uint8 ``[n]``.
        shower: position in ``SHOWERS``, uint8 ``[n]``.
        split: position in ``SPLITS``, uint8 ``[n]``.
        window: position of the lower edge in ``WINDOWS``, uint8 ``[n]``.
        header: settings and versions of the simulation, and of each sample seeds and counts; with ``"sha256"``.
    """

    codes: Tensor
    angles: Tensor
    measured: Measured
    process: Tensor
    shower: Tensor
    split: Tensor
    window: Tensor
    header: dict[str, Any]

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a record says about its data."""
        return {"data": "jets", "sha256": self.header["sha256"]}

    def to(self, device: torch.device | str) -> JetSamples:
        """The same jets on ``device``."""
        return self._map(lambda values: values.to(device))

    def select(
        self,
        process: str | None = None,
        shower: str | None = None,
        split: str | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Positions of the jets of a process, a shower, a split and a window, in the order of the file.

        Args:
            process: one of ``PROCESSES``; any unless given.
            shower: one of ``SHOWERS``; any unless given.
            split: one of ``SPLITS``; any unless given.
            window: 0 … 4, of ``WINDOWS``; any unless given.

        Returns:
            int64 ``[m]``, empty where the file has none.

        Raises:
            UserError: for an unknown name or window.
        """
        mask = torch.ones(len(self), dtype=torch.bool, device=self.codes.device)
        for have, value, known in (
            (self.process, process, PROCESSES), (self.shower, shower, SHOWERS), (self.split, split, SPLITS),
        ):  # fmt: skip
            if value is not None:
                mask &= have == known.index(one_of(value, "process, shower or split of jets", known))
        if window is not None:
            window_name(window)
            mask &= self.window == window
        return mask.nonzero()[:, 0]

    def __getitem__(self, rows: Tensor) -> JetSamples:
        """These jets, in this order."""
        return self._map(lambda values: values[rows])

    def particles(self, rows: Tensor | None = None) -> Tensor:
        """The hardest particles of these jets, or of all: float32 ``[m, 40, 3]``, pT in GeV, η, φ; hardest first.

        The file has pT to 2 % and angles to 0.005.
        """
        codes, angles = (self.codes, self.angles) if rows is None else (self.codes[rows], self.angles[rows])
        exponent = (codes.float() - 1) * math.log(RATIO)
        pt = torch.where(codes > 0, SOFTEST * exponent.exp(), 0.0)
        return torch.cat([pt.unsqueeze(-1), angles.float() * ANGLE], -1)

    def counts(self) -> dict[tuple[str, str, str], list[int]]:
        """Jets in each window, for each (process, shower, split) that there is, in the order of the file."""
        key = (self.process.long() * len(SHOWERS) + self.shower.long()) * len(SPLITS) + self.split.long()
        key = key.cpu().numpy()
        _, first = np.unique(key, return_index=True)
        window, found = self.window.cpu().numpy(), {}
        for row in np.sort(first).tolist():
            names = PROCESSES[self.process[row]], SHOWERS[self.shower[row]], SPLITS[self.split[row]]
            found[names] = np.bincount(window[key == key[row]], minlength=len(WINDOWS) - 1).tolist()
        return found

    def _map(self, change) -> JetSamples:
        return JetSamples(
            change(self.codes), change(self.angles), Measured(*map(change, self.measured)), change(self.process),
            change(self.shower), change(self.split), change(self.window), self.header,
        )  # fmt: skip


def window_name(window: int) -> str:
    """The name of a window, such as ``"250–300 GeV"``.

    Raises:
        UserError: if it is not 0 … 4.
    """
    whole(window, "number of a window of pT", 0, len(WINDOWS) - 2)
    return f"{WINDOWS[window]}–{WINDOWS[window + 1]} GeV"


def fifth_of(pt: np.ndarray) -> np.ndarray:
    """Which fifth of which window: 5 · window + fifth, of pT within the windows."""
    return np.searchsorted(_edges(), pt, side="right") - 1


def fifth_name(fifth: int) -> str:
    """The name of a fifth, 5 · window + fifth, such as ``"250–260 GeV"``.

    Raises:
        UserError: if there is none of that number.
    """
    whole(fifth, "number of a fifth", 0, len(_edges()) - 2)
    low, high = _edges()[fifth : fifth + 2]
    return f"{low:g}–{high:g} GeV"


def _edges() -> np.ndarray:
    pairs = zip(WINDOWS, WINDOWS[1:], strict=False)
    return np.concatenate([*(np.linspace(low, high, FIFTHS + 1)[:-1] for low, high in pairs), WINDOWS[-1:]])


def home() -> Path:
    """Where the shipped file is."""
    return root() / "data" / "jets.npz"


def load(path: Path | str | None = None) -> JetSamples:
    """Read a file of jets and verify it.

    Args:
        path: the file; ``data/jets.npz`` unless given.

    Returns:
        All its jets; see :class:`JetSamples`.

    Raises:
        UserError: when the file is not there, cannot be read, is damaged, or is of another format.

    Source: simulated with Pythia 8.3 (Bierlich et al., 2022), clustered with FastJet (Cacciari et al., 2012).
    """
    place = Path(path) if path is not None else home()
    remedy = "restore it from the repository or make it again with `metabook data jets --jets 1600`"
    if not place.is_file():
        raise UserError(f"the file of jets {place} is missing: {remedy}")
    try:
        with np.load(place, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        header = json.loads(str(arrays.pop("header")))
        sound = header.pop("sha256") == _digest(arrays, header)
    except OSError as error:
        raise UserError(f"the file of jets {place} cannot be read ({error.strerror or error}): {remedy}") from error
    except (
        ValueError,
        KeyError,
        EOFError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise UserError(f"the file of jets {place} is damaged: {remedy}") from error
    if not sound:
        raise UserError(f"the file of jets {place} is damaged (its digest differs): {remedy}")
    if header["format"] != FORMAT:
        raise UserError(f"the file of jets {place} has format {header['format']}, not {FORMAT}: {remedy}")
    return _unpack(arrays, header | {"sha256": _digest(arrays, header)})


def pack(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> bytes:
    """The content of a file.

    Args:
        arrays: ``particles`` ``[n, 40, 3]`` (GeV, hardest first), ``pt``, ``rapidity``, ``mass``, ``tau21``, ``tau32``,
            ``process``, ``shower``, ``split``, each ``[n]``.
        header: what to say about them, for JSON.
    """
    codes, angles = quantise(arrays["particles"])
    # Neighbouring particles are alike, and so are the same particles of neighbouring jets: that compresses better.
    stored = {"codes": np.ascontiguousarray(_differences(codes).T), "angles": np.ascontiguousarray(angles.T)}
    for name in MEASURED:
        kind = np.int16 if name == "rapidity" else np.uint16
        limits = np.iinfo(kind)
        stored[name] = np.rint(arrays[name] / STEPS[name]).clip(limits.min, limits.max).astype(kind)
    for name in ("process", "shower", "split"):
        stored[name] = np.asarray(arrays[name], np.uint8)
    # Before rounding: a jet of 299.999 GeV belongs to the window below 300 GeV.
    stored["window"] = (fifth_of(arrays["pt"]) // FIFTHS).astype(np.uint8)
    header = json.loads(json.dumps({"format": FORMAT, "jets": len(codes)} | header))  # tuples become lists, as in files
    header["sha256"] = _digest(stored, header)
    return archive({"header": np.array(json.dumps(header))} | stored)


def archive(arrays: dict[str, np.ndarray]) -> bytes:
    """What ``numpy.savez_compressed`` writes, packed by LZMA, a tenth smaller: ``numpy.load`` reads it all the same.

    The last axis, that of the jets, varies slowest in the file: what belongs to one jet stands together.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as members:
        for name, array in arrays.items():
            with members.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array.copy(order="F"), allow_pickle=False)
    return file.getvalue()


def _unpack(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> JetSamples:
    differences = arrays["codes"].T
    codes = np.where(differences == NOTHING, 0, -np.cumsum(differences.astype(np.int64), 1) + 2 * differences[:, :1])
    measured = Measured(*(torch.from_numpy((arrays[name] * STEPS[name]).astype(np.float32)) for name in MEASURED))
    labels = (torch.from_numpy(arrays[name]) for name in ("process", "shower", "split", "window"))
    angles = torch.from_numpy(np.ascontiguousarray(arrays["angles"].T))
    return JetSamples(torch.from_numpy(codes.astype(np.uint8)), angles, measured, *labels, header)


NOTHING = 255  # in place of a difference, where there is no particle


def _differences(codes: np.ndarray) -> np.ndarray:
    """The hardest particle's code, and how much lower each other one's is than that before it."""
    fall = np.diff(codes.astype(np.int64), axis=1, prepend=0)
    fall[:, 1:] *= -1
    return np.where(codes > 0, fall, NOTHING).astype(np.uint8)


def quantise(particles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of pT and angles in hundredths, of particles ``[n, 40, 3]``: uint8 ``[n, 40]`` and int8 ``[n, 40, 2]``.

    pT is rounded in equal ratios, to 2 %, above 0.1 GeV; what is softer counts as 0.1 GeV.
    """
    pt = particles[..., 0]
    codes = 1 + np.rint(np.log(np.maximum(pt, SOFTEST) / SOFTEST) / math.log(RATIO))
    codes = np.where(pt > 0, codes.clip(1, NOTHING - 1), 0).astype(np.uint8)
    angles = np.rint(particles[..., 1:] / ANGLE).clip(-127, 127) * (pt > 0)[..., None]
    return codes, angles.astype(np.int8)


def _digest(arrays: dict[str, np.ndarray], header: dict[str, Any]) -> str:
    described = [f"{name}:{arrays[name].dtype}:{arrays[name].shape}" for name in sorted(arrays)]
    return sha256(json.dumps(header, sort_keys=True), *described, *(arrays[name] for name in sorted(arrays)))


# ---------------------------------------- the detector


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
            UserError: for particles that are none, see :func:`check_particles`.
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


# ---------------------------------------- what can be seen of a jet


class Observables(NamedTuple):
    """What physicists cut on, of measured jets; each float32 ``[n]``.

    Attributes:
        pt: GeV.
        mass: of massless cells, GeV.
        tau21: τ₂/τ₁ with axes that start at the hardest cones and descend; 0 where τ₁ is.
    """

    pt: Tensor
    mass: Tensor
    tau21: Tensor


def check_particles(particles: Tensor) -> None:
    """Refuse what is no ``[n, slots, 3]`` of finite numbers with pT at least 0.

    Raises:
        UserError: then.
    """
    if particles.dim() != 3 or particles.shape[-1] != 3 or not particles.is_floating_point():
        raise UserError(f"particles are floats [n, slots, 3], not {particles.dtype} of shape {list(particles.shape)}")
    if not (particles.isfinite().all() and (particles[..., 0] >= 0).all()):
        raise UserError("particles must have a finite pT of at least 0, and finite η and φ: leave out the others")


def observables(particles: Tensor) -> Observables:
    """Transverse momentum, mass and τ₂₁ of jets as they are now, for example after the detector.

    τ₂₁ is close to, not the same as, that of ``Measured``, for which FastJet looked for the axes.

    Args:
        particles: ``[n, slots, 3]``.

    Raises:
        UserError: for particles that are none, see :func:`check_particles`.

    Source: Thaler and Van Tilburg (2011), arXiv:1011.2268, equation 2.1, β = 1.
    """
    check_particles(particles)
    parts = [_observables(part) for part in particles.split(CHUNK)]
    return Observables(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _observables(particles: Tensor) -> Observables:
    pt, eta, phi = particles.unbind(-1)
    # In double precision, as the mass is a small difference of large numbers.
    wide, eta, phi = pt.double(), eta.double(), phi.double()
    terms = torch.stack([wide * eta.cosh(), wide * phi.cos(), wide * phi.sin(), wide * eta.sinh()]).sum(-1)
    energy, x, y, z = terms
    mass = (energy**2 - x**2 - y**2 - z**2).clamp(min=0).sqrt()
    first, second, _ = _prongs(particles)
    one, two = (_subjettiness(particles, axes) for axes in (first.unsqueeze(1), torch.stack([first, second], 1)))
    tau21 = torch.where(one > 0, (two / one.clamp(min=1e-12)).clamp(max=1), 0.0)
    return Observables((x**2 + y**2).sqrt().to(pt.dtype), mass.to(pt.dtype), tau21)


def _subjettiness(particles: Tensor, axes: Tensor, steps: int = 8) -> Tensor:
    """Σ pT · distance to the nearest axis, after some steps towards the best axes (Weiszfeld's algorithm).

    Args:
        particles: ``[n, slots, 3]``.
        axes: where to start, ``[n, axes, 2]``.
    """
    pt, position = particles[..., 0], particles[..., 1:]
    for _ in range(steps):
        distance = torch.cdist(position, axes)  # [n, slots, axes]
        nearest = torch.nn.functional.one_hot(distance.argmin(-1), axes.shape[1])
        weight = nearest * pt.unsqueeze(-1) / distance.clamp(min=1e-3)
        total = weight.sum(1).unsqueeze(-1)
        axes = torch.where(total > 0, weight.transpose(1, 2) @ position / total.clamp(min=1e-12), axes)
    return (pt * torch.cdist(position, axes).min(-1).values).sum(-1)


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
        UserError: for a mass that is not positive, or particles that are none, see :func:`check_particles`.

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
        UserError: for a size or a width that is not positive, or particles that are none, see :func:`check_particles`.
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


# ---------------------------------------- tasks


class Domain(NamedTuple):
    """Where in phase space, of what and with what a task is about.

    Attributes:
        signal: the process to find among QCD jets.
        window: 0 … 4, of ``WINDOWS``.
        shower: one of ``SHOWERS``.
        detector: what measures the jets.
    """

    signal: str
    window: int
    shower: str
    detector: Detector


def domains(
    signals: Iterable[str], windows: Iterable[int], showers: Iterable[str], detectors: Iterable[Detector]
) -> tuple[Domain, ...]:
    """All combinations, the last varying fastest."""
    return tuple(Domain(*values) for values in product(signals, windows, showers, detectors))


@dataclass(frozen=True, eq=False)
class JetTasks:
    """Tell jets of a signal from QCD jets: label 1 is the signal.

    Every task draws its domain, and different jets of it; support and query set share none, and in each both classes
    are equally frequent. Jets of another split come from generators with other seeds, so tasks for meta-training,
    validation and test have none in common.

    A domain's jets are measured once, by a generator whose seed is ``seed`` and the domain's position, when a task is
    first drawn from it; then they are kept (half precision, 1.2 MB for 1,000 images). As in an experiment, a jet that
    is drawn twice looks the same twice.

    Args:
        samples: the jets.
        domains: what tasks are drawn from, all equally often.
        split: one of ``SPLITS``.
        shots: support examples of each class, K.
        queries: query examples of each class.
        view: what the tagger sees.
        seed: of the detectors.

    Raises:
        UserError: for an unknown name, a number that is not positive, no domain, or one with too few jets.
    """

    samples: JetSamples
    domains: Sequence[Domain]
    split: str
    shots: int
    queries: int
    view: View = View()
    seed: int = 0
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.domains:
            raise UserError("tasks of jets need at least one domain to draw from")
        for name in ("shots", "queries"):
            whole(getattr(self, name), f"{name} of a class")
        for at in range(len(self.domains)):
            self._enough(at, self.shots + self.queries)

    def available(self, domain: int) -> int:
        """Jets of each class in a domain, of which signal and QCD have equally many in use."""
        return min(len(rows) for rows in self._rows(domain))

    def inputs(self, domain: int) -> Tensor:
        """All measured jets of a domain, QCD first: float16 ``[2, n, 1, 25, 25]``, or ``[2, n, 40, 3]`` of particles.

        Args:
            domain: position in ``domains``.
        """
        if domain not in self._seen:
            rows, n = self._rows(domain), self.available(domain)
            draws = seeded(self.seed * 1_000_003 + domain, self.samples.codes.device)
            detector = self.domains[domain].detector
            parts = []
            for chunk in torch.cat([one[:n] for one in rows]).split(CHUNK):
                parts.append(self.view(detector(self.samples.particles(chunk), draws)).half())
            self._seen[domain] = torch.cat(parts).unflatten(0, (2, n))
        return self._seen[domain]

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` tasks.

        Args:
            n_tasks: how many tasks, T.
            generator: the only source of randomness; it must live on the device of the jets.

        Returns:
            ``Tasks`` with, for the support set (and alike for the query set with ``queries`` in place of ``shots``),
            ``x``: float32 ``[T, 2 * shots, 1, 25, 25]``, or ``[T, 2 * shots, 40, 3]`` for a view of particles;
            ``y``: int64 ``[T, 2 * shots]``, first all 0, QCD, then all 1.

        Raises:
            UserError: when ``n_tasks`` is not positive or the generator lives on another device.
        """
        return self.of(self._choose(n_tasks, generator), generator)

    def of(self, chosen: Sequence[int], generator: torch.Generator, shots: int | None = None) -> Tasks:
        """As :meth:`sample`, of given domains: one task for each position in ``domains``, with ``shots`` if given."""
        support, query = [], []
        shots = self.shots if shots is None else shots
        whole(shots, "shots of a class")
        for at in chosen:
            if shots > self.shots:
                self._enough(at, shots + self.queries)
            pool = self.inputs(at)
            rows = torch.stack([self._different(pool, shots + self.queries, generator) for _ in (0, 1)])
            x = torch.stack([pool[label, rows[label]] for label in (0, 1)])
            support.append(x[:, :shots].flatten(0, 1))
            query.append(x[:, shots:].flatten(0, 1))
        return Tasks(_labelled(support, shots), _labelled(query, self.queries))

    def bags(
        self, n_tasks: int, size: int, generator: torch.Generator, proportions: Sequence[float] = (0.2, 0.8)
    ) -> Tasks:
        """Draw tasks whose support set is unlabelled: bags of jets, of which only the share of signal is known.

        Args:
            n_tasks: how many tasks, T.
            size: jets in a bag.
            generator: the only source of randomness, on the device of the jets.
            proportions: the share of signal in each of the B bags, rounded to whole jets. With equal shares a constant
                output fits them all.

        Returns:
            ``Tasks`` with the query set of :meth:`sample`, and a support set of ``x``: float32
            ``[T, B * size, 1, 25, 25]`` (or ``[T, B * size, 40, 3]``), bag after bag, so that
            ``x.unflatten(1, (B, size))`` separates them, in random order within; ``y``: float32 ``[T, B * size]``, of
            each jet the share of signal in its bag. No jet is in two bags, or in a bag and the query set.

        Raises:
            UserError: for an impossible number or share, or too few jets.

        Source: Dery et al. (2017), arXiv:1702.00414 (label proportions); Metodiev et al. (2017), arXiv:1708.02949.
        """
        return self.bags_of(self._choose(n_tasks, generator), size, generator, proportions)

    def bags_of(
        self, chosen: Sequence[int], size: int, generator: torch.Generator, proportions: Sequence[float] = (0.2, 0.8)
    ) -> Tasks:
        """As :meth:`bags`, of given domains: one task for each position in ``domains``."""
        whole(size, "size of a bag")
        if not proportions or not all(0 <= share <= 1 for share in proportions):
            raise UserError(f"shares of signal must be between 0 and 1, not {tuple(proportions)}")
        signal = [round(share * size) for share in proportions]
        needed = [sum(size - count for count in signal), sum(signal)]
        support, query = [], []
        for at in chosen:
            self._enough(at, max(needed) + self.queries)
            pool = self.inputs(at)
            rows = [self._different(pool, needed[label] + self.queries, generator) for label in (0, 1)]
            query.append(torch.cat([pool[label, rows[label][: self.queries]] for label in (0, 1)]))
            start = [self.queries, self.queries]
            for count in signal:
                bag = []
                for label, number in ((0, size - count), (1, count)):
                    bag.append(pool[label, rows[label][start[label] : start[label] + number]])
                    start[label] += number
                order = torch.randperm(size, generator=generator, device=pool.device)
                support.append(torch.cat(bag)[order])
        x = torch.stack(support).float().unflatten(0, (len(query), len(signal))).flatten(1, 2)
        y = torch.tensor(signal, dtype=torch.float32, device=x.device) / size
        y = y.repeat_interleave(size).expand(len(query), -1).contiguous()
        return Tasks(Examples(x, y), _labelled(query, self.queries))

    def _choose(self, n_tasks: int, generator: torch.Generator) -> list[int]:
        check_draw(self.samples.codes, n_tasks, generator)
        return torch.randint(len(self.domains), (n_tasks,), generator=generator, device=generator.device).tolist()

    def _rows(self, domain: int) -> tuple[Tensor, Tensor]:
        signal, window, shower, _ = self.domains[domain]
        if signal == "QCD":
            raise UserError("QCD jets are the background of every task: choose another signal")
        return tuple(self.samples.select(process, shower, self.split, window) for process in ("QCD", signal))

    def _enough(self, domain: int, needed: int) -> None:
        for process, rows in zip(("QCD", self.domains[domain].signal), self._rows(domain), strict=True):
            if len(rows) < needed:
                where = f"{window_name(self.domains[domain].window)} with {self.domains[domain].shower}"
                raise UserError(
                    f"a task needs {needed:,} jets of each class, but there are {len(rows):,} of {process} for "
                    f"{self.split} at {where}: choose fewer, or another domain"
                )

    @staticmethod
    def _different(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(pool.shape[1], generator=generator, device=pool.device)[:count]


def _labelled(x: list[Tensor], each: int) -> Examples:
    inputs = torch.stack(x).float()
    labels = torch.arange(2, device=inputs.device).repeat_interleave(each).expand(len(x), -1).contiguous()
    return Examples(inputs, labels)
