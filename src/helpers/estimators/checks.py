"""What an estimator asks of a learner, asked at its head; no check reads a value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers.errors import UserError
from helpers.learners.descent import CARRIED, PREFIXES
from helpers.numerics.derivative_checks import DerivativeCheck
from helpers.types import Descent, Learner, Params, Tasks


def check(
    who: str, learner: Learner, theta: Params, tasks: Tasks, rests_on: Sequence[str] = (), carries: bool = False
) -> None:
    """Refuse in one sentence what the estimator ``who`` cannot be right for.

    Args:
        rests_on: methods of :class:`~helpers.types.Descent` that the estimator does not call but repeats, so that the
            learner must not have methods of its own there.
        carries: whether the estimator hands an inner optimiser's memory from task to task; implies a ``Descent``.
    """
    wanted = Descent if rests_on or carries else Learner
    if not isinstance(learner, wanted):
        raise UserError(f"{who} needs a learner that is a {wanted.__name__} of helpers.types, not {name_of(learner)}")
    for method in rests_on:
        if getattr(type(learner), method) is not getattr(Descent, method):
            raise UserError(f"{who} rests on {method} as Descent has it, and {name_of(learner)} has its own: use maml")
    if not isinstance(theta, Mapping) or not theta:
        raise UserError(f"{who} needs meta-parameters to learn, and θ is empty")
    if getattr(learner, "carry", False) and not carries:
        raise UserError(f"{who} has no new memory for an inner optimiser that carries it on: set carry=False")
    number_of_tasks(tasks)


@contextmanager
def watched(learner: Learner) -> Iterator[None]:
    """Look for derivatives that PyTorch gets wrong, at a learner's first call alone: the look costs as much as the
    call."""
    try:
        looked = _looked(learner)
    except TypeError:  # it has no hash
        looked = []
    if looked or DerivativeCheck.depth:
        yield
        return
    with DerivativeCheck():
        yield
    looked.append(True)


@lru_cache(maxsize=256)
def _looked(learner: Learner) -> list[bool]:
    """Not empty once a learner was looked at."""
    return []


def number_of_tasks(tasks: Tasks) -> int:
    """The number of tasks in a batch that has some, with something to measure on."""
    sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else () for leaf in tree_leaves(tasks)}
    if len(sizes) != 1 or not all(sizes) or not isinstance(tasks, tuple):
        raise UserError("a batch of tasks is Tasks(support, query), tensors that all have a first axis of equal length")
    if any(not leaf.numel() for leaf in tree_leaves(tasks[1])[:1]):
        raise UserError("there is nothing to measure on: the batch has no tasks, or their query sets are empty")
    return sizes.pop()[0]


def adapted_names(who: str, learner: Descent, theta: Params) -> set[str]:
    """The entries of θ that come back changed, for estimators that look at nothing else."""
    adapted = set(learner.split(theta)[0])
    if not adapted or any(name.startswith(PREFIXES) for name in theta.keys() - adapted if not name.startswith(CARRIED)):
        raise UserError(
            f"{who} moves only what the inner loop adapts: "
            "give it a start to learn, and no rates, pulls, losses or rules"
        )
    return adapted | {name for name in theta if name.startswith(CARRIED)}


def name_of(learner: object) -> str:
    return type(learner).__name__
