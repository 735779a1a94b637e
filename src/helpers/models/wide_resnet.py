"""The wide residual network of Neural Optimizer Search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.layers import channels_last, normalize
from helpers.types import Params
from helpers.validate import whole

__all__ = ["WideResNet"]


@dataclass(frozen=True)
class WideResNet:
    """The wide residual network WRN-d-k: a convolution with 16 filters, three groups of (d − 4) / 6 blocks with 16k,
    32k and 64k filters, batch normalisation and ReLU, mean over positions, linear.

    A block adds two 3×3 convolutions to its input, each preceded by normalisation and ReLU. The first block of the
    second and of the third group has stride 2. Where a block changes the number of channels, its input is projected (a
    1×1 convolution, after the normalisation and ReLU that both paths then share).

    Parameters are ``conv.weight`` ``[3, 3, channels, 16]``; in each block, say the first, ``group1.block1.norm1.scale``
    and ``.norm1.shift`` ``[in]``, ``.conv1.weight`` ``[3, 3, in, out]``, ``.norm2.scale`` and ``.norm2.shift``
    ``[out]``, ``.conv2.weight`` ``[3, 3, out, out]`` and, if it projects, ``.project.weight`` ``[in, out]``;
    ``norm.scale`` and ``norm.shift``; ``head.weight`` ``[64k, classes]`` and ``head.bias`` ``[classes]``. Normalisation
    has the statistics of the batch itself. There is no dropout.

    One network is fast: the convolutions are PyTorch's own, four times as fast on a CPU as products of patches. Many,
    under ``vmap``, are right too but gain nothing over one after the other.

    Attributes:
        depth: 6 n + 4, for n blocks in each group.
        width: k, how many times as many filters as in a thin network.
        channels: of the images.
        classes: number of logits.

    Raises:
        UserError: if no network has that depth or width.

    Source: Zagoruyko and Komodakis (2016), table 1 and section 2; weights drawn as by He et al. (2015), from a normal
    distribution of variance 2 / inputs.
    """

    depth: int = 16
    width: int = 1
    channels: int = 3
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("depth", "width", "channels", "classes"):
            whole(getattr(self, name), f"{name} of a wide residual network")
        if self.depth < 10 or self.depth % 6 != 4:
            raise UserError(f"a wide residual network has depth 6 n + 4, not {self.depth}: take 10, 16, 22, 28 or 40")

    @property
    def head(self) -> str:
        """Prefix of the linear map's parameters."""
        return "head."

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        device, params = generator.device, {}

        def draw(*shape: int) -> Tensor:
            deviation = (2 / math.prod(shape[:-1])) ** 0.5
            return deviation * torch.randn(shape, generator=generator, dtype=dtype, device=device)

        def norm(name: str, size: int) -> Params:
            scale, shift = torch.ones(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)
            return {f"{name}.scale": scale, f"{name}.shift": shift}

        params["conv.weight"] = draw(3, 3, self.channels, 16)
        fan_in = 16
        for block, filters, _ in self._blocks():
            params |= norm(f"{block}.norm1", fan_in) | {f"{block}.conv1.weight": draw(3, 3, fan_in, filters)}
            params |= norm(f"{block}.norm2", filters) | {f"{block}.conv2.weight": draw(3, 3, filters, filters)}
            if filters != fan_in:
                params[f"{block}.project.weight"] = draw(fan_in, filters)
            fan_in = filters
        params |= norm("norm", fan_in) | {"head.weight": draw(fan_in, self.classes)}
        return params | {"head.bias": torch.zeros(self.classes, dtype=dtype, device=device)}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map images ``x`` ``[n, channels, height, width]`` to logits ``[n, classes]``.

        Raises:
            UserError: if the images have another number of channels than the model.
        """
        x = channels_last(x, self.channels).contiguous()
        x = _convolution(x, params["conv.weight"])
        for block, _, stride in self._blocks():
            hidden = _activated(params, f"{block}.norm1", x)
            if (project := params.get(f"{block}.project.weight")) is not None:
                x = hidden[:, ::stride, ::stride] @ project
            hidden = _convolution(hidden, params[f"{block}.conv1.weight"], stride)
            hidden = _activated(params, f"{block}.norm2", hidden)
            x = x + _convolution(hidden, params[f"{block}.conv2.weight"])
        return _activated(params, "norm", x).mean((1, 2)) @ params["head.weight"] + params["head.bias"]

    def _blocks(self) -> Iterator[tuple[str, int, int]]:
        """Name, filters and stride of every block."""
        for group in (1, 2, 3):
            for block in range(1, (self.depth - 4) // 6 + 1):
                stride = 2 if group > 1 and block == 1 else 1
                yield f"group{group}.block{block}", 8 * 2**group * self.width, stride

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all of them."""
        return True


def _convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """3×3 convolution of ``x`` ``[n, h, w, in]`` with one line of zeros on each side, as PyTorch's layers have it; both
    views are free, for conv2d works on channels in the last place."""
    return functional.conv2d(x.movedim(-1, 1), weight.permute(3, 2, 0, 1), stride=stride, padding=1).movedim(1, -1)


def _activated(params: Params, norm: str, x: Tensor) -> Tensor:
    return torch.relu(torch.addcmul(params[f"{norm}.shift"], normalize(x), params[f"{norm}.scale"]))
