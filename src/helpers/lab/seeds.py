"""Several seeds side by side: as a leading axis of every tensor, or under ``0/``, ``1/`` … where they cannot be one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import runtime
from helpers.models.layers import stacked, subtree_of
from helpers.types import Estimator, Learner, Params, Tasks

Init = Callable[[torch.Generator], Params]


def side_by_side(estimator: Estimator) -> Estimator:
    """The same estimator for several θ at once, with tasks of their own: all tensors have one more leading axis."""

    def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        return vmap(partial(estimator, learner))(theta, tasks)

    return run


def fresh(init: Init, count: int, generator: torch.Generator) -> Params:
    """First parameters ``[count, ...]``, drawn one after the other."""
    return stacked([init(generator) for _ in range(count)])


def of_run(seed: int, number: int) -> int:
    """The seed of one of several runs side by side: those of one experiment never meet those of another seed.

    >>> [of_run(0, 2), of_run(1, 0) - of_run(0, 0)]
    [2, 4294967296]
    """
    return seed * 2**32 + number


def of_their_own(init: Init, seed: int, count: int, device: torch.device) -> list[Params]:
    """First parameters of each seed, drawn from a generator of its own: the same for whatever is compared."""
    return [init(runtime.generator(of_run(seed, number), device)) for number in range(count)]


def apart(tree: Any, *sizes: int) -> Any:
    """Tensors ``[seeds · n, ...]`` as ``[seeds, n, ...]``; one of the sizes may be −1."""
    return tree_map(lambda t: t.unflatten(0, sizes), tree)


def numbered(each: Sequence[Params]) -> Params:
    """The parameters of every seed under its number."""
    return {f"{number}/{name}": value for number, one in enumerate(each) for name, value in one.items()}


def one_by_one(
    gradient: Callable[[int, Params], tuple[Params, Tensor]], theta: Params, count: int
) -> tuple[Params, Tensor]:
    """Gradients of :func:`numbered` parameters, seed by seed, and the mean of their losses.

    Args:
        gradient: from a seed's number and its θ to its gradient and its losses.
    """
    found = [gradient(number, subtree_of(theta, str(number))) for number in range(count)]
    return numbered([one for one, _ in found]), torch.stack([losses.mean() for _, losses in found]).mean()


def draws_of(generator: torch.Generator) -> torch.Generator:
    """A generator of one seed's own, which the common one seeds."""
    number = torch.randint(2**62, (), generator=generator, device=generator.device)
    return runtime.generator(int(number), generator.device)


def few_starts(init: Init, few: int, many: int, count: int, generator: torch.Generator) -> Params:
    """First parameters of ``count`` tasks, the seeds one after the other, where each seed has but ``few`` to draw from.

    The few are the same whenever this is called.

    Args:
        many: seeds.
    """
    pool, device = fresh(init, many * few, runtime.generator(1)), generator.device
    seed = torch.arange(count, device=device) // max(1, count // many) % many
    row = seed * few + torch.randint(few, (count,), generator=generator, device=device)
    return {name: value.to(device)[row] for name, value in pool.items()}
