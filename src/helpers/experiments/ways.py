"""The recorded experiments of the first chapter: every way to learn F on both families of tasks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers.experiments.paradigms import ParadigmExperiment
from helpers.fields import among
from helpers.learners.multistep import SummedDescent
from helpers.types import Started, Tasks


@dataclass(frozen=True)
class Reader(ParadigmExperiment):
    """The recurrent network, trained on as many examples as it is tested on.

    Attributes:
        train_shots: numbers of examples of the training tasks; each task has one of them.
    """

    train_shots: tuple[int, ...] = (1, 2, 3, 4, 5)

    def drawn_shots(self, draws: torch.Generator) -> int:
        """One of ``train_shots`` for a meta-batch."""
        return self.train_shots[int(torch.randint(len(self.train_shots), (), generator=draws, device=draws.device))]


@dataclass(frozen=True)
class Rule(ParadigmExperiment):
    """The learned update rule, trained by the mean of the training losses on its way, as its paper has it.

    Attributes:
        objective: the outer loss.
    """

    objective: str = among("training losses", default="training losses")

    def learner(self) -> SummedDescent:
        """The rule of the method, judged after every step."""
        rule = super().learner()
        return SummedDescent(rule.model, rule.loss, rule.rate, rule.steps, first_order=True, rule=rule.rule)

    def outer_tasks(self, tasks: Tasks | Started) -> Tasks | Started:
        """The support sets in place of the query sets."""
        return tasks._replace(query=tasks.support)


def experiments() -> list[ParadigmExperiment]:
    """Every method on both families."""
    sinusoid = {"family": "sinusoid", "shots": 10}
    glyphs = {"family": "glyphs", "shots": 1, "ways": 5, "queries": 5, "test_shots": (1, 5), "meta_batch": 8}
    glyphs |= {"rates": (0.1, 0.3, 1.0), "steps": (1, 5, 20), "test_tasks": 60, "validation_tasks": 15}
    glyphs |= {"spot_tasks": 20}

    def both(method: str, on_sinusoids: dict, on_glyphs: dict, first=ParadigmExperiment, second=ParadigmExperiment):
        return [
            first(f"ways-sinusoid-{method}", method=method, **sinusoid | on_sinusoids),
            second(f"ways-glyphs-{method}", method=method, **glyphs | on_glyphs),
        ]

    fast, image = {"iterations": 4_000, "outer_rate": 3e-3}, {"iterations": 1_000, "outer_rate": 2e-3}
    once = {"iterations": 1, "outer_rate": 0.0}
    return [
        *both("recurrence", fast | {"train_shots": (5, 10, 20)}, image, first=Reader, second=Reader),
        *both(
            "optimizer",
            {"iterations": 600, "outer_rate": 3e-3, "inner_steps": 10, "meta_batch": 8},
            {"iterations": 300, "outer_rate": 3e-3, "inner_steps": 5, "meta_batch": 4},
            first=Rule,
        ),
        *both(
            "initialization",
            fast | {"inner_rate": 0.01, "inner_steps": 1},
            image | {"inner_rate": 0.4, "inner_steps": 1},
        ),
        *both(
            "architecture",
            {"iterations": 600, "outer_rate": 3e-2, "inner_rate": 0.03, "inner_steps": 20, "meta_batch": 8},
            {"iterations": 150, "outer_rate": 3e-2, "inner_rate": 0.3, "inner_steps": 5, "meta_batch": 4},
        ),
        *both("metric", fast, image),
        *both("joint", fast, image | {"iterations": 200}),
        *both("multisource", fast | {"sources": 64}, image | {"sources": 4, "iterations": 2_000}),
        *both("transfer", fast | {"sources": 1}, image | {"sources": 1, "iterations": 2_000}),
        *both("scratch", once, once),
        *both("nearest", once, once),
    ]
