"""A network on sets, blind to the order of their members."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.models.layers import subtree
from helpers.models.mlp import MLP
from helpers.types import Params
from helpers.validate import whole

__all__ = ["DeepSets"]


@dataclass(frozen=True)
class DeepSets:
    """A network of a set of particles: a network of each, their mean weighted by pT, a network of that.

    Parameters are those of two :class:`~helpers.models.mlp.MLP`, under ``each.`` and ``all.``. The order of the
    particles does not matter, nor do slots that are empty, nor whether a particle is split in two at the same place: no
    weight, no part in the mean.

    Attributes:
        ways: number of logits.
        hidden: units of the layers.

    Raises:
        UserError: if one of them is not a whole number of at least 1.

    Source: Zaheer et al. (2017), theorem 2; weighted by pT, an energy flow network (Komiske, Metodiev and Thaler 2019,
    arXiv:1810.05165, equation 1.2).
    """

    ways: int = 2
    hidden: int = 32

    def __post_init__(self) -> None:
        whole(self.ways, "ways of a network of sets")
        whole(self.hidden, "hidden units of a network of sets")

    @property
    def head(self) -> str:
        """The last linear map of the set's network."""
        return "all." + self._parts["all."].head

    @property
    def _parts(self) -> dict[str, MLP]:
        each, whole = (2, self.hidden, self.hidden), (self.hidden, self.hidden, self.ways)
        return {"each.": MLP(each, scale=None), "all.": MLP(whole, scale=None)}

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh parameters on the generator's device."""
        drawn = {prefix: part.init(generator, dtype) for prefix, part in self._parts.items()}
        return {prefix + name: value for prefix, params in drawn.items() for name, value in params.items()}

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map ``x`` ``[n, particles, 3]``, share of pT, η and φ, to logits ``[n, ways]``.

        Raises:
            UserError: if ``x`` has another shape.
        """
        if x.dim() != 3 or x.shape[2] != 3:
            raise UserError(f"this network takes particles [n, particles, 3], not {list(x.shape)}")
        each, whole = (partial(part, subtree(params, prefix)) for prefix, part in self._parts.items())
        hidden = torch.relu(each(x[..., 1:].flatten(0, 1))).unflatten(0, x.shape[:2])
        return whole((x[..., :1] * hidden).sum(1))

    def is_adapted(self, name: str) -> bool:
        """Whether the inner loop changes the parameter: it changes all."""
        return True
