"""Policies by PPO, as Stable-Baselines3 has it: what learned losses without a model are compared with."""

from __future__ import annotations

import importlib
import importlib.util
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from helpers import runtime
from helpers.errors import UserError
from helpers.progress import progress_bar
from helpers.tasks.control.experience import reward
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher


def _needed(package: str) -> Any:
    """The package, or the sentence that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0].replace("_", "-")
        raise UserError(f'{name} is not installed and is needed here: pip install -e ".[control]"') from None


def as_gymnasium(env: PointMass | Reacher, goal: Tensor, control_cost: float = 0.0, seed: int = 0) -> Any:
    """One goal of a task as a ``gymnasium.Env``.

    Actions are in [−1, 1], observations and rewards those of this module, as float32 and float; an episode is
    truncated at the horizon and never terminates.

    Args:
        goal: ``[2]``.
        seed: of the starts, until ``reset`` is given another.

    Raises:
        UserError: where gymnasium is not installed.
    """
    gymnasium = _needed("gymnasium")
    spaces = gymnasium.spaces

    class OneGoal(gymnasium.Env):
        """The state is a tensor ``[4]``."""

        def __init__(self) -> None:
            self.draws, self.state, self.time = runtime.generator(seed), None, 0
            size = env.observe(env.reset(1, runtime.generator(seed)), goal).shape[-1]
            self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
            self.action_space = spaces.Box(-1.0, 1.0, (env.action_size,), np.float32)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            super().reset(seed=seed)
            if seed is not None:
                self.draws = runtime.generator(seed)
            self.state, self.time = env.reset(1, self.draws)[0], 0
            return env.observe(self.state, goal).numpy(), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            drawn = torch.as_tensor(action, dtype=torch.float32)
            self.state, self.time = env.step(self.state, env.max_action * drawn), self.time + 1
            gained = reward(env, self.state, drawn, goal, control_cost).item()
            return env.observe(self.state, goal).numpy(), gained, False, self.time >= env.horizon, {}

    return OneGoal()


class PolicySettings(Protocol):
    """What PPO is given: an environment, the policy's form, and how many trajectories an update follows.

    Attributes:
        trajectories: of an update.
        control_cost: see :func:`~helpers.tasks.control.experience.reward`.
        hidden: layers of the policy, and of the value function.
        first_std: deviation of the actions before any update.
    """

    trajectories: int
    control_cost: float
    hidden: tuple[int, ...]
    first_std: float

    def environment(self) -> PointMass | Reacher:
        """Where the policy acts."""


def _side_by_side(e: PolicySettings, goal: Tensor, seed: int) -> Any:
    """As many of :func:`as_gymnasium` as an update takes trajectories, stepped as one batch, for stable-baselines3."""
    vectors = _needed("stable_baselines3.common.vec_env")
    env, n = e.environment(), e.trajectories
    one = as_gymnasium(env, goal, e.control_cost)

    class SideBySide(vectors.VecEnv):
        """``returns`` collects the mean return of each round of episodes."""

        def __init__(self) -> None:
            self.draws, self.returns, self.actions = runtime.generator(seed), [], None
            super().__init__(n, one.observation_space, one.action_space)

        def reset(self) -> np.ndarray:
            self.state, self.time, self.total = env.reset(n, self.draws), 0, 0.0
            return env.observe(self.state, goal).numpy()

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = torch.as_tensor(actions)

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
            self.state, self.time = env.step(self.state, env.max_action * self.actions), self.time + 1
            gained = reward(env, self.state, self.actions, goal, e.control_cost)
            self.total += gained.mean().item()
            seen, over = env.observe(self.state, goal).numpy(), self.time >= env.horizon
            infos = [{"terminal_observation": last, "TimeLimit.truncated": True} if over else {} for last in seen]
            if over:
                self.returns.append(self.total)
                seen = self.reset()
            return seen, gained.numpy(), np.full(n, over), infos

        def close(self) -> None:
            pass

        def get_attr(self, attr_name: str, indices: Any = None) -> list:
            return [getattr(one, attr_name)] * n

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise UserError("environments side by side are not changed from outside: make new ones")

        def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list:
            raise UserError("environments side by side are not changed from outside: make new ones")

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            return [False] * n

    return SideBySide()


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Leave the global generators, which stable-baselines3 seeds and uses, as they were found."""
    numpy, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy)  # noqa: NPY002
        random.setstate(python)


def ppo(e: PolicySettings, goal: Tensor, setting: Sequence[float], updates: int, seed: int) -> Tensor:
    """Train a fresh policy for one goal by proximal policy optimisation, with a value function of its own.

    An update is what follows ``e.trajectories`` trajectories: all epochs over their steps, in minibatches as long as a
    trajectory. The rest is left to the library's defaults.

    Args:
        goal: ``[2]``.
        setting: learning rate, epochs, discount.

    Returns:
        Mean return of the trajectories sampled after 0, 1, … ``updates`` updates, ``[updates + 1]``.

    Raises:
        UserError: where stable-baselines3 is not installed.

    Source: Schulman et al. (2017); the implementation is stable-baselines3's.
    """
    library = _needed("stable_baselines3")
    rate, epochs, discount = setting
    with _own_randomness():
        world, horizon = _side_by_side(e, goal, seed), e.environment().horizon
        model = library.PPO(
            "MlpPolicy", world, rate, n_steps=horizon, batch_size=horizon, n_epochs=epochs,
            gamma=discount, seed=seed, device="cpu",
            policy_kwargs={"net_arch": list(e.hidden), "log_std_init": math.log(e.first_std)},
        )  # fmt: skip
        model.learn((updates + 1) * model.n_steps * world.num_envs)
    return torch.tensor(world.returns)


def tuned_ppo(
    e: PolicySettings, training: Tensor, test: Tensor, settings: Sequence[Sequence[float]], updates: int, seeds: int
) -> tuple[Sequence[float], Tensor]:
    """PPO with that of several settings which has the best return after its last update on training goals.

    Args:
        training, test: goals, ``[goals, 2]``.
        settings: learning rate, epochs and discount of each.
        updates, seeds: how many; each goal of each seed has a policy of its own.

    Returns:
        The setting, and mean returns over the test goals ``[seeds, updates + 1]``.

    Raises:
        UserError: where stable-baselines3 is not installed.
    """
    bar = progress_bar(total=len(settings) * len(training) + seeds * len(test), desc="PPO", leave=False)

    def run(goal: Tensor, setting: Sequence[float], seed: int) -> Tensor:
        bar.update()
        return ppo(e, goal, setting, updates, seed)

    with bar:
        ends = [
            torch.stack([run(goal, setting, seed) for seed, goal in enumerate(training)])[:, -1].mean()
            for setting in settings
        ]
        best = settings[int(torch.stack(ends).argmax())]
        runs = [[run(goal, best, 1000 * (1 + seed) + i) for i, goal in enumerate(test)] for seed in range(seeds)]
    return best, torch.stack([torch.stack(goals).mean(0) for goals in runs])
