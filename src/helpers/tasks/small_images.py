"""Small images for networks that are trained by the hundred: CIFAR-10, or scikit-learn's digits, in three parts."""

from __future__ import annotations

from typing import Any

import torch

from helpers import runtime
from helpers.errors import UserError
from helpers.tasks import cifar10, digits
from helpers.types import Examples

SPLIT = 7  # seed of the choice of images, the same for every experiment: validation images are never trained on


def images(data: str, size: int, train: int, valid: int, test: int, split: int = SPLIT) -> tuple[Examples, ...]:
    """Training, validation and test examples of a data set, standardised by the training images.

    Args:
        data: ``"cifar10"``, or ``"digits"``, scikit-learn's 8×8 ones.
        size: height and width of the images.
        train, valid, test: how many of each; multiples of ten for CIFAR-10, whose test images are the official ones.

    Returns:
        Three ``Examples``: x float32 ``[n, channels, size, size]``, y int64 ``[n]``.
    """
    if data == "cifar10":
        known, unseen = cifar10.load("train", size), cifar10.load("test", size)
        parts = [cifar10.balanced(known, train // 10, split), cifar10.balanced(known, valid // 10, split, train // 10)]
        parts.append(cifar10.balanced(unseen, test // 10, split))
        pairs = [(p.images.float() / 255, p.labels) for p in parts]
    elif data == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        if train + valid + test > len(found.target):
            wanted = train + valid + test
            raise UserError(f"there are {len(found.target)} small digits, fewer than {wanted}: ask for fewer")
        order = torch.randperm(len(found.target), generator=runtime.generator(split))
        x = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
        y = torch.tensor(found.target, dtype=torch.long)[order]
        cuts = (0, train, train + valid, train + valid + test)
        pairs = [(x[a:b], y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    else:
        raise UserError(f"there is no data set {data!r} for children: use digits or cifar10")
    pixels = pairs[0][0]
    mean, deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return tuple(Examples((x - mean) / deviation, y) for x, y in pairs)


def provenance(data: str) -> dict[str, Any]:
    """Names and digests of the images."""
    if data == "digits":
        return digits.provenance("digits")
    return {"data": "cifar10"} | {f"{split}_sha256": cifar10.digest(split) for split in ("train", "test")}
