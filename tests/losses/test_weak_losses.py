"""Losses of unlabelled bags: zero and smallest where they should be, by hand, and with right second derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from helpers import losses
from helpers.estimators.explicit import maml
from helpers.learners.descent import GradientDescent
from helpers.losses import label_proportions, mixture
from helpers.models.convnet import ConvNet
from helpers.models.deep_sets import DeepSets
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, error, objective
from helpers.runtime import generator
from helpers.types import Examples, Tasks

SHARES = torch.tensor([[0.25, 0.75], [0.5, 0.0], [0.75, 1.0]], dtype=torch.float64)  # of every task
MODELS = {
    "mlp": (MLP((3, 6, 5, 2)), (3,)),
    "images": (ConvNet(2, filters=2, blocks=2, head_scale=None, flatten=True, size=5, norm=False), (1, 5, 5)),
    "particles": (DeepSets(hidden=4), (4, 3)),
}


def outputs(*probabilities):
    """Logits, ``[n, 2]``, that give class 1 these probabilities."""
    signal = torch.tensor(probabilities, dtype=torch.float64).logit()
    return torch.stack([torch.full_like(signal, 0.7), signal + 0.7], -1)


def stated(*shares, size=2):
    return torch.tensor(shares, dtype=torch.float64).repeat_interleave(size)


def separable(shares, size=200):
    """Bags of numbers around −4 and 4, with deviation 1, of which these shares are around 4."""
    bags = []
    for share in shares:
        counts = [round((1 - share) * size), round(share * size)]
        normal = [torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n) for n in counts]
        bags.append(torch.cat([normal[0] - 4, normal[1] + 4]))
    return torch.cat(bags)


def logistic(slope, x):
    return torch.stack([torch.zeros_like(x), slope * x], -1)


# ---------------------------------------- label proportions


def test_proportions_that_are_met_cost_nothing():
    met = outputs(0.1, 0.3, 0.9, 0.7)
    assert label_proportions(met, stated(0.2, 0.8)).item() == pytest.approx(0, abs=1e-12)
    for wrong in ((0.25, 0.8), (0.2, 0.7), (0.8, 0.2), (0.0, 1.0)):
        assert label_proportions(met, stated(*wrong)) > 1e-3
    assert label_proportions(outputs(0.1, 0.7, 0.9, 0.3), stated(0.2, 0.8)) > 0.05  # two jets are in each other's bag


def test_proportions_by_hand():
    found = label_proportions(outputs(0.5, 0.1, 0.9, 0.3, 0.2, 0.4), stated(0.2, 0.5, 0.9), bags=3)
    expected = [
        s * math.log(s / p) + (1 - s) * math.log((1 - s) / (1 - p)) for s, p in ((0.2, 0.3), (0.5, 0.6), (0.9, 0.3))
    ]
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_pure_bags_are_finite_and_right():
    """0 log 0 is 0, and a share that is said to be impossible costs much but not everything."""
    for dtype in (torch.float32, torch.float64):
        sure = torch.tensor([[50.0, -50.0]] * 2 + [[-50.0, 50.0]] * 2, dtype=dtype).requires_grad_()
        assert label_proportions(sure, stated(0, 1).to(dtype)).abs() < 1e-5
        wrong = label_proportions(sure, stated(1, 0).to(dtype))
        assert 10 < wrong < 20 and torch.autograd.grad(wrong, sure)[0].isfinite().all()


def test_proportions_are_smallest_at_the_true_model_and_the_true_shares():
    shares, slopes = (0.1, 0.6), torch.linspace(-4, 4, 17).tolist()
    x, y = separable(shares), stated(*shares, size=200)
    values = [label_proportions(logistic(slope, x), y).item() for slope in slopes]
    assert values == sorted(values, reverse=True) and values[-1] < 1e-4 < 0.5 < values[0]
    offsets = (-0.09, -0.05, -0.01, 0.0, 0.01, 0.05, 0.09)
    values = [label_proportions(logistic(4, x), y + offset).item() for offset in offsets]
    assert values[3] == min(values) < 0.1 * sorted(values)[1]


def test_descending_proportions_finds_the_classes():
    x, slope = separable((0.3, 0.5)), torch.zeros((), dtype=torch.float64, requires_grad=True)
    y = stated(0.3, 0.5, size=200)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(label_proportions(logistic(slope, x), y), slope)
        slope = (slope - 2 * gradient).detach().requires_grad_()
    assert slope > 0.5 and losses.accuracy(logistic(slope, x), (x > 0).long()) == 1


def test_a_constant_solves_one_bag_and_not_two():
    constants = [outputs(*[share] * 4) for share in torch.linspace(0.05, 0.95, 19).tolist()]
    one = [label_proportions(constant, stated(0.3, size=4), bags=1).item() for constant in constants]
    assert min(one) == one[5] == pytest.approx(0, abs=1e-12)
    same = [label_proportions(constant, stated(0.3, 0.3)).item() for constant in constants]
    assert min(same) == pytest.approx(0, abs=1e-12)
    assert min(label_proportions(constant, stated(0.3, 0.7)).item() for constant in constants) > 0.05


# ---------------------------------------- classification without labels


@pytest.mark.parametrize("shares", [(0.2, 0.8), (0.8, 0.2), (0.4, 0.41), (0.0, 1.0)])
def test_the_mixture_loss_is_the_cross_entropy_of_the_bag(shares):
    probabilities = (0.1, 0.6, 0.3, 0.25)
    above = [float(share == max(shares)) for share in shares for _ in range(2)]
    expected = -sum(math.log(p if one else 1 - p) for p, one in zip(probabilities, above, strict=True)) / 4
    for dtype in (torch.float32, torch.float64):
        found = mixture(outputs(*probabilities).to(dtype), stated(*shares).to(dtype)).item()
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_mixture_loss_sees_only_which_share_is_larger():
    given = outputs(0.1, 0.6, 0.3, 0.9).requires_grad_()
    values = [mixture(given, stated(*shares)) for shares in ((0.2, 0.8), (0.3, 0.5), (0.15, 0.16))]
    gradients = [torch.autograd.grad(value, given)[0] for value in values]
    assert all(torch.equal(value, values[0]) for value in values)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert not torch.isclose(mixture(given, stated(0.8, 0.2)), values[0])


def test_what_tells_mixtures_apart_ranks_the_classes():
    x, y = separable((0.3, 0.6)), stated(0.3, 0.6, size=200)
    values = {slope: mixture(logistic(slope, x), y).item() for slope in (-0.3, -0.1, 0.0, 0.1, 0.3)}
    assert values[0.0] == pytest.approx(math.log(2)) and min(values, key=values.get) > 0


# ---------------------------------------- derivatives


def case(name, loss, steps=2):
    """A learner with meta-parameters and three tasks of two bags of four; everything in float64, nothing near zero."""
    model, shape = MODELS[name]
    draws = generator(4)
    learner = GradientDescent(model, loss, 0.5, steps, outer_loss=losses.cross_entropy)
    theta = {
        key: value + 0.5 * torch.randn(value.shape, generator=draws, dtype=torch.float64)
        for key, value in learner.init(draws, torch.float64).items()
    }
    x = torch.randn(2, len(SHARES), 8, *shape, generator=draws, dtype=torch.float64)
    if name == "particles":
        x[..., 0] = x[..., 0].softmax(-1)
    labels = torch.arange(2).repeat_interleave(4).expand(len(SHARES), 8)
    return learner, theta, Tasks(Examples(x[0], SHARES.repeat_interleave(4, 1)), Examples(x[1], labels))


@pytest.mark.parametrize("loss", [label_proportions, mixture])
@pytest.mark.parametrize("name", MODELS)
def test_the_meta_gradient_through_unlabelled_bags(name, loss):
    learner, theta, tasks = case(name, loss)
    gradient, values = maml(learner, theta, tasks)
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta)) <= 1e-6
    unadapted, before = maml(learner.replace(steps=0), theta, tasks)
    assert not torch.allclose(values, before, rtol=1e-3) and error(gradient, unadapted) > 1e-2


def test_the_losses_of_many_tasks_are_those_of_each():
    draws = generator(0)
    logits = torch.randn(3, 8, 2, generator=draws, dtype=torch.float64)
    y = SHARES.repeat_interleave(4, 1)
    for loss in (label_proportions, mixture):
        together = torch.func.vmap(loss)(logits, y)
        torch.testing.assert_close(together, torch.stack([loss(*one) for one in zip(logits, y, strict=True)]))
    above = torch.tensor([[0, 1], [1, 0], [0, 1]]).repeat_interleave(4, 1)
    expected = torch.stack([functional.cross_entropy(*one) for one in zip(logits, above, strict=True)])
    torch.testing.assert_close(together, expected)
