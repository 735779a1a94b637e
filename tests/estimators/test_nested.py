"""Levels on levels: the third-level gradient against differences, closed forms and loops; families; the experiments."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from refusals import refused
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from helpers import losses
from helpers.estimators.explicit import fomaml, maml, reptile
from helpers.estimators.nested import MetaLearner, evaluations
from helpers.experiments import nested
from helpers.lab import training
from helpers.learners.descent import GradientDescent
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, error
from helpers.numerics.tracing import traced
from helpers.runtime import generator
from helpers.tasks.families import SPLITS, SinusoidFamilies
from helpers.types import Examples, Tasks


class Constant:
    """A network with one parameter, which is its output."""

    def init(self, generator, dtype=torch.float32):
        return {"c": torch.randn(1, generator=generator, dtype=dtype)}

    def __call__(self, params, x):
        return params["c"].expand(len(x), 1)

    def is_adapted(self, name):
        return True


def families_of(count, tasks, queries, examples=4, seed=0):
    """Random families in float64, not of any kind: ``[families, tasks, examples, 1]``."""
    draws = generator(seed)

    def half(tasks):
        def some():
            shape = (count, tasks, examples, 1)
            return Examples(*(torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(2)))

        return Tasks(some(), some())

    return Tasks(half(tasks), half(queries))


def case(steps=2, inner_steps=1, seed=0, activation="tanh", **settings):
    """A third-level learner on an MLP, θ with all entries random, and two families."""
    inner = GradientDescent(
        MLP((1, 4, 3, 1), activation=activation), losses.mean_squared_error, 0.1, inner_steps, **settings
    )
    draws = generator(seed + 1)
    theta = inner.init(draws, torch.float64)
    theta = {n: v + 0.5 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for n, v in theta.items()}
    return MetaLearner(inner, 0.2, steps), theta, families_of(2, 4, 3, seed=seed)


def objective(learner, theta, tasks):
    return vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks).mean()


# ---------------------------------------- the gradient


@pytest.mark.parametrize(
    ("steps", "inner_steps", "settings"),
    [
        (1, 1, {}), (2, 2, {}), (3, 1, {}), (2, 1, {"learn_rates": True}),
        (2, 1, {"activation": "elu"}), (2, 1, {"activation": "relu", "seed": 3}),
    ],
)  # fmt: skip
def test_third_level_is_the_gradient_of_its_objective(steps, inner_steps, settings):
    learner, theta, families = case(steps, inner_steps, **settings)
    gradient, values = maml(learner, theta, families)
    assert error(gradient, central_differences(lambda t: objective(learner, t, families), theta)) <= 1e-6
    torch.testing.assert_close(values.mean(), objective(learner, theta, families), rtol=1e-12, atol=0)


def test_families_are_mapped_as_a_loop_would():
    """Loops in place of every vmap, plain autograd in place of torch.func."""
    learner, theta, families = case(2)
    gradient, values = maml(learner, theta, families)
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}

    def task_loss(theta, task):
        model, loss = learner.inner.model, learner.inner.loss
        inner = torch.autograd.grad(
            loss(model(theta, task.support.x), task.support.y), list(theta.values()), create_graph=True
        )
        phi = {name: theta[name] - learner.inner.rate * g for name, g in zip(theta, inner, strict=True)}
        return loss(model(phi, task.query.x), task.query.y)

    def mean_loss(theta, tasks):
        each = [task_loss(theta, tree_map(lambda t, i=i: t[i], tasks)) for i in range(len(tasks.support.x))]
        return torch.stack(each).mean()

    looped = []
    for number in range(2):
        family, phi = tree_map(lambda t, number=number: t[number], families), theta
        for _ in range(learner.steps):
            outer = torch.autograd.grad(mean_loss(phi, family.support), list(phi.values()), create_graph=True)
            phi = {name: phi[name] - learner.rate * g for name, g in zip(phi, outer, strict=True)}
        looped.append(mean_loss(phi, family.query))
    torch.testing.assert_close(values, torch.stack(looped), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(torch.stack(looped).mean(), list(theta.values()))
    assert error(gradient, dict(zip(theta, expected, strict=True))) <= 1e-10


def test_zero_steps_of_meta_training_leave_the_mean_gradient_of_maml():
    learner, theta, families = case(0)
    gradient, _ = maml(learner, theta, families)
    flat = tree_map(lambda t: t.flatten(0, 1), families.query)
    expected, _ = maml(learner.inner, theta, flat)
    assert error(gradient, expected) <= 1e-12


def test_zero_inner_steps_leave_ordinary_maml():
    """Then a task is its query set, and a family is one large task with the examples of its tasks."""
    learner, theta, families = case(2, inner_steps=0)
    gradient, values = maml(learner, theta, families)
    plain = GradientDescent(learner.inner.model, learner.inner.loss, learner.rate, learner.steps)
    support, query = (tree_map(lambda t: t.flatten(1, 2), tasks.query) for tasks in families)
    expected, losses_ = maml(plain, theta, Tasks(support, query))
    assert error(gradient, expected) <= 1e-12
    torch.testing.assert_close(values, losses_, rtol=1e-12, atol=0)


def test_first_order_keeps_the_value_and_drops_the_highest_derivatives():
    learner, theta, families = case(2)
    gradient, values = maml(learner, theta, families)
    first, same = fomaml(learner, theta, families)
    torch.testing.assert_close(values, same, rtol=1e-12, atol=0)
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, families.support)
    at_the_end = vmap(grad(learner.query_loss))(phi, families.query)
    assert error(first, {name: g.mean(0) for name, g in at_the_end.items()}) <= 1e-12
    assert error(first, gradient) > 0.05


def test_reptile_and_tracing_take_the_next_floor_too():
    learner, theta, families = case(1)
    step, values = reptile(learner, theta, families)
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, families.support)
    assert error(step, {name: theta[name] - phi[name].mean(0) for name in theta}) <= 1e-12
    gradient, same = maml(learner, theta, families)
    again, _ = traced(maml)(learner, theta, families)
    assert error(again, gradient) <= 1e-10
    torch.testing.assert_close(values, same, rtol=1e-12, atol=0)


def test_batches_are_dealt_out_in_order():
    learner, theta, families = case(2)
    dealt, family = learner.replace(batches=2), tree_map(lambda t: t[0], families)
    phi = theta
    for half in (slice(0, 2), slice(2, 4)):
        phi = learner.step(theta, phi, tree_map(lambda t, half=half: t[half], family.support))
    adapted = dealt.adapt(theta, family.support)
    assert error(adapted, phi) <= 1e-12
    assert error(dealt.adapt(theta, family.support, steps=1, start=adapted), phi) > 1e-3


# ---------------------------------------- closed form, and a fourth level


def quadratic(groups):
    """Tasks from numbers w ``[..., tasks]``: the loss of a prediction c is (c − w)², on support and query alike."""
    y = groups[..., None, None]
    return Tasks(*(Examples(torch.zeros_like(y), y) for _ in range(2)))


def test_three_and_four_levels_of_a_quadratic_have_a_closed_form():
    """Each level shrinks the distance to the mean below it by 1 − 2 · rate · curvature, and curvature by its square."""
    w = torch.randn(2, 3, 4, generator=generator(0), dtype=torch.float64)  # groups of families of tasks
    alpha, beta, gamma, theta = 0.1, 0.2, 0.3, {"c": torch.tensor([0.7], dtype=torch.float64)}
    second = GradientDescent(Constant(), losses.mean_squared_error, alpha, steps=1)
    third = MetaLearner(second, beta, steps=2)
    fourth = MetaLearner(third, gamma, steps=1)
    curvature = (1 - 2 * alpha) ** 2
    gradient, _ = maml(second, theta, quadratic(w[0, 0]))
    torch.testing.assert_close(gradient["c"], 2 * curvature * (theta["c"] - w[0, 0].mean()), rtol=1e-12, atol=0)

    families = Tasks(quadratic(w[0]), quadratic(w[0]))
    curvature *= (1 - 2 * beta * curvature) ** (2 * third.steps)
    gradient, _ = maml(third, theta, families)
    torch.testing.assert_close(gradient["c"], 2 * curvature * (theta["c"] - w[0].mean()), rtol=1e-12, atol=0)

    families = Tasks(quadratic(w), quadratic(w))
    groups = Tasks(families, families)
    curvature *= (1 - 2 * gamma * curvature) ** 2
    gradient, values = maml(fourth, theta, groups)
    assert values.shape == (2,)
    torch.testing.assert_close(gradient["c"], 2 * curvature * (theta["c"] - w.mean()), rtol=1e-12, atol=0)


def test_fourth_level_against_differences():
    """Not quadratic, so that no derivative up to the fourth vanishes."""
    second = GradientDescent(MLP((1, 2, 1), activation="tanh"), losses.mean_squared_error, 0.1)
    fourth = MetaLearner(MetaLearner(second, 0.2), 0.3)
    groups = Tasks(*(tree_map(lambda t: t.unflatten(0, (2, 2)), families_of(4, 2, 2, seed=s)) for s in (0, 1)))
    theta = second.init(generator(0), torch.float64)
    theta = {n: v + torch.randn(v.shape, generator=generator(1), dtype=v.dtype) for n, v in theta.items()}
    gradient, _ = maml(fourth, theta, groups)
    assert error(gradient, central_differences(lambda t: objective(fourth, t, groups), theta)) <= 1e-6


# ---------------------------------------- what it costs


def test_evaluations_by_order():
    inner = GradientDescent(Constant(), losses.mean_squared_error, 0.1, steps=2)
    assert evaluations(inner) == Counter({2: 2, 1: 1})  # MAML: two inner gradients differentiated, one query gradient
    assert evaluations(inner, order=0) == Counter({1: 2, 0: 1})
    assert evaluations(inner.replace(first_order=True)) == Counter({1: 3})
    third = MetaLearner(inner, 0.1, steps=3)
    # three steps on five tasks: each inner gradient differentiated twice, each query gradient once; then four queries
    assert evaluations(third, [(5, 4)]) == Counter({3: 30, 2: 15 + 8, 1: 4})
    assert evaluations(third.replace(first_order=True), [(5, 4)]) == Counter({2: 30 + 8, 1: 15 + 4})
    assert evaluations(MetaLearner(third, 0.1), [(1, 1), (5, 4)])[4] == 30
    assert evaluations(third.replace(steps=0), [(5, 4)]) == Counter({2: 8, 1: 4})


def test_evaluations_are_those_that_happen():
    """Counted where they happen: the calls of the loss in a run without vmap or derivatives above the first."""
    calls = []

    def loss(outputs, y):
        calls.append(1)
        return losses.mean_squared_error(outputs, y)

    inner = GradientDescent(Constant(), loss, 0.1, steps=2)
    inner.task_loss(inner.init(generator(0)), tree_map(lambda t: t[0], quadratic(torch.ones(1))))
    assert len(calls) == sum(evaluations(inner, order=0).values())


# ---------------------------------------- families


def test_families_are_disjoint_in_frequency():
    bands = sorted((low, high, split) for split, those in SPLITS.items() for low, high in those)
    assert all(high <= low for (_, high, _), (low, _, _) in zip(bands, bands[1:], strict=False))
    for split, those in SPLITS.items():
        frequency = SinusoidFamilies(frequencies=those).draw(500, generator(0)).frequency
        inside = [(frequency >= low) & (frequency <= high) for low, high in those]
        assert torch.stack(inside).any(0).all(), split
        assert all(band.any() for band in inside), split


def test_families_have_their_shapes_and_are_deterministic():
    family = SinusoidFamilies(6, 4, shots=5, queries=7)
    tasks = family.sample(3, generator(1))
    assert tasks.support.support.x.shape == (3, 6, 5, 1) and tasks.support.query.y.shape == (3, 6, 7, 1)
    assert tasks.query.support.x.shape == (3, 4, 5, 1) and tasks.query.query.y.shape == (3, 4, 7, 1)
    again = family.sample(3, generator(1))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(tasks), tree_leaves(again), strict=True))
    other = family.sample(3, generator(2))
    assert not torch.equal(tasks.support.support.x, other.support.support.x)
    assert tasks.support.support.x.abs().max() <= 5
    assert tasks.query.query.y.abs().max() <= 2 * family.amplitudes[1]


def test_tasks_of_a_family_share_its_frequency():
    """With ω known a task is linear in two numbers; a wrong ω leaves a residual."""
    family = SinusoidFamilies(shots=20)
    drawn = family.draw(4, generator(0))
    support = family.tasks(drawn, 3, generator(1)).support

    def residual(frequency):
        angle = frequency.view(-1, 1, 1, 1) * support.x
        basis = torch.cat([angle.sin(), angle.cos()], -1).double()
        return (basis @ torch.linalg.lstsq(basis, support.y.double()).solution - support.y).abs().max()

    assert residual(drawn.frequency) < 1e-4 < 0.1 < residual(drawn.frequency + 0.3)


# ---------------------------------------- bad input


def test_bad_input_is_refused():
    learner, theta, families = case(2)
    assert "steps" in refused(lambda: learner.replace(steps=-1))
    assert "batch" in refused(lambda: learner.replace(batches=0))
    flat = tree_map(lambda t: t[0], families.support)
    assert "examples" in refused(lambda: maml(learner, theta, flat))
    assert "multiple of 3" in refused(lambda: maml(learner.replace(batches=3), theta, families))
    assert "too few" in refused(lambda: evaluations(learner))
    assert "too many" in refused(lambda: evaluations(learner.inner, [(1, 1)]))
    assert "shots" in refused(lambda: SinusoidFamilies(shots=0))
    assert "query_tasks" in refused(lambda: SinusoidFamilies(query_tasks=1.5))
    assert "band" in refused(lambda: SinusoidFamilies(frequencies=((1.0, 0.5),)))
    assert "kind" in refused(lambda: replace(nested.experiments()[0], kind="fourth"))


# ---------------------------------------- the experiments


def small(kind, **changes):
    """A start that trains in no time."""
    few = {"test_families": 2, "validation_families": 1, "shifted_families": 1, "test_tasks": 2, "test_queries": 5}
    few |= {"families": 2, "steps": 1, "step_tasks": 2, "query_tasks": 2, "hidden": (4,), "seeds": 2}
    few |= {"measured": (0, 1, 3), "sgd_rates": (0.1,), "adam_rates": (0.01,), "iterations": 2} | changes
    return nested.NestedExperiment(f"turtles-{kind}", kind, **few)


@pytest.fixture
def untraced(monkeypatch):
    """Recording a program takes seconds, and that it computes the same is tested above."""
    monkeypatch.setattr("helpers.estimators.traced", lambda function: function)


def test_an_experiment_trains_from_end_to_end(tmp_path, untraced):
    record = training.train(small("third"), data=tmp_path, progress=False, say=lambda line: None)
    assert record["status"] == "complete" and json.loads((tmp_path / "records/turtles-third.json").read_text())
    metrics = record["metrics"]
    assert {"loss_0", "loss_3", "shifted_loss_3", "iterations_to_50", "reached_50", "picked_3"} <= metrics.keys()
    assert metrics["seconds_training"]["value"] > 0
    assert metrics["evaluations_order_3"]["value"] == 2 * 2 * 2  # iterations · families · tasks of the one step


def test_the_other_kinds_see_the_same_tasks(untraced):
    """Same generator, same numbers drawn: in one heap for the second level, without adaptation for joint training."""
    gradients, state = {}, {}
    for kind in ("second", "joint", "random"):
        run, draws = small(kind).setup(torch.device("cpu"), False), generator(0)
        theta = run.init(draws)
        gradients[kind], _ = run.gradient(theta, draws, 0)
        state[kind] = draws.get_state()
    assert torch.equal(state["second"], state["joint"])
    assert all((g == 0).all() for g in gradients["random"].values())
    draws = generator(0)
    theta, one = run.init(draws), small("second")
    families = tree_map(lambda t: t[2:], one.family().sample(4, draws))  # those of the second seed
    heap = [tree_map(lambda t, k=k: t.flatten(0, 1), tasks) for k, tasks in enumerate(families)]
    tasks = tree_map(lambda a, b: torch.cat([a, b]), *heap)
    expected, _ = maml(one.learner(), {name: value[1] for name, value in theta.items()}, tasks)
    assert error(tree_map(lambda g: g[1], gradients["second"]), expected) < 1e-4


def test_meta_training_on_a_new_family_is_sgd_and_adam(untraced):
    """The grid side by side against torch.optim, one setting and one family at a time."""
    experiment = small("second", sgd_rates=(0.1, 0.2), adam_rates=(0.01,), seeds=1)
    run = experiment.setup(torch.device("cpu"), False)
    theta = run.init(generator(0))
    measured = run.curves(theta, "test", 2)
    assert measured.shape == (3, 3, 1, 2)
    torch.testing.assert_close(run.curves(theta, "test", 2, [0, 2]), measured[:, [0, 2]])
    draws = generator(nested.TEST_SEED + list(SPLITS).index("test"))
    family, learner = experiment.family("test"), experiment.learner()
    drawn = family.draw(2, draws)
    test = replace(family, queries=5).tasks(drawn, 2, draws)
    batches = [family.tasks(drawn, experiment.meta_batch, draws) for _ in range(3)]
    for setting, kind in enumerate((partial(torch.optim.SGD, lr=0.2), partial(torch.optim.Adam, lr=0.01)), start=1):
        phi = {name: value[0].clone().requires_grad_() for name, value in theta.items()}
        optimizer = kind(phi.values())
        for tasks in batches:
            at = {name: value.detach() for name, value in phi.items()}
            gradient, _ = maml(learner, at, tree_map(lambda t: t[1], tasks))
            for name, value in phi.items():
                value.grad = gradient[name]
            optimizer.step()
        at = {name: value.detach() for name, value in phi.items()}
        loss = objective(learner, at, tree_map(lambda t: t[1], test))
        torch.testing.assert_close(measured[-1, setting, 0, 1], loss, rtol=1e-4, atol=1e-5)
