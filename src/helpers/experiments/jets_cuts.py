"""Taggers without learning: cuts and likelihoods of mass and N-subjettiness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.experiments.jets_frame import OnJets
from helpers.lab import statistics
from helpers.lab.experiment import Run
from helpers.lab.ranking import in_parts, named
from helpers.lab.statistics import Interval
from helpers.tasks import jets
from helpers.tasks.jets import cuts
from helpers.tasks.jets.protocol import test_domains
from helpers.tasks.jets.samples import JetSamples
from helpers.tasks.jets.tasks import Domain
from helpers.types import Params


@dataclass(frozen=True)
class Cuts(OnJets):
    """What physicists do without a network: a window in mass and a cut on τ₂₁, and the likelihood ratio of the two.

    Nothing is learned from the domain of the test. The likelihoods are histograms of all training jets.

    Attributes:
        low: lower edge of the mass window, GeV.
        high: upper edge of the mass window, GeV.
        bins: of mass, and of τ₂₁.
        parts: into which the test jets of a domain are dealt, for an interval.
    """

    name: str
    low: float = 65.0
    high: float = 105.0
    bins: int = 16
    parts: int = 10
    iterations: int = 1
    outer_rate: float = 1.0
    seed: int = 0
    evaluate_every: int = 1
    paper: str = "jets"

    def setup(self, device: torch.device, compiled: bool) -> CutsMeasured:
        return CutsMeasured(self, jets.load().to(device), device)


class CutsMeasured(Run):
    """The cuts on one device; there is nothing to train."""

    def __init__(self, experiment: Cuts, samples: JetSamples, device: torch.device) -> None:
        self.experiment, self.samples, self.device = experiment, samples, device

    def init(self, generator: torch.Generator) -> Params:
        """An empty θ, since cuts have no parameters."""
        return {}

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """An empty gradient, like θ, and a loss of 0."""
        return {}, torch.zeros((), device=self.device)

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``auc_{where}_{cut}``, ``rejection_{where}_{cut}`` and ``rejection30_…``; ``cut`` is ``window`` or
        ``likelihood``, ``where`` a domain of :func:`~helpers.tasks.jets.protocol.test_domains`, or, for areas,
        ``mean`` of the windows. Intervals are over parts of the test jets."""
        e, ratio = self.experiment, cuts.likelihood_ratio(self.samples, self.experiment.bins)
        scores = {
            "window": lambda seen: cuts.mass_window(seen, e.low, e.high),
            "likelihood": lambda seen: ratio[cuts.cells(seen, e.bins)],
        }
        measured = {where: [self.seen(domain) for domain in some] for where, some in test_domains().items()}
        metrics = {}
        for cut, score in scores.items():
            places = {
                where: torch.stack([in_parts(*map(score, pair), e.parts) for pair in pairs]).mean(0)
                for where, pairs in measured.items()
            }
            metrics |= named(places, cut, statistics.interval)
        return metrics

    def seen(self, domain: Domain) -> list[jets.Observables]:
        """Mass and τ₂₁ of the background and of the signal of a domain of the test."""
        return [cuts.seen(self.samples, domain, process, "test") for process in ("QCD", domain.signal)]
