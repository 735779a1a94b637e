"""The learner: how meta-parameters and a support set become task parameters, ``φ = adapt(θ, support)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad

from helpers.models import Model, Params
from helpers.tasks import Examples, Tasks

RATE = "rate:"  # prefix of a learned inner rate's name in θ


def detached(params: Params) -> Params:
    """The same values, cut off from every gradient."""
    return {name: value.detach() for name, value in params.items()}


@dataclass(frozen=True)
class GradientDescent:
    """Gradient descent on the support loss from θ: the learner of MAML, first-order MAML and Meta-SGD.

    Everything here concerns one task; an estimator maps it over a batch of tasks with ``vmap``.

    Attributes:
        model: the network.
        loss: ``loss(outputs, y)``, minimised on the support set and, unless ``outer_loss`` is given, measured on the
            query set.
        rate: the inner rate α, on ``loss`` as it is (for a mean loss, no factor N); of learned rates the initial value.
        steps: number of inner steps.
        learn_rates: one learned inner rate a parameter, kept in θ under ``rate:NAME`` (Meta-SGD, Li et al. 2017).
        first_order: treat the inner gradients as constants, ∂φ/∂θ ≈ I.
        outer_loss: the loss on the query set, where it differs.

    Source: Finn, Abbeel and Levine (2017), algorithm 1, line 6.
    """

    model: Model
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float
    steps: int = 1
    learn_rates: bool = False
    first_order: bool = False
    outer_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ: the model's and, with ``learn_rates``, one rate beside each adapted entry."""
        theta = self.model.init(generator, dtype)
        if self.learn_rates:
            moving = {name: value for name, value in theta.items() if self.model.adapts(name)}
            theta |= {RATE + name: torch.full_like(value, self.rate) for name, value in moving.items()}
        return theta

    def start(self, theta: Params) -> Params:
        """The model's parameters before adaptation: θ without the learned rates."""
        return {name: value for name, value in theta.items() if not name.startswith(RATE)}

    def support_gradient(self, phi: Params, support: Examples) -> Params:
        """Gradient of the support loss with respect to the adapted parameters of ``phi``."""
        fixed = {name: value for name, value in phi.items() if not self.model.adapts(name)}
        moving = {name: value for name, value in phi.items() if self.model.adapts(name)}
        return grad(lambda p: self.loss(self.model(p | fixed, support.x), support.y))(moving)

    def step(self, theta: Params, phi: Params, support: Examples) -> Params:
        """One inner step, φ ← φ − α ∇L(φ; support)."""
        gradient = self.support_gradient(detached(phi) if self.first_order else phi, support)
        return phi | {name: phi[name] - theta.get(RATE + name, self.rate) * g for name, g in gradient.items()}

    def adapt(self, theta: Params, support: Examples, steps: int | None = None) -> Params:
        """Task parameters φ after ``steps`` (by default ``self.steps``) inner steps from θ.

        Args:
            theta: meta-parameters; every value without a task axis.
            support: one task's examples, ``x`` ``[n, ...]`` and ``y`` ``[n, ...]``.

        Returns:
            φ, differentiable with respect to θ.
        """
        phi = self.start(theta)
        for _ in range(self.steps if steps is None else steps):
            phi = self.step(theta, phi, support)
        return phi

    def query_loss(self, phi: Params, query: Examples) -> Tensor:
        """The outer loss of task parameters φ on the query set."""
        return (self.outer_loss or self.loss)(self.model(phi, query.x), query.y)

    def task_loss(self, theta: Params, task: Tasks) -> Tensor:
        """Query loss after adaptation: the summand of the meta-objective, a scalar for one task."""
        return self.query_loss(self.adapt(theta, task.support), task.query)

    def with_(self, **changes) -> GradientDescent:
        """A copy with some attributes changed, such as ``steps=10``."""
        return replace(self, **changes)
