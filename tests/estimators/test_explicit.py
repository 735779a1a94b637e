"""Every meta-gradient, for every family of models, against central differences, hand-derived cases and plain loops.

All in float64, with weights well away from their tiny initial values: nothing is close to linear, a missing term shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.func import vmap
from torch.nn import functional
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.estimators.explicit import chunked, fomaml, maml
from helpers.learners.descent import RATE, GradientDescent
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics import differences
from helpers.numerics.differences import central_differences, objective
from helpers.runtime import generator
from helpers.types import Examples, Tasks

TASKS = 3
STEPS = (1, 2, 5)


@dataclass(frozen=True)
class Family:
    """A model with a loss, and how to draw inputs and targets for it."""

    model: MLP | ConvNet
    loss: object
    shape: tuple[int, ...]
    rate: float

    def examples(self, n: int, draws: torch.Generator) -> Examples:
        x = torch.randn(TASKS, n, *self.shape, generator=draws, dtype=torch.float64)
        if self.loss is losses.mean_squared_error:
            return Examples(x, torch.randn(TASKS, n, 1, generator=draws, dtype=torch.float64))
        return Examples(x, torch.randint(0, 3, (TASKS, n), generator=draws))


FAMILIES = {
    "mlp": Family(MLP((2, 6, 5, 1)), losses.mean_squared_error, (2,), 0.05),
    "mlp-norm": Family(MLP((3, 5, 4, 3), norm=True), losses.cross_entropy, (3,), 0.2),
    "conv": Family(ConvNet(ways=3, filters=2, blocks=2), losses.cross_entropy, (1, 5, 6), 0.2),
}


def case(family: str, steps: int = 1, learn_rates: bool = False, seed: int = 0, **settings):
    """A learner with meta-parameters and tasks: all parameters random, also the biases and shifts that begin at 0."""
    f, draws = FAMILIES[family], generator(seed)
    learner = GradientDescent(f.model, f.loss, f.rate, steps, learn_rates=learn_rates, **settings)
    theta = learner.init(draws, torch.float64)
    for name, value in theta.items():
        noise = torch.randn(value.shape, generator=draws, dtype=torch.float64)
        # Learned rates get a different value everywhere, of either size, so that no two can be mixed up.
        theta[name] = value * (1 + 0.5 * noise.tanh()) if name.startswith(RATE) else value + 0.5 * noise
    return learner, theta, Tasks(f.examples(6, draws), f.examples(5, draws))


def error(gradient, reference):
    """The largest relative error of a parameter tensor.

    The bias of a linear layer that is normalised next has gradient 0, since the mean takes it away again; so has its
    learned rate. There the gradient is held against the size of the others.
    """

    def layer(name):
        return name.removeprefix(RATE).removeprefix("linear").removesuffix(".bias")

    return differences.error(
        gradient, reference, {name for name in reference if f"norm{layer(name)}.shift" in reference}
    )


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


def plain_loop(learner, theta, tasks, create_graph=True):
    """The same meta-gradient from torch.autograd, task after task, without torch.func and the learner's methods."""
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    moving = [name for name in theta if not name.startswith(RATE) and learner.model.is_adapted(name)]
    total, values = {name: torch.zeros_like(value) for name, value in theta.items()}, []
    count = len(tasks.support.x)
    for i in range(count):
        phi = {name: value for name, value in theta.items() if not name.startswith(RATE)}
        for _ in range(learner.steps):
            inner = learner.loss(learner.model(phi, tasks.support.x[i]), tasks.support.y[i])
            gradients = torch.autograd.grad(inner, [phi[name] for name in moving], create_graph=create_graph)
            if not create_graph:
                gradients = [g.detach() for g in gradients]
            rates = [theta[RATE + name] if learner.learn_rates else learner.rate for name in moving]
            phi = phi | {name: phi[name] - r * g for name, r, g in zip(moving, rates, gradients, strict=True)}
        value = learner.loss(learner.model(phi, tasks.query.x[i]), tasks.query.y[i])
        for name, g in zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True):
            total[name] += g / count
        values.append(value.detach())
    return total, torch.stack(values)


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


@dataclass(frozen=True)
class Linear:
    """Linear regression without a bias, y = x w: its squared error is a quadratic, so all can be written down."""

    features: int

    def init(self, generator, dtype=torch.float32):
        return {"w": torch.randn(self.features, 1, generator=generator, dtype=dtype)}

    def __call__(self, params, x):
        return x @ params["w"]

    def is_adapted(self, name):
        return True


def linear_tasks(draws, n=7, features=4):
    x = torch.randn(2, TASKS, n, features, generator=draws, dtype=torch.float64)
    y = torch.randn(2, TASKS, n, 1, generator=draws, dtype=torch.float64)
    return Tasks(*(Examples(*part) for part in zip(x, y, strict=True)))


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
