"""Losses and metrics refuse what would broadcast, also under vmap, in derivatives and in recordings."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from torch.func import grad, vmap

from helpers import losses
from helpers.experiments import ml3
from helpers.numerics.tracing import traced

ROWS, LOGITS = torch.zeros(4, 1), torch.zeros(4, 3)
LABELS, SHARES = torch.zeros(4, dtype=torch.long), torch.zeros(4)
REGRESSION = {"mse": losses.mean_squared_error, "prediction": lambda o, y: losses.prediction_and_target(o, o, y)}
REGRESSION["input"] = lambda o, y: losses.input_prediction_and_target(o, o, y)
CLASSES = {"cross entropy": losses.cross_entropy, "accuracy": losses.accuracy, "mixture": losses.mixture}
CLASSES["proportions"] = losses.label_proportions
CLASSES["features"] = lambda o, y: losses.probabilities_and_label(o, o, y)


@pytest.mark.parametrize("loss", REGRESSION.values(), ids=REGRESSION)
def test_targets_have_the_shape_of_outputs(loss):
    loss(ROWS, ROWS)
    for y in (ROWS[:, 0], ROWS[:1], ROWS.T, ROWS.expand(4, 2)):
        message = refused(lambda y=y: loss(ROWS, y))
        assert message == f"outputs and targets must have the same shape, not [4, 1] and {list(y.shape)}"


@pytest.mark.parametrize("loss", CLASSES.values(), ids=CLASSES)
def test_there_is_a_label_for_each_row(loss):
    loss(LOGITS[:, :2], SHARES if loss in (losses.label_proportions, losses.mixture) else LABELS)
    for y in (SHARES[:, None], SHARES[:1], SHARES[0], LABELS[:, None], LABELS[:1]):
        assert "rows of logits and labels" in refused(lambda y=y: loss(LOGITS, y))


def test_bags_are_equally_large():
    for bags, message in ((3, "no 3 bags of equal size"), (0, "number of bags"), (1.5, "number of bags")):
        assert message in refused(lambda bags=bags: losses.label_proportions(LOGITS[:, :2], SHARES, bags))


@pytest.mark.parametrize("loss", [ml3.frequency_error, ml3.prediction_error, ml3.torque_error, ml3.inertia_error])
def test_losses_of_the_experiments(loss):
    outputs = torch.zeros(6, 5)
    assert loss(outputs, outputs) == 0
    assert "same shape" in refused(lambda: loss(outputs, outputs[:1]))


def test_shapes_are_seen_where_values_are_not():
    """A task axis that vmap hides does not count."""
    many, y = torch.ones(3, 4, 1), torch.zeros(3, 4)
    for transform in (lambda f: vmap(grad(f)), lambda f: traced(vmap(f))):
        transform(losses.mean_squared_error)(many, many)
        assert "same shape" in refused(lambda t=transform: t(losses.mean_squared_error)(many, y))
        assert "same shape" in refused(lambda t=transform: t(losses.cross_entropy)(many, many.long()))
