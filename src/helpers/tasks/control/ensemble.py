"""Learned dynamics of an arm: an ensemble of networks fitted to random motion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from helpers.models.layers import stacked
from helpers.models.mlp import MLP
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.control.rollout import random_rollouts
from helpers.types import Params


def ensemble_step(env: Reacher, dynamics: Params, state: Tensor, action: Tensor) -> Tensor:
    """The next state by the mean change of velocity that the members of an ensemble predict.

    Args:
        dynamics: a network of two tanh layers and, last, a mean and a spread of each velocity's change; the tensors
            with a leading axis of members.
        state, action: ``[..., 4]`` and ``[..., 2]``.

    Source: Bechtle et al. (2020), model-based reinforcement learning; the public code's ensemble and limits.
    """
    change = ensemble(dynamics, _normal(env, state, action))[0].mean(0)
    speed = (state[..., 2:] + change).clamp(-4 * env.speed_scale, 4 * env.speed_scale)
    return torch.cat([state[..., :2] + env.dt * speed, speed], -1)


def _normal(env: Reacher, state: Tensor, action: Tensor) -> Tensor:
    return torch.cat([state[..., :2].cos(), state[..., :2].sin(), state[..., 2:] / env.speed_scale, action], -1)


def ensemble(dynamics: Params, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances ``[members, ..., 2]`` of every member at ``x`` ``[..., 8]``."""
    shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    for layer in (1, 2):
        x = torch.tanh(x @ dynamics[f"linear{layer}.weight"] + dynamics[f"linear{layer}.bias"][:, None])
    mean, spread = (x @ dynamics["linear3.weight"] + dynamics["linear3.bias"][:, None]).chunk(2, -1)
    return mean.unflatten(1, shape), (functional.softplus(spread) + 1e-6).unflatten(1, shape)


def fit_ensemble(
    env: Reacher, generator: torch.Generator, members: int, hidden: tuple[int, int], epochs: int, rollouts: int
) -> Params:
    """Dynamics of the environment from random rollouts: every member leaves another part of the data out.

    Args:
        env: what is imitated.
        generator: draws the rollouts, the first parameters and the minibatches.
        members: networks.
        hidden: widths of their two inner layers.
        epochs: of their training.
        rollouts: as long as an episode.

    Returns:
        Parameters of :func:`ensemble_step`, each with a leading axis of ``members``.
    """
    device = generator.device
    data = random_rollouts(env, rollouts, env.horizon, generator)
    x = _normal(env, data.state, data.action).flatten(0, 1)
    y = (data.next_state - data.state)[..., 2:].flatten(0, 1)
    fold = torch.ones(len(x), device=device)  # a single member leaves nothing out
    if members > 1:
        fold = torch.randperm(len(x), generator=generator, device=device) % members
    sizes = (x.shape[-1], *hidden, 2 * y.shape[-1])
    model = MLP(sizes, scale=None)
    params = stacked([model.init(generator) for _ in range(members)])
    params = {name: (v[:, :] if v.dim() == 3 else v).requires_grad_() for name, v in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=3e-3)
    weight = (fold[None] != torch.arange(members, device=device)[:, None]).to(x.dtype)[..., None]
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator, device=device).split(128):
            mean, variance = ensemble(params, x[batch])
            error = (y[batch] - mean).square() / variance + variance.log()
            optimizer.zero_grad()
            (weight[:, batch] * error).mean().backward()
            optimizer.step()
    return {name: value.detach() for name, value in params.items()}
