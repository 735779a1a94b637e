"""Estimators: from meta-parameters and a batch of tasks to a meta-gradient.

Every estimator has the shape ``estimator(learner, theta, tasks) -> (gradient, losses)``: ``gradient`` is a dictionary
like θ, the mean over the tasks, and ``losses`` ``[tasks]`` are the query losses after adaptation. A chapter is the
change of this one argument.

Any estimator becomes faster, and stays what it is, by :func:`chunked`, :func:`~helpers.tracing.traced` and
:func:`~helpers.tracing.compiled`, which combine, as in ``chunked(compiled(maml), 4)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_map

from helpers.learners import GradientDescent
from helpers.models import Params
from helpers.tasks import Examples, Tasks
from helpers.tracing import compiled, linearized, traced

__all__ = ["Estimator", "chunked", "compiled", "fomaml", "maml", "stepwise", "traced"]

Estimator = Callable[[GradientDescent, Params, Tasks], tuple[Params, Tensor]]


def maml(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """The exact meta-gradient: differentiate the mean query loss through every inner step.

    Args:
        learner: what adapts; its ``first_order`` must be off for the exact gradient.
        theta: meta-parameters, a dictionary of tensors without a task axis.
        tasks: a batch, every tensor with a leading task axis.

    Returns:
        The gradient of the mean query loss with respect to θ, a dictionary like θ, and the query losses ``[tasks]``.

    Source: Finn, Abbeel and Levine (2017), equation 1 and algorithm 1, line 8. Written out in the MAML chapter,
    section "The core".
    """

    def objective(theta: Params) -> tuple[Tensor, Tensor]:
        losses = vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks)
        return losses.mean(), losses

    gradient, (_, losses) = grad_and_value(objective, has_aux=True)(theta)
    return gradient, losses


def fomaml(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """First-order MAML: the same, with the inner gradients held constant, so that ∂φ/∂θ is taken for the identity.

    Arguments and returns are those of :func:`maml`. No second derivative is computed.

    Source: Finn, Abbeel and Levine (2017), section 5.2, "first-order approximation".
    """
    return maml(learner.with_(first_order=True), theta, tasks)


def chunked(estimator: Estimator, size: int | None) -> Estimator:
    """The same estimator, ``size`` tasks at a time: memory then does not grow with the meta-batch.

    On a CPU small chunks are also faster, since the activations of a few tasks stay in the cache. ``None`` leaves it
    as it is.
    """
    if size is None:
        return estimator

    def run(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count = len(tasks.support.x)
        total: Params | None = None
        losses = []
        for begin in range(0, count, size):
            part = tree_map(lambda t, begin=begin: t[begin : begin + size], tasks)
            gradient, loss = estimator(learner, theta, part)
            weighted = {name: g * (len(loss) / count) for name, g in gradient.items()}
            total = weighted if total is None else {name: total[name] + g for name, g in weighted.items()}
            losses.append(loss)
        return total, torch.cat(losses)

    return run


def stepwise() -> Estimator:
    """MAML's exact meta-gradient, one inner step at a time, and so as quick to trace for any number of them.

    Let φ ← U(θ, φ) be one inner step, and v the gradient of the query loss by the last φ. Going back through a step,
    v ← (∂U/∂φ)ᵀ v, and (∂U/∂θ)ᵀ v is what that step's own use of θ (shifts, learned rates) adds to the meta-gradient;
    what v is in the end belongs to the initial φ, that is to θ. All steps are the same program, so it is recorded once.

    Returns:
        An estimator equal to :func:`maml`.
    """

    def step(learner: GradientDescent, theta: Params, phi: Params, support: Examples) -> Params:
        return vmap(learner.step, in_dims=(None, 0, 0))(theta, phi, support)

    def measure(learner: GradientDescent, phi: Params, tasks: Examples) -> tuple[Params, Tensor]:
        return vmap(grad_and_value(learner.query_loss))(phi, tasks)

    advance, measure = linearized(step, by=(1, 2)), traced(measure)

    def run(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count, pulls = len(tasks.support.x), []
        phi = {name: value.expand(count, *value.shape).contiguous() for name, value in learner.start(theta).items()}
        for _ in range(learner.steps):
            phi, pull = advance(learner, theta, phi, tasks.support)
            pulls.append(pull)
        v, losses = measure(learner, phi, tasks.query)
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        while pulls:
            by_theta, v = pulls.pop()(v)
            total = {name: total[name] + g for name, g in by_theta.items()}
        total |= {name: total[name] + g.sum(0) for name, g in v.items()}
        return {name: g / count for name, g in total.items()}, losses

    return run
