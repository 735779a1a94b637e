"""The learner: how meta-parameters and a support set become task parameters, ``φ = adapt(θ, support)``.

Any estimator meets any learner: the result is right, or refused in one sentence. A learner honours each of its
attributes, or refuses it when it is made.
"""

from helpers.learners.descent import CARRIED, PREFIXES, RATE, STATE, STRENGTH, GradientDescent, detached
from helpers.learners.feedforward import Amortized, AsItIs, Neighbours, Prototypes, Recurrent
from helpers.learners.learned import LearnedDescent, LossDescent, started
from helpers.learners.minibatch import MinibatchAdam, MinibatchDescent
from helpers.learners.multistep import MultiStepDescent, annealed
from helpers.learners.proximal import HessianFree, Proximal

__all__ = [
    "Amortized",
    "AsItIs",
    "CARRIED",
    "GradientDescent",
    "HessianFree",
    "LearnedDescent",
    "LossDescent",
    "MinibatchAdam",
    "MinibatchDescent",
    "MultiStepDescent",
    "Neighbours",
    "PREFIXES",
    "Prototypes",
    "Proximal",
    "RATE",
    "Recurrent",
    "STATE",
    "STRENGTH",
    "annealed",
    "detached",
    "started",
]
