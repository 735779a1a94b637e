"""Ways to train a start that spend the same number of gradients, a learner and an estimator each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.estimators.explicit import combination, fomaml, maml
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchDescent
from helpers.types import Estimator, Examples, Model, Params, Tasks

METHODS = ("scratch", "transfer", "fomaml", "reptile")


def method(
    name: str,
    model: Model,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: int = 8,
    inner_rate: float = 0.3,
    count: int = 18,
) -> tuple[GradientDescent, Estimator, dict[str, int]]:
    """A way to train the start, as arguments of one engine; each spends ``count · batch`` gradients an outer step.

    ``transfer`` is MAML without an inner step, which is joint training. ``fomaml`` takes one inner step on a minibatch
    of a task and is judged on another; ``reptile`` adds the gradients of both, and so is two-step Reptile.

    Args:
        name: ``"transfer"``, ``"fomaml"`` or ``"reptile"``; ``"scratch"`` trains nothing and has no estimator to use.
        model: the network.
        loss: what it descends.
        batch: examples of a minibatch.
        inner_rate: of gradient descent within a task, in training.
        count: minibatches of a meta-batch: of ``transfer`` one a task, of the others two each of half as many.

    Returns:
        Learner, estimator, and what a meta-batch is: ``tasks``, and the examples of each, ``support`` and ``query``.

    Raises:
        UserError: for another name.
    """
    half = max(1, count // 2)
    match name:
        case "scratch" | "transfer":
            learner, size = GradientDescent(model, loss, 0.0, steps=0), {"tasks": count, "support": 0}
            return learner, maml, size | {"query": batch}
        case "fomaml":
            learner = GradientDescent(model, loss, inner_rate, steps=1)
            return learner, fomaml, {"tasks": half, "support": batch, "query": batch}
        case "reptile":
            # The second minibatch comes as the query too: its loss after one step is what is logged.
            learner = MinibatchDescent(model, loss, inner_rate)
            return learner, _reptile, {"tasks": half, "support": batch, "query": batch}
    raise UserError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}")


def _reptile(learner: MinibatchDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """Two-step Reptile by its gradients, Σ gᵢ: support and query are its two minibatches."""
    batches = Examples(*(torch.stack(pair, 1) for pair in zip(*tasks, strict=True)))
    return combination((1, 1))(learner, theta, Tasks(batches, tasks.query))
