"""Is it the gradient? Central differences in double precision, for every meta-gradient and for one's own method.

A meta-gradient is easily wrong in a term that no training curve shows. What it should be the gradient of is a function
that can be evaluated, and its differences need none of the code that is in question:

>>> import helpers, torch
>>> from torch.utils._pytree import tree_map
>>> network = helpers.MLP((1, 4, 1), activation="tanh", scale=0.5)
>>> learner = helpers.GradientDescent(network, helpers.mean_squared_error, rate=0.1, steps=2)
>>> theta = learner.init(helpers.generator(0), torch.float64)
>>> tasks = tree_map(torch.Tensor.double, helpers.Sinusoids(5, 5).sample(2, helpers.generator(1)))
>>> reference = central_differences(lambda t: objective(learner, t, tasks), theta)
>>> bool(error(helpers.maml(learner, theta, tasks)[0], reference) < 1e-6)
True
>>> bool(error(helpers.fomaml(learner, theta, tasks)[0], reference) < 1e-3)  # it leaves a term out
False
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache

import torch
from torch import Tensor
from torch.func import vmap

from helpers.errors import UserError
from helpers.types import Learner, Params, Tasks

__all__ = ["DIRECTIONS", "H", "along", "central_differences", "directions", "error", "objective"]

H = 1e-5  # step of the differences
DIRECTIONS = 8  # of a tensor with more numbers than that, so many directional derivatives are taken


def objective(learner: Learner, theta: Params, tasks: Tasks) -> Tensor:
    """The mean query loss after adaptation: what the exact meta-gradient is the gradient of."""
    return vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks).mean()


@cache
def directions(size: int) -> Tensor:
    """Random orthonormal directions in which a tensor of ``size`` numbers is differentiated: ``[DIRECTIONS, size]``."""
    draws = torch.randn(size, DIRECTIONS, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    return torch.linalg.qr(draws).Q.T


def central_differences(function: Callable[[Params], Tensor], theta: Params, everywhere: bool = False) -> Params:
    """The gradient of ``function(theta)``: central differences at h and 2h, combined.

    Of a tensor with more than eight numbers the derivatives in eight random directions of its own (``directions``), or
    with ``everywhere`` those of every coordinate, which say where an error is. Of an error in a tensor of five hundred
    numbers random directions see less than a hundredth once in ten million times, and the draws are always the same.

    The combination (8 d(h) − d(2h)) / 12h cancels the truncation error of order h², which leaves h⁴ = 1e-20 times a
    fifth derivative, and rounding of order 1e-16 / h = 1e-11 of the function's value. A ReLU kink between θ − 2h and
    θ + 2h would show as an error of order 1 or 1/h in a coordinate: as a failure, never as a pass. A few hundred
    activations of order 1 have a chance of 1e-5 each to lie that close to 0; another seed moves them.

    Args:
        function: from a dictionary like θ to a number, in operations that ``vmap`` can map.
        theta: where; tensors in double precision.
        everywhere: every coordinate of every tensor.

    Returns:
        A dictionary with the names of θ: tensors like its own, or ``[DIRECTIONS]``. :func:`along` brings a gradient
        into the same form.

    Raises:
        UserError: for an empty θ, or one that is not in double precision.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> found = central_differences(lambda theta: theta["w"].square().sum(), {"w": w})
    >>> torch.allclose(found["w"], 2 * w)
    True
    """
    if not theta or any(value.dtype != torch.float64 for value in theta.values()):
        raise UserError("differences need parameters, and double precision: pass θ and the tasks in torch.float64")
    few = {name for name, value in theta.items() if value.numel() > DIRECTIONS and not everywhere}
    units = {
        name: (directions(value.numel()) if name in few else torch.eye(value.numel())).to(value)
        for name, value in theta.items()
    }
    total, done, near = sum(map(len, units.values())), 0, {}
    for name, value in theta.items():  # all tensors at once: a row moves one of them
        away = value.new_zeros(total, value.numel())
        away[done : done + len(units[name])] = units[name]
        near[name] = torch.cat([value + k * H * away.reshape(-1, *value.shape) for k in (-2, -1, 1, 2)])
        done += len(units[name])
    f = vmap(function, chunk_size=1000)(near).reshape(4, total)
    slopes = ((8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * H)).split([len(unit) for unit in units.values()])
    return {
        name: slope if name in few else slope.reshape(theta[name].shape)
        for name, slope in zip(theta, slopes, strict=True)
    }


def along(gradient: Params, reference: Params) -> Params:
    """A gradient in the directions in which ``reference``, from :func:`central_differences`, was taken.

    Raises:
        UserError: if the two do not have the same names.
    """
    if gradient.keys() != reference.keys():
        raise UserError(f"gradient and reference differ in {', '.join(sorted(gradient.keys() ^ reference.keys()))}")
    return {
        name: g if g.shape == reference[name].shape else directions(g.numel()).to(g) @ g.flatten()
        for name, g in gradient.items()
    }


def error(gradient: Params, reference: Params, zero: Collection[str] = ()) -> float:
    """The largest relative error ‖g − r‖ / ‖r‖ of a parameter tensor, so that no small one hides behind a large one.

    Args:
        gradient: a dictionary of tensors.
        reference: what it should be, whole or from :func:`central_differences`.
        zero: names whose reference is 0, to 1e-6 of the largest: their error is relative to that.

    Raises:
        UserError: if the reference vanishes for other names than those in ``zero``, so that a relative error would mean
            nothing, or a gradient is not finite or has another shape.
    """
    gradient = along(gradient, reference)
    size, errors = max(r.norm() for r in reference.values()), []
    for name, r in reference.items():
        if gradient[name].shape != r.shape or not gradient[name].isfinite().all():
            raise UserError(f"the gradient of {name} is not finite, or not of the shape {list(r.shape)}")
        vanishes = bool(r.norm() <= 1e-6 * size)
        if vanishes != (name in zero):
            raise UserError(f"the reference of {name} is {'' if vanishes else 'not '}0: say in zero which ones are")
        errors.append((gradient[name] - r).norm() / (size if vanishes else r.norm()))
    return max(errors).item()
