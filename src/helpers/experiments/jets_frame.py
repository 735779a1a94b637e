"""What the experiments with jets share: their data, how far metrics may be from the record, and how they are tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helpers.lab.experiment import Experiment
from helpers.lab.statistics import Tolerance
from helpers.tasks import jets


class OnJets(Experiment):
    """An experiment whose data are the simulated jets."""

    # Jets of nearly the same score change places, and so may two nearly level inner rates, then next to each other.
    tolerances = (
        ("rate_*", Tolerance(relative=2.5)),
        ("steps_*", Tolerance(relative=2.5)),
        ("rejection*", Tolerance(relative=0.1)),
        ("*", Tolerance(0.01)),
    )
    # Taggers share their test tasks, so that the interval over them leaves out by how much few tasks differ.
    spot_chance = Tolerance(0.03)

    def data(self) -> dict[str, Any]:
        """Digest of the simulated jets."""
        return jets.load().provenance


@dataclass(frozen=True, kw_only=True)
class TaggersExperiment(OnJets):
    """Taggers that are trained, and adapted at test, with the rate and steps that are best on validation tasks.

    Attributes:
        zoom: multiply angles by pT/2m.
        shots: labelled support jets of each class.
        test_rates: inner rates that are tried at test.
        test_steps: numbers of inner steps that are tried.
        test_draws: test tasks of a window; other domains have one each.
        test_queries: query jets of each class at test.
        tuning_queries: query jets of each class where rates and steps are chosen.
    """

    name: str = field(kw_only=False)
    zoom: bool = False
    shots: int = 20
    iterations: int = 1_000
    outer_rate: float = 2e-3
    outer_rate_hold: int = 500
    outer_rate_final: float | None = 2e-4
    seed: int = 0
    seeds: int = 5
    test_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    test_steps: tuple[int, ...] = (1, 3, 10)
    test_draws: int = 5
    test_queries: int = 300
    tuning_queries: int = 100
    paper: str = "jets"
