"""The way of an inner optimisation, and the landscape that it goes through."""

from __future__ import annotations

import torch

from helpers.learners.learned import LossDescent
from helpers.learners.paths import landscapes
from helpers.losses import LearnedLoss
from helpers.models.layers import stacked
from helpers.models.mlp import MLP
from helpers.models.physics import Frequency
from helpers.runtime import generator
from helpers.tasks.frequencies import prediction_error, seen_of_frequency, whole_waves


def test_a_landscape_is_both_losses_at_every_point():
    learned = LearnedLoss(MLP((3, 4, 1)), seen_of_frequency, positive=False)
    learner = LossDescent(Frequency(), prediction_error, 1.0, learned=learned)
    each = [learner.init(generator(seed)) for seed in range(2)]
    waves, omegas = whole_waves(torch.tensor([0.5, -1.0, 2.0])), torch.linspace(-2, 2, 4)
    found, own = landscapes(learner, stacked(each), {"omega": omegas[:, None]}, waves)
    assert found.shape == (2, 3, 4) and own.shape == (3, 4)
    x, y = waves.x[1], waves.y[1]
    outputs = learner.model({"omega": omegas[3:]}, x)
    torch.testing.assert_close(found[1, 1, 3], learned(each[1], x, outputs, y))
    torch.testing.assert_close(own[1, 3], (torch.sin(2 * x[:, 0]) - torch.sin(-x[:, 0])).square().mean())
