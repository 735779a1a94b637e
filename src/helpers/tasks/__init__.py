"""Task distributions p(T): everything that can be sampled as a batch of (support, query) pairs.

A task family is any object with ``sample(n_tasks, generator) -> Tasks``. Importing this package reads no file and draws
no number; the data sets behind :mod:`helpers.tasks.glyphs` and :mod:`helpers.tasks.omniglot` are loaded by their
``load`` functions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Examples(NamedTuple):
    """Inputs and targets of a batch of tasks; both have a leading task axis.

    Attributes:
        x: inputs, ``[tasks, examples, ...]``.
        y: targets, ``[tasks, examples, ...]`` (regression) or ``[tasks, examples]`` class numbers (classification).
    """

    x: Tensor
    y: Tensor


class Tasks(NamedTuple):
    """A batch of tasks: what the learner adapts on, and what the adapted learner is judged on.

    Attributes:
        support: the examples that the inner loop sees (the training set of the task).
        query: the examples that the outer loss is computed on (the test set of the task).
    """

    support: Examples
    query: Examples


class TaskFamily(Protocol):
    """A distribution over tasks, p(T)."""

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` independent tasks; all randomness comes from ``generator``."""
        ...


# Only names of the two modules that need nothing but torch are re-exported, and only on first use: importing
# ``helpers.tasks`` for ``Tasks`` alone stays cheap, and ``episodes`` may import ``Tasks`` from here.
_HOME = {"FewShot": "episodes", "Sinusoids": "sinusoid"}

__all__ = ["Examples", "FewShot", "Sinusoids", "TaskFamily", "Tasks"]


def __getattr__(name: str):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
