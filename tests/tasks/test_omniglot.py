"""Omniglot: contents are verified, each kind of bad input is one sentence, caches are only a convenience.

Most tests use a miniature of the data set (5 characters of 3 alphabets) in a temporary folder; those on the real files
are marked ``records``.
"""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from helpers.tasks import images, omniglot
from helpers.tasks.episodes import FewShot

CHARACTERS = {
    "images_background": ["Alpha/character01", "Alpha/character02", "Beta/character01"],
    "images_evaluation": ["Gamma/character01", "Gamma/character02"],
}


def make_miniature(place: Path) -> None:
    """Write 1-bit PNGs as Omniglot has them: 105×105, ink 0 on paper 1, 20 a character."""
    rng = np.random.default_rng(0)
    for part, characters in CHARACTERS.items():
        for character in characters:
            folder = place / part / character
            folder.mkdir(parents=True)
            for i in range(20):
                pixels = np.full((105, 105), 255, np.uint8)
                top, left = rng.integers(5, 60, 2)
                pixels[top : top + 40, left : left + 3] = 0
                pixels[top + 5 : top + 8, left : left + 30] = 0
                Image.fromarray(pixels).convert("1").save(folder / f"0001_{i + 1:02d}.png")


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A root folder with a miniature Omniglot in data/raw/omniglot-py, which the module takes for the real one."""
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("METABOOK_DATA", raising=False)
    place = tmp_path / "data" / "raw" / "omniglot-py"
    make_miniature(place)
    digests = {}
    for part, characters in CHARACTERS.items():
        for name in characters:
            files = sorted((place / part / name).glob("*.png"))
            pixels = np.stack([np.asarray(Image.open(file).convert("L")) < 128 for file in files]).astype(np.uint8)
            digests[name] = images.sha256(name, pixels)
    listing = tmp_path / "characters.json"
    listing.write_text(json.dumps({name: digest[:12] for name, digest in digests.items()}))
    monkeypatch.setattr(omniglot, "PARTS", {"images_background": (2, 3), "images_evaluation": (1, 2)})
    monkeypatch.setattr(omniglot, "CHARACTERS", listing)
    monkeypatch.setattr(omniglot, "PIXELS_SHA256", images.sha256(*(digests[name] for name in sorted(digests))))
    for name, value in (("TRAIN", 3), ("VALIDATION", 1), ("TEST", 2)):
        monkeypatch.setattr(omniglot, name, value)
    monkeypatch.setattr(omniglot, "import_torchvision", no_network)
    return place


def no_network():
    def download(*_, **__):
        raise OSError("no network")

    return types.SimpleNamespace(datasets=types.SimpleNamespace(Omniglot=download))


def cache_of(place: Path) -> Path:
    return place.parent / omniglot.CACHE


def test_images_are_inverted_and_scaled(miniature):
    classes = omniglot.load("train", rotations=False)
    assert classes.images.shape == (3, 20, 28, 28) and classes.images.dtype == torch.uint8
    name = classes.names[0]
    file = next(file for file in miniature.glob(f"*/{name}/*_01.png"))
    original = 255 - np.asarray(Image.open(file).convert("L")).astype(float)
    scaled = classes.images[0, 0].numpy()
    assert scaled.max() > 150 and np.median(scaled) == 0  # ink is bright, paper is 0
    assert scaled.mean() == pytest.approx(original.mean(), rel=0.1)  # scaling keeps the amount of ink


def test_splits_are_disjoint_and_complete(miniature):
    train, test = omniglot.load("train", rotations=False), omniglot.load("test")
    assert len(train) == 3 and len(test) == 2
    assert sorted(train.names + test.names) == sorted(sum(CHARACTERS.values(), []))
    held_back, rest = omniglot.load("validation"), omniglot.load("train-without-validation", rotations=False)
    assert sorted(held_back.names + rest.names) == sorted(train.names)
    assert train.groups == [name.split("/")[0] for name in train.names]


def test_rotations_are_further_classes(miniature):
    plain, turned = omniglot.load("train", rotations=False), omniglot.load("train")
    assert len(turned) == 4 * len(plain) == len(set(turned.names))
    for k in range(4):
        for c, name in enumerate(plain.names):
            i = turned.names.index(f"{name}/rot{90 * k:03d}")
            assert torch.equal(turned.images[i], torch.rot90(plain.images[c], k, dims=(1, 2)))
            assert turned.groups[i] == plain.groups[c]
    assert omniglot.load("test").names == omniglot.load("test", rotations=False).names
    assert len(omniglot.load("test", rotations=True)) == 8
    assert turned.provenance["rotations"] is True


def test_the_split_is_fixed():
    """The order comes from SHA-256 of the names alone: nothing but a change of seed or names can change it."""
    names = sorted(json.loads(omniglot.CHARACTERS.read_text()))
    order = omniglot.split_order(names)
    assert len(names) == 1623 and sorted(order) == list(range(1623))
    assert [names[i] for i in order[:3]] == ["Atlantean/character13", "Greek/character20", "Mongolian/character25"]
    assert images.sha256("\n".join(names[i] for i in order)) == omniglot.SPLIT_SHA256
    shuffled = names[::-1]
    assert [shuffled[i] for i in omniglot.split_order(shuffled)] == [names[i] for i in order]


def test_unknown_split(miniature):
    message = refused(lambda: omniglot.load("tset"))
    assert "'tset'" in message and "train" in message


@pytest.mark.parametrize("layout", ["omniglot-py", "."])
def test_metabook_data_comes_first(miniature, tmp_path, monkeypatch, layout):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(miniature, elsewhere / layout)
    shutil.rmtree(miniature)
    monkeypatch.setenv("METABOOK_DATA", str(elsewhere))
    assert len(omniglot.load("train")) == 12
    assert (elsewhere / omniglot.CACHE).is_file()
    assert len(omniglot.load("train", folder=elsewhere)) == 12


def test_missing_data_says_where_and_how(miniature, tmp_path, monkeypatch):
    shutil.rmtree(miniature)
    (tmp_path / "nowhere").mkdir()
    monkeypatch.setenv("METABOOK_DATA", str(tmp_path / "nowhere"))
    for message in (refused(lambda: omniglot.load("train")), refused(lambda: omniglot.load("train", download=False))):
        assert "images_background" in message and omniglot.COMMAND in message
        assert str(tmp_path / "nowhere") in message and str(miniature.parent) in message
    assert "no network" in refused(lambda: omniglot.load("train"))
    assert not list((tmp_path / "nowhere").iterdir())
    message = refused(lambda: omniglot.load("train", folder=tmp_path / "named"))
    assert str(tmp_path / "named") in message and str(miniature.parent) not in message


def test_download_is_moved_into_place_whole(miniature, monkeypatch):
    saved = miniature.parent / "saved"
    miniature.rename(saved)

    def download(root, background, download):
        part = "images_background" if background else "images_evaluation"
        shutil.copytree(saved / part, Path(root) / "omniglot-py" / part)

    datasets = types.SimpleNamespace(Omniglot=download)
    monkeypatch.setattr(omniglot, "import_torchvision", lambda: types.SimpleNamespace(datasets=datasets))
    assert len(omniglot.load("train")) == 12
    assert sorted(entry.name for entry in miniature.parent.iterdir()) == [omniglot.CACHE, "omniglot-py", "saved"]


def first_file(place: Path) -> Path:
    return place / "images_background" / "Alpha" / "character02" / "0001_07.png"


def remove_alphabet(place):
    shutil.rmtree(place / "images_background" / "Beta")


def remove_character(place):
    shutil.rmtree(place / "images_evaluation" / "Gamma" / "character02")


def remove_image(place):
    first_file(place).unlink()


def truncate(place):
    content = first_file(place).read_bytes()
    first_file(place).write_bytes(content[: len(content) // 2])


def replace_with_text(place):
    first_file(place).write_text("not a picture")


def wrong_size(place):
    Image.new("1", (28, 28)).save(first_file(place))


def wrong_pixels(place):
    with Image.open(first_file(place)) as image:
        image = image.copy()
    image.putpixel((3, 3), 0)
    image.save(first_file(place))


def renamed_character(place):
    (place / "images_background" / "Alpha" / "character02").rename(
        place / "images_background" / "Alpha" / "character09"
    )


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_alphabet, "images_background holds 1 alphabets, not 2"),
        (remove_character, "images_evaluation holds 1 characters, not 2"),
        (remove_image, "character02 holds 19 images, not 20"),
        (truncate, "0001_07.png is damaged"),
        (replace_with_text, "0001_07.png is damaged"),
        (wrong_size, "0001_07.png is 28×28 pixels"),
        (wrong_pixels, "images_background/Alpha/character02 are not Omniglot's"),
        (renamed_character, "images_background/Alpha/character09 are not Omniglot's"),
    ],
)
def test_damaged_data(miniature, damage, says):
    damage(miniature)
    message = refused(lambda: omniglot.load("train"))
    assert says in message.replace("\\", "/") and omniglot.COMMAND in message
    assert not cache_of(miniature).exists()  # nothing unverified is ever cached


def test_the_cache_is_used(miniature):
    first = omniglot.load("train")
    shutil.rmtree(miniature)
    again = omniglot.load("train")
    assert torch.equal(first.images, again.images) and first.names == again.names


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "flipped", "other version"])
def test_a_damaged_cache_is_rebuilt(miniature, monkeypatch, damage):
    first = omniglot.load("train")
    cache = cache_of(miniature)
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        cache.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        cache.write_bytes(b"PK\x03\x04" + b"x" * 1000)
    elif damage == "empty":
        cache.write_bytes(b"")
    elif damage == "flipped":  # well-formed, but not what was stored
        with np.load(cache) as stored:
            arrays = dict(stored)
        arrays["images"][0, 0, 0, 0] ^= 255
        np.savez(cache, **arrays)
    else:
        monkeypatch.setattr(omniglot, "VERSION", omniglot.VERSION + 1)
    damaged = cache.read_bytes()
    assert torch.equal(omniglot.load("train").images, first.images)
    assert cache.read_bytes() != damaged
    shutil.rmtree(miniature)
    assert torch.equal(omniglot.load("train").images, first.images)


def test_without_a_place_for_the_cache(miniature, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    assert len(omniglot.load("train")) == 12
    assert [entry.name for entry in miniature.parent.iterdir()] == ["omniglot-py"]  # no temporary file is left


def test_read_only_data_folder_falls_back_to_data_raw(miniature, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(miniature, elsewhere)
    shutil.rmtree(miniature)
    monkeypatch.setenv("METABOOK_DATA", str(elsewhere))
    (elsewhere / omniglot.CACHE).mkdir()  # a folder in its place: neither readable nor replaceable as a file
    assert len(omniglot.load("train")) == 12
    assert cache_of(miniature).is_file()


def test_torchvision_imports_beside_this_torch():
    datasets = images.import_torchvision().datasets
    assert hasattr(datasets, "Omniglot")


# The real files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    if omniglot.find() is None:
        pytest.skip(f"Omniglot is not here; get it with `{omniglot.COMMAND}`")
    return {split: omniglot.load(split, download=False) for split in ("train", "validation", "test")}


@pytest.mark.records
def test_real_counts(real):
    assert real["train"].images.shape == (4800, 20, 28, 28)
    assert real["validation"].images.shape == (100, 20, 28, 28)
    assert real["test"].images.shape == (423, 20, 28, 28)
    trained = {name.rsplit("/", 1)[0] for name in real["train"].names}
    assert len(trained) == 1200 and not trained & set(real["test"].names)
    assert set(real["validation"].names) <= trained
    assert len(set(real["train"].groups) | set(real["test"].groups)) == 50
    assert real["train"].provenance["pixels_sha256"] == omniglot.digest()


@pytest.mark.records
def test_no_real_image_is_in_both_parts(real):
    """No drawing of a test character, in any of its four orientations, equals a training drawing."""
    rows = [classes.images.flatten(0, 1).flatten(1).numpy() for classes in (real["train"], real["test"])]
    trained, tested = ({row.tobytes() for row in part} for part in rows)
    assert not trained & tested


@pytest.mark.records
def test_real_episodes(real):
    tasks = FewShot(real["test"].images, 20, 5, 15).sample(4, torch.Generator().manual_seed(0))
    assert tasks.query.x.shape == (4, 300, 1, 28, 28)
    assert 0.02 < float(tasks.query.x.mean()) < 0.3  # strokes are ink, paper is 0


@pytest.mark.records
@pytest.mark.slow
def test_real_pixels():
    """Decodes and verifies all files again, past any cache."""
    place = omniglot.find()
    if place is None:
        pytest.skip(f"Omniglot is not here; get it with `{omniglot.COMMAND}`")
    names, decoded = omniglot.decode(place)
    assert len(names) == 1623 and decoded.shape == (1623, 20, 28, 28)
