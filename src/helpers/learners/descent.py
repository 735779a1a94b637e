"""Gradient descent from θ, and what stands in θ beside the initial parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad, vmap

from helpers.errors import UserError
from helpers.losses import LOSS
from helpers.optimizers.recurrent import RULE
from helpers.types import Descent, Examples, Model, Params
from helpers.validate import positive, whole

# Prefixes of what θ holds beside the initial parameters.
RATE = "rate:"  # a learned inner rate
STRENGTH = "strength:"  # a learned strength of the pull towards θ
CARRIED = "carried:"  # what an inner optimiser remembers from task to task; an outer step replaces it
STATE = "state"  # in φ: what a learned rule remembers of every coordinate
PREFIXES = (RATE, STRENGTH, CARRIED, STATE, LOSS, RULE)


def detached(params: Params) -> Params:
    """The same values, cut off from every gradient."""
    return {name: value.detach() for name, value in params.items()}


def own(params: Params) -> Params:
    """The model's own parameters: without learned rates, an optimiser's memory and the like."""
    return {name: value for name, value in params.items() if not name.startswith(PREFIXES)}


@dataclass(frozen=True)
class GradientDescent(Descent):
    """Gradient descent on the support loss from θ: the learner of MAML, first-order MAML and Meta-SGD.

    Everything here concerns one task; an estimator maps it over a batch of tasks with ``vmap``.

    Attributes:
        model: the network.
        loss: ``loss(outputs, y)``, minimised on the support set and, unless ``outer_loss`` is given, measured on the
            query set.
        rate: the inner rate α, on ``loss`` as it is (for a mean loss, no factor N); of learned rates the initial value.
        steps: number of inner steps.
        learn_rates: one learned inner rate a parameter, kept in θ under ``rate:NAME`` (Meta-SGD, Li et al. 2017).
        first_order: treat the inner gradients as constants, ∂φ/∂θ ≈ I. They still change with what θ holds beside the
            initial parameters, such as a learned loss, and with the θ in a pull.
        outer_loss: the loss on the query set, where it differs.
        query_sets: the query set comes as so many sets that are classified apart, its examples of a class dealt out to
            them in order; the outer loss is their mean. With normalisation by batch statistics this is not the same as
            one large set: training then sees queries in sets as small as those of the test.
        adapted: which parameters the inner loop changes, by what their names begin with; None leaves it to the model.
            ``(model.head,)`` is ANIL (Raghu, Raghu, Bengio and Vinyals 2020, section 4): only the last layer adapts,
            and the others are learned in the outer loop alone.

    Raises:
        UserError: for a negative rate or number of steps, fewer than one query set, or an ``adapted`` that is no tuple
            of texts; and, where the learner is used, if nothing begins with one of them.

    Source: Finn, Abbeel and Levine (2017), algorithm 1, line 6.

    >>> import helpers, torch
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.1, steps=3)
    >>> theta, x = learner.init(helpers.generator(0)), torch.linspace(-1, 1, 10)[:, None]
    >>> examples = helpers.Examples(x, x + 1)
    >>> phi = learner.adapt(theta, examples)
    >>> bool(learner.query_loss(phi, examples) < learner.query_loss(theta, examples))
    True
    """

    model: Model
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float
    steps: int = 1
    learn_rates: bool = False
    first_order: bool = False
    outer_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    query_sets: int = 1
    adapted: tuple[str, ...] | None = None

    steps_optional: ClassVar[bool] = False  # whether ``steps`` may be None

    def __post_init__(self) -> None:
        positive(self.rate, "inner rate", zero=True)
        if self.steps is not None or not self.steps_optional:
            whole(self.steps, "number of inner steps", least=0)
        whole(self.query_sets, "number of query sets")
        names, none = self.adapted, self.adapted is None
        if not none and not (names and isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
            raise UserError(
                "adapted is None, or a tuple of what the names of parameters begin with, such as (model.head,), "
                f"not {names!r}"
            )

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ: the model's and, with ``learn_rates``, one rate beside each adapted entry."""
        theta = self.model.init(generator, dtype)
        if self.learn_rates:
            adapted, _ = self.split(theta)
            theta |= {RATE + name: torch.full_like(value, self.rate) for name, value in adapted.items()}
        return theta

    def start(self, theta: Params) -> Params:
        """The model's parameters before adaptation: θ without the learned rates and the like."""
        return own(theta)

    def split(self, phi: Params) -> tuple[Params, Params]:
        """The adapted entries of ``phi``, and the others.

        Raises:
            UserError: if there are parameters, and none is named as ``adapted`` says.
        """
        names = own(phi)
        for prefix in (names and self.adapted) or ():
            if not any(name.startswith(prefix) for name in names):
                layers = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
                raise UserError(f"adapted says {prefix!r}, and no parameter begins with that: there are {layers}")
        chosen = self.model.is_adapted if self.adapted is None else lambda name: name.startswith(self.adapted)
        adapted = {name: value for name, value in names.items() if chosen(name)}
        return adapted, {name: value for name, value in phi.items() if name not in adapted}

    def outputs(self, phi: Params, x: Tensor) -> Tensor:
        """What the model gives for inputs ``x``; it sees its own entries of φ alone.

        Raises:
            UserError: if the model asks for a parameter that φ lacks.
        """
        try:
            return self.model(own(phi), x)
        except KeyError as missing:
            raise UserError(f"the model asks for a parameter {missing} that neither θ nor the task gives") from missing

    def _adapted(self, phi: Params) -> tuple[Params, Params]:
        """As :meth:`split`, for an inner loop that has something to do."""
        adapted, frozen = self.split(phi)
        if not adapted:
            raise UserError("there is nothing to adapt: neither θ nor the task gives a parameter that the model adapts")
        return adapted, frozen

    def support_gradient(self, phi: Params, support: Examples) -> Params:
        """Gradient of the support loss with respect to the adapted parameters of ``phi``."""
        adapted, frozen = self._adapted(phi)
        return grad(lambda p: self.loss(self.outputs(p | frozen, support.x), support.y))(adapted)

    def inner_gradient(self, theta: Params, phi: Params, support: Examples) -> Params:
        """What an inner step descends, by the adapted parameters: here the support loss."""
        return self.support_gradient(phi, support)

    def move(self, theta: Params, phi: Params, gradient: Params) -> Params:
        """φ ← φ − α ∇, with learned rates entry by entry."""
        return phi | {name: phi[name] - theta.get(RATE + name, self.rate) * g for name, g in gradient.items()}

    def query_loss(self, phi: Params, query: Examples) -> Tensor:
        """The outer loss of task parameters φ on the query set."""
        loss = self.outer_loss or self.loss
        if self.query_sets == 1:
            return loss(self.outputs(phi, query.x), query.y)
        if len(query.x) % self.query_sets:
            raise UserError(f"{len(query.x)} query examples cannot be dealt out to {self.query_sets} equal sets")
        x, y = (t.unflatten(0, (-1, self.query_sets)) for t in query)
        return vmap(lambda x, y: loss(self.outputs(phi, x), y), in_dims=1)(x, y).mean()
