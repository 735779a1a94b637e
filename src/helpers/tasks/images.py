"""What the image data sets share: where data lie and how they are downloaded, how a decoded set is cached, rotations,
splits and contact sheets."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from helpers.errors import DataAbsent, UserError, nearest
from helpers.runtime import root
from helpers.validate import whole


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """Images sorted by class.

    Attributes:
        images: uint8 ``[classes, instances, height, width]``, with channels before the height for colour; where classes
            differ in size, a tuple of such tensors without the first axis, one a class. 255 is ink, 0 is paper.
        names: one name a class, for example ``Greek/character03/rot090``.
        groups: one name a class of what it belongs to (an alphabet or a script).
        provenance: what a record needs to name the data: strings and numbers only.

    >>> images = torch.zeros(3, 2, 8, 8, dtype=torch.uint8)
    >>> classes = ImageClasses(images, ["alpha", "beta", "gamma"], ["Greek"] * 3, {"data": "zeros"})
    >>> classes.select(["gamma", 0]).names
    ['gamma', 'alpha']
    """

    images: Tensor | tuple[Tensor, ...]
    names: list[str]
    groups: list[str]
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> ImageClasses:
        """The same classes with their images on ``device``."""
        return replace(self, images=tree_map(lambda t: t.to(device), self.images))

    def select(self, classes: Sequence[int | str]) -> ImageClasses:
        """Only these classes, in this order.

        Args:
            classes: their names, or their numbers from 0.

        Raises:
            UserError: for a class that there is not.
        """
        chosen = [self._number(one) for one in classes]
        names, groups = [self.names[i] for i in chosen], [self.groups[i] for i in chosen]
        if isinstance(self.images, Tensor):
            images = self.images[torch.tensor(chosen, dtype=torch.long, device=self.images.device)]
        else:
            images = tuple(self.images[i] for i in chosen)
        return ImageClasses(images, names, groups, self.provenance)

    def _number(self, wanted: int | str) -> int:
        if isinstance(wanted, str):
            if wanted not in self.names:
                raise UserError(f"there is no class {wanted!r}{nearest(wanted, self.names)}: `names` lists all of them")
            return self.names.index(wanted)
        if not 0 <= wanted < len(self):
            raise UserError(f"there is no class {wanted}: the {len(self)} classes are numbered from 0")
        return int(wanted)


def data_folders() -> list[Path]:
    """Where data sets are looked for, in order: the folder named by ``METABOOK_DATA``, then ``data/raw`` of the
    checkout.

    Raises:
        UserError: if ``METABOOK_DATA`` names no folder.
    """
    found = [root() / "data" / "raw"]
    if named := os.environ.get("METABOOK_DATA"):
        place = Path(named).expanduser().resolve()
        if not place.is_dir():
            raise UserError(f"METABOOK_DATA names {place}, which is no folder: correct it, or unset it")
        found.insert(0, place)
    return found


@contextmanager
def downloading(title: str, target: Path, remedy: str) -> Iterator[Path]:
    """A temporary folder beside ``target`` to download to; move from there what is complete.

    Args:
        title: the data set's name in messages.
        target: where the files are to lie in the end.
        remedy: what to do where it fails.

    Raises:
        UserError: when the download fails. Nothing is then left that looks complete.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision sets none, and a silent network would block for ever
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as temporary:
            yield Path(temporary)
    # urllib's errors are OSErrors; torchvision raises RuntimeError for a wrong checksum.
    except (OSError, RuntimeError, EOFError, HTTPException, zipfile.BadZipFile) as error:
        raise UserError(f"{title} could not be downloaded to {target} ({error}): {remedy}") from error
    finally:
        socket.setdefaulttimeout(timeout)


@dataclass(frozen=True)
class Files:
    """The files that a data set consists of: where they lie, how they get there, and what to tell the reader.

    Args:
        title: the data set's name in messages.
        subfolder: where the files lie below a data folder; directly in it will do as well.
        names: of all files.
        source: the address of an archive that holds them, for messages.
    """

    title: str
    subfolder: str
    names: tuple[str, ...]
    source: str = ""

    def find(self, folder: Path | str | None = None) -> Path | None:
        """The folder that holds all the files, or None; nothing is downloaded or verified.

        Args:
            folder: look here only, instead of in ``METABOOK_DATA`` and ``data/raw``.
        """
        return next((place for place in self._places(folder) if not self._missing(place)), None)

    def fetch(self, download: Callable[[str], object]) -> Path:
        """Download the files to ``data/raw`` and return the folder that holds them.

        Args:
            download: given an empty folder, lays the files in ``subfolder`` of it.

        Raises:
            UserError: when the download fails.
        """
        target = self._home()
        with downloading(self.title, target, self._where()) as temporary:
            download(str(temporary))
            target.mkdir(exist_ok=True)
            for name in self.names:  # moved whole: an interrupted download leaves nothing that looks complete
                os.replace(temporary / self.subfolder / name, target / name)
        return target

    def find_or_fetch(self, folder: Path | str | None, fetch: Callable[[], Path] | None) -> Path:
        """The folder that holds all the files, which ``fetch`` gets when they are nowhere.

        Args:
            folder: look here only, instead of in ``METABOOK_DATA`` and ``data/raw``.
            fetch: downloads the files and returns their folder; None downloads nothing.

        Raises:
            DataAbsent: when the files are neither there nor to be had.
        """
        place = self.find(folder)
        if place is not None:
            return place
        names = min((self._missing(place) for place in self._places(folder)), key=len)  # where most of them are
        files, are = ("files", "are") if len(names) > 1 else ("file", "is")
        looked = " or ".join(str(base) for base in _bases(folder))
        missing = f"{self.title}'s {files} {', '.join(names)} {are} not in {looked}"
        if fetch is None:
            raise DataAbsent(f"{missing}: {self._where()}")
        try:
            return fetch()
        except UserError as error:
            reason = error.__cause__ or error
            raise DataAbsent(f"{missing} and could not be downloaded ({reason}): {self._where()}") from error

    def repair(self, place: Path) -> str:
        """What to do about wrong files in ``place``, the end of a sentence."""
        return f"delete {self.title}'s files in {place} and lay good ones there, or let them be downloaded again"

    def _places(self, folder: Path | str | None) -> list[Path]:
        return [place for base in _bases(folder) for place in (base / self.subfolder, base)]

    def _missing(self, place: Path) -> list[str]:
        return [name for name in self.names if not (place / name).is_file()]

    def _home(self) -> Path:
        return root() / "data" / "raw" / self.subfolder

    def _where(self) -> str:
        source = f" from {self.source}" * bool(self.source)
        return f"lay its files{source} in {self._home()}, or set METABOOK_DATA to a folder with {self.subfolder}"


def _bases(folder: Path | str | None) -> list[Path]:
    return [Path(folder)] if folder is not None else data_folders()


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: when it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the file {path} cannot be read ({error.strerror}): allow reading it") from error


def rotations(classes: ImageClasses) -> ImageClasses:
    """Four classes of each class: the images turned counter-clockwise by 0, 90, 180 and 270 degrees (Santoro et al.,
    2016; MAML).

    All unturned classes come first, then all turned by 90 degrees, and so on; names get the suffix ``/rot000`` …
    ``/rot270``.
    """
    each = [tree_map(lambda t, k=k: torch.rot90(t, k, dims=(-2, -1)), classes.images) for k in range(4)]
    turned = torch.cat(each) if isinstance(classes.images, Tensor) else sum(each, ())
    names = [f"{name}/rot{90 * k:03d}" for k in range(4) for name in classes.names]
    return ImageClasses(turned, names, classes.groups * 4, classes.provenance | {"rotations": True})


def hashed_order(names: Sequence[str], seed: int) -> list[int]:
    """A random order of ``names`` that no version of any random number generator can change.

    Sorted by the SHA-256 of ``"{seed}:{name}"``, so it depends on the seed and on each name, not on the order they come
    in.
    """
    return sorted(range(len(names)), key=lambda i: hashlib.sha256(f"{seed}:{names[i]}".encode()).digest())


def sha256(*parts: np.ndarray | bytes | str) -> str:
    """SHA-256 over byte strings, texts (as UTF-8) and arrays (C order), in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            part.encode()
            if isinstance(part, str)
            else part
            if isinstance(part, bytes)
            else np.ascontiguousarray(part).data
        )
    return digest.hexdigest()


def read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None when there is none, it belongs to another key, or it is damaged.

    The file carries its key and a digest of its arrays; anything that does not fit counts as "no cache", and the caller
    rebuilds.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    stamp = arrays.pop("stamp", None)
    return arrays if stamp is not None and str(stamp) == _stamp(key, arrays) else None


def write_cache(path: Path, key: str, arrays: dict[str, np.ndarray]) -> bool:
    """Write a cache file in one step, so that an interrupted or a parallel run never leaves half a file; False where
    that is not possible.

    A cache only saves time, so a folder that cannot be written (read-only, disk full) is not an error.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, stamp=np.array(_stamp(key, arrays)), **arrays)
        os.chmod(temporary, 0o644)  # temporary files are private; a data folder may be shared
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        return False
    except BaseException:  # Ctrl-C: leave nothing behind
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise
    return True


def _stamp(key: str, arrays: dict[str, np.ndarray]) -> str:
    described = [f"{name}:{array.dtype}:{array.shape}" for name, array in sorted(arrays.items())]
    return f"{key} {sha256(*described, *(array for _, array in sorted(arrays.items())))}"


def import_torchvision():
    """Import torchvision, also beside a CPU-only torch.

    PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not load, and then
    ``import torchvision`` fails with ``operator torchvision::nms does not exist``, because its Python part registers
    shape functions for operators that were never declared. Declaring the two schemas is enough for data sets and
    transforms (not for ``torchvision.io``).

    Raises:
        UserError: when torchvision is not installed or does not load even so.
    """
    global _declared
    import importlib
    import sys

    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise UserError("this needs torchvision, which is not installed: `pip install torchvision`") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]  # what the failed import left behind
    if _declared is None:
        _declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


_declared: torch.library.Library | None = None  # keeps the declarations alive: they go when the library object goes


def contact_sheet(images: Tensor | np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Lay images out as one picture, row by row.

    Args:
        images: ``[n, height, width]``, or ``[classes, instances, height, width]`` for one row a class (then the first
            ``columns`` instances).
        columns: images in a row.
        gap: paper between images, in pixels.

    Returns:
        ``[rows * (height + gap) + gap, columns * (width + gap) + gap]`` of the images' type; paper is 0.

    Raises:
        UserError: for images with other axes, no column, or a gap below 0.
    """
    whole(columns, "number of columns")
    whole(gap, "gap between images", 0)
    array = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim not in (3, 4):
        raise UserError(f"images to lay out are [n, height, width] or have two leading axes, not {list(array.shape)}")
    if array.ndim == 4:
        columns = min(columns, array.shape[1])
        array = array[:, :columns].reshape(-1, *array.shape[2:])
    rows = -(-len(array) // columns)
    height, width = array.shape[1:]
    sheet = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap), array.dtype)
    for i, image in enumerate(array):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet
