"""What is simulated: samples of jets, and the settings of Pythia for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from helpers.errors import UserError
from helpers.tasks.jets.samples import FIFTHS, PROCESSES, SHOWERS, SPLITS
from helpers.validate import one_of, whole

__all__ = ["Sample", "plan", "settings"]

EVENTS = 1000  # of a block of the other showers
WASTED = 60  # blocks in a row that bring nothing new to a sample before it is given up
COMMON = ("Beams:eCM = 13000",)
BIASED = ("PhaseSpace:bias2Selection = on", "PhaseSpace:pTHatMin = 200", "PhaseSpace:pTHatMax = 1200")
# Wide and flattened by a hook, so that one run reaches from 250 to 800 GeV. With anglesWZ = 1 both bosons are
# longitudinal. Z → νν leaves one jet; so does W → μν, as neither neutrinos nor muons are clustered.
RESONANCE = (
    "NewGaugeBoson:ffbar2Wprime = on", "Wprime:coup2WZ = 1", "Wprime:anglesWZ = 1",
    "34:onMode = off", "34:onIfAll = 24 23", "34:m0 = 1000", "34:doForceWidth = on", "34:mWidth = 1000",
    "34:mMin = 520", "34:mMax = 1900", "PhaseSpace:mHatMin = 520", "PhaseSpace:mHatMax = 1900",
)  # fmt: skip
QUARKS_OF_W = ("24:onMode = off", "24:onIfAny = 1 2 3 4")
PROCESS_SETTINGS = {
    "W": (*RESONANCE, *QUARKS_OF_W, "23:onMode = off", "23:onIfAny = 12 14 16"),
    "WT": (
        "WeakDoubleBoson:ffbar2ZW = on", *BIASED, "PhaseSpace:bias2SelectionPow = 4",
        *QUARKS_OF_W, "23:onMode = off", "23:onIfAny = 12 14 16",
    ),
    "Z": (*RESONANCE, "24:onMode = off", "24:onIfAny = 13", "23:onMode = off", "23:onIfAny = 1 2 3 4 5"),
    "top": ("Top:gg2ttbar = on", "Top:qqbar2ttbar = on", *BIASED, "PhaseSpace:bias2SelectionPow = 4", *QUARKS_OF_W),
    "QCD": ("HardQCD:all = on", *BIASED, "PhaseSpace:bias2SelectionPow = 4"),
}  # fmt: skip
HOOKED = {"W": 3.0, "Z": 3.0}  # events of these are drawn in proportion to (mass of the resonance)^power
NO_MPI = "PartonLevel:MPI = off"
SHOWER_SETTINGS = {  # the factor multiplies the squared scale of α_s: these are scales of 1/2, 1 and 2
    "fsr-half": (NO_MPI, "TimeShower:renormMultFac = 0.25"),
    "fsr-one": (NO_MPI,),
    "fsr-two": (NO_MPI, "TimeShower:renormMultFac = 4"),
    "monash": ("Tune:pp = 14",),
    "vincia": ("PartonShowers:model = 2",),
}


@dataclass(frozen=True)
class Sample:
    """Jets of one process, with one shower, in one split.

    Attributes:
        process: one of ``jets.PROCESSES``.
        shower: one of ``jets.SHOWERS``.
        split: one of ``jets.SPLITS``; the generator's seeds depend on it.
        per_window: jets in each of the five windows, a multiple of 5.

    Raises:
        UserError: for an unknown name, or a number that is not a positive multiple of 5.
    """

    process: str
    shower: str
    split: str
    per_window: int

    def __post_init__(self) -> None:
        one_of(self.process, "process", PROCESSES)
        one_of(self.shower, "shower", SHOWERS)
        one_of(self.split, "split", SPLITS)
        if whole(self.per_window, "number of jets in a window") % FIFTHS:
            raise UserError(f"the jets in a window must be a positive multiple of 5, not {self.per_window!r}")

    def seed(self, block: int) -> int:
        """The generator's seed of a block, between 1 and 899,999,999."""
        name = f"{self.process}/{self.shower}/{self.split}/{block}"
        return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 899_999_999


def plan(per_window: int = 1600) -> tuple[Sample, ...]:
    """The samples of the shipped file.

    W and QCD with three scales of the final-state shower for meta-training, validation and test; all processes with the
    tune and the multi-parton interactions that describe data for the test; a few with another shower.

    Args:
        per_window: jets in a window of a sample for meta-training; the other samples are in proportion.

    Raises:
        UserError: if ``per_window`` is less than 20.
    """
    whole(per_window, "number of jets in a window", 20)

    def share(part: float) -> int:
        return max(1, round(per_window * part / FIFTHS)) * FIFTHS

    def samples(processes: Sequence[str], showers: Sequence[str], split: str, part: float) -> Iterator[Sample]:
        for shower in showers:
            for process in processes:
                yield Sample(process, shower, split, share(part))

    pair, others, scales = ("W", "QCD"), ("WT", "Z", "top"), ("fsr-half", "fsr-one", "fsr-two")
    return (
        *samples(pair, scales, "train", 1),
        *samples(others, ("fsr-one",), "train", 1 / 2),
        *samples(pair, scales, "validation", 1 / 4),
        *samples(pair, scales, "test", 5 / 16),
        *samples(pair, ("monash",), "test", 15 / 8),
        *samples(others, ("monash",), "test", 15 / 16),
        *samples(pair, ("vincia",), "test", 1 / 4),
    )


def settings(process: str, shower: str) -> tuple[str, ...]:
    """What Pythia is told, line by line; all else is its default (which is the Monash 2013 tune)."""
    return (*COMMON, *PROCESS_SETTINGS[process], *SHOWER_SETTINGS[shower])
