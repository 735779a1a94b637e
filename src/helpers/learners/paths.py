"""The way of an inner optimisation: points on it to begin from, and what is measured along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

from helpers.learners.descent import detached
from helpers.learners.learned import LossDescent
from helpers.learners.minibatch import MinibatchDescent
from helpers.models.layers import stacked
from helpers.optimizers.adam import Adam, adam
from helpers.types import Examples, Params, Started
from helpers.validate import one_of

CAPPED = 1e3  # an error that is larger, or not a number, counts as this: a mean then exists


def along(learner: LossDescent, theta: Params, tasks: Started, count: int) -> Started:
    """The tasks from each of the first ``count`` points of the way that the present loss takes, the start included.

    The way is a constant: the meta-gradient of what follows does not see how a point was reached. So a loss is trained
    for what it will do late in an optimisation at the price of single steps.

    Returns:
        ``count`` times as many tasks.
    """

    def way(task: Started) -> Params:
        points = [task.start]
        for _ in range(count - 1):
            points.append(detached(learner.step(theta, points[-1], task.support)))
        return stacked(points)

    starts = {name: value.flatten(0, 1) for name, value in vmap(way)(tasks).items()}
    support, query = (tree_map(lambda t: t.repeat_interleave(count, 0), part) for part in tasks[:2])
    return Started(support, query, starts)


def descent(
    gradient: Callable[[Params, Examples], Params],
    measure: Callable[[Params, Examples], Tensor],
    tasks: Started,
    steps: Sequence[int],
    rate: float,
    optimizer: str = "sgd",
) -> Tensor:
    """A measure on the query set while parameters descend a loss, learned or not, from their start.

    Args:
        gradient: ``gradient(phi, support)``, a dictionary like φ.
        measure: ``measure(phi, query) -> scalar``.
        tasks: T tasks.
        steps: increasing numbers of steps.
        rate: of the optimiser.
        optimizer: ``"sgd"``, or ``"adam"`` with its usual constants.

    Returns:
        ``[len(steps), T]``; what is larger than ``CAPPED`` or not a number is ``CAPPED``.

    Raises:
        UserError: for another optimiser.
    """
    one_of(optimizer, "optimiser", ("sgd", "adam"))

    def curve(task: Started) -> Tensor:
        phi, done, values = task.start, 0, []
        state = Adam.of(phi)
        for target in steps:
            for _ in range(target - done):
                g = gradient(phi, task.support)
                if optimizer == "adam":
                    g, state = adam(g, state)
                phi = phi | {name: phi[name] - rate * value for name, value in g.items()}
            done = target
            values.append(measure(phi, task.query))
        return torch.stack(values)

    with torch.no_grad():
        return vmap(curve)(tasks).T.nan_to_num(CAPPED, CAPPED, CAPPED).clamp(max=CAPPED)


def descended(
    learner: LossDescent,
    theta: Params,
    tasks: Started,
    steps: Sequence[int],
    measure: Callable[[Params, Examples], Tensor] | None = None,
    rate: float | None = None,
    optimizer: str = "sgd",
    own_loss: bool = False,
) -> Tensor:
    """A measure on the query set while parameters descend the learned loss, see :func:`descent`.

    Args:
        measure: by default the task's own loss.
        rate: by default the learner's.
        own_loss: descend the task's own loss instead; θ is then not used.
    """

    def gradient(phi: Params, support: Examples) -> Params:
        if own_loss:
            return grad(lambda p: learner.loss(learner.model(p, support.x), support.y))(phi)
        return learner.inner_gradient(theta, phi, support)

    rate = learner.rate if rate is None else rate
    return descent(gradient, measure or learner.query_loss, tasks, steps, rate, optimizer)


def landscapes(learner: LossDescent, theta: Params, points: Params, examples: Examples) -> tuple[Tensor, Tensor]:
    """The learned loss and the task's own as functions of the parameters.

    Args:
        theta: of several learned losses, ``[seeds, ...]``.
        points: parameters of the model, ``[n, ...]``.
        examples: of T tasks.

    Returns:
        ``[seeds, T, n]``, and ``[T, n]``.
    """

    def learned(theta: Params, phi: Params, examples: Examples) -> Tensor:
        return learner.learned(theta, examples.x, learner.model(phi, examples.x), examples.y)

    with torch.no_grad():
        over = vmap(vmap(learned, (None, 0, None)), (None, None, 0))
        own = vmap(vmap(learner.query_loss, (0, None)), (None, 0))
        return vmap(over, (0, None, None))(theta, points, examples), own(points, examples)


@dataclass(frozen=True)
class MinibatchLossDescent(LossDescent, MinibatchDescent):
    """Descent of a learned loss in which every inner step sees a minibatch of its own, as later when it is used.

    The support set is given as a sequence of minibatches, as for :class:`~helpers.learners.minibatch.MinibatchDescent`.
    """

    steps: int | None = None
