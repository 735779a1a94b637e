"""MAML on policies: surrogates against exact expected returns, an outer step against the algorithm written out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.func import grad, jvp, vmap

from helpers.estimators import maml
from helpers.estimators.policy_search import PolicySearch, fisher_product, judged, policy_descent
from helpers.learners.descent import GradientDescent
from helpers.models.layers import expanded
from helpers.models.mlp import MLP
from helpers.models.policies import GaussianPolicy
from helpers.numerics.differences import central_differences, error, objective
from helpers.optimizers.trust_region import natural_step
from helpers.runtime import generator
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.surrogates import SURROGATES, collect, divergence, surrogate
from helpers.types import Examples, Tasks

DOUBLE = torch.float64

# ---------------------------------------- a world that can be enumerated


class Table:
    """A policy of two actions in three states: the start, and where either action leads."""

    head = "logits"

    def __call__(self, params, x):
        return x @ params["logits"]

    def is_adapted(self, name):
        return True


def log_chance(outputs, action):
    return outputs.log_softmax(-1).gather(-1, action.long())[..., 0]


class World:
    """Tasks that differ in their rewards; all trajectories of ``horizon`` steps are known, with their chances."""

    def __init__(self, horizon, tasks=3):
        draws = generator(0)
        self.actions = torch.tensor(list(itertools.product((0, 1), repeat=horizon)))
        states = torch.stack([torch.zeros(len(self.actions), dtype=torch.long), 1 + self.actions[:, 0]], 1)[:, :horizon]
        self.states = torch.nn.functional.one_hot(states, 3).to(DOUBLE)
        self.rewards = torch.randn(tasks, *self.actions.shape, generator=draws, dtype=DOUBLE)
        self.rewards[..., 0] = self.rewards[:, :1, 0] * self.actions[:, 0]  # before the second action is known
        self.baseline = torch.randn(3, generator=draws, dtype=DOUBLE)

    def chances(self, params):
        """Of every trajectory."""
        return log_chance(Table()(params, self.states), self.actions[..., None]).sum(-1).exp()

    def value(self, params, rewards):
        """The expected return."""
        return (self.chances(params) * rewards.sum(-1)).sum()

    def experience(self, params, rewards):
        """All trajectories, weighed by their chances, with rewards to go less a baseline of the state."""
        outputs = Table()(params, self.states).detach()
        to_go = rewards.flip(-1).cumsum(-1).flip(-1) - self.states @ self.baseline
        weight = self.chances(params).detach()[:, None].expand_as(to_go)
        parts = (self.actions[..., None].to(DOUBLE), outputs, to_go[..., None], weight[..., None])
        return Examples(self.states, torch.cat(parts, -1))


@pytest.mark.parametrize(
    ("kind", "horizon", "right"),
    [
        ("score", 2, False), ("ratio", 2, False), ("trajectory", 2, True),
        ("score", 1, False), ("ratio", 1, True), ("trajectory", 1, True),
    ],
)  # fmt: skip
def test_meta_gradient_is_that_of_the_exact_expected_return(kind, horizon, right):
    """Whose inner step is that of the exact gradient. Score functions lose a term; ratios of single steps another."""
    world, rate = World(horizon), 0.7
    theta = {"logits": torch.randn(3, 2, generator=generator(1), dtype=DOUBLE)}
    loss, outer = surrogate(kind, log_chance), surrogate("ratio", log_chance)
    learner = GradientDescent(Table(), loss, rate, outer_loss=outer)

    def moved(theta, rewards):
        slope = grad(world.value)(theta, rewards)
        return {"logits": theta["logits"] + rate / horizon * slope["logits"]}  # the loss is a mean over steps

    def exact(theta):
        return -torch.stack([world.value(moved(theta, r), r) for r in world.rewards]).mean() / horizon

    support = [world.experience(theta, rewards) for rewards in world.rewards]
    phi = [learner.adapt(theta, seen) for seen in support]
    for found, rewards in zip(phi, world.rewards, strict=True):
        torch.testing.assert_close(found, moved(theta, rewards))  # the first derivative is right in all of them
    query = [world.experience(p, rewards) for p, rewards in zip(phi, world.rewards, strict=True)]
    tasks = Tasks(*(Examples(*map(torch.stack, zip(*part, strict=True))) for part in (support, query)))
    gradient, reference = maml(learner, theta, tasks)[0], central_differences(exact, theta)
    zero = {"logits"} if reference["logits"].norm() < 1e-9 else ()
    assert (error(gradient, reference, zero) <= 1e-6) is right
    assert right or error(gradient, reference, zero) > 1e-2


def test_the_trajectory_surrogate_is_the_change_of_the_expected_return():
    """Everywhere, not only near the sampling policy."""
    world, draws = World(2), generator(1)
    theta, other = ({"logits": torch.randn(3, 2, generator=draws, dtype=DOUBLE)} for _ in range(2))
    for rewards in world.rewards:
        seen = world.experience(theta, rewards)
        found = surrogate("trajectory", log_chance)(Table()(other, seen.x), seen.y)
        change = world.value(other, rewards) - world.value(theta, rewards)
        torch.testing.assert_close(-2 * found, change)


# ---------------------------------------- Gaussian policies in the plane


def case(kind="score", dtype=DOUBLE, steps=1, **settings):
    """A search, its θ, some goals, and their tasks."""
    env, draws = Navigation(horizon=7, close=0.1), generator(0)
    mean = MLP((2, 6, 5, 2), scale="xavier", activation="tanh")
    policy = GaussianPolicy(mean, first_std=1.0, smallest_std=0.0, first_scale=1.0)
    search = PolicySearch(env, policy_descent(policy, kind, 0.4, steps), 5, **settings)
    theta = {
        n: v + 0.1 * torch.randn(v.shape, generator=draws, dtype=dtype) for n, v in policy.init(draws, dtype).items()
    }
    goals = env.goals(3, draws, dtype)
    goals[0] = 0.05  # near enough for episodes to end early
    return search, theta, goals, search.tasks(theta, goals, generator(2))[0]


@pytest.mark.parametrize("kind", SURROGATES)
def test_meta_gradient_on_samples_is_that_of_central_differences(kind):
    search, theta, _, tasks = case(kind)
    assert tasks.support.y[..., -1].min() == 0, "an episode ended early"
    gradient, _ = search.maml(search.learner, theta, tasks)
    assert error(gradient, central_differences(lambda t: objective(search.learner, t, tasks), theta)) <= 1e-6
    short, _ = maml(search.learner.replace(first_order=True), theta, tasks)
    assert error(short, gradient) > 1e-3


def test_the_three_surrogates_have_one_first_derivative():
    _, theta, _, tasks = case()
    moved = [
        case(kind)[0].learner.adapt(theta, Examples(*(t[0] for t in tasks.support))) for kind in ("score", "ratio")
    ]
    torch.testing.assert_close(*moved)
    whole = case("trajectory")[0].learner.adapt(theta, Examples(*(t[0] for t in tasks.support)))
    torch.testing.assert_close(moved[0], whole)


def test_before_the_step_ratios_are_one_and_the_divergence_is_zero():
    search, theta, _, tasks = case()
    loss, apart = judged(search.learner, theta, tasks)
    mean = (tasks.query.y[..., -2] * tasks.query.y[..., -1]).sum((1, 2)) / tasks.query.y[..., -1].sum((1, 2))
    torch.testing.assert_close(loss, -mean.mean())
    assert apart.abs() < 1e-12
    search, theta, _, tasks = case(dtype=torch.float32)
    assert judged(search.learner, theta, tasks)[1].abs() < 1e-6


def test_the_divergence_is_of_the_new_policies_from_those_that_sampled():
    """Averaged over the steps that were lived."""
    search, theta, _, tasks = case()
    away = {name: value + 0.3 for name, value in theta.items()}
    found, learner = [], search.learner
    for i in range(3):
        support, query = (Examples(*(t[i] for t in part)) for part in tasks)
        outputs = learner.outputs(learner.adapt(away, support), query.x)
        lived = query.y[..., -1].bool()
        old, new = (torch.distributions.Normal(*o[lived].chunk(2, -1)) for o in (query.y[..., 2:6], outputs))
        found.append(torch.distributions.kl_divergence(old, new).sum(-1))
    torch.testing.assert_close(judged(learner, away, tasks)[1], torch.cat(found).mean())


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_fisher_products_are_those_of_the_divergences_second_derivative(steps):
    search, theta, _, tasks = case(steps=1)
    learner = search.learner.replace(steps=steps)
    outputs = vmap(lambda task: learner.outputs(learner.adapt(theta, task.support), task.query.x))(tasks)
    y = tasks.query.y.clone()
    y[..., 2:6] = outputs  # so that the query sets are of what is adapted, whatever the steps
    tasks = Tasks(tasks.support, Examples(tasks.query.x, y))
    v = {name: torch.randn(value.shape, generator=generator(3), dtype=DOUBLE) for name, value in theta.items()}
    _, expected = jvp(grad(lambda t: judged(learner, t, tasks)[1]), (theta,), (v,))
    torch.testing.assert_close(fisher_product(learner, theta, tasks, v), expected)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_outer_steps_stay_within_the_limit_and_improve_the_surrogate(dtype):
    search, theta, goals, _ = case(dtype=dtype)
    draws, taken = generator(5), 0
    for _ in range(5):
        state = draws.get_state()
        moved, returns = search(theta, goals, draws)
        again = generator(0)
        again.set_state(state)
        tasks, _ = search.tasks(theta, goals, again)
        before, after = (judged(search.learner, t, tasks) for t in (theta, moved.theta))
        assert after[1] <= search.limit * 1.001 and returns.shape == (3, 5)
        assert moved.theta["log_std"].dtype == dtype
        if moved.factor:
            taken += 1
            assert after[0] < before[0] and after[1] > 0
            assert float(after[1]) == pytest.approx(moved.divergence, rel=1e-3)
        theta = moved.theta
    assert taken >= 4


def test_without_a_better_length_all_stays():
    search, theta, goals, _ = case(limit=0.01)
    ascent = natural_step(
        theta, {n: torch.ones_like(v) for n, v in theta.items()}, lambda v: v,
        lambda t: (torch.tensor(0.0 if t is theta else 1.0), torch.tensor(0.0)),
    )  # fmt: skip
    assert ascent.theta is theta and ascent.factor == 0
    far = natural_step(
        theta, {n: torch.ones_like(v) for n, v in theta.items()}, lambda v: v,
        lambda t: (torch.tensor(0.0 if t is theta else -1.0), torch.tensor(0.02)),
    )  # fmt: skip
    assert far.factor == 0, "beyond the limit"


def maml_for_policies(env, policy, theta, goals, alpha, limit, n, generator):
    """Algorithm 3 of the paper, an iteration written out; the comments are its lines."""
    inner, outer = surrogate("score"), surrogate("ratio")

    def adapt(theta, support):
        g = grad(lambda p: inner(policy(p, support.x), support.y))(theta)  # 6
        return {name: theta[name] - alpha * g[name] for name in theta}  # 7

    support, _ = collect(env, policy, expanded(theta, len(goals)), goals, n, generator)  # 4 and 5
    phi = vmap(adapt, in_dims=(None, 0))(theta, support)
    query, _ = collect(env, policy, phi, goals, n, generator)  # 8
    weight = query.y[..., -1] / query.y[..., -1].sum()

    def outputs(theta):
        return vmap(lambda seen, x: policy(adapt(theta, seen), x))(support, query.x)

    def loss(theta):
        return vmap(outer)(outputs(theta), query.y).mean()

    def kl(theta):
        return (weight * divergence(outputs(theta), query.y[..., 2:6])).sum()

    def hessian(v):
        return jvp(grad(kl), (theta,), (v,))[1]

    return natural_step(theta, grad(loss)(theta), hessian, lambda t: (loss(t), kl(t)), limit)  # 10


def test_a_search_is_the_algorithm_written_out():
    search, theta, goals, _ = case()
    moved, _ = search(theta, goals, generator(4))
    plain = maml_for_policies(search.env, search.learner.model, theta, goals, 0.4, 0.01, 5, generator(4))
    assert moved.factor == plain.factor > 0
    step = max((value - theta[name]).abs().max() for name, value in plain.theta.items())
    for name, value in plain.theta.items():  # ten conjugate gradients amplify rounding
        assert (value - moved.theta[name]).abs().max() < 1e-4 * step


def test_without_inner_steps_it_is_one_policy_for_all_goals():
    """With as many steps of the environment, and no support set."""
    search, theta, goals, tasks = case(steps=0)
    assert tasks.support is tasks.query and tasks.query.x.shape[:2] == (3, 10)
    gradient, _ = search.maml(search.learner, theta, tasks)

    def loss(theta):
        outputs = search.learner.model(theta, tasks.query.x)
        return vmap(surrogate("ratio"))(outputs, tasks.query.y).mean()

    torch.testing.assert_close(gradient, grad(loss)(theta))
    moved, returns = search(theta, goals, generator(4))
    assert returns.shape == (3, 10) and moved.divergence <= 0.01


def test_returns_before_and_after_steps():
    """Each step on fresh trajectories, whose returns are those before it; the first as of θ for every goal."""
    search, theta, goals, _ = case()
    found = search.returns(theta, goals, (0.4, 0.2), 6, generator(3))
    draws, phi = generator(3), expanded(theta, 3)
    for row, rate in zip(found, (0.4, 0.2, None), strict=True):
        seen, returns = collect(search.env, search.learner.model, phi, goals, 6, draws)
        torch.testing.assert_close(row, returns.mean(-1))
        if rate:
            learner = replace(search.learner, rate=rate)
            every = [learner.adapt({n: v[i] for n, v in phi.items()}, Examples(seen.x[i], seen.y[i])) for i in range(3)]
            phi = {name: torch.stack([one[name] for one in every]) for name in phi}


def test_it_learns_to_adapt():
    """Some outer steps, and one inner step gains more than it did."""
    env, draws = Navigation(horizon=20), generator(0)
    policy = GaussianPolicy(MLP((2, 20, 2), scale="xavier"), first_std=1.0, smallest_std=0.0, first_scale=1.0)
    search = PolicySearch(env, policy_descent(policy, "score", 0.5), 10)
    theta = policy.init(draws)
    goals = env.goals(20, generator(9))
    first = search.returns(theta, goals, (0.5,), 20, generator(8)).mean(1)
    for _ in range(25):
        theta = search(theta, env.goals(10, draws), draws)[0].theta
    last = search.returns(theta, goals, (0.5,), 20, generator(8)).mean(1)
    assert last[1] - last[0] > first[1] - first[0] + 0.5 and last[1] > first[1] + 1
