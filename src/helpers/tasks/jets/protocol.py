"""What taggers of jets are trained, tuned and judged on: domains, splits and supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from helpers import losses, runtime
from helpers.tasks import jets
from helpers.tasks.jets.detector import Detector, View
from helpers.tasks.jets.samples import JetSamples
from helpers.tasks.jets.tasks import Domain, JetTasks
from helpers.types import Examples, Tasks

TEST_SEED = 20_171_213  # of the test tasks; the same tasks for every experiment and every evaluation
TRAIN_WINDOWS, INSIDE, OUTSIDE = (0, 1, 3), 2, 4  # 400–500 GeV interpolates, 600–800 GeV extrapolates
TRAIN_SHOWERS = ("fsr-half", "fsr-one", "fsr-two")
TRAIN_DETECTORS = (
    Detector(cell=0.1, threshold=0.5, smearing=0.05),
    Detector(cell=0.1, threshold=0.5, smearing=0.15, dropped=0.05),
    Detector(cell=0.1, threshold=1.0, smearing=0.1, pileup=20),
)
TUNING_DETECTOR = Detector(cell=0.1, threshold=0.5, smearing=0.2, dropped=0.02)  # of the validation tasks
DATA_DETECTOR = Detector(cell=0.1, threshold=0.5, smearing=0.3)  # of what stands for real data
WINDOWS = tuple(range(len(jets.WINDOWS) - 1))
SHARES = (0.2, 0.8)  # of signal in two unlabelled bags
EDGES = tuple(str(edge) for edge in jets.WINDOWS[:-1])  # the windows' lower ones, as metrics name them
LOSSES = {"labels": losses.cross_entropy, "proportions": losses.label_proportions, "mixture": losses.mixture}


class Supervision(NamedTuple):
    """What a tagger is given to adapt to a domain.

    Attributes:
        kind: ``"labels"``; or ``"proportions"`` or ``"mixture"``, two unlabelled bags.
        size: labelled jets of each class, or jets in a bag.
        shares: of signal in the bags.
        offset: how far the stated shares are off.
    """

    kind: str
    size: int
    shares: tuple[float, float] = SHARES
    offset: float = 0.0

    @property
    def name(self) -> str:
        """As metrics are named: ``labels20``, ``proportions64``, ``proportions64_over5``, ``…_drift30_50``."""
        name = f"{self.kind}{self.size}"
        if self.offset:
            name += f"_{'over' if self.offset > 0 else 'under'}{100 * abs(self.offset):.0f}"
        if self.shares != SHARES:
            name += "_drift" + "_".join(f"{100 * share:.0f}" for share in self.shares)
        return name

    def tasks(self, family: JetTasks, chosen: Sequence[int], generator: torch.Generator) -> Tasks:
        """One task of each chosen domain."""
        if self.kind == "labels":
            return family.of(chosen, generator, self.size)
        support, query = family.bags_of(chosen, self.size, generator, self.shares)
        return Tasks(Examples(support.x, (support.y + self.offset).clamp(0, 1)), query)


LABELS = tuple(Supervision("labels", shots) for shots in (5, 20, 100))
PROPORTIONS = tuple(Supervision("proportions", size) for size in (64, 256))
MIXTURES = tuple(Supervision("mixture", size) for size in (64, 256))
WRONG = tuple(PROPORTIONS[0]._replace(offset=offset) for offset in (-0.10, -0.05, 0.05, 0.10))
DRIFTED = tuple(PROPORTIONS[0]._replace(shares=shares) for shares in ((0.1, 0.4), (0.3, 0.5), (0.4, 0.6)))


def training_domains() -> tuple[Domain, ...]:
    """Where taggers are trained: 27 domains of W jets."""
    return jets.domains(["W"], TRAIN_WINDOWS, TRAIN_SHOWERS, TRAIN_DETECTORS)


def tuning_domains() -> tuple[Domain, ...]:
    """Where inner rates and numbers of steps are chosen: as in training, but for the detector."""
    return jets.domains(["W"], TRAIN_WINDOWS, TRAIN_SHOWERS, [TUNING_DETECTOR])


def test_domains() -> dict[str, tuple[Domain, ...]]:
    """Where taggers are judged: W jets with the tune to data in each window, named by its lower edge; then other
    signals, and W jets with the shower of training and with another one, in all windows (top jets above 400 GeV, where
    they are whole)."""
    found = {EDGES[window]: jets.domains(["W"], [window], ["monash"], [DATA_DETECTOR]) for window in WINDOWS}
    for name, signal, shower, windows in (
        ("wt", "WT", "monash", WINDOWS),
        ("z", "Z", "monash", WINDOWS),
        ("top", "top", "monash", WINDOWS[2:]),
        ("train", "W", "fsr-one", WINDOWS),
        ("vincia", "W", "vincia", WINDOWS),
    ):
        found[name] = jets.domains([signal], windows, [shower], [DATA_DETECTOR])
    return found


class JudgedJets:
    """What taggers are judged on: tasks of all of :func:`test_domains`, the same on every call.

    Attributes:
        groups: positions of the domains by the names of :func:`test_domains`.
        family: jets of all these domains.
    """

    def __init__(self, samples: JetSamples, queries: int, view: View) -> None:
        self.groups, every = {}, []
        for name, some in test_domains().items():
            self.groups[name] = range(len(every), len(every) + len(some))
            every += some
        self.family = JetTasks(samples, every, "test", 1, queries, view)

    def given(self, supervision: Supervision, draws: int, other: int) -> tuple[Tasks, dict[str, list[int]]]:
        """``draws`` tasks of each window and ``other`` ones of each further domain, and which of them are of a group.

        A domain with too few jets for the supervision is left out, and so is a group without a task.
        """
        needed = supervision.size + self.family.queries  # of each class; the small samples are too few for large bags
        places, rows = [], {}
        for name, some in self.groups.items():
            own = [at for at in some for _ in range(draws if name in EDGES else other)]
            own = [at for at in own if self.family.available(at) >= needed]
            if own:
                rows[name] = list(range(len(places), len(places) + len(own)))
            places += own
        generator = runtime.generator(TEST_SEED, self.family.samples.codes.device)
        return supervision.tasks(self.family, places, generator), rows
