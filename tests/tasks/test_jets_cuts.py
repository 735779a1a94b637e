"""Scores of jets without a network."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from helpers.tasks.jets import cuts, protocol
from helpers.tasks.jets.cuts import cells, mass_window
from helpers.tasks.jets.substructure import Observables


def seen(mass, tau21):
    mass, tau21 = (torch.as_tensor(values, dtype=torch.float32) for values in (mass, tau21))
    return Observables(torch.full_like(mass, 300), mass, tau21)


def test_the_cut_prefers_the_window_then_small_ratios():
    best_first = seen([80, 65, 105, 90, 64, 107, 60, 160, 0], [0.0, 0.1, 0.5, 0.9, 0.9, 0.0, 0.5, 0.2, 0.0])
    values = mass_window(best_first, 65, 105)
    assert (values.diff() < 0).all() and (values[:4] > 0).all() and (values[4:] < 0).all()
    inside, outside = (mass_window(seen(mass, [0.3] * 3), 65, 105) for mass in ([66, 80, 104], [40, 60, 64]))
    assert len(inside.unique()) == 1 and torch.equal(outside, mass_window(seen([40, 60, 64], [0.1, 0.5, 0.9]), 65, 105))


def test_cells_of_mass_and_ratio():
    assert cells(seen([0, 39, 41, 159, 500, 80], [0.0, 0.3, 0.6, 0.99, 1.0, 0.1]), 4).tolist() == [0, 1, 6, 15, 15, 8]


def test_the_likelihood_ratio_of_known_counts(monkeypatch):
    """27 domains with four jets of each process; one is added to every cell."""

    def few(samples, domain, process, split):
        assert split == "train" and domain in protocol.training_domains()
        return seen([100, 100, 100, 10], [0.1] * 4) if process == "W" else seen([100, 10, 10, 10], [0.1, 0.1, 0.1, 0.9])

    monkeypatch.setattr(cuts, "seen", few)
    expected = [28 / 55, 1 / 28, 82 / 28, 1]  # light or heavy, small or large ratio
    found = cuts.likelihood_ratio(SimpleNamespace(codes=torch.zeros(1)), 2)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).log())
