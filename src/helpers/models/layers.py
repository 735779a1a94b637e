"""What networks of several families are made of: normalisation, first weights, and dictionaries of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.numerics.conv_ops import standardize
from helpers.types import Params
from helpers.validate import positive

__all__ = ["EPSILON", "expanded", "layer_norm", "normalize", "stacked", "subtree"]

EPSILON = 1e-3  # of the official MAML code's normalisation (TensorFlow's default)


def stacked(drawn: Sequence[Params]) -> Params:
    """Several parameter dictionaries of one network as one, its tensors with a leading axis."""
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}


def expanded(params: Params, count: int) -> Params:
    """The same parameters ``count`` times, its tensors with a leading axis."""
    return {name: value.expand(count, *value.shape).contiguous() for name, value in params.items()}


def subtree(params: Params, prefix: str) -> Params:
    """The entries whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def normalize(x: Tensor, shift: Tensor | None = None, epsilon: float = EPSILON) -> Tensor:
    """Batch normalisation with the statistics of ``x`` itself, over every axis but the last.

    Args:
        x: ``[..., channels]``; all leading axes are the batch.
        shift: ``[channels]``, added afterwards. There is no scale: a ReLU and a linear map follow, which absorb it.

    Returns:
        A tensor of the shape of ``x``. Differentiable any number of times, also under ``vmap``.

    Source: Ioffe and Szegedy (2015), algorithm 1, without running averages.
    """
    normal = standardize(x, positive(epsilon, "epsilon of a normalisation"))
    return normal if shift is None else normal + shift


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    """Layer normalisation over the last axis, with derivatives that stay right under ``vmap``.

    ``torch.nn.functional.layer_norm`` gives wrong ones of second order there if ``weight`` is adapted.

    Args:
        x: ``[..., features]``.
        weight: ``[features]``, a scale.
        bias: ``[features]``, added afterwards.

    Source: Ba, Kiros and Hinton (2016), equation 4.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0, 2.0]), torch.tensor([0.0, 1.0])).round()
    tensor([[-2.,  3.]])
    """
    x = functional.layer_norm(x, x.shape[-1:], eps=positive(epsilon, "epsilon of a normalisation"))
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def xavier(shape: tuple[int, ...], fan_in: int, fan_out: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    bound = (6 / (fan_in + fan_out)) ** 0.5
    return (2 * torch.rand(shape, generator=generator, dtype=dtype, device=generator.device) - 1) * bound


def as_rows(x: Tensor, features: int) -> Tensor:
    """``[n, ...]`` as ``[n, features]``."""
    if x.dim() < 2 or x.shape[1:].numel() != features:
        raise UserError(f"this network takes inputs [n, {features}], not {list(x.shape)}: reshape them or change sizes")
    return x.flatten(1)


def channels_last(x: Tensor, channels: int, halvings: int = 1) -> Tensor:
    """Images ``[n, channels, height, width]`` as ``[n, height, width, channels]``.

    Raises:
        UserError: for another shape, or if halving them so often begins with a single pixel.
    """
    if x.dim() != 4 or x.shape[1] != channels:
        raise UserError(f"this network takes images [n, {channels}, height, width], not {list(x.shape)}: reshape them")
    large_enough(x.shape[2], x.shape[3], halvings)
    return x.movedim(1, -1)


def large_enough(height: int, width: int, halvings: int) -> None:
    if min(height, width) < 1 or max(height, width) <= 2 ** (halvings - 1) > 1:
        raise UserError(
            f"images of {height} x {width} pixels are too small for {halvings} blocks, each of which halves them: "
            "take fewer blocks or larger images"
        )


def subtree_of(theta: Params, kind: str) -> Params:
    """The entries of θ under ``kind/``, without that prefix: one of several networks that are trained together."""
    return subtree(theta, f"{kind}/")


def new_head(params: Params, head: str, outputs: int | None = None) -> Params:
    """A network with another last layer: of one output, the mean of those it has; or of so many that are 0.

    Args:
        head: what the names of the last layer's parameters begin with; weights are ``[in, out]``.
    """
    weight, bias = params[f"{head}weight"], params[f"{head}bias"]
    if outputs is None:
        weight, bias = weight.mean(1, keepdim=True), bias.mean(0, keepdim=True)
    else:
        weight, bias = weight.new_zeros(len(weight), outputs), bias.new_zeros(outputs)
    return params | {f"{head}weight": weight, f"{head}bias": bias}
