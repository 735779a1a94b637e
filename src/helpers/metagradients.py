"""Estimators: from meta-parameters and a batch of tasks to a meta-gradient.

Every estimator has the shape ``estimator(learner, theta, tasks) -> (gradient, losses)``: ``gradient`` is a dictionary
like θ, the mean over the tasks, and ``losses`` ``[tasks]`` are the query losses after adaptation. A chapter is the
change of this one argument.

Any estimator becomes faster, and stays what it is, by :func:`chunked`, :func:`~helpers.tracing.traced` and
:func:`~helpers.tracing.compiled`, which combine, as in ``chunked(compiled(maml), 4)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap
from torch.utils._pytree import tree_map

from helpers import solvers
from helpers.learners import GradientDescent, MinibatchDescent, Proximal
from helpers.models import Params
from helpers.tasks import Examples, Tasks
from helpers.tracing import compiled, linearized, traced

__all__ = [
    "Estimator", "Implicit", "chunked", "combination", "compiled", "fomaml", "imaml", "inner_step",
    "maml", "query_gradient", "reptile", "stepwise", "traced",
]  # fmt: skip

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


def reptile(learner: MinibatchDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """Reptile: θ minus the mean of the adapted parameters, so that an outer step of size ε goes θ ← θ + ε (φ̄ − θ).

    Not the gradient of any function, and in no need of a query set: nothing is differentiated through the inner loop.
    With plain SGD inside it is the inner rate times the sum of the inner gradients. What an inner optimiser carries
    from task to task (``carried:…``) comes out the same way, as its old value minus the mean of the new ones.

    Args:
        learner: any learner; the official code's is :class:`~helpers.learners.MinibatchAdam`.
        theta: meta-parameters.
        tasks: a batch, their supports cut into minibatches for a minibatch learner.

    Returns:
        θ − mean φ, a dictionary like θ, and the query losses ``[tasks]``, which are measured and otherwise unused.

    Source: Nichol, Achiam and Schulman (2018), algorithm 2 (the batch version). Written out in the Reptile chapter.
    """
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, tasks.support)
    losses = vmap(learner.query_loss)(phi, tasks.query)
    return {name: value - phi[name].mean(0) for name, value in theta.items()}, losses


def combination(weights: Sequence[float]) -> Estimator:
    """An estimator that moves θ by a weighted sum of the gradients met on the inner path, Σ wᵢ gᵢ.

    ``(1, 1)`` is two-step Reptile divided by the inner rate, ``(0, 1)`` is first-order MAML judged on a minibatch of
    its own, and ``(1,)`` is joint training: the gradient of the expected loss.

    Args:
        weights: one for each minibatch of the support set.

    Returns:
        An estimator for a :class:`~helpers.learners.MinibatchDescent` (plain SGD inside).

    Source: Nichol, Achiam and Schulman (2018), section 6.2 and Figure 3.
    """

    def one(learner: MinibatchDescent, theta: Params, task: Tasks) -> tuple[Params, Tensor]:
        phi, total = learner.start(theta), {name: torch.zeros_like(value) for name, value in theta.items()}
        for batch, weight in enumerate(weights):
            gradient = learner.support_gradient(phi, Examples(task.support.x[batch], task.support.y[batch]))
            total |= {name: total[name] + weight * g for name, g in gradient.items()}
            phi = phi | {name: phi[name] - learner.rate * g for name, g in gradient.items()}
        return total, learner.query_loss(phi, task.query)

    def run(learner: MinibatchDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        totals, losses = vmap(partial(one, learner), in_dims=(None, 0))(theta, tasks)
        return {name: total.mean(0) for name, total in totals.items()}, losses

    return run


class Implicit(NamedTuple):
    """What iMAML knows of a batch of tasks beside the meta-gradient.

    Attributes:
        gradient: the meta-gradient, a dictionary like θ.
        losses: query losses ``[tasks]``.
        phi: where the inner solver stopped, tensors ``[tasks, ...]``.
        stationarity: norm of the inner objective's gradient there, ``[tasks]``; the theory wants 0.
        solution: what the linear solver returned.
    """

    gradient: Params
    losses: Tensor
    phi: Params
    stationarity: Tensor
    solution: solvers.Solution


class imaml:  # noqa: N801 (an estimator, like the functions beside it)
    """The implicit meta-gradient: it depends on where the inner loop ends, not on how it got there.

    At the end φ* of the proximal inner problem its gradient F(φ, θ) = ∇L(φ) + Λ (φ − θ) is 0. So φ* moves with θ as
    dφ*/dθ = −(∂F/∂φ)⁻¹ ∂F/∂θ = (∇²L(φ*) + Λ)⁻¹ Λ, and with any other entry of θ (a learned Λ, parameters that are not
    adapted) by its own ∂F/∂θ. One linear system a task, solved with Hessian-vector products, replaces the inner path,
    so the memory does not grow with the number of inner steps.

    Args:
        solver: ``solver(product, b) -> Solution``; by default ``partial(conjugate_gradient, steps=5)``, the paper's.
        by: how each of the pieces is run: as it is, or by :func:`~helpers.tracing.traced`; with ``traced`` one inner
            step and one Hessian-vector product are recorded, whatever their number.
        tolerance: if given, warn where a system is left with a larger residual (:func:`helpers.solvers.report`).

    An instance is an estimator for :class:`~helpers.learners.Proximal` learners: called as any other it returns
    ``(gradient, losses)``; :meth:`solve` says more.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), algorithms 1 and 2. Written out in the iMAML chapter.
    """

    def __init__(
        self,
        solver: Callable[..., solvers.Solution] | None = None,
        by: Callable[[Callable], Callable] | None = None,
        tolerance: float | None = None,
    ) -> None:
        self.solver = solver or partial(solvers.conjugate_gradient, steps=5)
        self.tolerance = tolerance
        plain = by is None
        by = by or (lambda function: function)
        self._step, self._measure, self._by_theta = by(inner_step), by(query_gradient), by(_pull_by_theta)
        self._linearize = _linearize if plain else linearized(_inner_gradient, by=(2,))

    def __call__(self, learner: Proximal, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        found = self.solve(learner, theta, tasks)
        return found.gradient, found.losses

    def solve(self, learner: Proximal, theta: Params, tasks: Tasks) -> Implicit:
        """The meta-gradient with everything that says how far it can be trusted.

        Args:
            learner: the inner problem and its solver.
            theta: meta-parameters.
            tasks: a batch, every tensor with a leading task axis.

        Warns:
            NotConverged: if a ``tolerance`` was given and is missed.
        """
        count, steps = len(tasks.support.x), learner.steps
        learner = learner.with_(steps=1)  # no piece is longer than that, so one recording of each serves any length
        phi = {name: value.expand(count, *value.shape) for name, value in learner.start(theta).items()}
        with torch.no_grad():  # the path is forgotten: this is what keeps the memory flat
            for _ in range(steps):
                phi = self._step(learner, theta, phi, tasks.support)
        by_phi, losses = self._measure(learner, phi, tasks.query)
        b, direct = learner.split(by_phi)
        moving, fixed = learner.split(phi)
        inner, pull = self._linearize(learner, theta, moving, tasks.support)
        solution = self.solver(lambda v: pull(v)[0], b)
        if self.tolerance is not None:
            solvers.report(solution, self.tolerance)
        gradient = self._by_theta(learner, theta, moving, tasks.support, solution.x)
        gradient = {name: -g for name, g in gradient.items()}
        gradient |= {name: gradient[name] + g.sum(0) for name, g in direct.items()}
        gradient = {name: g / count for name, g in gradient.items()}
        return Implicit(gradient, losses, moving | fixed, solvers.dot(inner, inner).sqrt(), solution)


def inner_step(learner: GradientDescent, theta: Params, phi: Params, support: Examples) -> Params:
    """One inner step of every task."""
    return vmap(learner.step, in_dims=(None, 0, 0))(theta, phi, support)


def query_gradient(learner: GradientDescent, phi: Params, query: Examples) -> tuple[Params, Tensor]:
    """Gradients of the query losses by φ, and the losses."""
    return vmap(grad_and_value(learner.query_loss))(phi, query)


def _inner_gradient(learner: Proximal, theta: Params, moving: Params, support: Examples) -> Params:
    """F(φ, θ) of every task; what is not adapted comes from θ, so that its part in F is seen."""

    def one(moving: Params, support: Examples) -> Params:
        return learner.inner_gradient(theta, learner.start(theta) | moving, support)

    return vmap(one)(moving, support)


def _linearize(learner: Proximal, theta: Params, moving: Params, support: Examples):
    """F, and the products with ∂F/∂φ, which is symmetric."""
    return vjp(lambda moving: _inner_gradient(learner, theta, moving, support), moving)


def _pull_by_theta(learner: Proximal, theta: Params, moving: Params, support: Examples, u: Params) -> Params:
    """(∂F/∂θ)ᵀ u, summed over the tasks."""
    _, pull = vjp(lambda theta: _inner_gradient(learner, theta, moving, support), theta)
    return pull(u)[0]


def chunked(estimator: Estimator, size: int | None) -> Estimator:
    """The same estimator, ``size`` tasks at a time: memory then does not grow with the meta-batch.

    On a CPU small chunks are also faster, since the activations of a few tasks stay in the cache. ``None`` leaves it
    as it is.
    """
    if size is None:
        return estimator

    @wraps(estimator)
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

    advance, measure = linearized(inner_step, by=(1, 2)), traced(query_gradient)

    def run(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count, steps, pulls = len(tasks.support.x), learner.steps, []
        learner = learner.with_(steps=1)  # for the recordings all lengths are one
        phi = {name: value.expand(count, *value.shape).contiguous() for name, value in learner.start(theta).items()}
        for _ in range(steps):
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
