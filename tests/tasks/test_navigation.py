"""2D navigation: how it moves, what it rewards, when it ends; and what an action was worth, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused

from helpers.models.layers import stacked
from helpers.models.mlp import MLP
from helpers.models.policies import GaussianPolicy, log_probability
from helpers.runtime import generator
from helpers.tasks.control import returns
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.surrogates import collect, divergence, metric

ENV = Navigation()


def policies(env, count, draws, dtype=torch.float64):
    mean = MLP((env.observation_size, 5, 2), scale="xavier")
    policy = GaussianPolicy(mean, first_std=1.0, smallest_std=0.0, first_scale=1.0)
    return policy, stacked([policy.init(draws, dtype) for _ in range(count)])


# ---------------------------------------- the environment


def test_a_step_is_the_action_cut_to_a_tenth():
    draws = generator(0)
    state, action = (torch.randn(3, 4, 2, generator=draws, dtype=torch.float64) for _ in range(2))
    moved = ENV.step(state, action) - state
    torch.testing.assert_close(moved, action.clamp(-0.1, 0.1))
    assert moved.abs().max() == pytest.approx(0.1) and ENV.horizon == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_goals_and_observations(dtype):
    start, goals = ENV.reset(3, generator(0), dtype), ENV.goals(1000, generator(0), dtype)
    assert start.dtype == goals.dtype == dtype and not start.any()
    assert goals.abs().max() <= 0.5 and goals.abs().max() > 0.49 and goals.mean().abs() < 0.03
    assert torch.equal(ENV.observe(start, goals[:3]), start), "the goal is not seen"
    seeing = replace(ENV, sees_goal=True)
    assert torch.equal(seeing.observe(start, goals[:3]), torch.cat([start, goals[:3]], -1))
    assert (ENV.observation_size, seeing.observation_size) == (2, 4)
    assert "needs a goal" in refused(lambda: seeing.observe(start))


def test_the_papers_test_goals():
    goals = ENV.published_goals()
    assert goals.shape == (40, 2) and torch.equal(goals[:5], ENV.published_goals(5))
    torch.testing.assert_close(goals[6], torch.tensor([-0.29555, 0.37812]), atol=1e-5, rtol=0)  # of its Figure 4


def test_an_episode_ends_with_the_step_that_is_close_in_both_coordinates():
    """Not in one of them, not at the start, and not by the Euclidean distance."""
    goal = torch.tensor([0.05, 0.0])
    path = torch.tensor([[0.05, 0.0], [0.05, 0.1], [0.0, 0.0], [0.0591, -0.0091], [0.3, 0.3], [0.05, 0.0], [0.3, 0.3]])
    assert ENV.lived(path, goal).tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert ENV.lived(path[:3], goal).tolist() == [1, 1, 1]


def test_collected_experience_is_what_happened():
    env, draws, dtype = Navigation(horizon=30, close=0.05), generator(0), torch.float64
    policy, params = policies(env, 3, draws)
    params["log_std"] = params["log_std"] - 1
    goals = env.goals(3, draws, dtype)
    goals[0] = 0.02
    seen, total = collect(env, policy, params, goals, 20, draws)
    assert seen.x.shape == (3, 20, 30, 2) and seen.y.shape == (3, 20, 30, 8) and seen.x.dtype == seen.y.dtype == dtype
    action, old, advantage, lived = seen.y.split([2, 4, 1, 1], -1)
    assert not seen.x[:, :, 0].any() and action.abs().max() > 1, "some actions are cut"
    after = seen.x + 0.1 * action.clamp(-1, 1)
    torch.testing.assert_close(seen.x[:, :, 1:], after[:, :, :-1])
    ended = 0
    for task, goal in enumerate(goals):
        outputs = policy({n: v[task] for n, v in params.items()}, seen.x[task])
        torch.testing.assert_close(old[task], outputs)
        for episode in range(20):
            gained, steps = 0.0, 0
            for p in after[task, episode]:
                away = (p - goal).abs()
                gained, steps = gained - away.norm().item(), steps + 1
                if (away < 0.05).all():
                    ended += 1
                    break
            assert total[task, episode].item() == pytest.approx(gained)
            assert lived[task, episode, :, 0].tolist() == [1.0] * steps + [0.0] * (30 - steps)
    assert ended > 2
    weighted = advantage * lived
    torch.testing.assert_close(advantage, weighted)
    assert weighted.sum((1, 2)).abs().max() < 1e-9
    torch.testing.assert_close(weighted.square().sum((1, 2)) / lived.sum((1, 2)), torch.ones(3, 1, dtype=dtype))


def test_sampling_depends_on_its_generator_alone():
    policy, params = policies(ENV, 2, generator(0), torch.float32)
    goals = ENV.goals(2, generator(1))
    one, again, other = (collect(ENV, policy, params, goals, 2, generator(seed))[1] for seed in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)


# ---------------------------------------- what an action was worth


def test_discounted_returns_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    torch.testing.assert_close(returns.discounted(rewards, 0.5), torch.tensor([[3.0, 4.0, 4.0], [2.0, 4.0, 8.0]]))
    torch.testing.assert_close(returns.discounted(rewards, 1.0)[:, 0], rewards.sum(-1))
    torch.testing.assert_close(returns.discounted(rewards, 0.0), rewards)


def test_the_baseline_is_ridge_regression_on_its_features():
    draws = generator(0)
    x = 8 * torch.randn(2, 3, 5, 2, generator=draws, dtype=torch.float64)
    y = torch.randn(2, 3, 5, generator=draws, dtype=torch.float64)
    lived = torch.ones(2, 3, 5, dtype=torch.float64)
    lived[0, 1, 3:] = 0
    found = returns.fitted_values(x, y, lived)
    seen = returns.features(x)
    torch.testing.assert_close(seen[1, 2, 4], torch.tensor(
        [*(o := x[1, 2, 4].clamp(-10, 10).tolist()), *(v * v for v in o), 0.04, 0.0016, 0.000064, 1], dtype=x.dtype
    ))  # fmt: skip
    assert x.abs().max() > 10
    for task in (0, 1):
        own = lived[task].bool()
        a, b = seen[task][own].numpy(), y[task][own].numpy()
        coefficients = np.linalg.solve(a.T @ a + 1e-5 * np.eye(8), a.T @ b)
        np.testing.assert_allclose(found[task].numpy(), seen[task].numpy() @ coefficients, rtol=1e-8)
    assert returns.fitted_values(x.float(), y.float(), lived.float()).dtype == torch.float32


def test_generalised_advantages_by_hand():
    """An episode of three steps and one that ends after two."""
    rewards = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 9.0]])
    values = torch.tensor([[10.0, 20.0, 40.0], [10.0, 20.0, 90.0]])
    lived = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    one_step = returns.generalised(rewards, values, lived, 0.5, 0.0)
    torch.testing.assert_close(one_step, torch.tensor([[1.0, 2.0, -36.0], [1.0, -18.0, 0.0]]))
    whole = returns.generalised(rewards, values, lived, 0.5, 1.0)
    torch.testing.assert_close(whole, torch.tensor([[-7.0, -16.0, -36.0], [-8.0, -18.0, 0.0]]))
    half = returns.generalised(rewards, values, lived, 0.5, 0.5)
    torch.testing.assert_close(half[0], torch.tensor([1 + 2 / 4 - 36 / 16, 2 - 36 / 4, -36.0]))


def test_standardised_by_hand():
    found = returns.standardised(torch.tensor([[1.0, 3.0], [5.0, 99.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    deviation = (8 / 3) ** 0.5
    torch.testing.assert_close(found, torch.tensor([[-2 / deviation, 0.0], [2 / deviation, 0.0]]))
    x, rewards, lived = torch.randn(4, 3, 2), torch.randn(4, 3), torch.ones(4, 3)
    one, other = (returns.advantages_of(x, r, lived) for r in (rewards, 7 * rewards))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)  # whatever the scale of the rewards


# ---------------------------------------- Gaussian policies


def test_divergence_and_its_second_derivative():
    draws = generator(0)
    new, old = (torch.randn(6, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    new[:, 2:], old[:, 2:] = new[:, 2:].exp(), old[:, 2:].exp()
    normal = [torch.distributions.Independent(torch.distributions.Normal(*o.chunk(2, -1)), 1) for o in (old, new)]
    torch.testing.assert_close(divergence(new, old), torch.distributions.kl_divergence(*normal))
    assert divergence(old, old).abs().max() < 1e-15
    hessian = torch.func.hessian(lambda o: divergence(o, old[0]))(old[0])
    torch.testing.assert_close(hessian, torch.diag(metric(old[0])))
    assert log_probability(old[0], old[0, :2]).shape == ()
