"""Several seeds side by side: as a leading axis of every tensor, or under ``0/``, ``1/`` … where they cannot be one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from helpers import runtime
from helpers.lab.experiment import Experiment, Run
from helpers.models.layers import stacked, subtree_of
from helpers.types import Estimator, Learner, Params, Tasks

Init = Callable[[torch.Generator], Params]


def side_by_side(estimator: Estimator) -> Estimator:
    """The same estimator for several θ at once, with tasks of their own: all tensors have one more leading axis."""

    def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        return vmap(partial(estimator, learner))(theta, tasks)

    return run


def in_turn(estimator: Estimator) -> Estimator:
    """As :func:`side_by_side`, of an estimator that cannot be mapped: one θ after the other."""

    def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        parts = zip(*(unstacked(tree) for tree in (theta, tasks)), strict=True)
        gradients, losses = zip(*(estimator(learner, *part) for part in parts), strict=True)
        return stacked(gradients), torch.stack(losses)

    return run


def unstacked(tree: Any) -> list[Any]:
    """The parts of a tree of tensors along their first axis."""
    count = len(tree_leaves(tree)[0])
    return [tree_map(lambda t, at=at: t[at], tree) for at in range(count)]


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


class SideBySide(Run):
    """A run whose θ is the learner's once for each seed, ``[seeds, ...]``: the outer step goes entry by entry, so that
    training them together is training them apart."""

    def __init__(self, experiment: Experiment, device: torch.device) -> None:
        self.experiment, self.device, self.learner = experiment, device, experiment.learner()

    def init(self, generator: torch.Generator) -> Params:
        """First parameters of all seeds, drawn one after the other."""
        return fresh(self.learner.init, self.experiment.seeds, generator)


class BegunAlike(SideBySide):
    """Such a run, each of whose seeds begins where it does in every experiment with the same network."""

    def init(self, generator: torch.Generator) -> Params:
        """First parameters of all seeds, each drawn from a generator of its own."""
        e = self.experiment
        return stacked(of_their_own(self.learner.init, e.seed, e.seeds, self.device))
