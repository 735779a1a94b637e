"""Binary tasks of two handwritten digits: MNIST, or the small digits that come with scikit-learn.

MNIST's four files (``train-images-idx3-ubyte`` and so on) are taken from the folder named by ``METABOOK_DATA`` or from
``data/raw``, where they lie in ``MNIST/raw``, as torchvision leaves them, or directly; else torchvision downloads them
to ``data/raw``. The small digits need no file. Contents are verified, whatever their source.

The digits of a set are not equally frequent. As many images of each are kept as there are of the rarest, the first ones
of each, so that a set is one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers.errors import UserError
from helpers.tasks.batches import minibatches
from helpers.tasks.episodes import check_draw, check_images, episodes_of, pooled
from helpers.tasks.images import Files, ImageClasses, hashed_order, import_torchvision, read_bytes, sha256
from helpers.types import Examples, Tasks
from helpers.validate import one_of, whole

__all__ = ["DIGITS", "DigitPairs", "find", "load", "pairs", "provenance"]

DIGITS = 10
PARTS = {"train": "train", "test": "t10k"}  # split -> how the names of its two files begin
KINDS = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
FILES = Files("MNIST", "MNIST/raw", tuple(f"{part}-{kind}" for part in PARTS.values() for kind in KINDS.values()))
TEST = 50  # test images of each of the small digits
SPLIT_SEED = 1  # of the small digits; MNIST has a split of its own
# Of the pixels and labels of each part, as they lie in the files.
SHA256 = {
    "mnist": {
        "train": "edc0d1098aa497be14ace79ddd5171e5a3dcf9c4d196c015389203eb3ba1f59b",
        "test": "c3f9adf9c66efb572b1f9326c3a511b45910c7173b97be66ceceeeeaef6b802b",
    },
    "digits": {"all": "a19cb3d96bba7deace8ee5a513a6eb7bad0403d528f00bf4d351b6a7a55baa91"},
}
Pair = tuple[int, int]


def load(split: str, name: str = "digits", folder: Path | str | None = None, download: bool = True) -> ImageClasses:
    """Load one part of a set of digits, as many images of each digit as there are of the rarest.

    Args:
        split: ``"train"`` or ``"test"``. MNIST's are the official ones; of the small digits 50 each are for the test,
            chosen by hash.
        name: ``"mnist"``, 28×28 pixels, or ``"digits"``, scikit-learn's, 8×8.
        folder: look for MNIST here only, instead of in ``METABOOK_DATA`` and ``data/raw``, and download nothing.
        download: fetch MNIST when it is in neither folder.

    Returns:
        ``ImageClasses`` with ten classes in the order of the digits: uint8 ``[10, 5421, 28, 28]`` (train) and
        ``[10, 892, 28, 28]`` (test) for MNIST, ``[10, 124, 8, 8]`` and ``[10, 50, 8, 8]`` for the small digits.

    Raises:
        UserError: for an unknown split or name, when MNIST is neither there nor to be had, or when files are damaged
            or not MNIST's.

    Source: LeCun, Bottou, Bengio and Haffner (1998); Alpaydin and Kaynak (1998), of whose 5,620 digits scikit-learn
    has the 1,797 of the test set.
    """
    one_of(split, "split of the digits", PARTS)
    one_of(name, "set of digits", SHA256)
    images, labels = _mnist(split, folder, download and folder is None) if name == "mnist" else _small()
    chosen = [np.flatnonzero(labels == digit) for digit in range(DIGITS)]
    count = min(len(rows) for rows in chosen)
    if name == "digits":
        chosen = [
            rows[hashed_order([f"{digit}/{i}" for i in range(count)], SPLIT_SEED)] for digit, rows in enumerate(chosen)
        ]
        chosen = [rows[:TEST] if split == "test" else rows[TEST:] for rows in chosen]
        count -= TEST if split == "train" else count - TEST
    pixels = torch.from_numpy(np.stack([images[rows[:count]] for rows in chosen]))
    names = [str(digit) for digit in range(DIGITS)]
    return ImageClasses(pixels, names, [name] * DIGITS, provenance(name) | {"split": split})


def provenance(name: str = "digits") -> dict[str, Any]:
    """What a record says about its data: the name, and digests of the pixels and labels.

    Raises:
        UserError: for an unknown name.
    """
    one_of(name, "set of digits", SHA256)
    return {"data": name} | {f"{part}_sha256": digest for part, digest in SHA256[name].items()}


def pairs(seed: int, train: int = 1) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Pairs of digits for meta-training, and held-out pairs that share no digit with them.

    The digits are put in an order that depends on the seed alone. The first 2 · ``train`` become training pairs, two by
    two; of the others the first half is paired with the second half. Seeds 0 to 4 turn the same order by two digits
    each, so that with one training pair each digit is trained on under one of them; seeds 5 to 9 turn another, and so
    on.

    Returns:
        ``train`` and 5 − ``train`` pairs (digit with label 0, digit with label 1).

    Raises:
        UserError: if ``train`` is not between 1 and 4.

    Source: the public code of Bechtle et al. (2020), ``run_binary_mnist_experiment.py``, which has one training pair
    and four held-out ones, of a permutation by NumPy.
    """
    whole(seed, "seed", 0)
    whole(train, "number of pairs to train on", 1, DIGITS // 2 - 1)
    turns, turned = DIGITS // 2, seed * 2 % DIGITS
    order = hashed_order([str(digit) for digit in range(DIGITS)], seed // turns)
    order = order[turned:] + order[:turned]
    seen, rest = order[: 2 * train], order[2 * train :]
    half = len(rest) // 2
    training, held_out = zip(seen[::2], seen[1::2], strict=True), zip(rest[:half], rest[half:], strict=True)
    return tuple(training), tuple(held_out)


@dataclass(frozen=True, eq=False)
class DigitPairs:
    """Tell two digits apart: label 0 is the first of the pair, 1 the second.

    Every task draws its pair, and ``shots + queries`` different images of it; support and query set share none, and in
    each both digits are equally frequent.

    Args:
        images: uint8, ``[10, instances, height, width]``; 255 is ink.
        pairs: the pairs that tasks are drawn from, all equally often.
        shots: examples of the support set, of both digits together.
        queries: examples of the query set, of both digits together.

    Raises:
        UserError: when ``images`` is no such tensor, there is no pair or one of equal or unknown digits, a number is
            not positive and even, or there are too few images of a digit.
    """

    images: Tensor
    pairs: tuple[Pair, ...]
    shots: int
    queries: int

    def __post_init__(self) -> None:
        check_images(self.images)
        digits, instances = self.images.shape[:2]
        if not self.pairs:
            raise UserError("tasks of two digits need at least one pair to draw from")
        for first, second in self.pairs:
            if first == second or not (0 <= first < digits and 0 <= second < digits):
                raise UserError(f"a pair has two different digits below {digits}, not {first} and {second}")
        for name in ("shots", "queries"):
            if whole(getattr(self, name), f"{name} of a pair", 2) % 2:
                raise UserError(f"the {name} of a pair are of both digits together: give an even number")
        if self.shots + self.queries > 2 * instances:
            raise UserError(
                f"{self.shots} shots and {self.queries} queries of two digits need "
                f"{(self.shots + self.queries) // 2} images of each, but there are {instances}: choose fewer"
            )

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` tasks; arguments and errors are those of :meth:`~helpers.tasks.episodes.FewShot.sample`.

        Returns:
            ``Tasks`` with ``x`` float32 ``[T, shots, height * width]`` in [0, 1], ink = 1, and ``y`` int64
            ``[T, shots]``, first all 0, then all 1; of the query set there are ``queries`` in place of ``shots``.
        """
        check_draw(self.images, n_tasks, generator)
        device = self.images.device
        chosen = torch.randint(len(self.pairs), (n_tasks,), generator=generator, device=device)
        pair = torch.tensor(self.pairs, device=device)[chosen]  # [T, 2]
        tasks = episodes_of(pooled(self.images), pair, self.shots // 2, self.queries // 2, generator)
        return Tasks(*(Examples(x.flatten(2), y) for x, y in tasks))


def long_tasks(
    train: Tensor,
    test: Tensor | None,
    pairs: Sequence[Pair],
    shots: int,
    steps: int,
    queries: int,
    generator: torch.Generator,
) -> Tasks:
    """A task for each pair, with a support set in minibatches ``[pairs, steps, shots, ...]``.

    Args:
        train: images by digit, to learn from.
        test: images to be judged on; None for training images that are not in the support set.
        pairs: of digits.
        shots, steps: images of a minibatch, and how many there are; where images run out they come again, in another
            order.
        queries: images to be judged on.
        generator: draws.
    """
    seen, found = min(shots * steps, 2 * train.shape[1] - queries), []
    for pair in pairs:
        task = DigitPairs(train, (pair,), seen, queries).sample(1, generator)
        if test is not None:
            task = Tasks(task.support, DigitPairs(test, (pair,), 2, queries).sample(1, generator).query)
        found.append(Tasks(minibatches(task.support, shots, steps, generator), task.query))
    return tree_map(lambda *parts: torch.cat(parts), *found)


# ---------------------------------------- the two sets
def find(folder: Path | str | None = None) -> Path | None:
    """The folder that holds MNIST's four files, or None; nothing is downloaded or verified."""
    return FILES.find(folder)


def fetch() -> Path:
    """Download MNIST with torchvision to ``data/raw`` and return the folder that holds its files.

    Raises:
        UserError: when the download fails.
    """
    return FILES.fetch(lambda folder: import_torchvision().datasets.MNIST(folder, download=True))


def _mnist(split: str, folder: Path | str | None, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[n, 28, 28]`` and labels ``[n]`` of one part, in the order of the files."""
    place = FILES.find_or_fetch(folder, fetch if download else None)
    files = [f"{PARTS[split]}-{kind}" for kind in KINDS.values()]
    images, labels = (_idx(place / name) for name in files)
    if sha256(images, labels) != SHA256["mnist"][split]:
        raise UserError(
            f"{' and '.join(files)} in {place} are not MNIST's (their digest differs): {FILES.repair(place)}"
        )
    return images, labels


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, 8 for bytes, the number of axes, their sizes, the content.

    Raises:
        UserError: when the file is of another format or not complete.
    """
    content = read_bytes(path)
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    sizes = np.frombuffer(content[4 : 4 + 4 * axes], ">u4").astype(int)
    if not axes or len(content) != 4 + 4 * axes + sizes.prod():
        raise UserError(f"the file {path} is damaged or not MNIST's: {FILES.repair(path.parent)}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def _small() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[1797, 8, 8]`` and labels ``[1797]``; the seventeen grey levels are spread over 0 … 255."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError("the small digits come with scikit-learn: `pip install scikit-learn`") from error
    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8), found.target
