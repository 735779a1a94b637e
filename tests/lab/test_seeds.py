"""Several seeds side by side."""

from __future__ import annotations

import torch

from helpers import losses
from helpers.estimators.explicit import maml
from helpers.lab import seeds
from helpers.learners.descent import GradientDescent
from helpers.models.mlp import MLP
from helpers.runtime import generator
from helpers.tasks.sinusoid import Sinusoids


def test_one_after_the_other_is_side_by_side():
    learner, draws = GradientDescent(MLP((1, 4, 1)), losses.mean_squared_error, 0.01), generator(0)
    theta = seeds.fresh(learner.init, 3, draws)
    tasks = seeds.apart(Sinusoids().sample(6, draws), 3, 2)
    together, apart = (kind(maml)(learner, theta, tasks) for kind in (seeds.side_by_side, seeds.in_turn))
    assert apart[1].shape == (3, 2)
    torch.testing.assert_close(apart, together)
