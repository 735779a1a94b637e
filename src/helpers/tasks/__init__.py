"""Task distributions p(T): everything that can be sampled as a batch of (support, query) pairs.

A task family is any object with ``sample(n_tasks, generator) -> Tasks``. Importing this package reads no file and draws
no number; the data sets behind :mod:`helpers.tasks.glyphs` and :mod:`helpers.tasks.omniglot` are loaded by their
``load`` functions.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from helpers.runtime import UserError
from helpers.validate import whole as whole_number


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


class Started(NamedTuple):
    """Tasks that also say where the inner loop begins, for learners whose θ is not an initialization.

    Attributes:
        support: as in :class:`Tasks`.
        query: as in :class:`Tasks`.
        start: the optimizee's first parameters, a dictionary of tensors ``[tasks, ...]``.
    """

    support: Examples
    query: Examples
    start: dict[str, Tensor]


class TaskFamily(Protocol):
    """A distribution over tasks, p(T)."""

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` independent tasks; all randomness comes from ``generator``."""
        ...


def whole(tasks: Tasks) -> Examples:
    """All examples of each task, those of the support set first."""
    return Examples(*(torch.cat(halves, 1) for halves in zip(*tasks, strict=True)))


def minibatches(
    examples: Examples, size: int, count: int, generator: torch.Generator, replacement: bool = False
) -> Examples:
    """Cut the examples of each task into a sequence of minibatches, as stochastic gradient descent sees them.

    Args:
        examples: ``x`` and ``y`` ``[tasks, n, ...]``.
        size: examples in a minibatch.
        count: number of minibatches.
        generator: the only source of randomness, on the device of the examples.
        replacement: draw every minibatch anew from all examples (without repetition inside it). Otherwise the examples
            are shuffled, dealt out to the last one, shuffled again and so on, so that all are used equally often; a
            minibatch may then reach from one round into the next.

    Returns:
        ``x`` and ``y`` ``[tasks, count, size, ...]``.

    Raises:
        UserError: for sizes and counts below 1, tasks without examples, or a minibatch with ``replacement`` that is to
            be larger than the task.

    Source: the official code of Nichol, Achiam and Schulman (2018), ``_mini_batches``.
    """
    whole_number(size, "size of a minibatch")
    whole_number(count, "number of minibatches")
    tasks, n = examples.x.shape[:2]
    if not n:
        raise UserError("tasks without examples cannot be cut into minibatches: give at least one")
    if replacement and size > n:
        raise UserError(f"a minibatch of {size} cannot be drawn from {n} examples: choose a smaller one")
    rounds = count if replacement else -(-count * size // n)
    order = torch.rand(tasks, rounds, n, generator=generator, device=examples.x.device).argsort(-1)
    order = order[..., :size].flatten(1) if replacement else order.flatten(1)[:, : count * size]

    def take(t: Tensor) -> Tensor:
        index = order.view(tasks, -1, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:])
        return t.gather(1, index).unflatten(1, (count, size))

    return Examples(take(examples.x), take(examples.y))


# Only names of the two modules that need nothing but torch are re-exported, and only on first use: importing
# ``helpers.tasks`` for ``Tasks`` alone stays cheap, and ``episodes`` may import ``Tasks`` from here.
_HOME = {"FewShot": "episodes", "Sinusoids": "sinusoid"}

__all__ = ["Examples", "FewShot", "Sinusoids", "TaskFamily", "Tasks", "minibatches", "whole"]


def __getattr__(name: str):
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
