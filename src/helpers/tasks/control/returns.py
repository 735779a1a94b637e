"""What an action was worth: discounted returns, a linear baseline, and generalised advantages.

All are functions of rewards ``[..., n, horizon]`` of n episodes and of ``lived`` ``[..., n, horizon]``, which is 1 for
the steps of an episode and 0 beyond its end. Leading axes are tasks, each with a baseline of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["advantages_of", "discounted", "features", "fitted_values", "generalised", "standardised"]

LIMIT = 10.0  # observations are cut to ±LIMIT before the baseline sees them
RIDGE = 1e-5  # added to the diagonal of the normal equations


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """The rewards still to come, this step's included, each step later counting ``discount`` times as much.

    Returns:
        ``[..., horizon]``, like the rewards.

    >>> discounted(torch.tensor([1.0, 2.0, 4.0]), 0.5)
    tensor([3., 4., 4.])
    """
    step = torch.arange(rewards.shape[-1], dtype=rewards.dtype, device=rewards.device)
    later = step[:, None] - step  # of step i after step j
    weights = torch.where(later >= 0, discount ** later.clamp(min=0), torch.zeros_like(later))
    return rewards @ weights


def features(observations: Tensor) -> Tensor:
    """What the baseline sees of a step: [o, o², t/100, (t/100)², (t/100)³, 1].

    Args:
        observations: ``[..., horizon, d]``.

    Returns:
        ``[..., horizon, 2 d + 4]``.

    Source: Duan et al. (2016), appendix; ``LinearFeatureBaseline`` of rllab.
    """
    seen = observations.clamp(-LIMIT, LIMIT)
    t = torch.arange(observations.shape[-2], dtype=seen.dtype, device=seen.device) / 100
    time = torch.stack([t, t**2, t**3, torch.ones_like(t)], -1).expand(*seen.shape[:-1], 4)
    return torch.cat([seen, seen.square(), time], -1)


def fitted_values(observations: Tensor, returns: Tensor, lived: Tensor) -> Tensor:
    """Least squares of the returns on :func:`features`, task by task, at the very steps that it was fitted to.

    As in the released code of MAML the baseline is fitted first and then predicts, so that it knows the episodes whose
    advantages it gives.

    Args:
        observations: ``[..., n, horizon, d]``.
        returns: discounted, ``[..., n, horizon]``.
        lived: ``[..., n, horizon]``; other steps are not fitted.

    Returns:
        ``[..., n, horizon]``; in the dtype of the returns, computed in double precision.
    """
    x = features(observations.double()).flatten(-3, -2)
    weight, y = lived.double().flatten(-2), returns.double().flatten(-2)
    weighted = x * weight[..., None]
    ridge = RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    solution = torch.linalg.solve(weighted.mT @ x + ridge, weighted.mT @ y[..., None])
    return (x @ solution)[..., 0].unflatten(-1, returns.shape[-2:]).to(returns.dtype)


def generalised(rewards: Tensor, values: Tensor, lived: Tensor, discount: float, smoothing: float) -> Tensor:
    """Generalised advantages: the discounted sum, by ``discount`` · ``smoothing``, of r_t + discount · V_t+1 − V_t.

    After the last step the value is 0, at the horizon too, although that is a limit of time: so it is in rllab. With
    a smoothing of 1 this is the discounted return minus the value.

    Returns:
        ``[..., n, horizon]``, 0 where nothing is lived.

    Source: Schulman et al. (2016), equation 16.
    """
    values = values * lived
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return discounted(rewards * lived + discount * following - values, discount * smoothing) * lived


def standardised(advantages: Tensor, lived: Tensor) -> Tensor:
    """Advantages less their mean, in units of their deviation, over all steps that a task has lived."""
    axes = (-2, -1)
    total = lived.sum(axes, keepdim=True)
    away = (advantages - (advantages * lived).sum(axes, keepdim=True) / total) * lived
    return away / ((away.square().sum(axes, keepdim=True) / total).sqrt() + 1e-8)


def advantages_of(
    observations: Tensor, rewards: Tensor, lived: Tensor, discount: float = 0.99, smoothing: float = 1.0
) -> Tensor:
    """Standardised generalised advantages with a linear baseline fitted to the same episodes, ``[..., n, horizon]``.

    Args:
        observations: ``[..., n, horizon, d]``.
        rewards: ``[..., n, horizon]``.
        lived: ``[..., n, horizon]``.
    """
    values = fitted_values(observations, discounted(rewards * lived, discount), lived)
    return standardised(generalised(rewards, values, lived, discount, smoothing), lived)
