"""The convolutional network of the few-shot papers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.models.layers import channels_last, large_enough, normalize, xavier
from helpers.numerics.conv_ops import convolve
from helpers.types import Params
from helpers.validate import positive, whole

__all__ = ["ConvNet"]


@dataclass(frozen=True)
class ConvNet:
    """The Omniglot network: four blocks of 3×3 convolution with stride 2, batch normalisation and ReLU; mean over
    positions; linear.

    Parameters are ``conv1.weight`` ``[3, 3, in, out]``, ``norm1.shift`` ``[out]``, …, ``head.weight`` ``[filters,
    ways]`` and ``head.bias`` ``[ways]``. There is no convolution bias, since normalisation removes it, and no
    normalisation scale. The shifts belong to the meta-parameters but the inner loop leaves them alone, as in the
    official code.

    The official code draws the head from a unit normal distribution (``head_scale=1``). The default is smaller: the
    first predictions are then near uniform instead of confidently wrong, which saves about a thousand iterations.

    The networks of Reptile's and iMAML's codes differ in their ends: ``flatten`` feeds all positions of the last block
    to the linear layer instead of their mean (so the image size matters), and ``affine`` gives each normalisation a
    scale, ``norm1.scale`` ``[out]``, which the inner loop adapts together with the shift.

    With ``norm_last`` a block is convolution, ReLU, normalisation. Flattened, the features of every example then have
    a norm near √(number of features), and the inner problem of iMAML's set-up is well conditioned: the iMAML chapter
    measures it.

    Attributes:
        ways: number of classes.
        head_scale: deviation of the head's first weights; None draws them as the convolutions'; 0 is a head of zeros.
        flatten: the head sees every position.
        affine: normalisation with scale and shift, both adapted.
        size: height and width of the images; matters with ``flatten`` only.
        gain: factor of the first weights of the convolutions (and of the head, where ``head_scale`` is None).
        norm: without it there is no normalisation, each image is judged by itself, and the shifts are adapted biases.
        norm_last: normalisation after ReLU instead of before; with ``norm`` and ``affine`` alone.

    Raises:
        UserError: if there is no such network, or ``norm_last`` has no normalisation with scale and shift to put last.

    Source: Finn, Abbeel and Levine (2017), section 5.2; otherwise initialised as in the official code (Xavier for
    convolutions). With ``flatten`` and ``affine``, ``models.py`` of Reptile's official code.

    >>> import helpers, torch
    >>> network = helpers.ConvNet(ways=5, filters=8)
    >>> params = network.init(helpers.generator(0))
    >>> network(params, torch.zeros(3, 1, 28, 28)).shape
    torch.Size([3, 5])
    >>> network.is_adapted("conv1.weight"), network.is_adapted("norm1.shift")
    (True, False)
    """

    ways: int
    filters: int = 64
    blocks: int = 4
    channels: int = 1
    head_scale: float | None = 0.1
    flatten: bool = False
    affine: bool = False
    size: int = 28
    gain: float = 1.0
    norm: bool = True
    norm_last: bool = False

    def __post_init__(self) -> None:
        if self.norm_last and not (self.norm and self.affine):
            raise UserError("norm_last needs a normalisation with scale and shift: pass norm=True and affine=True")
        for name in ("ways", "filters", "blocks", "channels", "size"):
            whole(getattr(self, name), f"{name} of a ConvNet")
        if self.head_scale is not None:
            positive(self.head_scale, "head_scale of a ConvNet", zero=True)
        positive(self.gain, "gain of a ConvNet")
        if self.flatten:
            large_enough(self.size, self.size, self.blocks)

    @property
    def head(self) -> str:
        """Prefix of the linear map's parameters."""
        return "head."

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        device, params, fan_in = generator.device, {}, self.channels
        for block in range(1, self.blocks + 1):
            shape = (3, 3, fan_in, self.filters)
            weight = xavier(shape, 9 * fan_in, 9 * self.filters, generator, dtype)
            params[f"conv{block}.weight"] = self.gain * weight
            if self.affine:
                params[f"norm{block}.scale"] = torch.ones(self.filters, dtype=dtype, device=device)
            params[f"norm{block}.shift"] = torch.zeros(self.filters, dtype=dtype, device=device)
            fan_in = self.filters
        side = -(-self.size // 2**self.blocks) if self.flatten else 1
        shape = (self.filters * side**2, self.ways)
        if self.head_scale is None:
            params["head.weight"] = self.gain * xavier(shape, *shape, generator, dtype)
        else:
            params["head.weight"] = self.head_scale * torch.randn(
                shape, generator=generator, dtype=dtype, device=device
            )
        params["head.bias"] = torch.zeros(self.ways, dtype=dtype, device=device)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map images ``x`` ``[n, channels, height, width]`` to logits ``[n, ways]``.

        Raises:
            UserError: if the images have another number of channels than the model, or too few pixels.
        """
        shape = list(x.shape)
        x = channels_last(x, self.channels, self.blocks)
        for block in range(1, self.blocks + 1):
            x = convolve(x, params[f"conv{block}.weight"])
            if self.norm_last:
                x = torch.relu(x)
            if self.norm:
                x = normalize(x)
            if self.affine:
                x = x * params[f"norm{block}.scale"]
            x = x + params[f"norm{block}.shift"]
            if not self.norm_last:
                x = torch.relu(x)
        x = x.flatten(1) if self.flatten else x.mean((1, 2))
        if x.shape[1] != params["head.weight"].shape[0]:
            raise UserError(f"a flattened network takes images of one size: give ConvNet the size of {shape}")
        return x @ params["head.weight"] + params["head.bias"]

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: all but the shifts of a normalisation without a scale."""
        return self.affine or not self.norm or not name.endswith(".shift")
