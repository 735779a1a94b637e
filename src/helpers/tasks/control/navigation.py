"""A point in the plane that is to find a goal it is not told: MAML's 2D navigation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from helpers.tasks.control.checks import check_matching, check_positive, check_size, goal_for, uniform_between
from helpers.validate import whole

__all__ = ["Navigation"]


@dataclass(frozen=True)
class Navigation:
    """A point that moves by what the policy says: p ← p + a, each coordinate of a cut to ``max_action``.

    State ``[x, y]``, action ``[dx, dy]``; no noise, no walls. The reward of a step is minus the distance from the goal
    after it (:func:`~helpers.tasks.control.experience.reward` without a cost of the action), and an episode ends with
    the step after which both coordinates are within ``close`` of the goal's. A return is the sum over what was lived.

    The goal is the task. The policy sees it only with ``sees_goal``: this is the oracle.

    Attributes:
        max_action: largest step in a coordinate.
        goal_box: goals are drawn from [−goal_box, goal_box]².
        close: how near in each coordinate ends an episode.
        horizon: most steps of an episode.
        sees_goal: the observation is ``[x, y, goal]`` instead of ``[x, y]``.

    Raises:
        UserError: when a number that must be positive is not.

    Source: Finn, Abbeel and Levine (2017), section 5.3. By the text the reward is the negative squared distance; its
    released code, whose numbers it prints, takes the distance, and "within 0.01" coordinate by coordinate.

    >>> env = Navigation()
    >>> start, goal = env.reset(2, torch.Generator()), torch.tensor([0.3, 0.0])
    >>> env.step(start, torch.tensor([[0.05, -7.0], [0.1, 0.0]]))
    tensor([[ 0.0500, -0.1000],
            [ 0.1000,  0.0000]])
    """

    max_action: float = 0.1
    goal_box: float = 0.5
    close: float = 0.01
    horizon: int = 100
    sees_goal: bool = False

    state_size: ClassVar[int] = 2
    action_size: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_positive(self, "max_action", "goal_box")
        check_positive(self, "close", zero=True)
        whole(self.horizon, "horizon of the navigation")

    @property
    def observation_size(self) -> int:
        """Numbers that a policy sees."""
        return 4 if self.sees_goal else 2

    def reset(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` points at the origin, ``[n, 2]``, on the generator's device; nothing is drawn."""
        whole(n, "number of starts")
        return torch.zeros(n, 2, dtype=dtype, device=generator.device)

    def goals(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` goals, ``[n, 2]``, on the generator's device."""
        whole(n, "number of goals")
        return uniform_between((n, 2), -self.goal_box, self.goal_box, generator, dtype)

    def published_goals(self, n: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first ``n`` of the goals that the paper's policies are judged at, ``[n, 2]``; the paper has 40.

        Source: ``np.random.seed(1)`` and ``np.random.uniform`` in the released code's tests of this domain.
        """
        draws = np.random.RandomState(1)  # noqa: NPY002 (the numbers of the old generator are what is wanted)
        return torch.tensor(draws.uniform(-self.goal_box, self.goal_box, (whole(n, "number of goals"), 2)), dtype=dtype)

    def step(self, state: Tensor, action: Tensor) -> Tensor:
        """The next state: ``state`` ``[..., 2]``, ``action`` ``[..., 2]``, result ``[..., 2]``."""
        check_matching(self, state, action)
        return state + action.clamp(-self.max_action, self.max_action)

    def observe(self, state: Tensor, goal: Tensor | None = None) -> Tensor:
        """The state ``[..., 2]``; with ``sees_goal`` state and goal, ``[..., 4]``.

        Raises:
            UserError: with ``sees_goal`` and without a goal ``[..., 2]``.
        """
        return torch.cat([state, goal_for(goal, state)], -1) if self.sees_goal else state

    def lived(self, observations: Tensor, goal: Tensor) -> Tensor:
        """Which steps belong to an episode: 1 up to the one that reaches the goal, 0 after it.

        The start counts as no arrival: whether to end is asked after a move.

        Args:
            observations: before each step, ``[..., horizon, observation]``.
            goal: ``[..., 2]``, one for each episode, or leading axes that broadcast.

        Returns:
            ``[..., horizon]``, in the dtype of the observations.
        """
        check_size(goal, 2, "goal")
        arrived = ((observations[..., :2] - goal[..., None, :]).abs() < self.close).all(-1).to(observations.dtype)
        arrived = torch.cat([torch.zeros_like(arrived[..., :1]), arrived[..., 1:]], -1)
        return (arrived.cumsum(-1) == 0).to(observations.dtype)
