"""Linear solvers for implicit gradients: many problems A x = b at once, each A known by its products alone.

A solver is an argument of :func:`helpers.estimators.implicit.ImplicitGradient`: any function ``solver(product, b) ->
Solution``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.types import Params
from helpers.validate import positive, whole


class Solution(NamedTuple):
    """What a solver found, for each of T problems.

    Attributes:
        x: the solutions, tensors ``[T, ...]``.
        residual: ‖b − A x‖ / ‖b‖ as the iteration keeps it, ``[T]``.
        iterations: steps that were taken, ``[T]``, whole numbers.
        indefinite: whether a direction p with pᵀ A p ≤ 0 was met, ``[T]``; the solver stopped there, and x minimises
            the quadratic over the directions before it, not over all of them.
    """

    x: Params
    residual: Tensor
    iterations: Tensor
    indefinite: Tensor


class NotConverged(UserWarning):
    """A linear system was left with a residual above the tolerance, or its matrix is not positive definite."""


def dot(a: Params, b: Params) -> Tensor:
    """Inner products ``[T]`` of vectors that are dictionaries of tensors ``[T, ...]``.

    Raises:
        UserError: if the vectors hold no tensor.
    """
    if not a:
        raise UserError("there is nothing to solve for: the vector holds no tensor")
    return sum((a[name] * b[name]).flatten(1).sum(1) for name in a)


def conjugate_gradient(
    product: Callable[[Params], Params],
    b: Params,
    steps: int,
    *,
    start: Params | None = None,
    damping: float = 0.0,
    tolerance: float = 0.0,
) -> Solution:
    """Solve (A + damping · I) x = b by conjugate gradients, for T problems side by side.

    Each problem stops by itself: when its residual is at most ``tolerance`` times ‖b‖, or where it meets a direction of
    non-positive curvature. The others go on, and there is no control flow that depends on values, so the whole can be
    traced.

    Args:
        product: p ↦ A p for all problems at once; A is symmetric.
        b: right-hand sides, a dictionary of tensors ``[T, ...]``.
        steps: at most so many steps, each one product.
        start: first guess, such as the solution of a similar problem ("warm start"); costs one product more.
        damping: added to the diagonal of A.
        tolerance: relative residual at which a problem counts as solved.

    Returns:
        The solutions with their residuals.

    Raises:
        UserError: for an empty ``b``, or a number of steps, a damping or a tolerance below 0.

    Source: Hestenes and Stiefel (1952); Nocedal and Wright (2006), algorithm 5.2.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 2.0, 4.0]), torch.ones(1, 3)  # one problem, with a diagonal matrix
    >>> found = conjugate_gradient(lambda p: {"x": a * p["x"]}, {"x": b}, steps=3)
    >>> torch.allclose(a * found.x["x"], b), found.indefinite.tolist()
    (True, [False])
    """

    whole(steps, "number of steps", 0)
    positive(damping, "damping", zero=True)
    positive(tolerance, "tolerance", zero=True)

    def damped(p: Params) -> Params:
        image = product(p)
        return {n: image[n] + damping * p[n] for n in p} if isinstance(damping, Tensor) or damping else image

    if start is None:
        x, r = {n: torch.zeros_like(v) for n, v in b.items()}, b
    else:
        image = damped(start)
        x, r = start, {n: b[n] - image[n] for n in b}
    p, rr, size = r, dot(r, r), dot(b, b)
    goal = tolerance**2 * size
    count, indefinite = torch.zeros_like(rr, dtype=torch.int64), torch.zeros_like(rr, dtype=torch.bool)
    for _ in range(steps):
        going = (rr > goal) & ~indefinite
        image = damped(p)
        curvature = dot(p, image)
        indefinite = indefinite | (going & (curvature <= 0))
        going = going & ~indefinite
        length = torch.where(going, rr / torch.where(going, curvature, 1), 0)
        x = {n: x[n] + _wide(length, p[n]) * p[n] for n in x}
        r = {n: r[n] - _wide(length, p[n]) * image[n] for n in r}
        new = torch.where(going, dot(r, r), rr)
        turn = torch.where(going, new / torch.where(going, rr, 1), 0)
        p = {n: torch.where(_wide(going, p[n]), r[n] + _wide(turn, p[n]) * p[n], p[n]) for n in p}
        rr, count = new, count + going
    residual = (rr / torch.where(size > 0, size, 1)).sqrt()
    return Solution(x, residual, count, indefinite)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """``[T]`` as ``[T, 1, ...]``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def identity(product: Callable[[Params], Params], b: Params) -> Solution:
    """x = b, whatever A: iMAML with this solver ignores the curvature, as first-order MAML does."""
    image = product(b)
    short = {n: b[n] - image[n] for n in b}
    size = dot(b, b)
    residual = (dot(short, short) / torch.where(size > 0, size, 1)).sqrt()
    none = torch.zeros_like(residual, dtype=torch.int64)
    return Solution(b, residual, none, none.bool())


def report(found: Solution, tolerance: float) -> None:
    """Warn of every problem that was not solved: non-convergence is said, not hidden.

    Warns:
        NotConverged: says how many of the problems have a residual above ``tolerance``, and how many matrices were
            seen to be indefinite.
    """
    total = len(found.residual)
    late, bad = int((found.residual > tolerance).sum()), int(found.indefinite.sum())
    if bad:
        warnings.warn(
            f"the matrix of {bad} of {total} linear systems is not positive definite: "
            "raise the proximal strength or the damping, or solve the inner problem further",
            NotConverged,
            stacklevel=2,
        )
    if late:
        warnings.warn(
            f"{late} of {total} linear systems were left with a residual above {tolerance:g} "
            f"(the largest is {found.residual.max().item():.2g}): allow more conjugate-gradient steps",
            NotConverged,
            stacklevel=2,
        )
