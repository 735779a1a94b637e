"""Folders of images as a reader may bring them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def folder(place: Path, counts: list[int], mode: str = "RGB", kinds: tuple[str, ...] = ("png",)) -> Path:
    """A folder with one class for each count, ``class00`` and so on, of images that are all different in size."""
    draws = np.random.default_rng(0)
    for number, count in enumerate(counts):
        (place / f"class{number:02d}").mkdir(parents=True)
        for i in range(count):
            height, width = 20 + i, 30 + number
            pixels = draws.integers(0, 256, (height, width, 3), np.uint8)
            image = Image.fromarray(pixels).convert(mode)
            image.save(place / f"class{number:02d}" / f"{i}.{kinds[i % len(kinds)]}")
    return place
