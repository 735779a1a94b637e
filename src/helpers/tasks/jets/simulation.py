"""Simulating jets with Pythia 8 and finding them with FastJet; only making ``data/jets.npz`` again needs this.

Both programs are free software under the GPL and are installed apart. They are imported inside the functions
that run them, so this module can be imported, and the book read, without them.

A sample is a process with one shower in one split. It is simulated in blocks of events, each by a generator of its own,
whose seed is a hash of the sample's name and the block's number: what comes out does not depend on how many blocks are
computed at a time, nor by how many processes. On another machine only the statistics are the same.

**The pT shape is chosen, not predicted.** Events are drawn with a bias towards high pT, so that one run covers 250 to
800 GeV, and then as many jets are kept in each fifth of each window, with equal weights. Cross sections are lost; so
is any difference of signal and background in pT, which a tagger could otherwise learn.

Sources: Bierlich et al. (2022), arXiv:2203.11601 (Pythia 8.3); Cacciari, Salam and Soyez (2012), arXiv:1111.6097
(FastJet); Krohn, Thaler and Wang (2010), arXiv:0912.1342 (trimming); Thaler and Van Tilburg (2012), arXiv:1108.2701
(N-subjettiness); de Oliveira et al. (2016), arXiv:1511.05190 (the selection).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from helpers.errors import UserError
from helpers.progress import progress_bar
from helpers.runtime import ensure_writable, only_one, write_atomically
from helpers.tasks import jets
from helpers.tasks.jets.plan import (
    COMMON,
    EVENTS,
    HOOKED,
    PROCESS_SETTINGS,
    SHOWER_SETTINGS,
    WASTED,
    Sample,
    plan,
    settings,
)
from helpers.tasks.jets.samples import FIFTHS, PARTICLES, PROCESSES, SHOWERS, SPLITS, WINDOWS

__all__ = ["available", "generate", "make", "simulate"]

RADIUS, SUBRADIUS, FRACTION = 1.0, 0.3, 0.05  # of the jets, and of the trimming
MAX_ETA, REACH = 2.0, 5.0  # |η| of the jets, and of the particles
BATCH = 200  # events handed to FastJet at a time; does not change the result
BLOCK = {"vincia": 250}  # events of a block, which does


def simulate(process: str, shower: str, seed: int, events: int, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Simulate events and keep their leading jets.

    The hardest anti-kT jet (R = 1.0) of each event is trimmed (kT subjets of R = 0.3 with less than 5 % of its pT are
    removed); it is kept if its axis has pseudorapidity between −2 and 2 and its trimmed pT is between 250 and 800 GeV.
    Neutrinos and muons are left out. Subjettiness is that of the trimmed jet, with winner-takes-all kT axes improved
    once.

    Args:
        process: one of ``jets.PROCESSES``.
        shower: one of ``jets.SHOWERS``.
        seed: of Pythia's random numbers, 1 … 900,000,000.
        events: how many.
        batch: events at a time; does not change the result.

    Returns:
        Arrays of n jets in the order of their events: ``pt``, ``rapidity``, ``mass`` (GeV), ``tau21``, ``tau32``
        float64 ``[n]``; and ``particles`` float64 ``[n, 40, 3]``: pT (GeV), η and φ relative to the jet, the hardest
        first, rows of zeros where there are fewer.

    Raises:
        UserError: when Pythia or FastJet is not installed, or Pythia does not start.
    """
    pythia8, fastjet, awkward = (_import(name) for name in ("pythia8mc", "fastjet", "awkward"))
    pythia = pythia8.Pythia("", False)
    lines = ("Print:quiet = on", "Random:setSeed = on", f"Random:seed = {seed}", *settings(process, shower))
    wrong = [line for line in lines if not pythia.readString(line)]
    hook = _flattening(pythia8, HOOKED[process]) if process in HOOKED else None  # lives as long as pythia
    if hook is not None:
        pythia.setUserHooksPtr(hook)
    if wrong or not pythia.init():
        raise UserError(
            f"Pythia refuses the settings of {process} with {shower}: install the version in pyproject.toml"
        )
    found = []
    for start in range(0, events, batch):
        some = pythia.nextBatch(min(batch, events - start))
        found.append(_leading_jets(some.prt, fastjet, awkward))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def _flattening(pythia8, power: float):
    """A hook that draws events in proportion to the power of the mass of the hard process."""

    class Flattening(pythia8.UserHooks):
        def canBiasSelection(self):
            return True

        def biasSelectionBy(self, process, phase_space, in_event):
            return (phase_space.sHat() / 500.0**2) ** (power / 2)

    return Flattening()


def _leading_jets(record, fastjet, ak) -> dict[str, np.ndarray]:
    """The trimmed leading jets of a batch of events, given all their particles."""

    def pt_of(p):
        return np.hypot(p.px, p.py)

    def summed(p):
        return [np.asarray(ak.sum(p[name], -1)) for name in ("px", "py", "pz", "E")]

    kind = abs(record.id)
    record = record[(record.status > 0) & (kind != 12) & (kind != 13) & (kind != 14) & (kind != 16)]
    momentum = record.p
    momentum = momentum[np.arcsinh(abs(momentum.pz) / np.hypot(momentum.px, momentum.py)) < REACH]
    names = {"px": momentum.px, "py": momentum.py, "pz": momentum.pz, "E": momentum.e}
    event = ak.zip(names, with_name="Momentum4D")

    lowest = WINDOWS[0]
    clustered = fastjet.ClusterSequence(event, fastjet.JetDefinition(fastjet.antikt_algorithm, RADIUS))
    first = ak.argmax(pt_of(clustered.inclusive_jets(min_pt=lowest)), axis=1, keepdims=True)
    jet = ak.drop_none(clustered.constituents(min_pt=lowest)[first][:, 0], axis=0)
    if not len(jet):
        return _empty()

    clustered = fastjet.ClusterSequence(jet, fastjet.JetDefinition(fastjet.kt_algorithm, SUBRADIUS))
    px, py, *_ = summed(jet)
    hard = pt_of(clustered.inclusive_jets(min_pt=0.0)) > FRACTION * np.hypot(px, py)
    jet = ak.flatten(clustered.constituents(min_pt=0.0)[hard], axis=2)
    px, py, pz, energy = summed(jet)
    pt = np.hypot(px, py)
    kept = (pt >= lowest) & (pt < WINDOWS[-1]) & (abs(np.arcsinh(pz / np.maximum(pt, 1e-9))) < MAX_ETA)
    if not kept.any():
        return _empty()
    jet, (px, py, pz, energy, pt) = jet[kept], (v[kept] for v in (px, py, pz, energy, pt))

    clustered = fastjet.ClusterSequence(jet, fastjet.JetDefinition(fastjet.kt_algorithm, RADIUS))
    tau = np.asarray(clustered.njettiness("NormalizedMeasure", "OnePass_WTA_KT_Axes", [1, 2, 3], 1.0, RADIUS))
    rapidity, phi = np.arctanh(pz / energy), np.arctan2(py, px)
    hardest = jet[ak.argsort(pt_of(jet), axis=1, ascending=False, stable=True)][:, :PARTICLES]

    def padded(values):
        return np.asarray(ak.to_numpy(ak.fill_none(ak.pad_none(values, PARTICLES, clip=True), 0.0)))

    x, y, z = (padded(hardest[name]) for name in ("px", "py", "pz"))
    size = np.hypot(x, y)
    there = size > 0
    eta = np.arcsinh(np.divide(z, size, where=there, out=np.zeros_like(z))) - rapidity[:, None]
    turn = (np.arctan2(y, x) - phi[:, None] + np.pi) % (2 * np.pi) - np.pi
    return {
        "pt": pt,
        "rapidity": rapidity,
        "mass": np.sqrt(np.maximum(energy**2 - pt**2 - pz**2, 0)),
        "tau21": _ratio(tau[:, 1], tau[:, 0]),
        "tau32": _ratio(tau[:, 2], tau[:, 1]),
        "particles": np.stack([size, eta * there, turn * there], -1),
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where there are too few particles for the axes."""
    return np.divide(above, below, where=below > 0, out=np.zeros_like(above)).clip(0, 1)


def _empty() -> dict[str, np.ndarray]:
    return {name: np.empty(0) for name in jets.MEASURED} | {"particles": np.empty((0, PARTICLES, 3))}


# ---------------------------------------- many samples, on all cores
@dataclass
class _Filling:
    """A sample on its way: the blocks that came, used in order, and how many jets each fifth of a window has."""

    sample: Sample
    asked: int = 0  # blocks
    used: int = 0
    idle: int = 0  # of those used last, how many brought nothing new
    waiting: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    parts: list[dict[str, np.ndarray]] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((len(WINDOWS) - 1) * FIFTHS, int))

    @property
    def quota(self) -> int:
        return self.sample.per_window // FIFTHS

    @property
    def full(self) -> bool:
        return bool((self.counts >= self.quota).all())

    def take(self, block: int, found: dict[str, np.ndarray]) -> int:
        """Store a block, use those whose turn it is, and return how many jets that added."""
        self.waiting[block] = found
        before = self.counts.sum()
        while not self.full and self.used in self.waiting:
            found = self.waiting.pop(self.used)
            place = jets.fifth_of(found["pt"])
            rank = np.empty(len(place), int)  # how many jets of the same fifth came before
            for part in np.unique(place):
                rows = np.flatnonzero(place == part)
                rank[rows] = self.counts[part] + np.arange(len(rows))
            rows = np.flatnonzero(rank < self.quota)
            self.parts.append({name: value[rows] for name, value in found.items()})
            self.counts += np.bincount(place[rows], minlength=len(self.counts))
            self.used += 1
            self.idle = 0 if len(rows) else self.idle + 1
        if self.idle > WASTED:
            lacking = jets.fifth_name(int(self.counts.argmin()))
            raise UserError(
                f"{self.sample.process} with {self.sample.shower} hardly ever makes jets of {lacking}: ask for fewer"
            )
        return int(self.counts.sum() - before)


def make(
    samples: Sequence[Sample], workers: int | None = None, progress: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Simulate samples, on all cores.

    Args:
        samples: what to simulate.
        workers: processes; as many as the machine has cores unless given. 1 starts no process.
        progress: show a bar that counts the jets.

    Returns:
        The arrays of a file, as :func:`helpers.tasks.jets.samples.pack` wants them, and its header without a digest.

    Raises:
        UserError: when Pythia or FastJet is not installed, there is no sample or one twice, or one cannot be filled.
    """
    for name in ("pythia8mc", "fastjet", "awkward"):
        _import(name)
    if len({(s.process, s.shower, s.split) for s in samples}) != len(samples) or not samples:
        raise UserError("there must be at least one sample of jets, and none twice")
    fillings = [_Filling(sample) for sample in samples]
    total = sum(sample.per_window for sample in samples) * (len(WINDOWS) - 1)
    with progress_bar(total=total, unit=" jets", desc="jets", smoothing=0.05, disable=not progress) as bar:
        _fill(fillings, workers or os.cpu_count() or 1, bar.update)
    columns = [{name: np.concatenate([part[name] for part in f.parts]) for name in f.parts[0]} for f in fillings]
    arrays = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    sizes = [len(column["pt"]) for column in columns]
    for name, known in (("process", PROCESSES), ("shower", SHOWERS), ("split", SPLITS)):
        arrays[name] = np.repeat([known.index(getattr(f.sample, name)) for f in fillings], sizes)
    return arrays, _header(fillings)


def _fill(fillings: list[_Filling], workers: int, done: Callable[[int], Any]) -> None:
    """Simulate blocks until all samples are full."""
    if workers == 1:
        for filling in fillings:
            while not filling.full:
                filling.asked += 1
                done(filling.take(filling.asked - 1, _block(filling.sample, filling.asked - 1)))
        return
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from multiprocessing import get_context

    # Spawned, because a fork would copy torch's threads, and with them its locks.
    with ProcessPoolExecutor(workers, get_context("spawn"), _quiet) as pool:
        pending = {}
        try:
            while lacking := [f for f in fillings if not f.full]:
                for _ in range(workers - len(pending)):
                    # The first samples first; a sample never runs far ahead of what it needs.
                    filling = min(lacking, key=lambda f: f.asked - f.used)
                    pending[pool.submit(_block, filling.sample, filling.asked)] = filling, filling.asked
                    filling.asked += 1
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    filling, block = pending.pop(future)
                    done(filling.take(block, future.result()))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _block(sample: Sample, block: int) -> dict[str, np.ndarray]:
    return simulate(sample.process, sample.shower, sample.seed(block), BLOCK.get(sample.shower, EVENTS))


def _quiet() -> None:
    """In a worker: Ctrl-C is for the main process, and FastJet's banner would break the bar."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _header(fillings: list[_Filling]) -> dict[str, Any]:
    """What a reader of the file should know about its making."""
    return {
        "versions": {name: metadata.version(name) for name in ("pythia8mc", "fastjet", "awkward", "numpy")},
        "settings": {
            "common": COMMON, "process": PROCESS_SETTINGS, "shower": SHOWER_SETTINGS, "flattened": HOOKED,
            "jets": {"algorithm": "anti-kT", "radius": RADIUS, "max_eta": MAX_ETA, "particles": PARTICLES},
            "trimming": {"algorithm": "kT", "radius": SUBRADIUS, "fraction": FRACTION},
            "pt": "equally many jets in each fifth of a window: the shape is chosen",
        },
        "samples": [
            {
                "process": f.sample.process, "shower": f.sample.shower, "split": f.sample.split,
                "per_window": f.sample.per_window, "events": BLOCK.get(f.sample.shower, EVENTS),
                "seeds": [f.sample.seed(block) for block in range(f.used)],
            }
            for f in fillings
        ],
    }  # fmt: skip


def generate(
    per_window: int = 1600, path: Path | str | None = None, workers: int | None = None, progress: bool = True
) -> Path:
    """Simulate the samples of ``plan(per_window)`` and write the file that ``jets.load`` reads.

    Args:
        per_window: jets in a window of a sample for meta-training; the shipped file has 1,600.
        path: the file; ``data/jets.npz`` unless given. What was there is replaced at the end, in one step.
        workers: processes; as many as the machine has cores unless given.
        progress: show a bar.

    Returns:
        The path of the file.

    Raises:
        UserError: when Pythia or FastJet is not installed, or the file cannot be written.
    """
    target = Path(path) if path is not None else jets.home()
    samples = plan(per_window)
    ensure_writable(target.parent)
    with only_one(target, "simulating jets"):
        arrays, header = make(samples, workers, progress)
        write_atomically(target, jets.pack(arrays, header))
    return target


def _import(name: str):
    try:
        return import_module(name)
    except ImportError as error:
        wanted = "pip install pythia8mc==8.317.2 fastjet awkward"
        raise UserError(f"simulating jets needs Pythia 8 and FastJet: `{wanted}`") from error


def available() -> bool:
    """Whether the programs that simulate are installed."""
    from importlib.util import find_spec

    return all(find_spec(name) is not None for name in ("pythia8mc", "fastjet", "awkward"))
