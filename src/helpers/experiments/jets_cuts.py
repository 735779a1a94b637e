"""Taggers without learning: cuts and likelihoods of mass and N-subjettiness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import runtime
from helpers.experiments.jets_frame import OnJets
from helpers.lab import statistics
from helpers.lab.experiment import Run
from helpers.lab.ranking import named, ranking
from helpers.lab.statistics import Interval
from helpers.tasks import jets
from helpers.tasks.jets.cuts import cells, mass_window
from helpers.tasks.jets.protocol import TEST_SEED, test_domains, training_domains
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

    def seen(self, domain: Domain, process: str, split: str) -> jets.Observables:
        """Mass and τ₂₁ of the measured jets of a process."""
        rows = self.samples.select(process, domain.shower, split, domain.window)
        generator = runtime.generator(TEST_SEED + 2, self.device)
        return jets.observables(domain.detector(self.samples.particles(rows), generator))

    def likelihood(self) -> Tensor:
        """The logarithm of signal over background in every cell, over the domains of training."""
        counts = torch.ones(2, self.experiment.bins**2, dtype=torch.float64, device=self.device)
        for domain in training_domains():
            for row, process in enumerate(("QCD", domain.signal)):
                counts[row] += cells(self.seen(domain, process, "train"), self.experiment.bins).bincount(
                    minlength=counts.shape[1]
                )
        background, signal = counts.log()
        return signal - background

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """``auc_{where}_{cut}``, ``rejection_{where}_{cut}`` and ``rejection30_…``; ``cut`` is ``window`` or
        ``likelihood``, ``where`` a domain of :func:`~helpers.tasks.jets.protocol.test_domains`, or, for areas,
        ``mean`` of the windows. Intervals are over parts of the test jets."""
        e, ratio, found = self.experiment, self.likelihood(), {"window": {}, "likelihood": {}}
        for where, some in test_domains().items():
            each = []
            for domain in some:
                pair = [self.seen(domain, process, "test") for process in ("QCD", domain.signal)]
                scores = {"window": [mass_window(seen, e.low, e.high) for seen in pair]}
                scores["likelihood"] = [ratio[cells(seen, e.bins)] for seen in pair]
                each.append({cut: self._quality(*values) for cut, values in scores.items()})
            for cut, places in found.items():
                places[where] = torch.stack([one[cut] for one in each]).mean(0)
        metrics = {}
        for cut, places in found.items():
            metrics |= named(places, cut, statistics.interval)
        return metrics

    def _quality(self, background: Tensor, signal: Tensor) -> Tensor:
        """The ranking of every part, ``[parts, 3]``."""
        parts = self.experiment.parts
        return torch.stack([ranking(background[n::parts].double(), signal[n::parts].double()) for n in range(parts)])
