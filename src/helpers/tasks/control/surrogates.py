r"""Losses of sampled experience whose derivatives are those of a policy's expected return.

Experience comes from a policy μ, the *sampling policy*, and is data: nothing in it moves when θ does. What moves is the
density π_θ(a|s) of the actions that were taken. Three losses have the same first derivative where π_θ = μ,
−E[A ∇log π], and differ in the second, which MAML needs, since it differentiates through a step along the first:

``"score"``
    −E[A log π]. The data stand for an expectation under π_θ itself, so the derivative of E_π[A ∇log π] has two terms,
    one by the integrand and one by the density of what is averaged: E[A ∇²log π] + E[A ∇log π ∇log πᵀ]. On fixed data
    the second term is lost. This is the loss of the MAML paper's released code.
``"ratio"``
    −E[A π/μ]. The weight π/μ keeps track of that density, so that the term is there. Right for every step by
    itself, it forgets that earlier actions decide which later states are met.
``"trajectory"``
    −E[A_t (ρ_t − ρ_{t−1})], with ρ_t = Π_{k ≤ t} π(a_k|s_k)/μ(a_k|s_k) the ratio of all actions up to t. It equals the
    change of the expected return at every θ, whatever the baseline in A_t, so that all its derivatives are right;
    products of a hundred ratios have a variance to match.

They are ``loss(outputs, y)`` like any other, with ``outputs`` a Gaussian policy's mean and deviation ``[n, horizon,
2 m]`` and ``y`` ``[n, horizon, 3 m + 2]``: action, the sampling policy's mean and deviation, advantage, and the weight
of the step, which is 0 beyond an episode's end. Means are over steps.

Source: Foerster et al. (2018), DiCE, section 3; Rothfuss et al. (2019), ProMP, section 5 (``"ratio"``);
Farquhar, Whiteson and Foerster (2019), Loaded DiCE (``"trajectory"``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from helpers.models.policies import GaussianPolicy, log_probability
from helpers.tasks.control.experience import sample
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.returns import advantages_of
from helpers.types import Examples, Params

__all__ = ["SURROGATES", "collect", "divergence", "metric", "ratio", "score", "surrogate", "trajectory"]


def score(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Advantage times log density: of the terms of the second derivative it has one.

    Args:
        new, old: log densities of the actions under π_θ and under the sampling policy, ``[..., horizon]``.
        advantage: ``[..., horizon]``.
    """
    return advantage * new


def ratio(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Advantage times likelihood ratio of the step; arguments as of :func:`score`."""
    return advantage * (new - old).exp()


def trajectory(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Advantage times what the step adds to the ratio of the trajectory so far; arguments as of :func:`score`."""
    so_far = (new - old).cumsum(-1).exp()
    before = torch.cat([torch.ones_like(so_far[..., :1]), so_far[..., :-1]], -1)
    return advantage * (so_far - before)


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "score": score, "ratio": ratio, "trajectory": trajectory,
}  # fmt: skip
"""The terms of the losses by name: of densities and an advantage, before weighing and averaging."""


def surrogate(kind: str, log_density: Callable[[Tensor, Tensor], Tensor] = log_probability) -> Callable:
    """A loss ``loss(outputs, y)`` of the kind: minus the weighted mean over the steps.

    Args:
        kind: a key of :data:`SURROGATES`.
        log_density: of actions ``[..., m]`` under a policy's outputs ``[..., 2 m]``.
    """
    term = SURROGATES[kind]

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        action, old, advantage, weight = parts(outputs, y)
        value = term(log_density(outputs, action), log_density(old, action), advantage)
        return -(weight * value).sum() / weight.sum()

    return loss


def parts(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of ``y``: action ``[..., m]``, old outputs, which are as wide as ``outputs``, advantage and weight ``[...]``."""
    wide = outputs.shape[-1]
    action, old, rest = y.split([y.shape[-1] - wide - 2, wide, 2], -1)
    return action, old, *rest.unbind(-1)


def divergence(outputs: Tensor, old: Tensor) -> Tensor:
    """KL(old ‖ new) of Gaussian policies with outputs ``[..., 2 m]``; ``[...]``.

    >>> both = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])  # mean and deviation of each
    >>> divergence(*both).item(), divergence(both[0], both[0]).item()
    (0.5, 0.0)
    """
    mean, std = outputs.chunk(2, -1)
    mean_old, std_old = old.chunk(2, -1)
    away = (std_old.square() + (mean_old - mean).square()) / (2 * std.square())
    return ((std / std_old).log() + away - 0.5).sum(-1)


def metric(outputs: Tensor) -> Tensor:
    """Second derivatives of :func:`divergence` by the outputs where both are equal: a diagonal, ``[..., 2 m]``."""
    _, std = outputs.chunk(2, -1)
    return torch.cat([std**-2, 2 * std**-2], -1)


def collect(
    env: Navigation,
    policy: GaussianPolicy,
    params: Params,
    goal: Tensor,
    n: int,
    generator: torch.Generator,
    discount: float = 0.99,
    step: Callable | None = None,
) -> tuple[Examples, Tensor]:
    """Let each policy seek its goal n times.

    Args:
        params: policies, tensors ``[tasks, ...]``.
        goal: ``[tasks, 2]``; its dtype is that of the experience.
        generator: of the actions' noise.
        step: :func:`~helpers.tasks.control.experience.act`, or the same recorded.

    Returns:
        Observations ``x`` ``[tasks, n, horizon, d]`` and ``y`` ``[tasks, n, horizon, 3 m + 2]`` as the losses of this
        module take them; and returns ``[tasks, n]``, sums of the rewards that were lived.
    """
    start = env.reset(len(goal) * n, generator, goal.dtype).unflatten(0, (len(goal), n))
    shape = (len(goal), n, env.horizon, env.action_size)
    noise = torch.randn(shape, generator=generator, dtype=goal.dtype, device=generator.device)
    met = sample(env, policy, params, goal, start, noise, **({"step": step} if step else {}))
    lived = env.lived(met.observations, goal[:, None])
    with torch.no_grad():
        outputs = vmap(policy)(params, met.observations)
    worth = advantages_of(met.observations, met.rewards, lived, discount)
    y = torch.cat([met.actions, outputs, worth[..., None], lived[..., None]], -1)
    return Examples(met.observations, y), (met.rewards * lived).sum(-1)
