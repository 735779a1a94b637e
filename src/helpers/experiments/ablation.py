"""A recorded experiment of the last chapter: learned loss, learned rule and learned start, alone and together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from helpers import losses
from helpers.experiments.paradigms import ParadigmExperiment
from helpers.fields import among
from helpers.learners.learned import LearnedDescent
from helpers.losses import LearnedLoss
from helpers.models.mlp import MLP
from helpers.optimizers.recurrent import RecurrentRule

PARTS = ("loss", "rule", "start")


@dataclass(frozen=True)
class Combined(ParadigmExperiment):
    """Descent on sinusoids with some of its parts learned; all eight train on as many tasks and steps.

    The network is half as wide as elsewhere, for the sake of the rule, which has a memory for every weight. The inner
    gradients are held constant in the outer loop for all of them (``first_order``): the derivative of the
    rule's logarithm is unbounded, and one estimator for all keeps the comparison about the parts.

    Attributes:
        learned: which of ``PARTS``.
    """

    learned: tuple[str, ...] = among(*PARTS, default=())
    paper: str = "combined"

    def learner(self) -> LearnedDescent:
        """The same descent for all; the parts are its arguments."""
        return LearnedDescent(
            MLP((1, 20, 20, 1), scale=None),
            losses.mean_squared_error,
            self.inner_rate,
            self.inner_steps,
            first_order=True,
            learned=LearnedLoss(MLP((2, 40, 40, 1), scale=None)) if "loss" in self.learned else None,
            rule=RecurrentRule(hidden=8) if "rule" in self.learned else None,
            learn_start="start" in self.learned,
        )


def experiments() -> list[Combined]:
    """All eight, the one with everything first."""

    def one(learned: tuple[str, ...]) -> Combined:
        return Combined(
            f"combined-{'-'.join(learned) or 'nothing'}", "sinusoid", "combined", 2_500 if learned else 1,
            outer_rate=3e-3 if learned else 0.0, shots=10, inner_rate=0.01, inner_steps=5, meta_batch=8,
            test_shots=(10,), learned=learned,
        )  # fmt: skip

    chosen = [tuple(p for p, on in zip(PARTS, switches, strict=True) if on) for switches in product((1, 0), repeat=3)]
    return [one(learned) for learned in chosen]
