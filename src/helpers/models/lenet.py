"""LeNet for the digits of ML3, all of it adapted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.types import Params


@dataclass(frozen=True)
class LeNet:
    """Two 5×5 convolutions with max pooling and ReLU, and two linear layers, for square images given as rows of pixels.

    Parameters are ``conv1.weight`` ``[5, 5, 1, 10]``, ``conv1.bias`` ``[10]``, ``conv2.…``, ``linear1.weight`` ``[320,
    50]`` and so on, drawn from U[−1/√n, 1/√n], n inputs, as PyTorch draws them. There is no dropout.

    Attributes:
        ways: number of classes.
        side: height and width of the images.
        filters: of the convolutions.
        hidden: units between the linear layers.

    Raises:
        UserError: if the images are too small.

    Source: ``optimizee.py`` of the public code of Bechtle et al. (2020), which has dropout too.
    """

    ways: int = 2
    side: int = 28
    filters: tuple[int, int] = (10, 20)
    hidden: int = 50

    def __post_init__(self) -> None:
        if self.left < 1:
            raise UserError(f"images of {self.side}×{self.side} pixels are too small for this network: give it 28×28")

    @property
    def left(self) -> int:
        """Height and width of what the second pooling leaves."""
        return ((self.side - 4) // 2 - 4) // 2

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        first, second = self.filters
        shapes = {
            "conv1": (first, 1, 5, 5),
            "conv2": (second, first, 5, 5),
            "linear1": (second * self.left**2, self.hidden),
            "linear2": (self.hidden, self.ways),
        }
        params = {}
        for name, shape in shapes.items():
            out = shape[0] if len(shape) == 4 else shape[-1]
            bound = (torch.Size(shape).numel() / out) ** -0.5
            for kind, size in (("weight", shape), ("bias", (out,))):
                value = torch.empty(size, dtype=dtype, device=generator.device)
                params[f"{name}.{kind}"] = value.uniform_(-bound, bound, generator=generator)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map ``x`` ``[n, side²]`` to ``[n, ways]``."""
        x = x.view(len(x), 1, self.side, self.side)
        for layer in ("conv1", "conv2"):
            x = functional.conv2d(x, params[f"{layer}.weight"], params[f"{layer}.bias"])
            x = functional.relu(functional.max_pool2d(x, 2))
        x = functional.relu(x.flatten(1) @ params["linear1.weight"] + params["linear1.bias"])
        return x @ params["linear2.weight"] + params["linear2.bias"]

    @property
    def head(self) -> str:
        """Prefix of the last linear map's parameters."""
        return "linear2."

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: it changes all."""
        return True
