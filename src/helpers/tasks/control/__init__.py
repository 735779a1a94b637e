"""Control problems that can be differentiated: a car on a hill, a point mass and a two-link arm, in torch alone.

An environment holds numbers only. ``env.step(state, action)`` is a pure function of tensors with any leading axes, so
that a whole rollout has derivatives of any order, and works under ``vmap``. An action beyond its limits acts as the
limit; derivatives are those of what is computed, thus 0 beyond a limit.

There is no episode end and no reward. :func:`rollout` gives the states and actions of a fixed horizon, and
``env.loss`` says how good they were, one number for each trajectory. One environment is for policies that learn from
rewards alone (:class:`~helpers.tasks.control.navigation.Navigation`): it says which steps an episode has lived, and has
no loss.
"""

from helpers.tasks.control.experience import Experience, act, advantages, reward, sample, to_go
from helpers.tasks.control.mountain_car import MountainCar
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.control.rollout import Rollout, random_rollouts, rollout
from helpers.tasks.control.types import Control, Trajectory, Transitions

__all__ = [
    "Control",
    "Experience",
    "MountainCar",
    "Navigation",
    "PointMass",
    "Reacher",
    "Rollout",
    "Trajectory",
    "Transitions",
    "act",
    "advantages",
    "random_rollouts",
    "reward",
    "rollout",
    "sample",
    "to_go",
]
