"""What a search trains to judge an update rule: small networks on small images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from helpers.fields import among, check_fields
from helpers.models.convnet import ConvNet
from helpers.optimizers.child_training import Population
from helpers.tasks import small_images
from helpers.types import Examples


def child(size: int, channels: int, filters: int = 32) -> ConvNet:
    """The paper's child: two layers of 3×3 convolution with 32 filters, each followed by batch normalisation and ReLU,
    and a linear layer. Convolutions have stride 2."""
    return ConvNet(
        10, filters=filters, blocks=2, channels=channels, head_scale=None, flatten=True, affine=True, size=size
    )


@dataclass(frozen=True)
class Children:
    """What a child is trained on, and for how long.

    Attributes:
        data_set: ``"digits"`` or ``"cifar10"``.
        size: height and width of the images.
        train: training images.
        valid: validation images, whose accuracy is the reward.
        test: test images.
        batch: images of a minibatch.
        epochs: of a child's training, the one of the sweep included.
        hopeless: a child whose best score after one epoch is not above this is trained no further; chance is 0.1.
        chunk: networks in one batched program.
    """

    data_set: str = among("digits", "cifar10", default="digits")
    size: int = 8
    train: int = 1_000
    valid: int = 400
    test: int = 300
    batch: int = 100
    epochs: int = 5
    filters: int = 32
    hopeless: float = 0.15
    chunk: int = 14

    def __post_init__(self) -> None:
        check_fields(self, "the children")

    def population(self, seed: int = 0, fused: bool = False, device: torch.device | str = "cpu") -> Population:
        """The children's common data and first weights, ready to train."""
        train, valid, _ = (Examples(*(t.to(device) for t in e)) for e in self.examples)
        net = child(self.size, train.x.shape[1], self.filters)
        steps = self.epochs * self.train // self.batch
        return Population(net, train, valid, self.batch, seed, chunk=self.chunk, fused=fused, horizon=steps)

    @cached_property
    def examples(self) -> tuple[Examples, ...]:
        """Training, validation and test examples."""
        return small_images.images(self.data_set, self.size, self.train, self.valid, self.test)
