"""The implicit meta-gradient: exact where the inner problem is solved, for every family of models and strengths."""

from __future__ import annotations

import warnings
from functools import cache, partial

import pytest
import torch
from families import FAMILIES, TASKS, Linear, case, error, linear_tasks
from miniatures import IMAML
from miniatures import little as little  # a fixture
from refusals import refused
from torch.func import grad, vmap

from helpers import losses, runtime
from helpers.estimators.explicit import chunked, maml, stepwise
from helpers.estimators.implicit import ImplicitGradient, released
from helpers.experiments.imaml import Omniglot
from helpers.lab import checkpoints, training
from helpers.learners.descent import STRENGTH, GradientDescent
from helpers.learners.proximal import HessianFree, Proximal
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics.differences import along, central_differences, objective
from helpers.numerics.solvers import NotConverged, conjugate_gradient, identity
from helpers.numerics.tracing import traced
from helpers.runtime import generator
from helpers.types import Examples, Tasks

# Without kinks where that can be had: with ReLUs the minimum of the inner problem often lies on one, where there is no
# Hessian and the theorem does not hold. (The convolutional network keeps its ReLUs; its minima happen to be smooth.)
SMOOTH = {
    "mlp": MLP((2, 6, 5, 1), activation="tanh"),
    "mlp-norm": MLP((3, 5, 4, 3), norm=True, activation="tanh"),
    "conv": FAMILIES["conv"].model,
}
KINDS = (None, "scalar", "layer", "diagonal", "matrix")
EXACT = partial(conjugate_gradient, steps=60, tolerance=1e-14)


def proximal(family, kind=None, newton=False, strength=None, steps=None):
    """A learner that solves its inner problem to rounding.

    The pull is strong, so the problem is convex and well conditioned.
    """
    plain, theta, tasks = case(family)
    plain = plain.replace(model=SMOOTH[family])
    strength = strength or (5000.0 if family == "mlp-norm" else 300.0)
    settings = {"strength": strength, "learn_strength": kind}
    if newton:
        learner = HessianFree(plain.model, plain.loss, 0.01, steps or 5, solver_steps=25, **settings)
    else:
        learner = Proximal(plain.model, plain.loss, 0.9 / strength, steps or 16, **settings)
    theta = theta | learner._initial_strength(theta)
    for name, value in theta.items():
        if name.startswith(STRENGTH):  # every λ another
            noise = torch.randn(value.shape, generator=generator(9), dtype=value.dtype)
            theta[name] = value + 0.1 * noise / max(value.shape[-1:], default=1) ** 0.5
    return learner, theta, tasks


def split(gradient):
    """The gradients by the network's parameters, and by the strength."""
    strengths = {name: g for name, g in gradient.items() if name.startswith(STRENGTH)}
    return {name: g for name, g in gradient.items() if name not in strengths}, strengths


@cache
def differences(family, kind):
    """Of the path that gradient descent takes: nothing implicit about them."""
    path, theta, tasks = proximal(family, kind)
    everywhere = family == "mlp" and kind != "matrix"
    return central_differences(lambda t: objective(path, t, tasks), theta, everywhere)


# Of the other families one strength for each shape that it has: one of a layer, and one of every parameter. A matrix
# with the normalised network has derivatives below the rounding error of differences, so strong is the pull.
CASES = [("mlp", kind) for kind in KINDS] + [("mlp-norm", None), ("mlp-norm", "layer"), ("conv", "diagonal")]


@pytest.mark.parametrize("newton", [False, True], ids=["gradient", "hessian-free"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_it_is_the_gradient_of_the_meta_objective(family, kind, newton):
    learner, theta, tasks = proximal(family, kind, newton)
    found = ImplicitGradient(EXACT).solve(learner, theta, tasks)
    assert found.stationarity.max() < 1e-7, "the inner problem is not solved, so the test would say nothing"
    assert not found.solution.indefinite.any() and found.solution.residual.max() < 1e-9
    reference = differences(family, kind)
    parameters, strengths = split(along(found.gradient, reference))
    expected, expected_strengths = split(reference)
    assert error(parameters, expected) <= 1e-6
    assert strengths.keys() == expected_strengths.keys() and bool(strengths) == (kind is not None)
    for name, g in strengths.items():
        # These are small, about 1 / λ, and differences have a rounding error of 1e-11.
        assert (g - expected_strengths[name]).norm() <= 1e-6 * expected_strengths[name].norm() + 2e-10, name


@pytest.mark.parametrize("kind", ["scalar", "layer", "diagonal", "matrix"])
def test_all_strengths_are_the_same_at_first(kind):
    learner, theta, tasks = proximal("mlp-norm")
    other = learner.replace(learn_strength=kind)
    with_strength = theta | other._initial_strength(theta)
    gradient, values = ImplicitGradient(EXACT)(learner, theta, tasks)
    other_gradient, other_values = ImplicitGradient(EXACT)(other, with_strength, tasks)
    assert error(split(other_gradient)[0], gradient) <= 1e-9
    torch.testing.assert_close(other_values, values, rtol=1e-12, atol=0)


def test_maml_through_the_proximal_path_goes_to_the_same_limit():
    learner, theta, tasks = proximal("mlp")
    learner = learner.replace(rate=0.1 / learner.strength)
    exact, _ = ImplicitGradient(EXACT)(learner.replace(steps=400), theta, tasks)
    apart = [error(maml(learner.replace(steps=k), theta, tasks)[0], exact) for k in (10, 50, 250)]
    assert apart[0] > 10 * apart[1] > 100 * apart[2] and apart[2] < 1e-6


def test_chunks_and_traces_change_nothing():
    learner, theta, tasks = proximal("conv", "layer", steps=6)
    gradient, values = ImplicitGradient()(learner, theta, tasks)
    for other in (chunked(ImplicitGradient(), 2), ImplicitGradient(by=traced), chunked(ImplicitGradient(by=traced), 1)):
        same, same_values = other(learner, theta, tasks)
        assert error(same, gradient) <= 1e-11
        torch.testing.assert_close(same_values, values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", [ImplicitGradient(by=traced), stepwise()], ids=["imaml", "stepwise"])
def test_one_recording_serves_any_number_of_steps(estimator):
    learner, theta, tasks = proximal("mlp", steps=2)
    written = []

    def loss(outputs, y):
        written.append(len(y))
        return losses.mean_squared_error(outputs, y)

    learner = learner.replace(loss=loss)
    estimator(learner, theta, tasks)
    before = len(written)
    estimator(learner.replace(steps=5), theta, tasks)
    assert 0 < before == len(written)


def test_no_curvature_at_all_is_first_order():
    """With u = v / λ for the solution, Λ u is the query gradient at φ: what first-order MAML takes."""
    learner, theta, tasks = proximal("mlp", steps=3)

    def plain(product, b):
        return identity(product, b)._replace(x={name: value / learner.strength for name, value in b.items()})

    gradient, _ = ImplicitGradient(plain)(learner, theta, tasks)
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, tasks.support)
    first = vmap(grad(learner.query_loss))(phi, tasks.query)
    assert error(gradient, {name: g.mean(0) for name, g in first.items()}) <= 1e-12


# ---------------------------------------- ridge regression: everything in closed form


def ridge(strength):
    """Tasks, θ, and for each the exact inner solution and the exact meta-gradient."""
    draws = generator(0)
    tasks, w = linear_tasks(draws, n=12, features=6), torch.randn(6, 1, generator=draws, dtype=torch.float64)
    total, eye = torch.zeros(6, 1, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    solutions = []
    for i in range(TASKS):
        (x, y), (xq, yq) = ((part.x[i], part.y[i]) for part in tasks)
        hessian = 2 / len(x) * x.T @ x
        matrix = hessian + strength * eye
        phi = torch.linalg.solve(matrix, 2 / len(x) * x.T @ y + strength * w)
        total += strength * torch.linalg.solve(matrix, 2 / len(xq) * xq.T @ (xq @ phi - yq)) / TASKS
        solutions.append(phi)
    return tasks, {"w": w}, torch.stack(solutions), {"w": total}


@pytest.mark.parametrize("strength", [0.3, 2.0, 30.0])
def test_ridge_regression_is_exact_when_both_solvers_converge(strength):
    """The claim of the paper's synthetic study, to a relative error of 1e-8 and well below."""
    tasks, theta, phi, exact = ridge(strength)
    gradient_descent = Proximal(Linear(6), losses.mean_squared_error, 0.2 / (1 + strength / 5), 600, strength=strength)
    newton = HessianFree(Linear(6), losses.mean_squared_error, 0.1, 2, strength=strength, solver_steps=12)
    for learner in (gradient_descent, newton):
        found = ImplicitGradient(EXACT).solve(learner, theta, tasks)
        torch.testing.assert_close(found.phi["w"], phi, rtol=1e-9, atol=1e-11)
        assert error(found.gradient, exact) <= 1e-8


def test_ridge_error_falls_with_inner_steps_and_with_solver_steps():
    tasks, theta, _, exact = ridge(1.0)
    learner = Proximal(Linear(6), losses.mean_squared_error, 0.15, strength=1.0)
    by_steps = [error(ImplicitGradient(EXACT)(learner.replace(steps=k), theta, tasks)[0], exact) for k in (5, 20, 80)]
    assert by_steps[0] > by_steps[1] > by_steps[2]
    solved = learner.replace(steps=300)
    by_cg = [
        error(ImplicitGradient(partial(conjugate_gradient, steps=c))(solved, theta, tasks)[0], exact) for c in (1, 3, 6)
    ]
    assert by_cg[0] > by_cg[1] > by_cg[2] and by_cg[2] < 1e-8, "six steps solve a system with six unknowns"


def test_what_the_released_code_computes_by_hand():
    """(2 I + H / (λ + 10))⁻¹ v at θ plus (1 − αλ) times the way that plain gradient descent goes."""
    tasks, theta, _, _ = ridge(2.0)
    learner = Proximal(Linear(6), losses.mean_squared_error, 0.1, 3, strength=2.0)
    total = torch.zeros(6, 1, dtype=torch.float64)
    for i in range(TASKS):
        (x, y), (xq, yq) = ((part.x[i], part.y[i]) for part in tasks)
        hessian, w = 2 / len(x) * x.T @ x, theta["w"]
        for _ in range(3):
            w = w - 0.1 * 2 / len(x) * x.T @ (x @ w - y)
        w = w - 0.1 * 2.0 * (w - theta["w"])
        v = 2 / len(xq) * xq.T @ (xq @ w - yq)
        total += torch.linalg.solve(2 * torch.eye(6).double() + hessian / 12, v) / TASKS
    assert error(released(learner, theta, tasks, cg_steps=20)[0], {"w": total}) <= 1e-12


# ---------------------------------------- memory


def test_memory_does_not_grow_with_the_inner_steps():
    """The paper claims it: at 40 steps the peak is within a tenth of that at 5; MAML's has grown many times over."""
    draws = generator(0)
    x, y = torch.rand(2, 2, 5, 1, 14, 14, generator=draws), torch.arange(5).repeat(2, 1)
    tasks = Tasks(*(Examples(part, y) for part in x))
    model = ConvNet(5, filters=8, blocks=2)

    def peak(estimator, steps):
        learner = Proximal(model, losses.cross_entropy, 0.1, steps, strength=2.0)
        theta = learner.init(generator(0))
        estimator(learner.replace(steps=1), theta, tasks)
        return runtime.peak_memory(lambda: estimator(learner, theta, tasks))

    assert abs(peak(ImplicitGradient(), 40) / peak(ImplicitGradient(), 5) - 1) <= 0.1
    assert peak(maml, 20) > 3 * peak(maml, 5)


def test_peak_memory_counts_what_is_alive_together():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(1000)

    def together():
        return [torch.zeros(1000) for _ in range(3)]

    assert 4000 <= runtime.peak_memory(one_after_the_other) < 4200
    assert 12000 <= runtime.peak_memory(together) < 12200


# ---------------------------------------- learners


def test_hessian_free_never_raises_the_objective_and_gets_there_first():
    learner, theta, tasks = proximal("mlp", newton=True, strength=20.0, steps=1)
    support = Examples(tasks.support.x[0], tasks.support.y[0])
    phi, values = learner.start(theta), []
    for _ in range(6):
        values.append(learner.inner_objective(theta, phi, support))
        phi = learner.step(theta, phi, support)
    rounding = torch.finfo(torch.float64).eps * values[0]  # of the value, once the minimum is reached
    assert all(after <= before + rounding for before, after in zip(values, values[1:], strict=False))
    descent = Proximal(learner.model, learner.loss, 0.02, 6, strength=20.0).adapt(theta, support)
    assert learner.inner_objective(theta, phi, support) < learner.inner_objective(theta, descent, support)


def test_the_inner_gradient_is_that_of_the_inner_objective():
    for kind in KINDS:
        learner, theta, tasks = proximal("mlp-norm", kind)
        support = Examples(tasks.support.x[0], tasks.support.y[0])
        phi = {name: value + 0.1 for name, value in learner.start(theta).items()}
        moving, fixed = learner.split(phi)
        expected = grad(lambda p, fixed=fixed, support=support: learner.inner_objective(theta, p | fixed, support))(  # noqa: B023
            moving
        )
        ours = learner.inner_gradient(theta, phi, support)
        assert all((ours[name] - expected[name]).norm() <= 1e-12 * (1 + expected[name].norm()) for name in expected)


def test_refusals():
    learner, theta, _ = proximal("mlp")
    assert "matrix" in refused(lambda: learner.replace(learn_strength="tensor"))
    assert "greater than 0" in refused(lambda: learner.replace(strength=0.0))


def test_query_sets_are_classified_apart():
    draws = generator(0)
    model = ConvNet(3, filters=2, blocks=2)
    together = GradientDescent(model, losses.cross_entropy, 0.1, query_sets=2)
    theta = together.init(draws)
    x, y = torch.rand(6, 1, 8, 8, generator=draws), torch.arange(3).repeat_interleave(2)
    apart = [together.replace(query_sets=1).query_loss(theta, Examples(x[i::2], y[i::2])) for i in range(2)]
    torch.testing.assert_close(together.query_loss(theta, Examples(x, y)), sum(apart) / 2)


def test_a_system_that_is_not_solved_is_said():
    learner, theta, tasks = proximal("mlp", strength=2.0, steps=3)
    with pytest.warns(NotConverged, match="residual"):
        ImplicitGradient(partial(conjugate_gradient, steps=1), tolerance=1e-8)(learner, theta, tasks)
    strong, theta, tasks = proximal("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImplicitGradient(EXACT, tolerance=1e-8)(strong, theta, tasks)


def test_a_run_goes_on_where_another_ended(tmp_path, monkeypatch, little):  # noqa: F811
    tiny = IMAML | {"iterations": 1, "evaluate_every": 2, "test_tasks": 2}
    first, then = Omniglot("first", **tiny), Omniglot("then", start="first", **tiny)
    monkeypatch.setattr(checkpoints, "load_theta", partial(checkpoints.load_theta, folder=tmp_path / "checkpoints"))
    setup = {"device": torch.device("cpu"), "compiled": False}
    assert "there is no checkpoint" in refused(lambda: then.setup(**setup).init(generator(0)))

    (tmp_path / "checkpoints").mkdir()
    ended = checkpoints.State(first.setup(**setup).init(generator(7)), first.outer_rate, generator(0))
    ended.save(tmp_path / "checkpoints" / "first.safetensors.xz", first.config())
    begin = then.setup(**setup).init(generator(0))
    assert begin.keys() == ended.theta.keys() and all(begin[name].equal(ended.theta[name]) for name in begin)
    assert not all(value.equal(begin[name]) for name, value in first.setup(**setup).init(generator(0)).items())

    record = training.train(then, data=tmp_path, progress=False, say=lambda _: None)
    end, data = checkpoints.load_theta("then"), record["provenance"]["data"]
    # One step of Adam moves a parameter by the outer rate, wherever it began.
    assert all((end[name] - begin[name]).abs().max() < 1.01 * then.outer_rate for name in begin)
    assert record["config"]["start"] == data["start"] == "first"
    assert "start" not in first.config() and "start" not in first.data()
    # The digest is that of the meta-parameters: a start that was trained otherwise is another one.
    assert then.data() == data
    monkeypatch.setattr(checkpoints, "load_theta", lambda _: end)
    assert then.data()["start_sha256"] != data["start_sha256"]
