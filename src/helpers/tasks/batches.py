"""Batches of examples: minibatches of a support set, and support and query put together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers import runtime
from helpers.errors import UserError
from helpers.types import Examples, TaskFamily, Tasks
from helpers.validate import whole as whole_number

__all__ = ["drawn", "merge_support_query", "minibatches"]


def merge_support_query(tasks: Tasks) -> Examples:
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

    >>> import helpers
    >>> g = helpers.generator(0)
    >>> tasks = helpers.Sinusoids(shots=10).sample(4, g)
    >>> minibatches(tasks.support, size=5, count=3, generator=g).x.shape
    torch.Size([4, 3, 5, 1])
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


def drawn(family: TaskFamily, count: int, seed: int, device: torch.device | str) -> Tasks:
    """Tasks that are the same on every device: drawn on the CPU by a seed, and then moved."""
    return tree_map(lambda t: t.to(device), family.sample(count, runtime.generator(seed)))
