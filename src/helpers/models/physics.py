"""Networks with a formula inside: the frequency of a sine, and the inertia of an arm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.models.mlp import MLP
from helpers.types import Params


@dataclass(frozen=True)
class Frequency:
    """f(x) = sin(ωx) with one parameter, ``omega`` ``[1]``; the outputs ``[n, 2]`` are f(x) and ω itself.

    A loss that may look at ω can use what it is told at meta-training. The learned loss sees f(x) alone.
    """

    first: float = 0.1

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """The public code's only start."""
        return {"omega": torch.full((1,), self.first, dtype=dtype, device=generator.device)}

    @property
    def head(self) -> str:
        """ω is all there is."""
        return "omega"

    def is_adapted(self, name: str) -> bool:
        """ω is all there is."""
        return True

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """``[n, 2]`` of ``x`` ``[n, 1]``."""
        return torch.cat([torch.sin(params["omega"] * x), params["omega"].expand_as(x)], -1)


@dataclass(frozen=True)
class InertiaNetwork:
    """A model of a two-link arm's inverse dynamics that learns its mass matrix: τ = M_φ(q) q̈ + c(q, q̇).

    What does not depend on M, c(q, q̇), is known, as in the paper, and taken off: the outputs are the torques
    M_φ(q) q̈. The network gives the three entries of a lower triangle L from cosines and sines of the angles, and
    M = L Lᵀ. All is in units in which the numbers are about 1: ``inertia`` kg m² and ``acceleration`` rad/s².
    """

    network: MLP
    inertia: float = 5e-4
    acceleration: float = 10.0

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters of the network."""
        return self.network.init(generator, dtype)

    @property
    def head(self) -> str:
        """The last layer of the network."""
        return self.network.head

    def is_adapted(self, name: str) -> bool:
        """All parameters adapt, whatever their name."""
        return True

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Two torques and the entries M11, M12, M22, ``[n, 5]``, of ``x`` ``[n, 4]``: angles and accelerations."""
        q, acceleration = x[:, :2], x[:, 2:]
        a, b, c = self.network(params, torch.cat([q.cos(), q.sin()], -1)).unbind(-1)
        entries = torch.stack([a * a, a * b, b * b + c * c], -1)
        return torch.cat([self.torque(entries, acceleration), entries], -1)

    def torque(self, entries: Tensor, acceleration: Tensor) -> Tensor:
        """M q̈ ``[..., 2]`` of M11, M12, M22 ``[..., 3]`` and q̈ ``[..., 2]``."""
        first, cross, last = entries.unbind(-1)
        one, two = acceleration.unbind(-1)
        return torch.stack([first * one + cross * two, cross * one + last * two], -1)
