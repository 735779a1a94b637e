"""Networks that tell jets of a signal from QCD jets."""

from __future__ import annotations

from helpers.errors import UserError
from helpers.models.convnet import ConvNet
from helpers.models.deep_sets import DeepSets
from helpers.types import Model

__all__ = ["tagger"]


def tagger(kind: str) -> Model:
    """A network that gives two logits, QCD and signal.

    Args:
        kind: ``"images"``, a small convolutional network without normalisation, so that jets are judged one by one; or
            ``"particles"``, a network of their set.

    Raises:
        UserError: for another kind.
    """
    match kind:
        case "images":
            return ConvNet(2, filters=8, blocks=3, head_scale=None, flatten=True, size=25, gain=2**0.5, norm=False)
        case "particles":
            return DeepSets()
    raise UserError(f"there is no tagger of {kind!r}: use images or particles")
