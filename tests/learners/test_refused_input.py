"""Attributes of learners are honoured or refused, nonsense is refused in one sentence, and Adam has a derivative."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused
from torch.func import vmap

from helpers import losses
from helpers.estimators.explicit import chunked, combination, fomaml, maml
from helpers.estimators.implicit import ImplicitGradient
from helpers.estimators.nested import MetaLearner, evaluations
from helpers.lab.evaluation import adaptation_curve
from helpers.learners.descent import CARRIED, GradientDescent
from helpers.learners.feedforward import Recurrent
from helpers.learners.learned import LearnedDescent
from helpers.learners.minibatch import MinibatchAdam, MinibatchDescent
from helpers.learners.proximal import HessianFree, Proximal
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, error, objective
from helpers.optimizers.recurrent import RecurrentRule
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks

NETWORK, MSE = MLP((1, 6, 1), activation="tanh", scale=0.5), losses.mean_squared_error
PLAIN = GradientDescent(NETWORK, MSE, 0.05, 2)
THETA = NETWORK.init(generator(0))
TASKS = Sinusoids(6, 6).sample(3, generator(1))
CUT = Tasks(minibatches(TASKS.support, 2, 3, generator(2)), TASKS.query)


class Strict:
    """A model that refuses what is not its own."""

    def init(self, generator, dtype=torch.float32):
        return NETWORK.init(generator, dtype)

    def __call__(self, params, x):
        assert params.keys() == THETA.keys()
        return NETWORK(params, x)

    def is_adapted(self, name):
        return True


class Frozen(Strict):
    def is_adapted(self, name):
        return False


@pytest.mark.parametrize("change", [
    {"steps": -1}, {"steps": 1.5}, {"steps": None}, {"steps": True}, {"rate": -1.0}, {"rate": math.nan},
    {"rate": math.inf}, {"rate": "x"}, {"query_sets": 0}, {"query_sets": 1.5},
])  # fmt: skip
def test_attributes_are_checked_when_a_learner_is_made(change):
    name = next(iter(change)).replace("_", " ").split()[0]
    assert name in refused(lambda: PLAIN.replace(**change))


def test_attributes_that_a_learner_has_no_use_for_are_refused():
    adam, rule = MinibatchAdam(NETWORK, MSE, 0.01), RecurrentRule(2)
    assert "learn_rates" in refused(lambda: adam.replace(learn_rates=True))
    for change in ({"decay": 1.0}, {"decay": -0.1}, {"decay": math.nan}, {"epsilon": 0.0}):
        assert next(iter(change)) in refused(lambda change=change: adam.replace(**change))
    for change in ({"strength": math.nan}, {"strength": math.inf}, {"strength": -1.0}, {"learn_strength": "x"}):
        assert "strength" in refused(lambda change=change: Proximal(NETWORK, MSE, 0.1, **change))
    for change in ({"learn_rates": True}, {"first_order": True}):
        assert "Proximal" in refused(lambda change=change: HessianFree(NETWORK, MSE, 0.1, **change))
    for change in ({"solver_steps": 0}, {"damping": -1.0}, {"lengths": ()}, {"lengths": (1.0, math.nan)}):
        refused(lambda change=change: HessianFree(NETWORK, MSE, 0.1, **change))
    for change in ({}, {"learn_start": True, "rule": rule}):
        assert "learn_rates" in refused(
            lambda change=change: LearnedDescent(NETWORK, MSE, 0.1, learn_rates=True, **change)
        )
    assert "inner learner" in refused(lambda: MetaLearner(NETWORK, 0.1))
    assert "rate" in refused(lambda: MetaLearner(PLAIN, math.nan))


def test_the_steps_of_a_minibatch_learner_count():
    learner = MinibatchDescent(NETWORK, MSE, 0.05)
    values = [maml(learner.replace(steps=steps), THETA, CUT)[1] for steps in (1, 2, 3, None)]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    assert torch.equal(values[2], values[3])
    assert "minibatches" in refused(lambda: maml(learner.replace(steps=4), THETA, CUT))
    assert "steps" in refused(lambda: evaluations(learner)) and evaluations(learner.replace(steps=2))[2] == 2


def test_adam_honours_first_order():
    learner = MinibatchAdam(NETWORK, MSE, 0.001, carry=False)
    exact, first = (estimator(learner, THETA, CUT)[0] for estimator in (maml, fomaml))
    assert any((exact[name] - first[name]).norm() > 1e-3 * exact[name].norm() for name in THETA)


def test_a_combination_goes_the_learners_own_way():
    sgd, adam = (
        kind(NETWORK, MSE, 0.01, **s) for kind, s in ((MinibatchDescent, {}), (MinibatchAdam, {"carry": False}))
    )
    one, other = (combination((1.0, 1.0, 1.0))(learner, THETA, CUT)[0] for learner in (sgd, adam))
    assert not any(torch.equal(one[name], other[name]) for name in THETA)
    assert "weights" in refused(lambda: combination((1.0,) * 4)(sgd, THETA, CUT))


def test_the_model_sees_its_own_parameters_alone():
    adam = MinibatchAdam(Strict(), MSE, 0.01)
    adam.task_loss(adam.init(generator(0)), Tasks(*(Examples(e.x[0], e.y[0]) for e in CUT)))
    ruled = LearnedDescent(Strict(), MSE, 0.01, 2, learn_start=True, rule=RecurrentRule(2))
    theta = ruled.init(generator(0))
    maml(ruled, theta, TASKS)
    for transductive in (True, False):
        adaptation_curve(ruled, theta, TASKS, (0, 2), MSE, transductive)


# ---------------------------------------- Adam


def test_adam_has_a_derivative_where_a_gradient_is_0():
    """Two hidden units are dead, so that the inner gradients of their weights are exactly 0."""
    network = MLP((1, 4, 1), scale=0.5)
    learner = MinibatchAdam(network, MSE, 0.01, carry=False)
    theta = network.init(generator(3), torch.float64)
    theta["linear1.bias"] = torch.tensor([-50.0, 0.3, -50.0, 0.4], dtype=torch.float64)
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 2, 3, 1)
    tasks = Tasks(Examples(x, x.sin() + 0.3), Examples(x[:, 0], x[:, 0].cos()))
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, tasks.support)
    assert (phi[f"{CARRIED}square:linear1.bias"][:, [0, 2]] == 0).all()
    gradient, _ = maml(learner, theta, tasks)
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta, everywhere=True)) < 1e-6


def test_adam_adds_epsilon_before_the_correction():
    """As TensorFlow does: at step t its ε̂ is an ε of ε̂ / √(1 − β₂ᵗ) to torch, which shows in small gradients."""
    learner = MinibatchAdam(NETWORK, MSE, 0.01, carry=False)
    for size in (1e-3, 1e-5, 1e-6, 1e-7):
        g = {name: torch.full_like(value.double(), size) for name, value in THETA.items()}
        theta = {name: torch.zeros_like(value).double() for name, value in THETA.items()}
        moved = -learner.move(theta, learner.start(theta), g)["linear2.bias"].item()
        assert math.isclose(moved, 0.01 * size / (size + 1e-8 / 0.001**0.5), rel_tol=1e-9)


# ---------------------------------------- nonsense


def test_estimators_refuse_nonsense():
    none = Examples(TASKS.query.x[:, :0], TASKS.query.y[:, :0])
    for tasks in (
        None,
        TASKS.support.x,
        Tasks(*(Examples(e.x[:0], e.y[:0]) for e in TASKS)),
        Tasks(TASKS.support, none),
    ):
        refused(lambda tasks=tasks: maml(PLAIN, THETA, tasks))
        refused(lambda tasks=tasks: chunked(maml, 2)(PLAIN, THETA, tasks))
    fewer = Examples(TASKS.query.x[:2], TASKS.query.y[:2])
    assert "equal length" in refused(lambda: maml(PLAIN, THETA, Tasks(TASKS.support, fewer)))
    assert "empty" in refused(lambda: maml(PLAIN, {}, TASKS))
    assert "linear1.weight" in refused(
        lambda: maml(PLAIN, {n: THETA[n] for n in THETA if n != "linear1.weight"}, TASKS)
    )
    assert "MLP" in refused(lambda: maml(NETWORK, THETA, TASKS))
    assert "query" in refused(lambda: maml(PLAIN.replace(query_sets=4), THETA, TASKS))
    assert "adapt" in refused(lambda: maml(GradientDescent(Frozen(), MSE, 0.1), THETA, TASKS))
    assert "adapt" in refused(lambda: ImplicitGradient()(Proximal(Frozen(), MSE, 0.1), THETA, TASKS))
    assert "pull" in refused(lambda: ImplicitGradient()(PLAIN, THETA, TASKS))
    for size in (0, -1, 1.5):
        assert "at a time" in refused(lambda size=size: chunked(maml, size))


def test_curves_refuse_nonsense():
    reader = Recurrent(MLP((1, 3)), width=3)
    assert "Recurrent" in refused(lambda: adaptation_curve(reader, reader.init(generator(0)), TASKS, (0, 1), MSE))
    assert "at least one" in refused(lambda: adaptation_curve(PLAIN, THETA, TASKS, (), MSE))
    empty = Tasks(*(Examples(e.x[:0], e.y[:0]) for e in TASKS))
    assert "one task" in refused(lambda: adaptation_curve(PLAIN, THETA, empty, (0,), MSE))
    assert "whole number" in refused(lambda: adaptation_curve(PLAIN, THETA, TASKS, (0, 1.5), MSE))
    assert "at a time" in refused(lambda: adaptation_curve(PLAIN, THETA, TASKS, (0, 1), MSE, chunk=0))
    learner = MinibatchDescent(NETWORK, MSE, 0.05)
    assert "minibatches" in refused(lambda: adaptation_curve(learner, THETA, CUT, (0, 1), MSE))
    plain, same = (adaptation_curve(one, THETA, TASKS, (0, 2), MSE) for one in (PLAIN, learner))
    assert torch.equal(plain, same), "it sees the whole support set at every step"


def test_differences_refuse_what_they_cannot_resolve():
    assert "float64" in refused(lambda: central_differences(lambda t: objective(PLAIN, t, TASKS), THETA))
