"""Glyphs: letters are drawn whole, train and test share no shape, and the same images come out everywhere."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from refusals import refused

from helpers.tasks import glyphs, images
from helpers.tasks.episodes import FewShot

SAMPLE = [*"ABWgΩЖᐁش", *"Աאⴳფ"]  # 8 training letters, 4 test letters


@pytest.fixture(scope="module")
def both():
    return {split: glyphs.load(split) for split in ("train", "test")}


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty root, and only a dozen letters, so that drawing takes no time."""
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    monkeypatch.setattr(glyphs, "distinct_letters", lambda: list(SAMPLE))
    return tmp_path / "data" / "raw" / f"glyphs-{glyphs.VERSION}-0.npz"


@pytest.mark.slow
def test_counts_and_names(both):
    train, test = both["train"], both["test"]
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (20, 28, 28)
    # Measured 947 and 242; another FreeType may move a pair of letters across the threshold of similarity.
    assert 930 <= len(train) <= 965 and 235 <= len(test) <= 250
    for classes in both.values():
        assert len(classes.names) == len(classes.groups) == len(classes.images) == len(set(classes.names))
        assert classes.provenance["images_sha256"] == images.sha256(classes.images.numpy())
    assert "Ж CYRILLIC CAPITAL LETTER ZHE" in train.names and train.groups[0] == "Latin"


def test_scripts_are_disjoint(both):
    assert set(both["train"].groups) == set(glyphs.TRAIN_SCRIPTS.values())
    assert set(both["test"].groups) == set(glyphs.TEST_SCRIPTS.values())
    assert not set(both["train"].groups) & set(both["test"].groups)


def test_no_test_shape_is_a_training_shape(both):
    """In no face does a test letter look like a training letter: their cosine similarity is below the limit."""
    covering, faces = glyphs.letters(), glyphs.faces()
    for face in ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique"):
        pictures = {}
        for split, classes in both.items():
            have = [name[0] for name in classes.names if face in covering[name[0]]]
            drawn = torch.from_numpy(np.stack([glyphs.draw(letter, faces[face]) for letter in have])).float()
            pictures[split] = torch.nn.functional.normalize(
                torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(drawn, 2), 3, 1, 1).flatten(1), dim=1
            )
        assert float((pictures["train"] @ pictures["test"].T).max()) < glyphs.SAME + 1e-4


def test_letters_of_one_shape_are_one_class(both):
    """Latin A, Greek Alpha and Cyrillic A; small and capital o; I and l: one class each, the first of them."""
    kept = {name[0] for classes in both.values() for name in classes.names}
    for same in ("AΑА", "OoΟοОоՕօס", "IlΙІ", "sSѕЅ", "XxΧХⵝ", "hһհ", "Жж"):
        assert len(kept & set(same)) <= 1, same
    for different in ("AB", "eC", "bh", "pq", "yY", "ЖЯ", "ΔΩ"):
        assert set(different) <= kept, different
    assert "A" in kept and "Α" not in kept


def test_every_letter_is_drawn_whole(both):
    for classes in both.values():
        pictures = classes.images.float() / 255
        ink = pictures.mean(dim=(2, 3))
        assert float(ink.min()) > 0.01 and float(ink.max()) < 0.7  # none blank, none a blob
        edge = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], dim=-1)
        assert float((edge.amax(-1) > 0.5).float().mean()) < 0.01  # hardly ever does a distortion push ink to the edge
        differ = (pictures[:, :1] - pictures[:, 1:]).abs().mean(dim=(2, 3))
        assert float(differ.min()) > 0  # twenty different images
    centred = glyphs.draw("A", glyphs.faces()["DejaVuSans"])
    rows, columns = np.nonzero(centred.max(1))[0], np.nonzero(centred.max(0))[0]
    assert abs(rows[0] + rows[-1] - 55) <= 1 and abs(columns[0] + columns[-1] - 55) <= 1
    assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - glyphs.INK) <= 2


def test_tasks_are_neither_trivial_nor_hopeless(both):
    """Nearest neighbour on pixels, 5-way 1-shot: above chance, below what a learned representation should reach."""
    tasks = FewShot(both["test"].images, 5, 1, 5).sample(200, torch.Generator().manual_seed(0))
    distance = torch.cdist(tasks.query.x.flatten(2), tasks.support.x.flatten(2))
    accuracy = float((distance.argmin(2) == tasks.query.y).float().mean())
    assert 0.4 < accuracy < 0.6  # 0.49 measured; 0.43 on Omniglot


def test_same_seed_same_images(few):
    first = glyphs.load("train")
    few.unlink()
    again = glyphs.load("train")
    assert torch.equal(first.images, again.images)
    other = glyphs.load("train", seed=1)
    assert other.names == first.names and not torch.equal(other.images, first.images)


def test_images_do_not_depend_on_vector_instructions(few):
    """ATEN_CPU_CAPABILITY=default turns vector instructions off; every grey level must stay."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from helpers.tasks import glyphs, images\n"
        f"print(images.sha256(glyphs.instances({SAMPLE!r}, range({len(SAMPLE)}), 0)))"
    )
    digests = set()
    for capability in ("default", None):
        environment = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
        run = subprocess.run(
            [sys.executable, "-c", program, *sys.path], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1


def test_limit_takes_a_part_of_the_same_images(few):
    limited = glyphs.load("train", limit=3)
    assert len(limited) == 3 and not few.exists()  # a part is not worth a cache
    whole = glyphs.load("train")
    for name, pictures in zip(limited.names, limited.images, strict=True):
        assert torch.equal(pictures, whole.images[whole.names.index(name)])
    assert glyphs.load("train", limit=3).names == limited.names  # now from the cache
    assert glyphs.load("train", limit=8).names == whole.names


@pytest.mark.parametrize("limit", [0, -1, 9, 2.5, True])
def test_bad_limit(few, limit):
    assert "limit" in refused(lambda: glyphs.load("train", limit=limit))


def test_unknown_split(few):
    assert "'validation'" in refused(lambda: glyphs.load("validation"))
    assert "seed" in refused(lambda: glyphs.load("train", seed=-1))


def test_the_cache_is_used(few, monkeypatch):
    train, test = glyphs.load("train"), glyphs.load("test")
    assert few.is_file()
    monkeypatch.setattr(glyphs, "instances", None)  # would fail if it were called
    assert torch.equal(glyphs.load("train").images, train.images)
    assert torch.equal(glyphs.load("test").images, test.images) and glyphs.load("test").names == test.names


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "other version"])
def test_a_damaged_cache_is_rebuilt(few, monkeypatch, damage):
    first = glyphs.load("train")
    content = few.read_bytes()
    if damage == "truncated":
        few.write_bytes(content[:-300])
    elif damage == "garbage":
        few.write_bytes(b"nonsense")
    elif damage == "flipped":
        with np.load(few) as stored:
            arrays = dict(stored)
        arrays["images"][1, 1, 14, 14] ^= 255
        np.savez(few, **arrays)
    else:
        monkeypatch.setattr(glyphs, "_drawn_with", lambda: "another font library")
    assert torch.equal(glyphs.load("train").images, first.images)
    if damage != "other version":
        assert few.read_bytes() == content


def test_without_a_place_for_the_cache(tmp_path, few, monkeypatch):
    (tmp_path / "data").write_text("a file where a folder should be")
    assert len(glyphs.load("train")) == 8 and len(glyphs.load("test")) == 4
    assert (tmp_path / "data").is_file()


def test_contact_sheet():
    pictures = torch.full((5, 3, 4, 6), 200, dtype=torch.uint8)
    sheet = images.contact_sheet(pictures, columns=2, gap=1)
    assert sheet.shape == (5 * 5 + 1, 2 * 7 + 1) and sheet.dtype == np.uint8
    assert int((sheet == 200).sum()) == 5 * 2 * 4 * 6 and int((sheet[0] != 0).sum()) == 0
    assert images.contact_sheet(pictures[0], columns=2, gap=0).shape == (8, 12)
