"""The implicit estimator: iMAML's meta-gradient from one linear system a task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_map

from helpers.errors import UserError
from helpers.estimators.checks import check, name_of, watched
from helpers.estimators.explicit import inner_step, query_gradient
from helpers.learners.descent import RATE, GradientDescent
from helpers.learners.proximal import Proximal
from helpers.numerics import solvers
from helpers.numerics.tracing import linearized
from helpers.types import Examples, Learner, Params, Tasks

__all__ = ["Implicit", "ImplicitGradient", "released"]


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


class ImplicitGradient:  # noqa: N801 (an estimator, like the functions beside it)
    """The implicit meta-gradient: it depends on where the inner loop ends, not on how it got there.

    At the end φ* of the proximal inner problem its gradient F(φ, θ) = ∇L(φ) + Λ (φ − θ) is 0. So φ* moves with θ as
    dφ*/dθ = −(∂F/∂φ)⁻¹ ∂F/∂θ = (∇²L(φ*) + Λ)⁻¹ Λ, and with any other entry of θ (a learned Λ, parameters that are not
    adapted) by its own ∂F/∂θ. One linear system a task, solved with Hessian-vector products, replaces the inner path,
    so the memory does not grow with the number of inner steps.

    Args:
        solver: ``solver(product, b) -> Solution``; by default ``partial(conjugate_gradient, steps=5)``, the paper's.
        by: how each of the pieces is run: as it is, or by :func:`~helpers.numerics.tracing.traced`; with ``traced`` one
            inner step and one Hessian-vector product are recorded, whatever their number.
        tolerance: if given, warn where a system is left with a larger residual
            (:func:`helpers.numerics.solvers.report`).

    An instance is an estimator for :class:`~helpers.learners.proximal.Proximal` learners: called as any other it
    returns ``(gradient, losses)``; :meth:`solve` says more.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), algorithms 1 and 2. Written out in the iMAML chapter.

    >>> import helpers
    >>> g, network, loss = helpers.generator(0), helpers.MLP((1, 8, 1)), helpers.mean_squared_error
    >>> learner = helpers.Proximal(network, loss, rate=0.05, steps=10, strength=2.0)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> found = helpers.imaml().solve(learner, theta, tasks)  # called itself, it is an estimator
    >>> found.gradient.keys() == theta.keys(), found.stationarity.shape
    (True, torch.Size([4]))
    """

    def __init__(
        self,
        solver: Callable[..., solvers.Solution] | None = None,
        by: Callable[[Callable], Callable] | None = None,
        tolerance: float | None = None,
    ) -> None:
        if isinstance(solver, Learner):
            raise UserError("imaml has settings, so it is made before it is used: imaml()(learner, theta, tasks)")
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
                f"the implicit gradient needs a learner with a pull, such as Proximal, not {name_of(learner)}"
            )
        check("iMAML", learner, theta, tasks, rests_on=("begin", "per_step", "adapt", "task_loss"))
        if not learner.split(learner.start(theta))[0] or any(name.startswith(RATE) for name in theta):
            raise UserError(
                "iMAML learns where adapted parameters end, not at which rate they move: "
                "adapt at least one parameter, and leave learn_rates off"
            )
        count, steps = len(tasks.support.x), learner.steps
        learner = learner.replace(steps=1)  # no piece is longer than that, so one recording of each serves any length
        phi = {name: value.expand(count, *value.shape) for name, value in learner.start(theta).items()}
        with torch.no_grad():  # the path is forgotten: this is what keeps the memory flat
            for _ in range(steps):
                phi = self._step(learner, theta, phi, tasks.support)
        by_phi, losses = self._measure(learner, phi, tasks.query)
        b, direct = learner.split(by_phi)
        adapted, frozen = learner.split(phi)
        with watched(learner):
            inner, pull = self._linearize(learner, theta, adapted, tasks.support)
        solution = self.solver(lambda v: pull(v)[0], b)
        if self.tolerance is not None:
            solvers.report(solution, self.tolerance)
        gradient = self._by_theta(learner, theta, adapted, tasks.support, solution.x)
        gradient = {name: -g for name, g in gradient.items()}
        gradient |= {name: gradient[name] + g.sum(0) for name, g in direct.items()}
        gradient = {name: g / count for name, g in gradient.items()}
        return Implicit(gradient, losses, adapted | frozen, solvers.dot(inner, inner).sqrt(), solution)

    def diagnosed(self, learner: Proximal, theta: Params, tasks: Tasks, chunk: int) -> dict[str, Tensor]:
        """How well the inner problems and the linear systems are solved, of every task: ``residual`` of the linear
        solver, ``stationarity`` of the inner solution, and whether curvature was ``indefinite``.

        Args:
            chunk: tasks at a time.
        """
        found = []
        for begin in range(0, len(tasks.support.x), chunk):
            some = tree_map(lambda t, begin=begin: t[begin : begin + chunk], tasks)
            found.append(self.solve(learner, theta, some))
        parts = {
            "residual": [one.solution.residual for one in found],
            "stationarity": [one.stationarity for one in found],
            "indefinite": [one.solution.indefinite.double() for one in found],
        }
        return {kind: torch.cat(values).cpu() for kind, values in parts.items()}


imaml = ImplicitGradient  # an estimator, like the functions beside it


def _inner_gradient(learner: Proximal, theta: Params, adapted: Params, support: Examples) -> Params:
    """F(φ, θ) of every task; what is not adapted comes from θ, so that its part in F is seen."""

    def one(adapted: Params, support: Examples) -> Params:
        return learner.inner_gradient(theta, learner.start(theta) | adapted, support)

    return vmap(one)(adapted, support)


def _linearize(learner: Proximal, theta: Params, adapted: Params, support: Examples):
    """F, and the products with ∂F/∂φ, which is symmetric."""
    return vjp(lambda adapted: _inner_gradient(learner, theta, adapted, support), adapted)


def _pull_by_theta(learner: Proximal, theta: Params, adapted: Params, support: Examples, u: Params) -> Params:
    """(∂F/∂θ)ᵀ u, summed over the tasks."""
    _, pull = vjp(lambda theta: _inner_gradient(learner, theta, adapted, support), theta)
    return pull(u)[0]


def released(learner: Proximal, theta: Params, tasks: Tasks, cg_steps: int = 5) -> tuple[Params, Tensor]:
    """What iMAML's public code computes in place of the implicit gradient; an estimator, for comparison.

    Its inner steps leave the proximal term out; one step of the term alone follows them ("pull back"). Its linear
    system is (2 I + H / (λ + 10)) u = v, where the paper's is (I + H / λ) u = v.

    Source: ``omniglot_implicit_maml.py`` and ``learner_model.py`` of the released code, at the settings of its README.
    """
    free = GradientDescent(learner.model, learner.loss, learner.rate, learner.steps)
    keep = 1 - learner.rate * learner.strength

    def adapt(support: Examples) -> Params:
        return {name: theta[name] + keep * (value - theta[name]) for name, value in free.adapt(theta, support).items()}

    phi = vmap(adapt)(tasks.support)
    by_phi, query_losses = query_gradient(learner, phi, tasks.query)
    adapted, frozen = learner.split(phi)
    b, direct = learner.split(by_phi)

    def gradients(adapted: Params) -> Params:
        return vmap(learner.support_gradient)(adapted | frozen, tasks.support)

    _, hessian = vjp(gradients, adapted)

    def product(v: Params) -> Params:
        (curved,) = hessian(v)
        return {name: 2 * v[name] + curved[name] / (learner.strength + 10) for name in v}

    solution = solvers.conjugate_gradient(product, b, cg_steps).x
    return {name: g.mean(0) for name, g in (solution | direct).items()}, query_losses
