"""Estimators: from meta-parameters and a batch of tasks to a meta-gradient.

Every estimator has the shape ``estimator(learner, theta, tasks) -> (gradient, losses)``: ``gradient`` is a dictionary
like θ, the mean over the tasks, and ``losses`` ``[tasks]`` are the query losses after adaptation. A chapter is the
change of this one argument.

Any estimator meets any learner: the result is right, or refused in one sentence. What an estimator asks of a learner is
checked at its head; no check reads a value.

Any estimator becomes faster, and stays what it is, by :func:`chunked`, :func:`~helpers.tracing.traced` and
:func:`~helpers.tracing.compiled`, which combine, as in ``chunked(compiled(maml), 4)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from helpers import solvers
from helpers.learners import CARRIED, PREFIXES, RATE, Proximal
from helpers.models import Params
from helpers.runtime import UserError
from helpers.tasks import Examples, Tasks
from helpers.tracing import NormalisationCheck, compiled, linearized, traced
from helpers.types import Descent, Estimator, Learner
from helpers.validate import whole

__all__ = [
    "Estimator", "Implicit", "chunked", "combination", "compiled", "fomaml", "imaml", "inner_step",
    "maml", "query_gradient", "reptile", "stepwise", "traced",
]  # fmt: skip


def maml(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """The exact meta-gradient: differentiate the mean query loss through every inner step.

    Args:
        learner: any; its ``first_order`` must be off for the exact gradient.
        theta: meta-parameters, a dictionary of tensors without a task axis.
        tasks: a batch, every tensor with a leading task axis.

    Returns:
        The gradient of the mean query loss with respect to θ, a dictionary like θ, and the query losses ``[tasks]``.

    Source: Finn, Abbeel and Levine (2017), equation 1 and algorithm 1, line 8. Written out in the MAML chapter,
    section "The core".
    """
    _check("MAML", learner, theta, tasks)

    def objective(theta: Params) -> tuple[Tensor, Tensor]:
        losses = vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks)
        return losses.mean(), losses

    with _watched(learner):
        gradient, (_, losses) = grad_and_value(objective, has_aux=True)(theta)
    return gradient, losses


def fomaml(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """First-order MAML: the same, with the inner gradients held constant, so that ∂φ/∂θ is taken for the identity.

    Arguments and returns are those of :func:`maml`; the learner has a ``first_order``. No second derivative by the
    adapted parameters is computed.

    Source: Finn, Abbeel and Levine (2017), section 5.2, "first-order approximation".
    """
    if not hasattr(learner, "first_order"):
        raise UserError(f"first-order MAML holds inner gradients constant, and {_name(learner)} has none: use maml")
    return maml(learner.with_(first_order=True), theta, tasks)


def reptile(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """Reptile: θ minus the mean of the adapted parameters, so that an outer step of size ε goes θ ← θ + ε (φ̄ − θ).

    Not the gradient of any function, and in no need of a query set: nothing is differentiated through the inner loop.
    With plain SGD inside it is the inner rate times the sum of the inner gradients. What an inner optimiser carries
    from task to task (``carried:…``) comes out the same way, as its old value minus the mean of the new ones.

    Args:
        learner: any that adapts θ itself; the official code's is :class:`~helpers.learners.MinibatchAdam`.
        theta: meta-parameters. Parameters of the model that are not adapted stay as they are, their entry is 0.
        tasks: a batch, their supports cut into minibatches for a minibatch learner.

    Returns:
        θ − mean φ, a dictionary like θ, and the query losses ``[tasks]``, which are measured and otherwise unused.

    Source: Nichol, Achiam and Schulman (2018), algorithm 2 (the batch version). Written out in the Reptile chapter.
    """
    _check("Reptile", learner, theta, tasks, carries=True)
    moving = _moving("Reptile", learner, theta)
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, tasks.support)
    losses = vmap(learner.query_loss)(phi, tasks.query)
    still = {name: torch.zeros_like(value) for name, value in theta.items()}
    return still | {name: theta[name] - phi[name].mean(0) for name in theta if name in moving}, losses


def combination(weights: Sequence[float]) -> Estimator:
    """An estimator that moves θ by a weighted sum of the gradients met on the inner path, Σ wᵢ gᵢ.

    The path is the learner's own. With plain SGD inside, ``(1, 1)`` is two-step Reptile divided by the inner rate,
    ``(0, 1)`` is first-order MAML judged on a minibatch of its own, and ``(1,)`` is joint training: the gradient of the
    expected loss.

    Args:
        weights: one for each inner step, that is for each minibatch of the support set.

    Returns:
        An estimator for learners such as :class:`~helpers.learners.MinibatchDescent`.

    Source: Nichol, Achiam and Schulman (2018), section 6.2 and Figure 3.
    """

    def one(learner: Descent, theta: Params, task: Tasks) -> tuple[Params, Tensor]:
        seen = learner.per_step(task.support)
        if len(seen) != len(weights):
            raise UserError(f"{len(seen)} inner steps were given {len(weights)} weights: give one for each step")
        phi, total = learner.begin(theta, task), {name: torch.zeros_like(value) for name, value in theta.items()}
        for support, weight in zip(seen, weights, strict=True):
            gradient = learner.inner_gradient(theta, phi, support)
            total |= {name: total[name] + weight * g for name, g in gradient.items()}
            phi = learner.move(theta, phi, gradient)
        return total, learner.query_loss(phi, task.query)

    def run(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        _check("a combination of inner gradients", learner, theta, tasks, rests_on=("step", "adapt"))
        _moving("a combination of inner gradients", learner, theta)
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
        if not hasattr(learner, "pull"):
            raise UserError(
                f"the implicit gradient needs a learner with a pull, such as Proximal, not {_name(learner)}"
            )
        _check("iMAML", learner, theta, tasks, rests_on=("begin", "per_step", "adapt", "task_loss"))
        if not learner.split(learner.start(theta))[0] or any(name.startswith(RATE) for name in theta):
            raise UserError(
                "iMAML learns where adapted parameters end, not at which rate they move: "
                "adapt at least one parameter, and leave learn_rates off"
            )
        count, steps = len(tasks.support.x), learner.steps
        learner = learner.with_(steps=1)  # no piece is longer than that, so one recording of each serves any length
        phi = {name: value.expand(count, *value.shape) for name, value in learner.start(theta).items()}
        with torch.no_grad():  # the path is forgotten: this is what keeps the memory flat
            for _ in range(steps):
                phi = self._step(learner, theta, phi, tasks.support)
        by_phi, losses = self._measure(learner, phi, tasks.query)
        b, direct = learner.split(by_phi)
        moving, fixed = learner.split(phi)
        with _watched(learner):
            inner, pull = self._linearize(learner, theta, moving, tasks.support)
        solution = self.solver(lambda v: pull(v)[0], b)
        if self.tolerance is not None:
            solvers.report(solution, self.tolerance)
        gradient = self._by_theta(learner, theta, moving, tasks.support, solution.x)
        gradient = {name: -g for name, g in gradient.items()}
        gradient |= {name: gradient[name] + g.sum(0) for name, g in direct.items()}
        gradient = {name: g / count for name, g in gradient.items()}
        return Implicit(gradient, losses, moving | fixed, solvers.dot(inner, inner).sqrt(), solution)


def inner_step(learner: Descent, theta: Params, phi: Params, support: Examples) -> Params:
    """One inner step of every task."""
    return vmap(learner.step, in_dims=(None, 0, 0))(theta, phi, support)


def query_gradient(learner: Descent, phi: Params, query: Examples) -> tuple[Params, Tensor]:
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
    size = whole(size, "number of tasks at a time")

    @wraps(estimator)
    def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count = _count(tasks)
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
    what v is in the end belongs to the initial φ, and so to what θ gave of it. All steps are the same program, so it is
    recorded once.

    Returns:
        An estimator equal to :func:`maml`, for learners whose task loss is that of :class:`~helpers.types.Descent`.
    """

    advance, measure = linearized(inner_step, by=(1, 2)), traced(query_gradient)

    def run(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        _check("stepwise", learner, theta, tasks, rests_on=("adapt", "task_loss"))
        phi, by_start = vjp(lambda theta: vmap(learner.begin, in_dims=(None, 0))(theta, tasks), theta)
        phi, pulls = {name: value.contiguous() for name, value in phi.items()}, []
        seen = vmap(learner.per_step)(tasks.support)
        learner = learner.with_(steps=1)  # for the recordings all lengths are one
        for support in seen:
            phi, pull = advance(learner, theta, phi, support)
            pulls.append(pull)
        v, losses = measure(learner, phi, tasks.query)
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        while pulls:
            by_theta, v = pulls.pop()(v)
            total = {name: total[name] + g for name, g in by_theta.items()}
        total = {name: total[name] + g for name, g in by_start(v)[0].items()}
        return {name: g / len(losses) for name, g in total.items()}, losses

    return run


def _check(
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
        raise UserError(f"{who} needs a learner that is a {wanted.__name__} of helpers.types, not {_name(learner)}")
    for method in rests_on:
        if getattr(type(learner), method) is not getattr(Descent, method):
            raise UserError(f"{who} rests on {method} as Descent has it, and {_name(learner)} has its own: use maml")
    if not isinstance(theta, Mapping) or not theta:
        raise UserError(f"{who} needs meta-parameters to learn, and θ is empty")
    if getattr(learner, "carry", False) and not carries:
        raise UserError(f"{who} has no new memory for an inner optimiser that carries it on: set carry=False")
    _count(tasks)


@contextmanager
def _watched(learner: Learner) -> Iterator[None]:
    """Look for derivatives that PyTorch gets wrong, at a learner's first call alone: the look costs as much as the call."""
    try:
        looked = _looked(learner)
    except TypeError:  # it has no hash
        looked = []
    if looked:
        yield
        return
    with NormalisationCheck():
        yield
    looked.append(True)


@lru_cache(maxsize=256)
def _looked(learner: Learner) -> list[bool]:
    """Not empty once a learner was looked at."""
    return []


def _count(tasks: Tasks) -> int:
    """The number of tasks in a batch that has some, with something to measure on."""
    sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else () for leaf in tree_leaves(tasks)}
    if len(sizes) != 1 or not all(sizes) or not isinstance(tasks, tuple):
        raise UserError("a batch of tasks is Tasks(support, query), tensors that all have a first axis of equal length")
    if any(not leaf.numel() for leaf in tree_leaves(tasks[1])[:1]):
        raise UserError("there is nothing to measure on: the batch has no tasks, or their query sets are empty")
    return sizes.pop()[0]


def _moving(who: str, learner: Descent, theta: Params) -> set[str]:
    """The entries of θ that come back changed, for estimators that look at nothing else."""
    moving = set(learner.split(theta)[0])
    if not moving or any(name.startswith(PREFIXES) for name in theta.keys() - moving if not name.startswith(CARRIED)):
        raise UserError(
            f"{who} moves only what the inner loop adapts: "
            "give it a start to learn, and no rates, pulls, losses or rules"
        )
    return moving | {name for name in theta if name.startswith(CARRIED)}


def _name(learner: object) -> str:
    return type(learner).__name__
