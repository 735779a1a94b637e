"""Omniglot (Lake, Salakhutdinov, Tenenbaum, Science 2015): 1,623 handwritten characters of 50 alphabets, 20 drawings of
each.

Images are scaled to 28×28 and inverted (ink = 255); the split is the usual 1,200 characters for training and 423 for
test, drawn at random across alphabets (Santoro et al., 2016; MAML, section 5.2). The order behind it comes from SHA-256
with a fixed seed, so it is the same on every machine and with every library version.

The files are taken from the folder named by ``METABOOK_DATA`` or from ``data/raw`` (each may hold
``omniglot-py/images_background`` and ``…/images_evaluation``, or these two directly), else downloaded with torchvision
to ``data/raw``. Contents are verified, whatever their source.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.errors import DataAbsent, UserError
from helpers.progress import progress_bar
from helpers.runtime import root
from helpers.tasks import images as shared
from helpers.tasks.images import (
    ImageClasses,
    data_folders,
    downloading,
    hashed_order,
    import_torchvision,
    read_cache,
    sha256,
    write_cache,
)
from helpers.validate import one_of

SPLIT_SEED = 1
LEAK_SEED = 2  # of the split that takes no notice of what was trained on
TRAIN, VALIDATION, TEST = 1200, 100, 423
INSTANCES = 20
PARTS = {"images_background": (30, 964), "images_evaluation": (20, 659)}  # part: alphabets, characters
COMMAND = "metabook data omniglot"
CACHE = "omniglot-28x28.npz"
VERSION = 1  # of the decoding; a cache of another version is rebuilt
# Of all characters' names and pixels in canonical order, and of the names in split order. They go into every record.
PIXELS_SHA256 = "0cedf659956c099e175f5d1e72698f81cf10d771cd573585a3f65f7341b8c424"
SPLIT_SHA256 = "9aa0108ea8acd39928c835ddf6f6b7ce8ef3e2901b7b2a8928554da72502c921"
# Character -> first 12 hexadecimal digits of the SHA-256 of its name and pixels, so that wrong images can be named, not
# only noticed.
CHARACTERS = Path(__file__).with_name("omniglot_characters.json")


def load(
    split: str, rotations: bool | None = None, folder: Path | str | None = None, download: bool = True
) -> ImageClasses:
    """Load one part of Omniglot.

    Args:
        split: ``"train"`` (1,200 characters), ``"test"`` (423), ``"validation"`` (the last 100 of the 1,200, which
            MAML's code holds back) or ``"train-without-validation"`` (the other 1,100).
        rotations: add each character turned by 90, 180 and 270 degrees as further classes. The default turns what is
            trained on and nothing else. (MAML's public code turns test characters too, each class of each task by a
            random multiple of 90 degrees.)
        folder: look here only, instead of in ``METABOOK_DATA`` and ``data/raw``, and download nothing.
        download: fetch the files when they are in neither folder.

    Returns:
        ``ImageClasses`` with images uint8 ``[C, 20, 28, 28]``, names such as ``Greek/character03`` (``/rot090`` … when
        turned) and the alphabet as group.

    Raises:
        UserError: for an unknown split, when the files are neither there nor to be had, or when they are not
            Omniglot's.
    """
    parts = {
        "train": slice(0, TRAIN),
        "train-without-validation": slice(0, TRAIN - VALIDATION),
        "validation": slice(TRAIN - VALIDATION, TRAIN),
        "test": slice(TRAIN, TRAIN + TEST),
    }
    one_of(split, "split of Omniglot", parts)
    names, images = _images(folder, download and folder is None)
    order = split_order(names)
    everything = ImageClasses(
        torch.from_numpy(images), names, [name.split("/")[0] for name in names], provenance() | {"split": split}
    )
    chosen = everything.select(order[parts[split]])
    return shared.rotations(chosen) if (split.startswith("train") if rotations is None else rotations) else chosen


def digest() -> str:
    """SHA-256 of the decoded 105×105 pixels of all images in canonical order; what is loaded is held against it."""
    return PIXELS_SHA256


def provenance() -> dict[str, Any]:
    """What a record says about its data: name, digest of the pixels, seed and digest of the split."""
    return {"data": "omniglot", "pixels_sha256": PIXELS_SHA256, "split_seed": SPLIT_SEED, "split_sha256": SPLIT_SHA256}


def split_order(names: list[str]) -> list[int]:
    """The random order of all characters whose first 1,200 are the training classes, as positions in ``names``."""
    return hashed_order(names, SPLIT_SEED)


def find(folder: Path | str | None = None) -> Path | None:
    """The folder that holds ``images_background`` and ``images_evaluation``, or None; nothing is downloaded or
    verified."""
    for base in [Path(folder)] if folder is not None else data_folders():
        for place in (base / "omniglot-py", base):
            if all((place / part).is_dir() for part in PARTS):
                return place
    return None


def fetch() -> Path:
    """Download Omniglot with torchvision to ``data/raw`` and return the folder that holds it.

    The archives are unpacked beside their destination and moved there whole, so an interrupted download leaves nothing
    that looks complete.

    Raises:
        UserError: when the download fails.
    """
    target = root() / "data" / "raw" / "omniglot-py"
    datasets = import_torchvision().datasets
    with downloading("Omniglot", target, f"run `{COMMAND}` where there is a network") as temporary:
        for background in (True, False):
            datasets.Omniglot(str(temporary), background=background, download=True)
        target.mkdir(exist_ok=True)
        for part in PARTS:
            shutil.rmtree(target / part, ignore_errors=True)
            os.replace(temporary / "omniglot-py" / part, target / part)
    return target


def _images(folder: Path | str | None, download: bool) -> tuple[list[str], np.ndarray]:
    """Names and 28×28 images of all characters in canonical order, from a cache where there is one."""
    bases = [Path(folder)] if folder is not None else data_folders()
    key = f"omniglot {VERSION} {PIXELS_SHA256}"
    for base in bases:
        if (stored := read_cache(base / CACHE, key)) is not None:
            return stored["names"].tolist(), stored["images"]
    place = find(folder)
    if place is None:
        if not download:
            raise DataAbsent(f"{_missing(bases)}: get them with `{COMMAND}`")
        try:
            place = fetch()
        except UserError as error:
            raise DataAbsent(
                f"{_missing(bases)} and could not be downloaded ({error.__cause__ or error}): "
                f"run `{COMMAND}` where there is a network, or set METABOOK_DATA to a folder that has them"
            ) from error
    names, images = decode(place)
    base = place.parent if place.name == "omniglot-py" else place
    # Beside the files where that is possible, else in data/raw.
    any(
        write_cache(folder / CACHE, key, {"names": np.array(names), "images": images})
        for folder in (base, root() / "data" / "raw")
    )
    return names, images


def _missing(bases: list[Path]) -> str:
    return f"Omniglot's folders {' and '.join(PARTS)} are not in {' or '.join(str(base) for base in bases)}"


def _repair(place: Path) -> str:
    return f"delete {' and '.join(PARTS)} in {place} and run `{COMMAND}`"


def decode(place: Path) -> tuple[list[str], np.ndarray]:
    """Read, verify and scale all images below ``place``.

    Canonical order: characters sorted by ``alphabet/character``, images by file name. Lanczos scaling needs grey
    levels; Pillow silently falls back to nearest-neighbour for the 1-bit images as they are stored (which is what
    MAML's published preprocessing does).

    Args:
        place: the folder that holds ``images_background`` and ``images_evaluation``.

    Returns:
        Names ``alphabet/character`` and uint8 images ``[1623, 20, 28, 28]``, ink = 255.

    Raises:
        UserError: when a folder or an image is missing, unreadable, or not Omniglot's.
    """
    from PIL import Image

    files = _listing(place)
    names = sorted(files)
    expected = _character_digests()
    images = np.empty((len(names), INSTANCES, 28, 28), np.uint8)
    pixels = np.empty((INSTANCES, 105, 105), np.uint8)
    digests = []
    for c, name in enumerate(progress_bar(names, desc="Omniglot: decoding", unit="character", leave=False)):
        for i, file in enumerate(files[name]):
            try:
                with Image.open(file) as image:
                    grey = image.convert("L")
            except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for broken PNG chunks
                raise UserError(f"the image {file} is damaged or cannot be read: {_repair(place)}") from error
            if grey.size != (105, 105):
                raise UserError(f"the image {file} is {grey.width}×{grey.height} pixels, not 105×105: {_repair(place)}")
            pixels[i] = np.asarray(grey) < 128
            images[c, i] = 255 - np.asarray(grey.resize((28, 28), Image.Resampling.LANCZOS))
        digests.append(sha256(name, pixels))
        if name not in expected or not digests[-1].startswith(expected[name]):
            raise UserError(
                f"the images in {files[name][0].parent} are not Omniglot's (their pixels differ): {_repair(place)}"
            )
    if sha256(*digests) != PIXELS_SHA256:
        raise UserError(f"the images in {place} are not Omniglot's (their digest differs): {_repair(place)}")
    return names, images


def _character_digests() -> dict[str, str]:
    return json.loads(CHARACTERS.read_text(encoding="utf-8"))


def _listing(place: Path) -> dict[str, list[Path]]:
    """Character name -> its image files in order; counts verified."""
    repair = _repair(place)
    files: dict[str, list[Path]] = {}
    for part, (n_alphabets, n_characters) in PARTS.items():
        if not (place / part).is_dir():
            raise UserError(f"the folder {place / part} is missing: {repair}")
        alphabets = sorted(entry for entry in (place / part).iterdir() if entry.is_dir())
        if len(alphabets) != n_alphabets:
            raise UserError(f"the folder {place / part} holds {len(alphabets)} alphabets, not {n_alphabets}: {repair}")
        characters = [entry for alphabet in alphabets for entry in sorted(alphabet.iterdir()) if entry.is_dir()]
        if len(characters) != n_characters:
            raise UserError(
                f"the folder {place / part} holds {len(characters)} characters, not {n_characters}: {repair}"
            )
        for character in characters:
            drawings = sorted(character.glob("*.png"))
            if len(drawings) != INSTANCES:
                raise UserError(f"the folder {character} holds {len(drawings)} images, not {INSTANCES}: {repair}")
            files[f"{character.parent.name}/{character.name}"] = drawings
    return files


def leaking_split() -> ImageClasses:
    """As many characters as the test has, drawn anew from all 1,623, as iMAML's released test script does.

    That script has a seed of its own, so three in four of these characters have been trained on.
    """
    train, test = load("train", rotations=False), load("test")
    everything = ImageClasses(
        torch.cat([train.images, test.images]), train.names + test.names, train.groups + test.groups, test.provenance
    )
    return everything.select(hashed_order(everything.names, LEAK_SEED)[: len(test)])
