"""Learners with a pull towards θ, for which the implicit gradient is defined: gradient descent and truncated Newton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from helpers.errors import UserError
from helpers.learners.descent import STRENGTH, GradientDescent
from helpers.numerics.solvers import conjugate_gradient
from helpers.types import Examples, Params
from helpers.validate import finite, one_of, positive, whole


@dataclass(frozen=True)
class Proximal(GradientDescent):
    """Gradient descent on the support loss plus a pull towards θ: L(φ) + ½ (φ − θ)ᵀ Λ (φ − θ), the learner of iMAML.

    Attributes:
        strength: λ, where Λ = λ I; of a learned Λ the initial value.
        learn_strength: None for the fixed λ, or what is learned, kept in θ: ``"scalar"``, ``"layer"`` (one λ for each
            parameter tensor) or ``"diagonal"`` (one for each coordinate), all as log λ, so that they stay positive; or
            ``"matrix"``, a full Λ = A Aᵀ over all adapted coordinates, for small problems.

    Raises:
        UserError: for an unknown kind of ``learn_strength``, or a strength that is not positive and finite.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), equation 3; section 3 proposes the matrix.

    >>> import helpers
    >>> network, loss = helpers.MLP((1, 8, 1)), helpers.mean_squared_error
    >>> learner = helpers.Proximal(network, loss, rate=0.01, steps=3, strength=2.0, learn_strength="layer")
    >>> sorted(learner.init(helpers.generator(0)))[-2:]  # one learned pull for each parameter tensor
    ['strength:linear2.bias', 'strength:linear2.weight']
    """

    strength: float = 1.0
    learn_strength: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.strength, "proximal strength, on which an implicit gradient rests,")
        one_of(self.learn_strength, "learn_strength", (None, "scalar", "layer", "diagonal", "matrix"))

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ, with Λ where it is learned."""
        theta = super().init(generator, dtype)
        return theta | self._initial_strength(theta)

    def _initial_strength(self, theta: Params) -> Params:
        adapted, _ = self._adapted(theta)
        like = next(iter(adapted.values()))
        log = torch.full((), self.strength, dtype=like.dtype, device=like.device).log()
        match self.learn_strength:
            case "scalar":
                return {STRENGTH: log}
            case "layer":
                return {STRENGTH + name: log.clone() for name in adapted}
            case "diagonal":
                return {STRENGTH + name: log.expand_as(value).clone() for name, value in adapted.items()}
            case "matrix":
                size = sum(value.numel() for value in adapted.values())
                return {STRENGTH: self.strength**0.5 * torch.eye(size, dtype=like.dtype, device=like.device)}
        return {}

    def pull(self, theta: Params, delta: Params) -> Params:
        """Λ δ for a difference δ = φ − θ of adapted parameters."""
        if self.learn_strength is None:
            return {name: self.strength * value for name, value in delta.items()}
        if self.learn_strength == "matrix":
            root = theta[STRENGTH]
            flat = root @ (root.mT @ torch.cat([value.flatten() for value in delta.values()]))
            parts = flat.split([value.numel() for value in delta.values()])
            return {name: part.view_as(delta[name]) for name, part in zip(delta, parts, strict=True)}
        one = self.learn_strength == "scalar"
        return {name: theta[STRENGTH if one else STRENGTH + name].exp() * value for name, value in delta.items()}

    def inner_gradient(self, theta: Params, phi: Params, support: Examples) -> Params:
        """Gradient of the whole inner objective, ∇L(φ) + Λ (φ − θ), by the adapted parameters; 0 at φ*(θ)."""
        adapted, _ = self.split(phi)
        pull = self.pull(theta, {name: value - theta[name] for name, value in adapted.items()})
        return {name: g + pull[name] for name, g in self.support_gradient(phi, support).items()}

    def inner_objective(self, theta: Params, phi: Params, support: Examples) -> Tensor:
        """L(φ; support) + ½ (φ − θ)ᵀ Λ (φ − θ)."""
        adapted, _ = self.split(phi)
        delta = {name: value - theta[name] for name, value in adapted.items()}
        pull = sum((delta[name] * value).sum() for name, value in self.pull(theta, delta).items())
        return self.loss(self.outputs(phi, support.x), support.y) + pull / 2


@dataclass(frozen=True)
class HessianFree(Proximal):
    """The proximal inner problem solved by truncated Newton steps, "Hessian-free": the other inner solver of iMAML.

    Each of the ``steps`` solves (∇²L(φ) + Λ) d = −∇ by conjugate gradients with Hessian-vector products and goes along
    d by the best of a few lengths, 0 among them, so that the objective never grows. Where the curvature along a search
    direction is not positive, the direction found so far is used, or minus ``rate`` times the gradient if there is none
    yet.

    Attributes:
        solver_steps: conjugate-gradient steps of one Newton step.
        damping: added to the curvature for the direction alone (Levenberg and Marquardt), never to the objective.
        lengths: step lengths that are tried.

    Raises:
        UserError: for ``learn_rates``, which have no meaning here, and for ``first_order``, since a Newton step is
            more than an inner gradient.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), section 4, "Hessian-free"; Martens (2010); Nocedal and Wright
    (2006), algorithm 7.1. No public code of it exists.
    """

    solver_steps: int = 5
    damping: float = 0.0
    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_rates or self.first_order:
            raise UserError("HessianFree has neither learned rates nor a first-order form: use Proximal for them")
        whole(self.solver_steps, "number of conjugate-gradient steps")
        positive(self.damping, "damping", zero=True)
        if not self.lengths:
            raise UserError("HessianFree needs at least one step length to try")
        for length in self.lengths:
            finite(length, "step length")

    def step(self, theta: Params, phi: Params, support: Examples) -> Params:
        """One truncated Newton step from φ, along the best of the step lengths."""
        adapted, frozen = self._adapted(phi)
        gradient, curvature = vjp(lambda p: self.inner_gradient(theta, p | frozen, support), adapted)
        batch = {name: -g[None] for name, g in gradient.items()}  # the solver wants an axis of problems

        def product(v: Params) -> Params:
            (by_phi,) = curvature({name: value[0] for name, value in v.items()})
            return {name: value[None] for name, value in by_phi.items()}

        found = conjugate_gradient(product, batch, self.solver_steps, damping=self.damping)
        none = found.iterations[0] == 0
        direction = {n: torch.where(none, -self.rate * gradient[n], value[0]) for n, value in found.x.items()}
        like = next(iter(adapted.values()))
        lengths = torch.stack([like.new_full((), length) for length in self.lengths])  # no copy, which would wait

        def along(length: Tensor) -> Tensor:
            return self.inner_objective(
                theta, phi | {n: adapted[n] + length * d for n, d in direction.items()}, support
            )

        best = lengths[vmap(along)(lengths).nan_to_num(torch.inf).argmin()]
        return phi | {name: adapted[name] + best * d for name, d in direction.items()}
