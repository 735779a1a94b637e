"""Glyphs: letters of the world's scripts drawn from the DejaVu fonts that come with matplotlib, a small Omniglot that
needs no download.

A class is one letter, an instance is that letter in one of 2 to 12 faces under a random affine and elastic distortion.
Training and test classes come from different scripts, as Omniglot's background and evaluation sets come from different
alphabets. Letters of the same shape are one class, whatever their script or case (Latin A, Greek Alpha, Cyrillic A; o,
O), so no test letter has the shape of a training letter.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.progress import progress_bar
from helpers.runtime import root
from helpers.tasks.images import ImageClasses, hashed_order, read_cache, sha256, write_cache
from helpers.validate import one_of, whole

VERSION = 2  # raise it whenever a change below changes an image
INSTANCES = 20
SIZE = 28
CANVAS = 2 * SIZE  # letters are drawn and distorted at twice the size and then averaged, which keeps edges smooth
INK = 34  # longer side of a letter on the canvas, in pixels, before distortion
# Script (the first word of its characters' Unicode names) -> group name. Look-alikes (Latin, Greek, Cyrillic, Coptic,
# Old Italic, Lisu) stay together.
TRAIN_SCRIPTS = {
    "LATIN": "Latin",
    "GREEK": "Greek",
    "CYRILLIC": "Cyrillic",
    "COPTIC": "Coptic",
    "OLD": "Old Italic",
    "LISU": "Lisu",
    "CANADIAN": "Canadian syllabics",
    "ARABIC": "Arabic",
}
TEST_SCRIPTS = {
    "ARMENIAN": "Armenian",
    "GEORGIAN": "Georgian",
    "HEBREW": "Hebrew",
    "LAO": "Lao",
    "NKO": "N'Ko",
    "OGHAM": "Ogham",
    "TIFINAGH": "Tifinagh",
}
REFERENCE_FACE = "DejaVuSans"  # every letter that is used is in it
# From which cosine similarity of blurred 28x28 pictures on two letters have one shape: in the reference face, and
# between a training and a test letter in any face. (s and S, I and l, Ж and ж are above; e and c, b and h are below.)
SAME = 0.96
VALIDATION_SCRIPTS = ("Greek", "Old Italic", "Lisu", "Coptic")  # 90 training classes, held back by three_parts


def load(split: str, limit: int | None = None, seed: int = 0) -> ImageClasses:
    """Draw (or take from the cache in ``data/raw``) one part of the glyphs.

    Args:
        split: ``"train"`` or ``"test"``; their classes come from different scripts.
        limit: only this many classes, chosen at random but always the same ones. Their images do not depend on it.
        seed: of the faces and distortions of all instances. Letters and split do not depend on it.

    Returns:
        ``ImageClasses`` with images uint8 ``[C, 20, 28, 28]``; a name is a letter and its Unicode name (``"Ж CYRILLIC
        CAPITAL LETTER ZHE"``), a group is a script.

    Raises:
        UserError: for an unknown split, a negative seed, or a limit that is not between 1 and the number of classes.
    """
    one_of(split, "split of the glyphs", ("train", "test"))
    whole(seed, "seed", 0)
    key = f"glyphs {VERSION} {seed} {_drawn_with()}"
    cache = root() / "data" / "raw" / f"glyphs-{VERSION}-{seed}.npz"
    stored = read_cache(cache, key)
    if stored is None:
        classes = distinct_letters()
        pictures = None
    else:
        classes, pictures = stored["letters"].tolist(), stored["images"]
    test = [_script(letter) in TEST_SCRIPTS for letter in classes]
    chosen = [i for i, held_out in enumerate(test) if held_out == (split == "test")]
    if limit is not None:
        whole(limit, f"limit on the {split} classes", 1, len(chosen))
        kept = set(hashed_order([classes[i] for i in chosen], 0)[:limit])
        chosen = [i for position, i in enumerate(chosen) if position in kept]
    if pictures is not None:
        images = pictures[chosen]
    elif limit is None:  # draw both splits at once: whoever trains also tests
        pictures = instances(classes, range(len(classes)), seed)
        write_cache(cache, key, {"letters": np.array(classes), "images": pictures})
        images = pictures[chosen]
    else:
        images = instances(classes, chosen, seed)
    scripts = TRAIN_SCRIPTS | TEST_SCRIPTS
    return ImageClasses(
        images=torch.from_numpy(images),
        names=[f"{classes[i]} {unicodedata.name(classes[i])}" for i in chosen],
        groups=[scripts[_script(classes[i])] for i in chosen],
        provenance={
            "data": "glyphs",
            "version": VERSION,
            "seed": seed,
            "split": split,
            "images_sha256": sha256(images),
        },
    )


def three_parts() -> tuple[ImageClasses, ImageClasses, ImageClasses]:
    """Glyphs for training, validation and test, each of scripts of its own."""
    train = load("train")
    held = [i for i, script in enumerate(train.groups) if script in VALIDATION_SCRIPTS]
    kept = [i for i, script in enumerate(train.groups) if script not in VALIDATION_SCRIPTS]
    return train.select(kept), train.select(held), load("test")


def _script(letter: str) -> str:
    return unicodedata.name(letter).split()[0]


def _drawn_with() -> str:
    """Whatever can change a rendering: the fonts and the library that draws them."""
    import matplotlib
    from PIL import features

    return f"matplotlib {matplotlib.__version__} freetype {features.version('freetype2')}"


def faces() -> dict[str, Path]:
    """The twelve DejaVu text faces inside matplotlib: name -> file."""
    import matplotlib

    files = sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf"))
    return {file.stem: file for file in files if not file.stem.endswith("Display")}


def letters() -> dict[str, list[str]]:
    """Every letter of the scripts above that ``REFERENCE_FACE`` and another face have, with the faces that have it; in
    order of code points.

    Letters with a compatibility decomposition (ligatures, presentation forms) or a canonical one (a letter plus an
    accent) are left out: they repeat other letters up to a mark that 28 pixels barely show.
    """
    from matplotlib.ft2font import FT2Font

    covering = defaultdict(list)
    for name, file in faces().items():
        for code in FT2Font(str(file)).get_charmap():
            covering[chr(code)].append(name)
    scripts = TRAIN_SCRIPTS | TEST_SCRIPTS
    return {
        letter: covering[letter]
        for letter in sorted(covering)
        if unicodedata.category(letter) in ("Lu", "Ll", "Lt", "Lo")
        and unicodedata.name(letter).split()[0] in scripts
        and not unicodedata.decomposition(letter)
        and REFERENCE_FACE in covering[letter]
        and len(covering[letter]) >= 2
    }


@lru_cache(maxsize=64)
def _font(file: Path, size: int):
    from PIL import ImageFont

    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


def draw(letter: str, file: Path) -> np.ndarray:
    """One letter in one face: uint8 ``[56, 56]``, ink = 255, centred, its longer side ``INK`` pixels (so a letter has
    no size, only a shape)."""
    from PIL import Image

    def ink(size: int) -> Image.Image:
        mask = _font(file, size).getmask(letter, mode="L")
        image = Image.frombytes("L", mask.size, bytes(mask))
        return image.crop(image.getbbox())

    # Drawn at three times the size and averaged: small letters are fitted to the pixel grid, which bends them.
    image = ink(round(3 * INK * 48 / max(ink(48).size))).reduce(3)
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
    return np.asarray(canvas)


def distinct_letters() -> list[str]:
    """One letter of each shape: training scripts first, each part in order of code points.

    Of letters with the same shape (see ``SAME``) the first is kept, so a letter of a test script that looks like one
    of a training script is dropped.
    """
    covering = letters()
    ordered = sorted(covering, key=lambda letter: (_script(letter) in TEST_SCRIPTS, letter))
    position = {letter: i for i, letter in enumerate(ordered)}
    reference, most = torch.zeros(2, len(ordered), len(ordered))
    for face, file in faces().items():
        have = [letter for letter in ordered if face in covering[letter]]
        pictures = torch.from_numpy(np.stack([draw(letter, file) for letter in have])).unsqueeze(1).float()
        blurred = F.normalize(F.avg_pool2d(F.avg_pool2d(pictures, 2), 3, 1, 1).flatten(1), dim=1)
        similarity = blurred @ blurred.T
        at = torch.tensor([position[letter] for letter in have])
        most[at[:, None], at] = torch.maximum(most[at[:, None], at], similarity)
        if face == REFERENCE_FACE:  # it has every letter, so its order is the final one
            reference = similarity
    held_out = torch.tensor([_script(letter) in TEST_SCRIPTS for letter in ordered])
    same = torch.where(held_out[:, None] != held_out, most, reference) >= SAME
    kept: list[int] = []
    for i in range(len(ordered)):
        if not same[i, kept].any():
            kept.append(i)
    return [ordered[i] for i in kept]


def instances(classes: list[str], chosen: Sequence[int], seed: int) -> np.ndarray:
    """Draw the instances of ``classes[i]`` for i in ``chosen``: uint8 ``[len(chosen), 20, 28, 28]``.

    All random numbers are drawn for all classes first, so a class looks the same whichever others are drawn with it.
    They are float64 uniforms, and so is the arithmetic: rounding to whole grey levels then gives the same images
    whatever vector instructions the machine has.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(classes)
    which_face = torch.rand(n, INSTANCES, generator=generator, dtype=torch.float64)
    affine = torch.rand(n, INSTANCES, 6, generator=generator, dtype=torch.float64) * 2 - 1
    elastic = torch.rand(n, INSTANCES, 2, *ELASTIC_GRID, generator=generator, dtype=torch.float64) * 2 - 1
    covering, files = letters(), faces()
    images = np.empty((len(chosen), INSTANCES, SIZE, SIZE), np.uint8)
    step = 16  # classes at a time, so that a block's grids (16 * 20 * 56 * 56 * 2 float64, 16 MB) stay near the cache
    with progress_bar(total=len(chosen), desc="Glyphs: drawing", unit="letter", leave=False) as bar:
        for start in range(0, len(chosen), step):
            block = list(chosen[start : start + step])
            pictures = []
            for i in block:
                drawn = np.stack([draw(classes[i], files[face]) for face in covering[classes[i]]])
                pictures.append(drawn[(which_face[i] * len(drawn)).long().numpy()])
            flat = torch.from_numpy(np.concatenate(pictures)).double()
            distorted = distort(flat, affine[block].flatten(0, 1), elastic[block].flatten(0, 1))
            # Half-covered pixels are exact halves up to rounding: the small number decides them the same way
            # everywhere.
            levels = (distorted + 1e-6).round().clamp(0, 255).to(torch.uint8)
            images[start : start + step] = levels.unflatten(0, (len(block), INSTANCES)).numpy()
            bar.update(len(block))
    return images


# Largest distortions, either way.
ROTATION = 0.3  # radians
SHEAR = 0.25
LOG_SCALE = 0.2
SHIFT = 0.1  # of half the canvas
ELASTIC = 0.12  # of half the canvas, at the nodes of a coarse grid of displacements
ELASTIC_GRID = (5, 5)


def distort(pictures: Tensor, affine: Tensor, elastic: Tensor) -> Tensor:
    """Distort pictures and halve their size, all in one batch.

    Args:
        pictures: float64 ``[n, 56, 56]``.
        affine: ``[n, 6]`` in [-1, 1]: rotation, shear, log scale across and down, shift across and down, in units of
            the constants above.
        elastic: ``[n, 2, 5, 5]`` in [-1, 1]: displacements on a coarse grid, smoothly interpolated between its nodes.

    Returns:
        ``[n, 28, 28]`` in the units of ``pictures``.
    """
    rotation, shear = affine[:, 0] * ROTATION, affine[:, 1] * SHEAR
    across, down = (affine[:, 2:4] * LOG_SCALE).exp().unbind(1)
    cos, sin = rotation.cos(), rotation.sin()
    side = pictures.shape[-1]
    at = (torch.arange(side, dtype=pictures.dtype) * 2 + 1) / side - 1  # pixel centres in [-1, 1]
    x, y = at.view(1, 1, side), at.view(1, side, 1)
    cos, sin, across, down, shear = (each.view(-1, 1, 1) for each in (cos, sin, across, down, shear))
    # grid_sample asks, for each pixel of the result, where in the picture it comes from.
    straight = torch.stack(
        [(cos * x + (shear * cos - sin) * y) / across, (sin * x + (shear * sin + cos) * y) / down], dim=-1
    )
    bent = F.interpolate(elastic, (side, side), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    where = straight + SHIFT * affine[:, None, None, 4:] + ELASTIC * bent
    return F.avg_pool2d(F.grid_sample(pictures.unsqueeze(1), where, align_corners=False), 2).squeeze(1)
