"""An outer step that trusts its gradient only as far as the policy stays nearly the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from helpers.numerics.solvers import conjugate_gradient, dot
from helpers.types import Params


class Moved(NamedTuple):
    """What came of a step.

    Attributes:
        theta: the new parameters; the old ones where no length was accepted.
        factor: share of the full step that was taken, 0 for none.
        loss: there.
        divergence: there.
    """

    theta: Params
    factor: float
    loss: float
    divergence: float


def natural_step(
    theta: Params,
    gradient: Params,
    product: Callable[[Params], Params],
    judge: Callable[[Params], tuple[Tensor, Tensor]],
    limit: float = 0.01,
    cg_steps: int = 10,
    damping: float = 1e-5,
    shrink: float = 0.8,
    tries: int = 15,
) -> Moved:
    """Go along the natural gradient until the divergence reaches ``limit``, less far if need be.

    With F the divergence's second derivative and g the gradient, the step that lowers the loss most at ½ sᵀF s = limit
    is s = −√(2 limit / gᵀF⁻¹g) F⁻¹g. It is shortened until the loss is lower in truth and the divergence within limits.

    Args:
        theta: where to begin.
        gradient: of the loss, there.
        product: v ↦ F v, for dictionaries like θ.
        judge: from parameters to their loss and their divergence from θ, scalars.
        limit: of the divergence.
        cg_steps: conjugate-gradient steps towards F⁻¹g.
        damping: added to F's diagonal.
        shrink: factor from one length to the next.
        tries: lengths that are tried.

    Source: Schulman et al. (2015), trust region policy optimization, appendix C; numbers of rllab's.

    >>> import torch
    >>> start = {"x": torch.tensor([5.0])}  # the loss ½ x², and a divergence of half the squared distance
    >>> judge = lambda p: (p["x"].square().sum() / 2, (p["x"] - start["x"]).square().sum() / 2)
    >>> moved = natural_step(start, start, lambda v: v, judge, limit=2.0, damping=0.0)
    >>> moved.factor, round(moved.loss, 3)
    (1.0, 4.5)
    """
    found = conjugate_gradient(
        lambda v: _wide(product({name: value[0] for name, value in v.items()})), _wide(gradient), cg_steps,
        damping=damping,
    ).x  # fmt: skip
    length = (2 * limit / (dot(found, _wide(gradient)) + 1e-8)).clamp(min=0).sqrt()[0]
    direction = {name: length * value[0] for name, value in found.items()}
    before, _ = judge(theta)
    for k in range(tries):
        factor = shrink**k
        there = {name: value - factor * direction[name] for name, value in theta.items()}
        loss, divergence = judge(there)
        if bool(loss < before) and bool(divergence <= limit):
            return Moved(there, factor, float(loss), float(divergence))
    return Moved(theta, 0.0, float(before), 0.0)


def _wide(params: Params) -> Params:
    """As one problem of several, ``[1, ...]``."""
    return {name: value[None] for name, value in params.items()}
