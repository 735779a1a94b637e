"""Functions of one number on a grid: where going downhill ends."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def downhill_share(landscape: Tensor, omegas: Tensor, truth: Tensor, close: float) -> Tensor:
    """From which share of the ω going downhill ends near the truth: the limit of gradient descent with small steps.

    Args:
        landscape: values ``[..., truths, omegas]`` on an equally spaced grid.
        omegas: the grid, ``[omegas]``.
        truth: ``[truths]``.
        close: largest distance from the truth that counts.

    Returns:
        ``[..., truths]``, in [0, 1].
    """
    here = torch.arange(len(omegas), device=omegas.device).expand(landscape.shape).clone()
    infinite = landscape.new_full((*landscape.shape[:-1], 1), torch.inf)
    left = torch.cat([infinite, landscape[..., :-1]], -1)
    right = torch.cat([landscape[..., 1:], infinite], -1)
    lowest = torch.stack([landscape, left, right]).argmin(0)  # the first of equals: a flat stretch stays where it is
    to = here + (lowest == 2).long() - (lowest == 1).long()
    for _ in range(math.ceil(math.log2(len(omegas)))):  # follow twice as many steps each time
        to = to.gather(-1, to)
    return ((omegas[to] - truth[:, None]).abs() <= close).double().mean(-1)
