"""CIFAR-10 (Krizhevsky, 2009): 60,000 photographs of 32×32 pixels in colour, of ten classes.

The six files of the binary version (``data_batch_1.bin`` … ``data_batch_5.bin`` and ``test_batch.bin``) are taken from
the folder named by ``METABOOK_DATA`` or from ``data/raw``, where they lie in ``cifar-10-batches-bin``, as the archive
unpacks, or directly; else they are downloaded to ``data/raw``. Sizes, labels and the number of images of each class are
verified, whatever the source. The pixels are not: copies whose images were encoded again are of use too. A digest says
which ones a record is about.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from helpers.errors import UserError
from helpers.runtime import generator
from helpers.tasks.images import Files, import_torchvision, read_bytes, sha256
from helpers.validate import one_of, whole

__all__ = ["CLASSES", "Labelled", "balanced", "digest", "fetch", "find", "load"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PARTS = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}
RECORDS = 10_000  # images of a file
SIZE = 32  # pixels of a side, in the files
CHUNK = 1_000  # images made smaller at a time
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of the archive
FILES = Files("CIFAR-10", "cifar-10-batches-bin", PARTS["train"] + PARTS["test"], URL)


class Labelled(NamedTuple):
    """Images and their classes.

    Attributes:
        images: uint8 ``[n, 3, size, size]``: red, green, blue; 255 is bright.
        labels: int64 ``[n]``, positions in ``CLASSES``.
        provenance: what a record needs to name the data: strings and numbers only.
    """

    images: Tensor
    labels: Tensor
    provenance: dict[str, Any]


def load(split: str, size: int = SIZE, folder: Path | str | None = None, download: bool = True) -> Labelled:
    """Load one part of CIFAR-10, in the order of the files.

    Args:
        split: ``"train"`` (50,000 images) or ``"test"`` (10,000).
        size: pixels of a side: 32, or 16 or 8, then each pixel is the mean over 2×2 or 4×4, rounded.
        folder: look here only, instead of in ``METABOOK_DATA`` and ``data/raw``, and download nothing.
        download: fetch the files when they are in neither folder.

    Returns:
        ``Labelled`` with images uint8 ``[n, 3, size, size]`` and labels int64 ``[n]``, each class equally frequent. The
        order may be that of the classes: draw with ``balanced``, do not take the first ones. The provenance has split,
        size, and as ``sha256`` the digest of the part's files one after another: labels and 32×32 pixels, whatever
        ``size`` is.

    Raises:
        UserError: for an unknown split or size, when the files are neither there nor to be had, or when they are
            damaged or not CIFAR-10's.

    Source: Krizhevsky (2009), Learning multiple layers of features from tiny images, chapter 3.
    """
    one_of(split, "split of CIFAR-10", PARTS)
    one_of(whole(size, "size of CIFAR-10's images"), "size of CIFAR-10's images", (SIZE, SIZE // 2, SIZE // 4))
    place = FILES.find_or_fetch(folder, fetch if download and folder is None else None)
    names, content = PARTS[split], hashlib.sha256()
    images = np.empty((len(names), RECORDS, 3, size, size), np.uint8)
    labels = np.empty((len(names), RECORDS), np.int64)
    for i, name in enumerate(names):  # one file in memory at a time
        records = _records(place / name)
        content.update(records.data)
        labels[i] = records[:, 0]
        _shrink(records[:, 1:].reshape(-1, 3, SIZE, SIZE), images[i])
    each = len(names) * RECORDS // len(CLASSES)
    for name, count in zip(CLASSES, np.bincount(labels.ravel(), minlength=len(CLASSES)).tolist(), strict=True):
        if count != each:
            raise UserError(
                f"{', '.join(names)} in {place} are not CIFAR-10's (of class {name} they have {count:,} images, "
                f"not {each:,}): {FILES.repair(place)}"
            )
    provenance = {"data": "cifar10", "split": split, "size": size, "sha256": content.hexdigest()}
    return Labelled(
        torch.from_numpy(images.reshape(-1, 3, size, size)), torch.from_numpy(labels.reshape(-1)), provenance
    )


def digest(split: str, folder: Path | str | None = None) -> str:
    """The digest that the provenance of ``load(split)`` has, without decoding the images.

    Raises:
        UserError: for an unknown split, or when the files are neither there nor to be had.
    """
    one_of(split, "split of CIFAR-10", PARTS)
    place = FILES.find_or_fetch(folder, fetch if folder is None else None)
    return sha256(*(read_bytes(place / name) for name in PARTS[split]))


def balanced(data: Labelled, per_class: int, seed: int, skip: int = 0) -> Labelled:
    """Draw equally many images of each class, none twice, in random order.

    The images of each class are put in an order that depends on ``seed`` alone. Draws with the same seed whose ranges
    ``skip`` … ``skip + per_class`` do not overlap are therefore disjoint: one for training, one for validation.

    Args:
        data: what ``load`` returned.
        per_class: images of each class.
        seed: of a generator on the CPU, so the draw is the same on every device.
        skip: leave out as many images of each class, the first ones in its order.

    Returns:
        ``Labelled`` with images uint8 ``[10 * per_class, 3, size, size]`` and labels int64 ``[10 * per_class]``. The
        provenance has per_class, seed and skip too.

    Raises:
        UserError: when a number is not a whole one or too small, ``data`` is such a draw itself, which its provenance
            could not tell, or a class has fewer than ``skip + per_class`` images.
    """
    whole(per_class, "number of images of each class, per_class,")
    whole(skip, "number of images to skip", 0)
    if "per_class" in data.provenance:
        raise UserError("these images were drawn from a larger set already: draw from what load returned, with skip")
    draws, chosen, labels = generator(seed), [], data.labels.cpu()
    for label, name in enumerate(CLASSES):
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) < skip + per_class:
            raise UserError(
                f"there are {len(rows):,} images of class {name}, too few to skip {skip:,} and draw {per_class:,}: "
                "choose fewer"
            )
        chosen.append(rows[torch.randperm(len(rows), generator=draws)][skip : skip + per_class])
    rows = torch.cat(chosen)[torch.randperm(per_class * len(CLASSES), generator=draws)].to(data.labels.device)
    provenance = data.provenance | {"per_class": per_class, "seed": seed, "skip": skip}
    return Labelled(data.images[rows], data.labels[rows], provenance)


def find(folder: Path | str | None = None) -> Path | None:
    """The folder that holds CIFAR-10's six files, or None; nothing is downloaded or verified."""
    return FILES.find(folder)


def fetch() -> Path:
    """Download CIFAR-10 with torchvision to ``data/raw`` and return the folder that holds its files.

    Raises:
        UserError: when the download fails.
    """

    def download(folder: str) -> None:
        import_torchvision().datasets.utils.download_and_extract_archive(URL, folder, md5=MD5)

    return FILES.fetch(download)


def _records(path: Path) -> np.ndarray:
    """One file as uint8 ``[RECORDS, 1 + 3072]``: the label, then the red, the green and the blue pixels, row by row.

    Raises:
        UserError: when the file is of another size or has other labels than 0 … 9.
    """
    content, length = read_bytes(path), 1 + 3 * SIZE * SIZE
    if len(content) != RECORDS * length:
        raise UserError(
            f"the file {path} is damaged or not CIFAR-10's (it has {len(content):,} bytes, not {RECORDS * length:,}): "
            f"{FILES.repair(path.parent)}"
        )
    records = np.frombuffer(content, np.uint8).reshape(RECORDS, length)
    if (worst := int(records[:, 0].max())) >= len(CLASSES):
        raise UserError(
            f"the file {path} is damaged or not CIFAR-10's (it has the label {worst}, which is above 9): "
            f"{FILES.repair(path.parent)}"
        )
    return records


def _shrink(pixels: np.ndarray, out: np.ndarray) -> None:
    """Write ``pixels``, uint8 ``[n, 3, 32, 32]``, to ``out``, uint8 ``[n, 3, size, size]``, as means over squares."""
    factor = SIZE // out.shape[-1]
    if factor == 1:
        out[:] = pixels
        return
    for start in range(0, len(pixels), CHUNK):
        chunk = torch.from_numpy(pixels[start : start + CHUNK].astype(np.float32))
        out[start : start + CHUNK] = functional.avg_pool2d(chunk, factor).round_().numpy()  # halves to even
