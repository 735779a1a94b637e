"""An update rule that is a recurrent network, the same for every coordinate of the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.models.layers import subtree
from helpers.types import Params
from helpers.validate import positive, whole

RULE = "rule:"  # prefix, in θ, of the parameters of a learned rule


@dataclass(frozen=True)
class RecurrentRule:
    """An LSTM that reads the gradient of one coordinate and writes its update; all coordinates share its weights.

    A gradient may have any order of magnitude, so the network sees two numbers, its logarithm and its sign. Each
    coordinate has a memory of its own. The paper has two such layers, here there is one.

    Parameters, in θ under ``rule:``, are ``input.weight`` ``[2, 4 hidden]``, ``hidden.weight`` ``[hidden, 4 hidden]``
    and ``bias`` ``[4 hidden]``, for the gates input, forget and output and for the new cell, and ``head.weight``
    ``[hidden]``.

    Attributes:
        hidden: units.
        scale: of the update.
        cut: p; gradients below e⁻ᵖ are seen as they are, e^p g, in place of their logarithm.

    Raises:
        UserError: for units that are no whole number of at least 1, or a cut that is not positive.

    Source: Andrychowicz et al. (2016), section 2.1 and appendix A.
    """

    hidden: int = 20
    scale: float = 0.1
    cut: float = 10.0

    def __post_init__(self) -> None:
        whole(self.hidden, "number of units of a learned rule")
        positive(self.cut, "cut of a learned rule")

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters, ready to be part of θ; drawn as PyTorch draws an LSTM's."""
        shapes = {
            "input.weight": (2, 4 * self.hidden), "hidden.weight": (self.hidden, 4 * self.hidden),
            "bias": (4 * self.hidden,), "head.weight": (self.hidden,),
        }  # fmt: skip
        settings = {"generator": generator, "dtype": dtype, "device": generator.device}
        bound = self.hidden**-0.5
        return {RULE + name: bound * (2 * torch.rand(shape, **settings) - 1) for name, shape in shapes.items()}

    def empty(self, like: Tensor) -> Tensor:
        """The memory before the first step, ``[2, like.numel(), hidden]``: state and cell of every coordinate."""
        return like.new_zeros(2, like.numel(), self.hidden)

    def __call__(self, theta: Params, gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The update of one parameter tensor.

        Args:
            theta: holds the rule's parameters; other entries are ignored.
            gradient: of any shape.
            memory: as :meth:`empty` and earlier calls gave it.

        Returns:
            What is to be added, like the gradient, and the memory afterwards.
        """
        p, g = subtree(theta, RULE), gradient.flatten()
        large, size = g.abs() >= math.exp(-self.cut), g.abs().clamp(min=math.exp(-self.cut))
        seen = torch.stack(
            [torch.where(large, size.log() / self.cut, -1.0), torch.where(large, g.sign(), math.exp(self.cut) * g)], -1
        )
        h, c = memory.unbind(0)
        gates = seen @ p["input.weight"] + h @ p["hidden.weight"] + p["bias"]
        input, forget, output, cell = gates.chunk(4, -1)
        c = torch.sigmoid(forget) * c + torch.sigmoid(input) * torch.tanh(cell)
        h = torch.sigmoid(output) * torch.tanh(c)
        return self.scale * (h @ p["head.weight"]).view_as(gradient), torch.stack([h, c])
