"""Networks whose architecture is itself a parameter: every layer is a weighted mean of what it might be.

The weights are the softmax of a few numbers, so the choice has a gradient like any parameter. The inner loop leaves it
alone; learned across tasks it is a part of θ, and at the end the largest of each layer is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.convnet import ConvNet
from helpers.models.layers import as_rows, channels_last, normalize
from helpers.models.mlp import MLP
from helpers.numerics.conv_ops import convolve
from helpers.types import Params

CHOICE = "choice"  # names of the choices begin with it
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sine": torch.sin,
    "identity": lambda x: x,
}
SKIP = "skip"  # the layer is left out
TAKEN = 1e4  # a logit that leaves nothing to the others


def decided(params: Params) -> Params:
    """The same with every choice made: all weight on the largest."""

    def decide(logits: Tensor) -> Tensor:
        return TAKEN * functional.one_hot(logits.argmax(), len(logits)).to(logits.dtype)

    return {name: decide(value) if name.startswith(CHOICE) else value for name, value in params.items()}


def _mixed(logits: Tensor, candidates: list[Tensor]) -> Tensor:
    """The mean of the candidates, weighted by the softmax of ``logits``."""
    weights = logits.softmax(0)
    return sum(weight * candidate for weight, candidate in zip(weights.unbind(0), candidates, strict=True))


def _check(activations: tuple[str, ...]) -> None:
    if isinstance(activations, str):
        raise UserError(
            f"the activations to choose from are a tuple of names, such as ('relu', 'tanh'), not {activations!r}"
        )
    unknown = [name for name in activations if name not in ACTIVATIONS]
    if unknown or not activations:
        what = f"{unknown[0]!r} is none" if unknown else "none was given"
        raise UserError(f"the activations to choose from are {', '.join(ACTIVATIONS)}: {what}")


class _Mixed:
    """What both have of the network without choices, ``_plain``."""

    activations: tuple[str, ...]

    def __post_init__(self) -> None:
        _check(self.activations)
        _ = self._plain  # whose checks are this network's

    @property
    def head(self) -> str:
        """Prefix of the last linear map's parameters."""
        return self._plain.head

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: the weights, as in the network without choices."""
        return not name.startswith(CHOICE) and self._plain.is_adapted(name)


@dataclass(frozen=True)
class MixedMLP(_Mixed):
    """A fully connected network whose hidden layers choose their activation, or to be left out.

    Parameters are those of :class:`~helpers.models.mlp.MLP` and ``choice1`` ``[activations]``, ``choice2``
    ``[activations + 1]`` and so on: a layer that keeps the number of units may be skipped, which comes last.

    Attributes:
        sizes: numbers of units.
        activations: names out of ``ACTIVATIONS``.
        scale: as in :class:`~helpers.models.mlp.MLP`.

    Raises:
        UserError: for an activation that does not exist, or numbers of which no network can be made.

    Source: Liu, Simonyan and Yang (2019), equation 2, with layers in place of the edges of a cell.
    """

    sizes: tuple[int, ...]
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    scale: float | str | None = None

    @property
    def _plain(self) -> MLP:
        return MLP(self.sizes, scale=self.scale)

    def options(self, layer: int) -> tuple[str, ...]:
        """What hidden layer number ``layer``, from 1, may be."""
        square = self.sizes[layer - 1] == self.sizes[layer]
        return (*self.activations, SKIP) if square else self.activations

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh weights on the generator's device, and no preference."""
        params = self._plain.init(generator, dtype)
        for layer in range(1, len(self.sizes) - 1):
            params[f"{CHOICE}{layer}"] = params["linear1.weight"].new_zeros(len(self.options(layer)))
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map ``x`` ``[n, ...]`` (flattened to ``[n, sizes[0]]``) to ``[n, sizes[-1]]``.

        Raises:
            UserError: if the inputs have another number of features.
        """
        x, last = as_rows(x, self.sizes[0]), len(self.sizes) - 1
        for layer in range(1, last):
            after = x @ params[f"linear{layer}.weight"] + params[f"linear{layer}.bias"]
            candidates = [ACTIVATIONS[name](after) for name in self.activations]
            if SKIP in self.options(layer):
                candidates.append(x)
            x = _mixed(params[f"{CHOICE}{layer}"], candidates)
        return x @ params[f"linear{last}.weight"] + params[f"linear{last}.bias"]


@dataclass(frozen=True)
class MixedConvNet(_Mixed):
    """The Omniglot network with blocks that choose their activation, or to be a mean over 2×2 pixels instead.

    Parameters are those of :class:`~helpers.models.convnet.ConvNet` and ``choice1`` ``[activations]``, ``choice2``
    ``[activations + 1]`` and so on; the first block, which alone changes the number of channels, stays.

    Attributes:
        ways: number of classes.
        filters: of each block.
        blocks: their number.
        activations: names out of ``ACTIVATIONS``.
        channels: of the images.

    Raises:
        UserError: for an activation that does not exist, or numbers of which no network can be made.

    Source: as :class:`MixedMLP`.
    """

    ways: int
    filters: int = 32
    blocks: int = 4
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    channels: int = 1

    @property
    def _plain(self) -> ConvNet:
        return ConvNet(self.ways, filters=self.filters, blocks=self.blocks, channels=self.channels)

    def options(self, layer: int) -> tuple[str, ...]:
        """What block number ``layer``, from 1, may be."""
        return (*self.activations, SKIP) if layer > 1 else self.activations

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh weights on the generator's device, and no preference."""
        params = self._plain.init(generator, dtype)
        for layer in range(1, self.blocks + 1):
            params[f"{CHOICE}{layer}"] = params["head.bias"].new_zeros(len(self.options(layer)))
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map images ``x`` ``[n, channels, height, width]`` to logits ``[n, ways]``.

        Raises:
            UserError: if the images have another number of channels than the model, or too few pixels.
        """
        x = channels_last(x, self.channels, self.blocks)
        for layer in range(1, self.blocks + 1):
            after = normalize(convolve(x, params[f"conv{layer}.weight"]), params[f"norm{layer}.shift"])
            candidates = [ACTIVATIONS[name](after) for name in self.activations]
            if SKIP in self.options(layer):
                candidates.append(functional.avg_pool2d(x.movedim(-1, 1), 2, ceil_mode=True).movedim(1, -1))
            x = _mixed(params[f"{CHOICE}{layer}"], candidates)
        return x.mean((1, 2)) @ params["head.weight"] + params["head.bias"]
