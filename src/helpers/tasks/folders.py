"""Images of a reader's own: a folder that holds a folder for each class.

Which classes are for training, validation and test is said by the folders ``train``, ``validation`` and ``test``, each
with the folders of its classes, or, where these are not there, drawn by a seed. Nothing is written anywhere: decoded
images stay in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.progress import progress_bar
from helpers.tasks.images import ImageClasses, hashed_order, read_bytes
from helpers.validate import one_of, whole

PARTS = ("train", "validation", "test")
HELD_OUT = {"test": 0.2, "validation": 0.16}  # shares of the classes where nothing else says so, as in mini-ImageNet
KINDS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # of files, by their ends
GREY = ("1", "L", "LA", "La", "I", "F")  # Pillow's modes without colours, and those that begin with I;16
Files = dict[str, list[Path]]  # by class


@dataclass(frozen=True)
class Folder:
    """A folder of images and how it is used; :func:`read` makes one.

    Attributes:
        sha256: of the names and contents of all its images.
        split: of the classes, ``"folders"`` or ``"drawn"``.
        split_seed: by which they are drawn.
        size: height and width to which the images are scaled.
        channels: 1 for grey, 3 for colour; 0 if the folder has both and nobody has chosen.
        judged: the part of the classes on which an experiment is judged, ``"test"`` or ``"validation"``.
        place: where the folder lies; no part of an experiment's configuration, and empty if that is not known.
        content: what is in it, in words.

    Raises:
        UserError: for a size, a channel or a part that there is not.
    """

    sha256: str
    split: str
    channels: int
    size: int = 28
    split_seed: int = 0
    judged: str = "test"
    place: str = field(default="", compare=False)
    content: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        one_of(self.split, "split of a folder of images", ("folders", "drawn"))
        one_of(self.channels, "number of channels", (0, 1, 3))
        one_of(self.judged, "part to be judged on", ("test", "validation"))
        whole(self.size, "size of images")
        whole(self.split_seed, "split_seed", 0)

    def classes(self, part: str, ways: int = 1) -> ImageClasses:
        """The classes of one part, decoded.

        Args:
            part: ``"train"``, ``"validation"`` or ``"test"``.
            ways: classes of a task; each part has at least so many.

        Returns:
            ``ImageClasses``, a tensor ``[instances, channels, size, size]`` for each class. Images are scaled whatever
            their proportions, what is transparent is white, and grey images that are mostly light are inverted, so that
            ink is 255 as in the book's own data.

        Raises:
            UserError: if there are fewer classes than ``ways``, a file is no image that can be read, or has changed.
        """
        one_of(part, "part of a folder of images", PARTS)
        names = self._split(ways)[part]
        images = self._images()
        prefix = f"{part}/" if self.split == "folders" else ""
        chosen = tuple(images[prefix + name] for name in names)
        return ImageClasses(chosen, names, [part] * len(names), self.provenance())

    def provenance(self) -> dict[str, Any]:
        """What a record says about its data: that they are a reader's own, the folder's name, its digest, the split."""
        used = {name: value for name, value in asdict(self).items() if name not in ("place", "judged")}
        return {"data": "own folder", "folder": Path(self.place).name} | used

    def sentence(self, ways: int = 1) -> str:
        """What was found and what is made of it; all images are decoded for that.

        Raises:
            UserError: as :meth:`classes`.
        """
        parts, (images, inverted) = self._split(ways), _decoded(self.place, self.sha256, self.size, self._colours())
        how = "by its folders" if self.split == "folders" else f"drawn with seed {self.split_seed}"
        kind = {1: "in grey", 3: "in colour"}[self.channels]
        light = " and inverted, since they are mostly light" * inverted
        shares = ", ".join(f"{len(parts[part])} for {part}" for part in PARTS)
        return (
            f"{self.place}: {self.content}, at least {min(map(len, images.values()))} of each, scaled to "
            f"{self.size}×{self.size} {kind}{light}; classes: {shares}, {how}; SHA-256 {self.sha256[:8]}…"
        )

    def _images(self) -> dict[str, Tensor]:
        return _decoded(self.place, self.sha256, self.size, self._colours())[0]

    def _colours(self) -> int:
        if not self.channels:
            grey, colour = (next(_of_kind(self.place, wanted)) for wanted in (1, 3))
            raise UserError(
                f"{self.place} has grey images such as {grey} and coloured ones such as {colour}: make all of them one "
                "kind, by channels=1 or channels=3 (`--set own.channels=1`)"
            )
        return self.channels

    def _split(self, ways: int) -> dict[str, list[str]]:
        """The names of the classes of each part."""
        if not self.place:
            raise UserError(
                f"this run is about images of your own (SHA-256 {self.sha256[:8]}…): name their folder with "
                "--data-folder"
            )
        listing = _listing(Path(self.place))
        if self.split == "folders":
            parts = {part: list(listing[part]) for part in PARTS}
            for part, names in parts.items():
                if len(names) < ways:
                    raise UserError(
                        f"{Path(self.place) / part} has {len(names)} classes, too few for {ways}-way tasks: "
                        "add classes, or choose fewer ways"
                    )
            return parts
        names = list(listing[""])
        held = {part: max(ways, round(share * len(names))) for part, share in HELD_OUT.items()}
        if len(names) - sum(held.values()) < ways:
            raise UserError(
                f"{self.place} has {len(names)} classes, but {ways}-way tasks need at least {3 * ways}, since "
                "training, validation and test have classes of their own: add classes, or choose fewer ways"
            )
        order = [names[i] for i in hashed_order(names, self.split_seed)]
        test, validation = held["test"], held["test"] + held["validation"]
        return {"train": order[validation:], "validation": order[test:validation], "test": order[:test]}


def read(place: Path | str, size: int = 28, channels: int | None = None) -> Folder:
    """Look at a folder of images: what is in it, its digest and its split.

    Args:
        place: the folder. Each of its folders is a class, named after it, and holds images of any size, at any depth;
            or it has the three folders ``train``, ``validation`` and ``test``, and these have the folders of the
            classes.
        size: height and width to which the images are to be scaled.
        channels: 1 makes grey of everything, 3 colours; by default as the images are.

    Raises:
        UserError: if there is no such folder, a class without images, a class in two parts, or a file that is no image.

    >>> import tempfile
    >>> from PIL import Image
    >>> place = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "cow", "dog"):
    ...     (place / name).mkdir()
    ...     Image.new("RGB", (40, 30), "red").save(place / name / "1.png")
    >>> own = read(place)
    >>> own.content, own.channels, own.classes("train").images[0].shape
    ('3 images of 3 classes, 40×30 pixels', 3, torch.Size([1, 3, 28, 28]))
    """
    from PIL import Image

    place = Path(place).expanduser().absolute()
    listing, digest = _listing(place), hashlib.sha256()
    sizes, found = [], set()
    for file in _progress(_files(listing), f"{place.name}: looking"):
        content = read_bytes(file)
        digest.update(_entry(place, file, content))
        try:
            with Image.open(BytesIO(content)) as image:
                sizes.append(image.size)
                found.add(1 if _is_grey(image.mode) else 3)
        except (*_UNREADABLE, Image.DecompressionBombError) as error:
            raise _damaged(file) from error
    low, high = (min(sizes, key=np.prod), max(sizes, key=np.prod))
    pixels = f"{low[0]}×{low[1]}" + (f" to {high[0]}×{high[1]}" if low != high else "") + " pixels"
    count = sum(len(classes) for classes in listing.values())
    content = f"{len(sizes):,} images of {count:,} classes, {pixels}"
    split = "drawn" if "" in listing else "folders"
    channels = channels or (found.pop() if len(found) == 1 else 0)
    return Folder(digest.hexdigest(), split, channels, size, place=str(place), content=content)


# ---------------------------------------- files
def _listing(place: Path) -> dict[str, Files]:
    """The image files of every class in each part; one part without a name where the classes stand side by side."""
    if not place.is_dir():
        raise UserError(f"there is no folder {place}: name one that holds a folder of images for each class")
    folders = _folders(place)
    if not folders:
        loose = "its images lie side by side" if _images_below(place) else "it is empty"
        raise UserError(f"{place} has no folders, {loose}: put the images of each class in a folder of its own")
    parts = {name: _folders(folders[name]) for name in PARTS if name in folders}
    if not any(parts.values()):  # "train" may be a class, too
        return {"": _of_classes(folders)}
    missing = [name for name in PARTS if not parts.get(name)]
    if missing:
        there = [name for name in PARTS if parts.get(name)]
        raise UserError(
            f"{place} has classes in {' and '.join(there)} but none in {' and '.join(missing)}: name its folders "
            f"{', '.join(PARTS)}, or put the folders of all classes side by side"
        )
    listing = {name: _of_classes(parts[name]) for name in PARTS}
    for name, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if both := sorted(listing[name].keys() & listing[other].keys()):
            raise UserError(
                f"{place} has {', '.join(both[:3])} in {name} and in {other}, but a few-shot learner is judged on "
                "classes that it was not trained on: give each class to one of them, or put the folders of all classes "
                "side by side"
            )
    return listing


def _folders(place: Path) -> dict[str, Path]:
    """The folders in a folder; hidden ones and what an archive program leaves are none."""
    hidden = (".", "__")
    return {one.name: one for one in sorted(place.iterdir()) if one.is_dir() and not one.name.startswith(hidden)}


def _of_classes(folders: dict[str, Path]) -> Files:
    found = {name: _images_below(folder) for name, folder in folders.items()}
    for name, files in found.items():
        if not files:
            raise UserError(
                f"the class {folders[name]} has no image (a file in {', '.join(KINDS)}): put some in, or remove it"
            )
    return found


def _images_below(place: Path) -> list[Path]:
    found = (file for file in place.rglob("*") if file.suffix.lower() in KINDS and not file.name.startswith("."))
    return sorted(file for file in found if file.is_file())


def _files(listing: dict[str, Files]) -> list[Path]:
    return [file for classes in listing.values() for files in classes.values() for file in files]


def _entry(place: Path, file: Path, content: bytes) -> bytes:
    """What the digest takes of a file: its name within the folder and its content."""
    return f"{file.relative_to(place).as_posix()}\0".encode() + hashlib.sha256(content).digest()


def _progress(files: list[Path], title: str) -> Iterable[Path]:
    return progress_bar(files, desc=title, unit="image", leave=False, delay=2)


# ---------------------------------------- pixels
_UNREADABLE = (OSError, SyntaxError, ValueError, ArithmeticError)  # Pillow raises SyntaxError for broken PNG chunks


def _damaged(file: Path) -> UserError:
    return UserError(f"the image {file} is damaged, or is none: replace it, or remove it")


def _is_grey(mode: str) -> bool:
    return mode in GREY or mode.startswith("I;16")


def _of_kind(place: str, channels: int) -> Iterator[Path]:
    """The images of a folder that are grey (1) or in colour (3) by themselves."""
    from PIL import Image

    for file in _files(_listing(Path(place))):
        with Image.open(file) as image:
            if _is_grey(image.mode) == (channels == 1):
                yield file


@lru_cache(maxsize=2)
def _decoded(place: str, sha256: str, size: int, channels: int) -> tuple[dict[str, Tensor], bool]:
    """Images ``[instances, channels, size, size]`` by class, named ``part/class`` where there are parts; and whether
    they were inverted."""
    listing, digest = _listing(Path(place)), hashlib.sha256()
    pixels = np.empty((len(_files(listing)), size, size, channels), np.uint8)
    for i, file in enumerate(_progress(_files(listing), f"{Path(place).name}: decoding")):
        content = read_bytes(file)
        digest.update(_entry(Path(place), file, content))
        pixels[i] = _scaled(file, content, size, channels)
    if digest.hexdigest() != sha256:
        raise UserError(f"the images in {place} are not those of SHA-256 {sha256[:8]}…: read the folder again")
    inverted = channels == 1 and pixels.mean() > 127.5
    images = torch.from_numpy(255 - pixels if inverted else pixels).movedim(-1, 1).contiguous()
    names = [f"{part}/{name}".lstrip("/") for part, classes in listing.items() for name in classes]
    counts = [len(files) for classes in listing.values() for files in classes.values()]
    return dict(zip(names, images.split(counts), strict=True)), bool(inverted)


def _scaled(file: Path, content: bytes, size: int, channels: int) -> np.ndarray:
    """One image, uint8 ``[size, size, channels]``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(BytesIO(content)) as image:
            if image.mode == "F":
                raise UserError(f"the image {file} has floating point numbers for pixels: save it with whole numbers")
            image = ImageOps.exif_transpose(image)  # a telephone turns the camera, not the picture
            if image.mode == "I" or image.mode.startswith("I;16"):  # sixteen bits
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            image = image.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)  # photographs are large
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        raise _damaged(file) from error
    return np.asarray(image).reshape(size, size, channels)
