"""Images of a reader's own: what is read, how it is split, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import folder
from PIL import Image
from refusals import refused

from helpers.tasks import folders
from helpers.tasks.episodes import FewShot

PARTS = ("train", "validation", "test")


def parted(place, **counts):
    """A folder with parts; each class has the name of its part, so that none is in two."""
    for part, each in counts.items():
        folder(place / part, each)
        for one in sorted((place / part).iterdir()):
            one.rename(one.with_name(f"{part}-{one.name}"))
    return place


def test_colours_sizes_and_kinds_of_files(tmp_path):
    place = folder(tmp_path / "mine", [3, 5, 4], kinds=("png", "jpg", "webp", "bmp", "gif"))
    (place / "class00" / "notes.txt").write_text("no image")
    (place / "__MACOSX").mkdir()
    (place / "class01" / ".hidden.png").write_bytes(b"no image")
    own = folders.read(place, size=16)
    assert (own.channels, own.split, own.content) == (3, "drawn", "12 images of 3 classes, 30×20 to 31×24 pixels")
    parts = {part: own.classes(part) for part in PARTS}
    assert sorted(name for one in parts.values() for name in one.names) == ["class00", "class01", "class02"]
    sizes = {name: len(images) for one in parts.values() for name, images in zip(one.names, one.images, strict=True)}
    assert sizes == {"class00": 3, "class01": 5, "class02": 4}
    assert all(image.shape[1:] == (3, 16, 16) and image.dtype == torch.uint8 for image in parts["test"].images)


def test_pixels_are_those_of_the_file(tmp_path):
    """Wide or tall, turned by a telephone, transparent, with sixteen bits: what is seen is what is read."""
    for name in "abc":
        (tmp_path / name).mkdir()
    red = Image.new("RGB", (40, 10), "red")
    red.paste("blue", (20, 0, 40, 10))
    exif = red.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    red.save(tmp_path / "a" / "1.png")
    red.save(tmp_path / "b" / "1.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "c" / "1.png")
    own = folders.read(tmp_path, size=8)
    pixels = {part.names[0]: part.images[0][0] for part in map(own.classes, PARTS)}
    assert pixels["a"][:, 4, 0].tolist() == [255, 0, 0] and pixels["a"][:, 4, 7].tolist() == [0, 0, 255]
    assert pixels["b"][:, 0, 4].tolist() == [255, 0, 0] and pixels["b"][:, 7, 4].tolist() == [0, 0, 255]
    assert (pixels["c"] == 255).all(), "what is transparent is white"


def test_grey_is_inverted_where_it_is_mostly_light(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((9, 9), 200, np.uint8)).save(tmp_path / name / "light.png")
        Image.fromarray(np.full((9, 9), 60_000, np.uint16)).save(tmp_path / name / "sixteen.png")
    own = folders.read(tmp_path)
    assert own.channels == 1 and "in grey and inverted" in own.sentence()
    images = own.classes("train").images[0]
    assert images.shape == (2, 1, 28, 28) and images[:, 0, 0, 0].tolist() == [55, 255 - (60_000 >> 8)]
    assert " and inverted" not in folders.read(tmp_path, channels=3).sentence()


def test_the_split_is_drawn_by_names_and_seed(tmp_path):
    own = folders.read(folder(tmp_path / "mine", [2] * 20))
    parts = {part: own.classes(part, ways=2).names for part in PARTS}
    assert [len(parts[part]) for part in PARTS] == [13, 3, 4]
    assert len({name for names in parts.values() for name in names}) == 20
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    again = folders.read(tmp_path / "copy")
    assert again == own and again.classes("test", ways=2).names == parts["test"]
    assert replace(own, split_seed=1).classes("test", ways=2).names != parts["test"]
    assert [len(own.classes(part, ways=5)) for part in PARTS] == [10, 5, 5], "at least as many as a task has"


def test_folders_split_where_they_are_all_three(tmp_path):
    own = folders.read(parted(tmp_path, train=[2, 2, 2], validation=[2, 2], test=[2, 2]))
    assert own.split == "folders" and "by its folders" in own.sentence(2)
    assert own.classes("test", 2).names == ["test-class00", "test-class01"] and len(own.classes("train", 2)) == 3
    assert "validation has 2 classes, too few for 3-way tasks" in refused(lambda: own.classes("train", 3))


def test_train_may_be_a_class(tmp_path):
    folder(tmp_path, [2, 2, 2])
    (tmp_path / "class00").rename(tmp_path / "train")
    assert folders.read(tmp_path).split == "drawn"


def test_the_digest_is_of_names_and_contents(tmp_path):
    place = folder(tmp_path / "mine", [2, 2, 2])
    before = folders.read(place)
    (place / "class00" / "0.png").rename(place / "class00" / "9.png")
    after = folders.read(place)
    assert after.sha256 != before.sha256
    assert "read the folder again" in refused(lambda: before.classes("train"))


def test_uneven_classes_are_named_where_they_are_too_small(tmp_path):
    own = folders.read(folder(tmp_path, [9] * 6 + [3] * 2))
    found = refused(lambda: [FewShot(own.classes(part, ways=2), 2, 1, 4) for part in PARTS])
    assert "1 shots and 4 queries need 5 images of a class, but class0" in found and "has 3" in found
    assert "or leave the small classes out" in found


def test_a_folder_that_will_not_do(tmp_path):
    def says(name, sentence, **settings):
        assert sentence in refused(lambda: folders.read(tmp_path / name, **settings).sentence(2))

    says("nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    says("empty", "has no folders, it is empty: put the images of each class in a folder of its own")
    folder(tmp_path, [3])
    (tmp_path / "class00").rename(tmp_path / "loose")
    says("loose", "has no folders, its images lie side by side")
    (folder(tmp_path / "hole", [2, 2]) / "bare").mkdir()
    says("hole", "bare has no image (a file in .bmp, ")
    folder(tmp_path / "few", [2] * 5)
    says("few", "has 5 classes, but 2-way tasks need at least 6")
    (folder(tmp_path / "text", [2] * 6) / "class00" / "2.png").write_text("no image")
    says("text", "2.png is damaged, or is none: replace it, or remove it")
    cut = folder(tmp_path / "cut", [2] * 6) / "class01" / "1.png"
    cut.write_bytes(cut.read_bytes()[:-900])
    says("cut", "class01/1.png is damaged")
    (tmp_path / "float").mkdir()
    for name in ("a", "b", "c", "d", "e", "f"):
        (tmp_path / "float" / name).mkdir()
        Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "float" / name / "1.tiff")
    says("float", "1.tiff has floating point numbers for pixels")
    Image.new("L", (9, 9)).save(folder(tmp_path / "mixed", [2] * 6) / "class01" / "grey.png")
    says("mixed", "has grey images such as")
    assert "in grey" in folders.read(tmp_path / "mixed", channels=1).sentence(2)
    parted(tmp_path / "two", train=[2, 2], test=[2, 2])
    says("two", "has classes in train and test but none in validation")
    for part in PARTS:
        folder(tmp_path / "ordinary" / part, [2, 2])
    says("ordinary", "has class00, class01 in train and in validation")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"channels": 2}, "there is no number of channels 2"),
        ({"size": 0}, "size of images must be a whole number of at least 1"),
    ],
)
def test_bad_settings(tmp_path, settings, sentence):
    place = folder(tmp_path, [1, 1, 1])
    assert sentence in refused(lambda: folders.read(place, **settings))
    assert "there is no part of a folder of images 'valid'" in refused(lambda: folders.read(place).classes("valid"))
