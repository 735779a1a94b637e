"""Learned losses: their meta-gradient against central differences, by hand, and task by task."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, TASKS, error
from refusals import refused
from torch.func import grad

from helpers import losses
from helpers.estimators.explicit import chunked, maml
from helpers.learners.descent import GradientDescent
from helpers.learners.learned import LossDescent, started
from helpers.losses import LOSS, LearnedLoss
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, objective
from helpers.numerics.tracing import traced
from helpers.runtime import generator
from helpers.types import Examples, Started, Tasks


def case(family, steps=1, hidden=(4, 3), features=None, bias=True, activation="elu", positive=True, **settings):
    """A learner with ψ and started tasks, all in float64 and nothing near zero."""
    f, draws = FAMILIES[family], generator(3)
    tasks = Tasks(f.examples(6, draws), f.examples(5, draws))
    tasks = started(f.model, tasks, draws)
    noise = {n: 0.5 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for n, v in tasks.start.items()}
    tasks = tasks._replace(start={name: value + noise[name] for name, value in tasks.start.items()})
    classes = f.loss is losses.cross_entropy
    features = features or (losses.probabilities_and_label if classes else losses.prediction_and_target)
    width = 6 if classes else 2 if features is losses.prediction_and_target else 4
    body = MLP((width, *hidden, 1), scale=None, activation=activation, bias=bias)
    learned = LearnedLoss(body, features, positive)
    learner = LossDescent(f.model, f.loss, 5 * f.rate, steps, learned=learned, **settings)
    theta = learner.init(draws, torch.float64)
    noise = {n: 0.5 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for n, v in theta.items()}
    theta = {name: value + noise[name] for name, value in theta.items()}
    return learner, theta, tasks


def unit(gradient):
    """The direction of the whole gradient."""
    size = sum(g.square().sum() for g in gradient.values()).sqrt()
    return {name: g / size for name, g in gradient.items()}


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_gradient_of_the_task_loss_after_adaptation(family, steps):
    learner, theta, tasks = case(family, steps)
    gradient, _ = maml(learner, theta, tasks)
    assert gradient.keys() == theta.keys() and all(name.startswith(LOSS) for name in theta)
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta)) <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": False, "activation": "relu"},
        {"features": losses.input_prediction_and_target, "positive": False},
        {"transform": unit},
        {"learn_rates": False, "activation": "tanh", "hidden": ()},
    ],
    ids=["relu-no-bias", "input-linear-out", "transform", "linear"],
)
def test_every_kind_of_loss_network(settings):
    learner, theta, tasks = case("mlp", 3, **settings)
    gradient, _ = maml(learner, theta, tasks)
    constant = {}
    if not learner.learned.positive:  # a constant is no part of a loss; behind a softplus it is
        last = f"{LOSS}linear{len(learner.learned.body.sizes) - 1}.bias"
        assert gradient.pop(last).item() == 0
        constant = {last: theta.pop(last)}
    reference = central_differences(lambda t: objective(learner, t | constant, tasks), theta)
    assert error(gradient, reference) <= 1e-6


def test_a_learned_start_beside_the_loss():
    learner, theta, tasks = case("mlp", 2, learn_start=True)
    tasks = Tasks(tasks.support, tasks.query)
    gradient, _ = maml(learner, theta, tasks)
    assert "linear1.weight" in gradient and any(name.startswith(LOSS) for name in gradient)
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta)) <= 1e-6


def test_one_step_by_hand():
    """f(x) = w x and the loss M = ψ ŷ: the step is −α ψ mean(x), whatever y, and the meta-gradient follows."""
    learned = LearnedLoss(MLP((2, 1), bias=False), positive=False)
    learner = LossDescent(MLP((1, 1), bias=False), losses.mean_squared_error, 0.1, learned=learned)
    draws = generator(0)
    x, y = (torch.randn(1, 4, 1, generator=draws, dtype=torch.float64) for _ in range(2))
    w, psi = torch.tensor(0.7, dtype=torch.float64), torch.tensor([[1.3], [0.4]], dtype=torch.float64)
    tasks = Started(Examples(x, y), Examples(x, y), {"linear1.weight": w.view(1, 1, 1)})
    gradient, _ = maml(learner, {LOSS + "linear1.weight": psi}, tasks)
    moved = w - 0.1 * psi[0, 0] * x.mean()
    by_w = 2 * ((moved * x - y) * x).mean()
    torch.testing.assert_close(gradient[LOSS + "linear1.weight"][0, 0], -0.1 * x.mean() * by_w)
    assert gradient[LOSS + "linear1.weight"][1, 0] == 0  # what does not depend on the prediction moves nothing


def test_with_the_tasks_own_loss_for_features_it_is_gradient_descent():
    """A loss network that passes (ŷ − y)² through is the mean squared error, and adapts as it does."""

    def squared_error(x, outputs, y):
        return (outputs - y).square()

    learner, _, tasks = case("mlp", 3)
    exact = learner.replace(learned=LearnedLoss(MLP((1, 1), bias=False), squared_error, positive=False))
    theta = {LOSS + "linear1.weight": torch.ones(1, 1, dtype=torch.float64)}
    plain = GradientDescent(learner.model, learner.loss, learner.rate, 3)
    for t in range(TASKS):
        start = {name: value[t] for name, value in tasks.start.items()}
        support = Examples(tasks.support.x[t], tasks.support.y[t])
        ours, theirs = exact.adapt(theta, support, start=start), plain.adapt(start, support)
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-12) for name in theirs)


@pytest.mark.parametrize("fast", [traced(maml), chunked(maml, 2)], ids=["traced", "chunked"])
def test_faster_forms_change_nothing(fast):
    learner, theta, tasks = case("mlp", 2)
    expected, values = maml(learner, theta, tasks)
    gradient, same = fast(learner, theta, tasks)
    assert error(gradient, expected) <= 1e-12
    torch.testing.assert_close(same, values, rtol=1e-12, atol=0)


def test_tasks_and_initialisations_at_once_are_the_loop_over_them():
    learner, theta, plain = case("mlp", 2)
    tasks = started(learner.model, Tasks(plain.support, plain.query), generator(5), count=4)
    assert len(tasks.support.x) == 4 * TASKS
    for name, value in tasks.start.items():  # all tasks have the same four starts, and these differ
        grouped = value.unflatten(0, (TASKS, 4))
        assert torch.equal(grouped[0], grouped[2]), name
        assert name.endswith("bias") or not torch.equal(grouped[0, 0], grouped[0, 1])
    _, values = maml(learner, theta, tasks)
    for t in (0, 5, 11):
        one = Started(
            Examples(*(v[t] for v in tasks.support)),
            Examples(*(v[t] for v in tasks.query)),
            {name: value[t] for name, value in tasks.start.items()},
        )
        assert torch.equal(one.support.x, plain.support.x[t // 4])
        torch.testing.assert_close(learner.task_loss(theta, one), values[t], rtol=1e-12, atol=0)


def test_the_loss_of_each_example_and_their_mean():
    learner, theta, tasks = case("mlp")
    x, y = tasks.support.x[0], tasks.support.y[0]
    outputs = torch.randn(6, 1, generator=generator(1), dtype=torch.float64)
    each = learner.learned.each(theta, x, outputs, y)
    assert each.shape == (6,) and (each > 0).all()
    torch.testing.assert_close(each.mean(), learner.learned(theta, x, outputs, y))
    alone = grad(lambda o: learner.learned.each(theta, x, o, y)[2])(outputs)
    assert alone[2] != 0 and alone[[0, 1, 3, 4, 5]].abs().max() == 0  # an example's loss is its own


def test_refusals():
    assert "one number" in refused(lambda: LearnedLoss(MLP((2, 3, 2))))
    assert "learned=" in refused(lambda: LossDescent(MLP((1, 1)), losses.mean_squared_error, 0.1))
