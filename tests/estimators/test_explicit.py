"""Every meta-gradient, for every family of models, against central differences, hand-derived cases and plain loops.

All in float64, with weights well away from their tiny initial values: nothing is close to linear, a missing term shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES, TASKS, Linear, case, error, linear_tasks, plain_loop
from torch.func import vmap
from torch.nn import functional
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.estimators.explicit import chunked, fomaml, maml
from helpers.learners.descent import RATE, GradientDescent
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, objective
from helpers.runtime import generator
from helpers.types import Examples, Tasks

STEPS = (1, 2, 5)


# ---------------------------------------- central differences


@pytest.mark.parametrize("learn_rates", [False, True], ids=["maml", "meta-sgd"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_maml_is_the_gradient_of_the_meta_objective(family, steps, learn_rates):
    # With seed 0 a kink of mlp-norm lies within 2h; differences at h = 1e-6 agree there to 7e-9.
    learner, theta, tasks = case(family, steps, learn_rates, seed=1 if family == "mlp-norm" else 0)
    gradient, values = maml(learner, theta, tasks)
    reference = central_differences(lambda t: objective(learner, t, tasks), theta, everywhere=family == "mlp")
    assert error(gradient, reference) <= 1e-6
    assert values.shape == (TASKS,)
    torch.testing.assert_close(values.mean(), objective(learner, theta, tasks), rtol=1e-12, atol=0)
    if learn_rates:
        assert {name for name in theta if name.startswith(RATE)} == {
            RATE + name for name in theta if not name.startswith(RATE) and learner.model.is_adapted(name)
        }


@pytest.mark.parametrize("learn_rates", [False, True], ids=["fomaml", "meta-sgd"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fomaml_is_the_gradient_with_inner_gradients_frozen(family, steps, learn_rates):
    """First-order MAML differentiates the query loss of θ − Σ α g, the g of the present θ being numbers."""
    learner, theta, tasks = case(family, steps, learn_rates)
    frozen, phi = [], vmap(lambda _: learner.start(theta))(tasks.support.x)
    for _ in range(steps):
        frozen.append(vmap(learner.support_gradient)(phi, tasks.support))
        phi = vmap(learner.step, in_dims=(None, 0, 0))(theta, phi, tasks.support)

    def surrogate(theta):
        def one(gradients, query):
            phi = learner.start(theta)
            for g in gradients:
                phi = phi | {n: phi[n] - theta.get(RATE + n, learner.rate) * g[n] for n in g}
            return learner.query_loss(phi, query)

        return vmap(one)(frozen, tasks.query).mean()

    gradient, values = fomaml(learner, theta, tasks)
    assert error(gradient, central_differences(surrogate, theta)) <= 1e-6
    # Freezing changes the gradient, not the losses; and it does change the gradient.
    exact, exact_values = maml(learner, theta, tasks)
    torch.testing.assert_close(values, exact_values, rtol=1e-12, atol=0)
    assert error(gradient, exact) > 1e-3


def test_full_omniglot_network():
    """The network of the recorded experiments, four blocks on 28×28 images (thinner), along random directions."""
    draws = generator(3)
    learner = GradientDescent(ConvNet(ways=5, filters=4), losses.cross_entropy, 0.4, 2)
    theta = {n: v + 0.1 * torch.randn(v.shape, generator=draws).double() for n, v in learner.init(draws).items()}
    x = torch.rand(2, 2, 5, 1, 28, 28, generator=draws).double()
    tasks = Tasks(*(Examples(part, torch.arange(5).expand(2, 5)) for part in x))
    gradient, _ = maml(learner, theta, tasks)
    # One direction a parameter tensor, since a coordinate each would take minutes, and a smaller step, since of tens of
    # thousands of activations one would otherwise have its kink inside the interval.
    h = 1e-6
    for name, value in theta.items():
        direction = torch.randn(value.shape, generator=draws).double()
        direction /= direction.norm()
        ahead, behind = (
            objective(learner, theta | {name: value + sign * h * direction}, tasks).item() for sign in (1, -1)
        )
        difference, slope = (ahead - behind) / (2 * h), (gradient[name] * direction).sum().item()
        assert abs(slope - difference) <= 1e-6 * abs(difference), name


# ---------------------------------------- loops


@pytest.mark.parametrize("learn_rates", [False, True], ids=["fixed", "meta-sgd"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_vmap_is_the_plain_loop(family, steps, learn_rates):
    learner, theta, tasks = case(family, steps, learn_rates, seed=1)
    for estimator, create_graph in ((maml, True), (fomaml, False)):
        gradient, values = estimator(learner, theta, tasks)
        expected, expected_values = plain_loop(learner, theta, tasks, create_graph)
        assert error(gradient, expected) <= 1e-10
        torch.testing.assert_close(values, expected_values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_nothing(family, size):
    """Also where the number of tasks is no multiple of the chunk, and where the chunk is larger."""
    learner, theta, tasks = case(family, 2)
    for estimator in (maml, fomaml):
        gradient, values = estimator(learner, theta, tasks)
        in_parts, values_in_parts = chunked(estimator, size)(learner, theta, tasks)
        assert error(in_parts, gradient) <= 1e-12
        torch.testing.assert_close(values_in_parts, values, rtol=1e-12, atol=0)


def test_gradient_is_the_mean_over_tasks():
    learner, theta, tasks = case("conv", 2)
    gradient, values = maml(learner, theta, tasks)
    apart = [maml(learner, theta, tree_map(lambda t, i=i: t[i : i + 1], tasks)) for i in range(TASKS)]
    mean = {name: torch.stack([g[name] for g, _ in apart]).mean(0) for name in gradient}
    assert error(gradient, mean) <= 1e-12
    torch.testing.assert_close(values, torch.cat([v for _, v in apart]), rtol=1e-12, atol=0)


# ---------------------------------------- cases derived by hand


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_linear_regression_by_hand(steps):
    """L(w) = |Xw − y|²/n has gradient (2/n) Xᵀ(Xw − y) and Hessian H = (2/n) XᵀX on the support set, whatever w.

    So φ = w − α ∇L(w) repeated k times has ∂φ/∂w = (I − αH)ᵏ, and the meta-gradient is (I − αH)ᵏ ∇L_query(φ);
    first-order MAML leaves the matrix out. (H is symmetric, so no transpose is needed.)
    """
    alpha, draws = 0.1, generator(0)
    learner = GradientDescent(Linear(4), losses.mean_squared_error, alpha, steps)
    theta, tasks = learner.init(draws, torch.float64), linear_tasks(draws)
    exact, first = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    for i in range(TASKS):
        (x, y), (xq, yq) = ((part.x[i], part.y[i]) for part in tasks)
        n = len(x)
        hessian, phi = 2 / n * x.T @ x, theta["w"]
        for _ in range(steps):
            phi = phi - alpha * 2 / n * x.T @ (x @ phi - y)
        query = 2 / n * xq.T @ (xq @ phi - yq)
        exact += torch.linalg.matrix_power(torch.eye(4).double() - alpha * hessian, steps) @ query / TASKS
        first += query / TASKS
    assert error(maml(learner, theta, tasks)[0], {"w": exact}) <= 1e-13
    assert error(fomaml(learner, theta, tasks)[0], {"w": first}) <= 1e-13


def test_meta_sgd_rate_by_hand():
    """After one step φ = w − a ∘ g, with g = ∇L_support(w), the derivative by the rates a is −g ∘ ∇L_query(φ)."""
    draws = generator(0)
    learner = GradientDescent(Linear(4), losses.mean_squared_error, 0.1, 1, learn_rates=True)
    theta, tasks = learner.init(draws, torch.float64), linear_tasks(draws)
    theta["rate:w"] = torch.tensor([[0.1], [0.2], [-0.05], [0.0]], dtype=torch.float64)
    by_rate, by_weight = torch.zeros(2, 4, 1, dtype=torch.float64)
    for i in range(TASKS):
        (x, y), (xq, yq) = ((part.x[i], part.y[i]) for part in tasks)
        g = 2 / len(x) * x.T @ (x @ theta["w"] - y)
        query = 2 / len(xq) * xq.T @ (xq @ (theta["w"] - theta["rate:w"] * g) - yq)
        hessian = 2 / len(x) * x.T @ x
        by_rate -= g * query / TASKS
        # φ = w − diag(a) ∇L(w), so ∂φ/∂w = I − diag(a) H, which is not symmetric.
        by_weight += (torch.eye(4).double() - theta["rate:w"] * hessian).T @ query / TASKS
    gradient, _ = maml(learner, theta, tasks)
    assert error(gradient, {"w": by_weight, "rate:w": by_rate}) <= 1e-13


def first_order_is_exact(learner, theta, tasks):
    return error(fomaml(learner, theta, tasks)[0], maml(learner, theta, tasks)[0]) <= 1e-12


def test_first_order_is_exact_where_the_support_loss_is_linear():
    """Without curvature the inner gradient does not depend on θ, so nothing is lost by holding it constant."""
    learner = GradientDescent(
        Linear(4), lambda outputs, y: (outputs * y).mean(), 0.3, 3, outer_loss=losses.mean_squared_error
    )
    draws = generator(0)
    assert first_order_is_exact(learner, learner.init(draws, torch.float64), linear_tasks(draws))


@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_is_exact_without_adaptation(family):
    """With rate 0, or with no step, both are the plain gradient of the query loss."""
    for settings in ({"steps": 0}, {"steps": 2}):
        learner, theta, tasks = case(family, **settings)
        if settings["steps"]:
            learner = learner.replace(rate=0.0)
        assert first_order_is_exact(learner, theta, tasks)
        leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
        value = sum(
            learner.loss(learner.model(leaves, x), y) for x, y in zip(tasks.query.x, tasks.query.y, strict=True)
        )
        plain = dict(zip(leaves, torch.autograd.grad(value / TASKS, list(leaves.values())), strict=True))
        assert error(maml(learner, theta, tasks)[0], plain) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_error_shrinks_with_the_rate(family):
    """With one step MAML is ∇ − αH∇, so the difference between the two gradients is proportional to α for small α."""
    learner, theta, tasks = case(family)
    apart = []
    for rate in (1e-4, 1e-5):
        small = learner.replace(rate=rate)
        apart.append(error(fomaml(small, theta, tasks)[0], maml(small, theta, tasks)[0]))
    assert math.isclose(apart[0] / apart[1], 10, rel_tol=0.05)


# ---------------------------------------- batch normalisation


@pytest.mark.parametrize("family", ["mlp-norm", "conv"])
@pytest.mark.parametrize("rate", [0.4, 2.0])
def test_normalisation_has_the_right_second_derivatives_under_vmap(family, rate):
    """``torch.nn.BatchNorm2d`` under ``vmap`` with an outer ``.backward()`` is silently wrong (the MAML chapter shows
    it; pytorch/functorch#534). In a plain loop torch's normalisation is right, so it serves as the reference for ours.
    """
    from helpers import models

    learner, theta, tasks = case(family, 5, seed=2)
    learner = learner.replace(rate=rate)
    gradient, _ = maml(learner, theta, tasks)

    class Reference(type(learner.model)):
        """The same network out of torch's own layers, for a plain loop only."""

        def __call__(self, params, x):
            def norm(x, shift):  # torch wants channels second
                return functional.batch_norm(x.movedim(-1, 1), None, None, None, shift, True, 0.0, models.EPSILON)

            if isinstance(self, MLP):
                for layer in range(1, len(self.sizes) - 1):
                    x = x @ params[f"linear{layer}.weight"] + params[f"linear{layer}.bias"]
                    x = norm(x, params[f"norm{layer}.shift"]).relu()
                return x @ params[f"linear{layer + 1}.weight"] + params[f"linear{layer + 1}.bias"]
            for block in range(1, self.blocks + 1):
                x = functional.conv2d(same(x), params[f"conv{block}.weight"].permute(3, 2, 0, 1), stride=2)
                x = norm(x.movedim(1, -1), params[f"norm{block}.shift"]).relu()
            return x.mean((2, 3)) @ params["head.weight"] + params["head.bias"]

    def same(x):
        pads = [max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in x.shape[2:]]
        return functional.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))

    reference = learner.replace(model=Reference(**vars(learner.model)))
    expected, _ = plain_loop(reference, theta, tasks)
    assert error(gradient, expected) <= 1e-9


# ---------------------------------------- determinism


@pytest.mark.parametrize("estimator", [maml, fomaml])
def test_same_seed_same_gradient(estimator):
    first, again, other = (estimator(*case("conv", 2, seed=seed)) for seed in (5, 5, 6))
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0]["head.weight"], other[0]["head.weight"])


def test_theta_is_not_changed():
    learner, theta, tasks = case("mlp", 2, learn_rates=True)
    before = {name: value.clone() for name, value in theta.items()}
    maml(learner, theta, tasks)
    fomaml(learner, theta, tasks)
    assert all(torch.equal(theta[name], before[name]) for name in theta)
