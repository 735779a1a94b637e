"""A learned loss for black boxes: its meta-gradient, the score function, the worlds that PPO sees, and refusals."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from refusals import refused
from torch.func import grad

from helpers.experiments.ml3_modelfree import ModelFree
from helpers.lab import checkpoints, training
from helpers.learners import ppo
from helpers.learners.ppo import as_gymnasium
from helpers.models.layers import stacked
from helpers.models.policies import log_probability
from helpers.numerics.differences import central_differences, error
from helpers.runtime import generator
from helpers.tasks import control
from helpers.tasks.control.experience import Experience, advantages, query, sample, support
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.control.rollout import rollout

SMALL = ModelFree(
    "small", hidden=(4,), loss_hidden=(5,), trajectories=3, updates=2, goals=2, iterations=2, seeds=2, test_goals=2,
    test_updates=(0, 2), ppo_updates=(0, 1), ppo_settings=((1e-3, 1, 0.9), (1e-2, 1, 0.9)), ppo_goals=1,
)  # fmt: skip
TASKS = [{"task": "pointmass"}, {"task": "reacher", "max_action": 0.1}]


def ready(**changes):
    return replace(SMALL, **changes).setup(torch.device("cpu"), False)


def noisy(params, draws):
    """Nothing near zero."""
    return {n: v + 0.5 * torch.randn(v.shape, generator=draws, dtype=v.dtype) for n, v in params.items()}


def case(rewards=False, dtype=torch.float64):
    """A run, ψ, policies, and invented experience before and after an update: ``[seeds, policies, ...]``."""
    run, draws = ready(rewards=rewards), generator(0)

    def invented():
        shapes = ((4, 3, 7, 6), (4, 3, 7, 2), (4, 3, 7))
        return Experience(*(torch.randn(shape, generator=draws, dtype=dtype) for shape in shapes))

    theta = stacked([noisy(run.learner.init(draws, dtype), draws) for _ in range(2)])
    params = stacked([noisy(run.learner.model.init(draws, dtype), draws) for _ in range(4)])
    given, fresh = support(invented(), rewards), query(invented())
    return run, theta, *(run._apart(tree) for tree in (params, given, fresh))


@pytest.mark.parametrize("rewards", [False, True])
def test_meta_gradient_is_that_of_central_differences(rewards):
    """Of the outer objective on fixed fresh trajectories, by ψ, through the update on fixed given ones."""
    run, theta, params, given, fresh = case(rewards)
    learner = run.learner

    def objective(theta):
        """The mean over policies of each seed, added up: each seed's derivative is its own."""
        total = 0.0
        for seed in range(2):
            for policy in range(2):
                at = {n: v[seed, policy] for n, v in params.items()}
                learned = {n: v[seed] for n, v in theta.items()}
                moved = learner.step(learned, at, given._make(t[seed, policy] for t in given))
                total = total + learner.query_loss(moved, fresh._make(t[seed, policy] for t in fresh)) / 2
        return total

    met = []
    gradient, moved = run.one_step(theta, params, given, lambda moved: met.append(moved) or fresh)
    assert met[0] is moved and error(moved, params) > 1e-2
    assert gradient.keys() == theta.keys()
    differences, constant = central_differences(objective, theta), "loss:linear2.bias"
    assert not gradient.pop(constant).any() and differences.pop(constant).abs().max() < 1e-9, "only adds to the loss"
    assert error(gradient, differences) <= 1e-6


@pytest.mark.parametrize("rewards", [False, True])
def test_learned_loss_sees_rewards_only_if_asked(rewards):
    draws, shapes = generator(0), ((1, 3, 7, 6), (1, 3, 7, 2), (1, 3, 7))
    experience = Experience(*(torch.randn(shape, generator=draws) for shape in shapes))
    other = experience._replace(rewards=experience.rewards.square())
    one, two = (support(e, rewards) for e in (experience, other))
    assert torch.equal(one.x, two.x) and torch.equal(one.y, two.y) is not rewards


def test_log_density_is_that_of_the_normal_distribution():
    draws = generator(0)
    policy, x = ready().learner.model, torch.randn(5, 6, generator=draws, dtype=torch.float64)
    params = noisy(policy.init(draws, torch.float64), draws)
    mean, std = policy(params, x).chunk(2, -1)
    action = torch.randn(5, 2, generator=draws, dtype=torch.float64)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1).log_prob(action)
    torch.testing.assert_close(log_probability(policy(params, x), action), theirs)
    torch.testing.assert_close(std, (0.1 + params["log_std"].exp()).expand(5, 2))
    torch.testing.assert_close(policy(policy.init(draws), x.float())[:, 2:], torch.full((5, 2), 0.5))


def test_advantages_by_hand():
    rewards = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 2.0, -1.0]]])
    torch.testing.assert_close(control.to_go(rewards), torch.tensor([[[6.0, 5.0, 3.0], [4.0, 1.0, -1.0]]]))
    by_hand = torch.tensor([1.0, 2.0, 2.0]) / 3**0.5
    torch.testing.assert_close(advantages(rewards), torch.stack([by_hand, -by_hand])[None])
    assert not advantages(torch.ones(1, 4, 3)).any()


def test_outer_gradient_points_where_the_return_grows():
    """The score function, of a black box, against the derivative through the environment."""
    run, draws, n = ready(), generator(0), 20_000
    env, policy = replace(run.env, horizon=4, dt=0.5), run.learner.model
    params, goal = noisy(policy.init(draws), draws), torch.tensor([[0.6, -0.8]])
    start, noise = env.reset(n, draws)[None], torch.randn(1, n, 4, 2, generator=draws)
    one = {name: value[None] for name, value in params.items()}
    met = sample(env, policy, {n: v.requires_grad_() for n, v in one.items()}, goal, start, noise)
    assert not any(part.requires_grad for part in met)
    example = query(met)
    score = grad(lambda p: run.learner.query_loss(p, example._make(t[0] for t in example)))(params)

    def loss(params):
        state, total = start, 0.0
        for now in noise.unbind(-2):
            *_, gained, state = control.act(env, policy, 0.0, params, state, goal[:, None], now)
            total = total - gained.mean()
        return total

    exact = grad(loss)({name: value.detach() for name, value in one.items()})
    a, b = (torch.cat([gradient[name].flatten() for name in params]) for gradient in (score, exact))
    assert torch.cosine_similarity(a, b, 0) > 0.98


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"])
def test_sampling_is_a_rollout(task):
    """Of the policy with its noise; and returns are what the trajectories say."""
    run, draws = ready(**task), generator(0)
    env, policy, cost = run.env, run.learner.model, 0.1
    params = [policy.init(draws) for _ in range(2)]
    goal, start = env.goals(2, draws), env.reset(6, draws).view(2, 3, 4)
    noise = torch.randn(2, 3, env.horizon, 2, generator=draws)
    met = sample(env, policy, stacked(params), goal, start, noise, cost)
    assert met.actions.abs().max() > 1, "some actions are cut"
    for i in (0, 1):
        now = iter(noise[i].unbind(1))

        def said(params, seen, now=now):
            mean, std = policy(params, seen).chunk(2, -1)
            return env.max_action * (mean + std * next(now))

        path = rollout(env, said, params[i], start[i], goal[i])
        torch.testing.assert_close(met.observations[i], env.observe(path.states[:, :-1], goal[i]))
        away = (path.states[:, 1:, :2] - goal[i]).norm(dim=-1).sum(-1)
        effort = (path.actions / env.max_action).square().sum((-1, -2))
        torch.testing.assert_close(met.returns[i], -away - cost * effort)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"])
def test_gymnasium_world_is_ours(task):
    gymnasium = pytest.importorskip("gymnasium", reason='needs gymnasium: pip install -e ".[control]"')
    from gymnasium.utils import env_checker

    env, draws = ready(**task).env, generator(0)
    goal, actions = env.goals(1, draws)[0], 1.5 * torch.randn(env.horizon, 2, generator=draws)
    world = as_gymnasium(env, goal, 0.1)
    assert isinstance(world, gymnasium.Env)
    first, _ = world.reset(seed=3)
    start = env.reset(1, generator(3))[0]
    path = rollout(env, lambda now, _: env.max_action * next(now)[None], iter(actions), start, goal)
    seen, gained, terminated, truncated = zip(*(world.step(a)[:4] for a in actions.clamp(-1, 1).numpy()), strict=True)
    torch.testing.assert_close(torch.tensor(np.stack([first, *seen])), env.observe(path.states, goal))
    away = (path.states[1:, :2] - goal).norm(dim=-1) + 0.1 * (path.actions / env.max_action).square().sum(-1)
    torch.testing.assert_close(torch.tensor(gained), -away)
    assert not any(terminated) and truncated == (False,) * (env.horizon - 1) + (True,)
    env_checker.check_env(world, skip_render_check=True)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"])
def test_worlds_side_by_side_are_single_ones(task):
    pytest.importorskip("stable_baselines3", reason='needs stable-baselines3: pip install -e ".[control]"')
    experiment = replace(SMALL, **task, control_cost=0.1)
    env, draws = experiment.environment(), np.random.default_rng(0)
    goal = env.goals(1, generator(0))[0]
    many, one = ppo._side_by_side(experiment, goal, 3), as_gymnasium(env, goal, 0.1)
    seen = many.reset()
    one.reset()
    one.unwrapped.state, total = env.reset(3, generator(3))[1], 0.0
    for _ in range(env.horizon):
        actions = draws.uniform(-1, 1, (3, 2)).astype(np.float32)
        seen, gained, over, infos = many.step(actions)
        total += gained.mean()
        alone = one.step(actions[1])
        assert gained[1] == pytest.approx(alone[1], rel=1e-5) and bool(over[1]) is alone[3]
    assert over.all() and infos[1]["TimeLimit.truncated"] and many.returns == [pytest.approx(total, rel=1e-5)]
    np.testing.assert_allclose(infos[1]["terminal_observation"], alone[0], atol=1e-5)
    assert np.abs(seen[:, :2]).max() <= 0.1, "the next episode has begun"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"])
def test_two_iterations(task, tmp_path):
    """With what the records need; and the random generators of others are left alone."""
    pytest.importorskip("stable_baselines3", reason='needs stable-baselines3: pip install -e ".[control]"')
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    experiment = replace(SMALL, **task)
    record = training.train(experiment, data=tmp_path, progress=False, say=lambda _: None)
    assert record["iterations"] == {"done": 2, "planned": 2} and json.dumps(record)
    metrics = record["metrics"]
    assert list(metrics)[0] == "ml3_return_2"
    assert {"ml3_return_0", "spot_ml3_return_2", "ppo_return_0", "ppo_return_1", "ppo_rate"} < metrics.keys()
    assert all(entry["value"] < 0 for name, entry in metrics.items() if "return" in name)
    run = experiment.setup(torch.device("cpu"), False)
    spot = run.spot_check(checkpoints.load_theta("small", tmp_path / "checkpoints"))
    assert spot.keys() == {name for name in metrics if name.startswith("spot_")}
    assert all(value.value == pytest.approx(metrics[name]["value"], rel=1e-6) for name, value in spot.items())
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()  # noqa: NPY002


def test_iteration_depends_on_its_generator_alone():
    run = ready()
    theta = run.init(generator(0))
    (one, loss), (again, _), (other, _) = (run.gradient(theta, generator(seed), 0) for seed in (1, 1, 2))
    assert loss > 0 and all(torch.equal(one[name], again[name]) for name in theta)
    assert not torch.equal(one["loss:linear1.weight"], other["loss:linear1.weight"])
    assert all(value.shape[0] == 2 for value in one.values()), "one loss for each seed"


def test_arm_is_still_that_of_reacher_v5():
    """One Runge-Kutta step for two, over an episode of full torques."""
    env, draws = ready(**TASKS[1]).env, generator(0)
    start = env.reset(20, draws, torch.float64)
    torques = env.max_action * (2 * torch.rand(50, 20, 2, generator=draws, dtype=torch.float64) - 1)
    ours, theirs = (
        rollout(arm, lambda now, _: next(now), iter(torques), start, start[:, :2], env.horizon).states
        for arm in (env, Reacher(max_action=env.max_action))
    )
    assert env.dt * env.substeps == Reacher().dt * Reacher().substeps and (theirs - start[:, None]).abs().max() > 0.5
    assert (ours - theirs)[..., :2].abs().max() < 1e-6


def test_absent_packages_are_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    assert "gymnasium is not installed" in refused(lambda: as_gymnasium(PointMass(), torch.zeros(2)))
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    message = refused(lambda: ppo.ppo(SMALL, torch.zeros(2), (1e-3, 1, 0.9), 1, 0))
    assert "stable-baselines3 is not installed" in message and "pip install" in message


def test_without_ppo_there_are_the_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    run = ready()
    metrics = run.evaluate(run.init(generator(0)))
    assert "ml3_return_2" in metrics and not any(name.startswith("ppo") for name in metrics)


def test_unknown_task_is_refused():
    assert "pointmass, reacher, not 'walker'" in refused(lambda: replace(SMALL, task="walker"))
    assert isinstance(replace(SMALL, task="reacher").environment(), Reacher)
