"""Learners that do not descend, learned rules and architectures: central differences, cases by hand, limits."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, TASKS, error
from refusals import refused
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.estimators.explicit import maml
from helpers.lab.evaluation import adaptation_curve
from helpers.learners.descent import STATE, GradientDescent
from helpers.learners.feedforward import AsItIs, Neighbours, Prototypes, Recurrent, one_hot, squared_distances
from helpers.learners.learned import LearnedDescent, started
from helpers.losses import LearnedLoss
from helpers.models.convnet import ConvNet
from helpers.models.mixed import ACTIVATIONS, SKIP, MixedConvNet, MixedMLP, decided
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, objective
from helpers.numerics.tracing import traced
from helpers.optimizers.recurrent import RULE, RecurrentRule
from helpers.runtime import generator
from helpers.types import Examples, Tasks

DOUBLE = torch.float64


def spread(theta, draws):
    """Everything away from zero: a missing term would show."""
    return {n: v + 0.3 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for n, v in theta.items()}


def drawn(family, n=6):
    """Tasks of one of FAMILIES, every class in every support set."""
    f, draws = FAMILIES[family], generator(11)
    tasks = Tasks(f.examples(n, draws), f.examples(5, draws))
    if f.loss is losses.cross_entropy:
        tasks.support.y[:] = torch.arange(n) % 3
    return tasks, draws


AMORTIZED = {
    "recurrent-mlp": (Recurrent(MLP((2, 4), scale=None), width=4, hidden=3), "mlp"),
    "recurrent-conv": (Recurrent(ConvNet(4, filters=2, blocks=2), ways=3, width=4, hidden=3), "conv"),
    "prototypes-mlp": (Prototypes(MLP((3, 5, 4), scale=None), ways=3), "mlp-norm"),
    "prototypes-conv": (Prototypes(ConvNet(4, filters=2, blocks=2), ways=3), "conv"),
    "neighbours-mlp": (Neighbours(MLP((2, 4), scale=None)), "mlp"),
    "neighbours-conv": (Neighbours(ConvNet(4, filters=2, blocks=2), ways=3), "conv"),
}


@pytest.mark.parametrize("name", AMORTIZED)
def test_meta_gradients_of_learners_that_do_not_descend(name):
    learner, family = AMORTIZED[name]
    tasks, draws = drawn(family)
    theta = spread(learner.init(draws, DOUBLE), draws)
    gradient, values = maml(learner, theta, tasks)
    reference = central_differences(lambda t: objective(learner, t, tasks), theta)
    if "features.head.bias" in theta and name != "recurrent-conv":  # moves all features alike: distances stay
        assert gradient.pop("features.head.bias").norm() < 1e-9 and reference.pop("features.head.bias").norm() < 1e-7
    if name in ("prototypes-mlp", "neighbours-mlp"):
        last = max(n for n in theta if n.endswith(".bias"))
        assert gradient.pop(last).norm() < 1e-9 and reference.pop(last).norm() < 1e-7
    assert error(gradient, reference) <= 1e-6
    one_by_one = torch.stack([learner.task_loss(theta, tree_map(lambda t, i=i: t[i], tasks)) for i in range(TASKS)])
    torch.testing.assert_close(values, one_by_one)


def test_prototypes_by_hand():
    learner = Prototypes(AsItIs(), ways=2)
    support = Examples(torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
    phi = learner.adapt({}, support)
    assert phi["memory"].tolist() == [[1.0, 0.0], [5.0, 5.0]]
    assert learner.predict(phi, torch.tensor([[1.0, 2.0]])).tolist() == [[-4.0, -25.0]]
    # Equal prototypes cannot be told apart: the loss is that of a coin.
    same = Examples(torch.zeros(2, 2), torch.tensor([0, 1]))
    loss = learner.task_loss({}, Tasks(same, Examples(torch.ones(1, 2), torch.tensor([1]))))
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-6)


def test_one_shot_prototypes_are_nearest_neighbours():
    draws = generator(0)
    x, y = torch.randn(4, 3, generator=draws), torch.arange(4)
    queries = torch.randn(20, 3, generator=draws)
    answers = []
    for learner in (Prototypes(AsItIs(), ways=4), Neighbours(AsItIs(), ways=4, sharpness=math.inf)):
        answers.append(learner.predict(learner.adapt({}, Examples(x, y)), queries).argmax(-1))
    assert torch.equal(*answers)


def test_neighbours_by_hand():
    support = Examples(torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0], [20.0]]))
    queries = torch.tensor([[0.5], [0.4], [7.0]])
    hard = Neighbours(AsItIs(), sharpness=math.inf)
    assert hard.predict(hard.adapt({}, support), queries).flatten().tolist() == [15.0, 10.0, 20.0]  # a tie is shared
    soft = Neighbours(AsItIs(), sharpness=2.0)
    weight = 1 / (1 + math.exp(2 * (0.4**2 - 0.6**2)))  # of the nearer
    found = soft.predict(soft.adapt({}, support), queries)[1].item()
    assert math.isclose(found, 10 * weight + 20 * (1 - weight), rel_tol=1e-5)


def test_the_reader_is_pytorchs_gru():
    learner = Recurrent(AsItIs(), ways=0, width=2, hidden=5)
    draws = generator(1)
    theta, x, y = learner.init(draws, DOUBLE), torch.randn(7, 2, dtype=DOUBLE), torch.randn(7, 1, dtype=DOUBLE)
    cell = torch.nn.GRU(3, 5, dtype=DOUBLE)
    with torch.no_grad():
        for theirs, ours in (("weight_ih_l0", "input.weight"), ("weight_hh_l0", "hidden.weight"),
                             ("bias_ih_l0", "input.bias"), ("bias_hh_l0", "hidden.bias")):  # fmt: skip
            getattr(cell, theirs).copy_(theta[f"reader.{ours}"].mT if "weight" in ours else theta[f"reader.{ours}"])
        last = cell(torch.cat([x, y], 1)[:, None])[1].flatten()
    torch.testing.assert_close(learner.adapt(theta, Examples(x, y))["memory"], last)
    # The state is all that is kept of the support set.
    assert set(learner.adapt(theta, Examples(x, y))) - set(theta) == {"memory"}


def test_reading_order_matters_to_the_reader_alone():
    draws = generator(2)
    x, y = torch.randn(6, 2, generator=draws), torch.randn(6, 1, generator=draws)
    back, queries = Examples(x.flip(0), y.flip(0)), torch.randn(4, 2, generator=draws)
    for learner, same in ((Recurrent(AsItIs(), width=2), False), (Neighbours(AsItIs()), True)):
        theta = learner.init(draws)
        one, other = (learner.predict(learner.adapt(theta, s), queries) for s in (Examples(x, y), back))
        assert torch.allclose(one, other, atol=1e-6) == same


def test_helpers_of_distances_and_labels():
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(squared_distances(a, b), torch.cdist(a, b).square(), rtol=1e-4, atol=1e-4)
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert "ways" in refused(lambda: Prototypes(AsItIs()))
    assert "ways" in refused(lambda: Prototypes(AsItIs(), ways=2.5)) and "ways" in refused(
        lambda: Neighbours(AsItIs(), -1)
    )
    for name in ("width", "hidden"):
        assert name in refused(lambda name=name: Recurrent(AsItIs(), **{name: 0}))
    assert all("sharpness" in refused(lambda s=s: Neighbours(AsItIs(), sharpness=s)) for s in (0, -1.0, math.nan))
    learner = Recurrent(AsItIs(), width=3)
    examples = Examples(torch.zeros(4, 2), torch.zeros(4, 1))
    assert "give width=2" in refused(lambda: learner.adapt(learner.init(generator(0)), examples))


# ---------------------------------------- learned rules


def rule_case(family, steps, first_order=False, **settings):
    f = FAMILIES[family]
    tasks, draws = drawn(family)
    tasks = started(f.model, tasks, draws)
    tasks = tasks._replace(start=spread(tasks.start, draws))
    learner = LearnedDescent(
        f.model, f.loss, f.rate, steps, first_order=first_order, rule=RecurrentRule(hidden=3, scale=0.3), **settings
    )
    return learner, spread(learner.init(draws, DOUBLE), draws), tasks


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_meta_gradient_of_a_learned_rule(family, steps):
    learner, theta, tasks = rule_case(family, steps)
    gradient, _ = maml(learner, theta, tasks)
    assert gradient.keys() == theta.keys() and all(name.startswith(RULE) for name in theta)
    reference = central_differences(lambda t: objective(learner, t, tasks), theta)
    if steps == 1:  # nothing is remembered yet: neither the state's weights nor the forget gate act
        assert (
            not gradient.pop(f"{RULE}hidden.weight").any() and reference.pop(f"{RULE}hidden.weight").abs().max() < 1e-9
        )
    assert error(gradient, reference) <= 1e-6


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("loss", [True, False])
def test_loss_rule_and_start_together(loss, start):
    body = LearnedLoss(MLP((2, 4, 1), scale=None, activation="elu"))
    learner, theta, tasks = rule_case("mlp", 2, learn_start=start, learned=body if loss else None)
    gradient, _ = maml(learner, theta, tasks)
    assert any(n.startswith("loss:") for n in theta) == loss and ("linear1.weight" in theta) == start
    assert error(gradient, central_differences(lambda t: objective(learner, t, tasks), theta)) <= 1e-6


def test_first_order_rule_keeps_the_inner_gradients_constant():
    learner, theta, tasks = rule_case("mlp", 3)
    exact, _ = maml(learner, theta, tasks)
    frozen, _ = maml(learner.replace(first_order=True), theta, tasks)
    one_step = [maml(l.replace(steps=1), theta, tasks)[0] for l in (learner, learner.replace(first_order=True))]
    assert any(not torch.allclose(exact[n], frozen[n]) for n in theta)
    for name in theta:  # the gradient at a given start does not depend on the rule, so one step is exact
        torch.testing.assert_close(one_step[0][name], one_step[1][name])


def test_rule_by_hand():
    """One unit, everything zero but what makes the update scale · w · σ(0) · tanh(σ(0) · tanh(sign))."""
    rule = RecurrentRule(hidden=1, scale=0.1)
    theta = {name: torch.zeros_like(value) for name, value in rule.init(generator(0)).items()}
    theta[f"{RULE}input.weight"][1, 3] = 1.0  # the candidate sees the sign
    theta[f"{RULE}head.weight"][0] = -2.0
    gradient = torch.tensor([[4.0, -4.0], [1e-9, 0.0]])
    update, memory = rule(theta, gradient, rule.empty(gradient))
    step = -0.2 * 0.5 * math.tanh(0.5 * math.tanh(1.0))
    assert torch.allclose(update[0], torch.tensor([step, -step])) and memory.shape == (2, 4, 1)
    assert update[1, 1] == 0 and abs(update[1, 0]) < abs(step) * 1e-3  # below e^-10 a gradient counts as it is


def test_rule_is_the_same_for_every_coordinate():
    rule, draws = RecurrentRule(), generator(3)
    theta, g = rule.init(draws), torch.randn(3, 4, generator=draws)
    order = torch.randperm(12, generator=draws)
    update, _ = rule(theta, g, rule.empty(g))
    turned, _ = rule(theta, g.flatten()[order], rule.empty(g))
    torch.testing.assert_close(turned, update.flatten()[order])


def test_curve_of_started_tasks_and_memory_in_phi():
    learner, theta, tasks = rule_case("mlp", 2)
    curve = adaptation_curve(learner, theta, tasks, [0, 2], losses.mean_squared_error)
    torch.testing.assert_close(curve[1], vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks))
    one = tree_map(lambda t: t[0], tasks)
    phi = learner.adapt(theta, one.support, start=learner.begin(theta, one))
    assert phi[STATE].shape == (2, sum(v[0].numel() for v in tasks.start.values()), 3)
    traced_gradient, _ = traced(maml)(learner, theta, tasks)
    plain, _ = maml(learner, theta, tasks)
    for name in theta:
        torch.testing.assert_close(traced_gradient[name], plain[name])


# ---------------------------------------- architectures

MIXED = {"mlp": MixedMLP((2, 4, 4, 1)), "conv": MixedConvNet(3, filters=2, blocks=2)}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", MIXED)
def test_meta_gradient_of_a_choice(family, steps):
    f, model = FAMILIES[family], MIXED[family]
    tasks, draws = drawn(family)
    tasks = started(model, tasks, draws)
    learner = LearnedDescent(model, f.loss, f.rate, steps, learn_frozen=True)
    theta = spread(learner.init(draws, DOUBLE), draws)
    choices = {"choice1", "choice2"}
    assert choices <= theta.keys() and all(not model.is_adapted(name) for name in theta)
    gradient, _ = maml(learner, theta, tasks)
    reference = central_differences(lambda t: objective(learner, t, tasks), theta)
    assert error(gradient, reference) <= 1e-6


def test_a_decided_network_is_the_plain_one():
    model, plain, draws = MixedMLP((2, 4, 4, 1)), MLP((2, 4, 4, 1), scale=None), generator(4)
    params, x = model.init(draws), torch.randn(5, 2, generator=draws)
    params["choice1"][0] = params["choice2"][0] = 0.1
    torch.testing.assert_close(model(decided(params), x), plain(params, x))
    params["choice2"][model.options(2).index(SKIP)] = 0.2
    short = MLP((2, 4, 1), scale=None)
    fewer = {"linear2.weight": params["linear3.weight"], "linear2.bias": params["linear3.bias"]}
    torch.testing.assert_close(model(decided(params), x), short(params | fewer, x))
    conv, images = MixedConvNet(3, filters=2), torch.rand(4, 1, 28, 28, generator=draws)
    params = conv.init(draws)
    for layer in range(1, 5):
        params[f"choice{layer}"][0] = 1.0
    torch.testing.assert_close(conv(decided(params), images), ConvNet(3, filters=2)(params, images))


def test_what_layers_may_be():
    assert MixedMLP((1, 40, 40, 1)).options(1) == tuple(ACTIVATIONS)
    assert MixedMLP((1, 40, 40, 1)).options(2)[-1] == SKIP
    assert "gelu" in refused(lambda: MixedMLP((1, 4, 1), activations=("gelu",)))
    assert "images" in refused(lambda: MixedConvNet(3)({}, torch.zeros(2, 3, 8, 8)))


def test_descent_without_anything_learned_is_gradient_descent_from_a_given_start():
    f = FAMILIES["mlp"]
    tasks, draws = drawn("mlp")
    tasks = started(f.model, tasks, draws)
    plain = GradientDescent(f.model, f.loss, f.rate, 3)
    learner = LearnedDescent(f.model, f.loss, f.rate, 3)
    assert learner.init(draws) == {}
    start = {name: value[0] for name, value in tasks.start.items()}
    torch.testing.assert_close(
        vmap(learner.task_loss, in_dims=(None, 0))({}, tasks),
        vmap(plain.task_loss, in_dims=(None, 0))(start, Tasks(*tasks[:2])),
    )
