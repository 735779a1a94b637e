"""The shipped jets: their file, its format, and what was measured of each jet."""

from __future__ import annotations

import io
import json
import lzma
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.parsing import from_json
from helpers.runtime import root
from helpers.tasks.images import sha256
from helpers.validate import one_of, whole

__all__ = ["JetSamples", "PROCESSES", "SHOWERS", "SPLITS", "WINDOWS", "load", "window_name"]

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
        header = from_json(str(arrays.pop("header")))
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


def check_particles(particles: Tensor) -> None:
    """Refuse what is no ``[n, slots, 3]`` of finite numbers with pT at least 0.

    Raises:
        UserError: then.
    """
    if particles.dim() != 3 or particles.shape[-1] != 3 or not particles.is_floating_point():
        raise UserError(f"particles are floats [n, slots, 3], not {particles.dtype} of shape {list(particles.shape)}")
    if not (particles.isfinite().all() and (particles[..., 0] >= 0).all()):
        raise UserError("particles must have a finite pT of at least 0, and finite η and φ: leave out the others")
