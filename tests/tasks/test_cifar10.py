"""CIFAR-10: files are verified, pixels and labels are where they belong, and draws are balanced and disjoint."""

from __future__ import annotations

import ast
import hashlib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused

from helpers.tasks import cifar10

RECORDS = 20  # images of each miniature file


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A root folder with a miniature CIFAR-10 in data/raw/cifar-10-batches-bin, whose files have 20 random images."""
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("METABOOK_DATA", raising=False)
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)
    monkeypatch.setattr(cifar10, "CHUNK", 7)  # which does not divide 20
    monkeypatch.setattr(cifar10, "import_torchvision", lambda: torchvision(no_network))
    place = tmp_path / "data" / "raw" / "cifar-10-batches-bin"
    place.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for names in cifar10.PARTS.values():
        labels = draws.permutation(np.arange(RECORDS * len(names)) % 10)  # equally many in a part, not in a file
        records = draws.integers(256, size=(len(labels), 3073), dtype=np.uint8)
        records[:, 0] = labels
        for name, part in zip(names, np.split(records, len(names)), strict=True):
            (place / name).write_bytes(part.tobytes())
    return place


def torchvision(download):
    utils = types.SimpleNamespace(download_and_extract_archive=download)
    return types.SimpleNamespace(datasets=types.SimpleNamespace(utils=utils))


def no_network(*_, **__):
    raise OSError("no network")


def contents(place: Path, split: str) -> bytes:
    return b"".join((place / name).read_bytes() for name in cifar10.PARTS[split])


@pytest.mark.parametrize(("split", "count"), [("train", 100), ("test", 20)])
def test_labels_and_pixels_are_where_the_files_have_them(miniature, split, count):
    data, content = cifar10.load(split), contents(miniature, split)
    assert data.images.shape == (count, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.labels.shape == (count,) and data.labels.dtype == torch.int64
    for image in (0, 13, count - 1):
        start = image * 3073
        assert data.labels[image] == content[start]
        for plane, row, column in ((0, 0, 0), (0, 0, 31), (1, 5, 2), (2, 31, 31)):
            assert data.images[image, plane, row, column] == content[start + 1 + 1024 * plane + 32 * row + column]
    assert data.provenance == {
        "data": "cifar10", "split": split, "size": 32, "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_digest_needs_no_decoding(miniature, split, monkeypatch):
    expected = cifar10.load(split).provenance["sha256"]
    monkeypatch.setattr(cifar10, "_records", None)
    assert cifar10.digest(split) == expected
    assert "no split" in refused(lambda: cifar10.digest("tset"))


@pytest.mark.parametrize("size", [16, 8])
def test_smaller_images_are_rounded_means_over_squares(miniature, size):
    whole, small = cifar10.load("train"), cifar10.load("train", size)
    factor = 32 // size
    assert small.images.shape == (100, 3, size, size) and small.images.dtype == torch.uint8
    assert torch.equal(small.labels, whole.labels)
    assert small.provenance == whole.provenance | {"size": size}
    squares = whole.images.double().reshape(100, 3, size, factor, size, factor)
    assert torch.equal(small.images, squares.mean((3, 5)).round().to(torch.uint8))
    corner = whole.images[5, 1, :factor, factor : 2 * factor].double().mean()
    assert abs(small.images[5, 1, 0, 1] - corner) <= 0.5


def test_files_are_found_where_metabook_data_says(miniature, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    miniature.rename(elsewhere)
    assert cifar10.find() is None and "no network" in refused(lambda: cifar10.load("train"))
    assert len(cifar10.load("train", folder=elsewhere).labels) == 100
    monkeypatch.setenv("METABOOK_DATA", str(elsewhere))
    assert cifar10.find() == elsewhere and len(cifar10.load("test").labels) == 20
    (tmp_path / "other").mkdir()
    elsewhere.rename(tmp_path / "other" / "cifar-10-batches-bin")
    monkeypatch.setenv("METABOOK_DATA", str(tmp_path / "other"))
    assert len(cifar10.load("test").labels) == 20


def test_missing_data_says_which_where_and_how(miniature, tmp_path, monkeypatch):
    (miniature / "data_batch_3.bin").unlink()
    (tmp_path / "nowhere").mkdir()
    monkeypatch.setenv("METABOOK_DATA", str(tmp_path / "nowhere"))
    for message in (refused(lambda: cifar10.load("train")), refused(lambda: cifar10.load("train", download=False))):
        assert "file data_batch_3.bin is not" in message and "data_batch_1" not in message
        assert "METABOOK_DATA" in message and cifar10.URL in message
        assert str(tmp_path / "nowhere") in message and str(miniature) in message
    assert not list((tmp_path / "nowhere").iterdir())
    message = refused(lambda: cifar10.load("train", folder=tmp_path / "nowhere"))
    assert "data_batch_1.bin, data_batch_2.bin" in message and "no network" not in message


def test_a_download_is_laid_where_it_is_found(miniature, monkeypatch):
    kept = {file.name: file.read_bytes() for file in miniature.iterdir()}
    for file in miniature.iterdir():
        file.unlink()
    calls = []

    def download(url, folder, md5):
        calls.append((url, md5))
        (Path(folder) / "cifar-10-batches-bin").mkdir()
        for name, content in kept.items():
            (Path(folder) / "cifar-10-batches-bin" / name).write_bytes(content)

    monkeypatch.setattr(cifar10, "import_torchvision", lambda: torchvision(download))
    assert len(cifar10.load("test").labels) == len(cifar10.load("test").labels) == 20
    assert calls == [(cifar10.URL, cifar10.MD5)]
    assert {file.name for file in miniature.iterdir()} == set(kept)
    assert [entry.name for entry in miniature.parent.iterdir()] == ["cifar-10-batches-bin"]  # the archive is gone


def test_an_interrupted_download_leaves_nothing(miniature, monkeypatch):
    for file in miniature.iterdir():
        file.unlink()
    miniature.rmdir()

    def download(url, folder, md5):
        (Path(folder) / "archive.tar.gz").write_bytes(b"half")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(cifar10, "import_torchvision", lambda: torchvision(download))
    assert "corrupted" in refused(lambda: cifar10.load("train"))
    assert not list(miniature.parent.iterdir())


@pytest.mark.parametrize("damage", ["short", "long", "empty", "label"])
def test_damaged_files_are_named(miniature, damage):
    file = miniature / "data_batch_4.bin"
    content = bytearray(file.read_bytes())
    if damage == "label":
        content[3073] = 10
    file.write_bytes({"short": content[:-1], "long": content + b"0", "empty": b""}.get(damage, content))
    message = refused(lambda: cifar10.load("train"))
    assert str(file) in message and "delete" in message
    assert ("label 10" if damage == "label" else "61,460") in message
    assert len(cifar10.load("test").labels) == 20


def test_classes_that_are_not_equally_frequent_are_named(miniature):
    file = miniature / "test_batch.bin"
    content = bytearray(file.read_bytes())
    content[0] = (content[0] + 1) % 10
    file.write_bytes(content)
    message = refused(lambda: cifar10.load("test"))
    assert "test_batch.bin" in message and str(miniature) in message and "not 2" in message
    assert any(f"class {name} " in message for name in cifar10.CLASSES)


def test_unknown_splits_and_sizes_are_refused():
    assert "'tset'" in refused(lambda: cifar10.load("tset"))
    for size in (28, 32.0, "32", True):
        assert repr(size) in refused(lambda size=size: cifar10.load("train", size))


def numbered(each=30):
    """Images grouped by class, each filled with its own number."""
    images = torch.arange(10 * each)[:, None, None, None].expand(-1, 3, 2, 2)
    labels = torch.arange(10).repeat_interleave(each)
    return cifar10.Labelled(images, labels, {"data": "cifar10", "split": "test"})


def drawn(data):
    return data.images[:, 0, 0, 0].tolist()


def test_a_draw_is_balanced_shuffled_and_the_same_again():
    data = numbered()
    draw = cifar10.balanced(data, 7, seed=3)
    assert draw.images.shape == (70, 3, 2, 2) and draw.labels.bincount().tolist() == [7] * 10
    assert len(set(drawn(draw))) == 70
    assert torch.equal(draw.labels, data.labels[drawn(draw)])  # images keep their labels
    assert draw.labels.tolist() != draw.labels.sort().values.tolist()
    assert draw.provenance == data.provenance | {"per_class": 7, "seed": 3, "skip": 0}
    assert drawn(cifar10.balanced(data, 7, seed=3)) == drawn(draw) != drawn(cifar10.balanced(data, 7, seed=4))
    assert "per_class" not in data.provenance


def test_draws_of_one_seed_that_skip_each_other_are_disjoint_and_exhaust_the_set():
    data = numbered()
    first, second = cifar10.balanced(data, 20, seed=0), cifar10.balanced(data, 10, seed=0, skip=20)
    assert sorted(drawn(first) + drawn(second)) == list(range(300))
    assert set(drawn(cifar10.balanced(data, 5, seed=0))) < set(drawn(first))
    assert second.provenance["skip"] == 20


def test_impossible_draws_are_refused():
    data = numbered()
    assert "30 images of class airplane" in refused(lambda: cifar10.balanced(data, 11, seed=0, skip=20))
    for per_class in (0, -1, 1.0, True):
        assert "per_class" in refused(lambda per_class=per_class: cifar10.balanced(data, per_class, seed=0))
    assert "skip" in refused(lambda: cifar10.balanced(data, 1, seed=0, skip=-1))
    # The provenance of a draw from a draw would be that of another draw.
    assert "already" in refused(lambda: cifar10.balanced(cifar10.balanced(data, 9, seed=0), 3, seed=1))


@pytest.mark.records
@pytest.mark.skipif(cifar10.find() is None, reason="CIFAR-10 is not here")
def test_the_real_cifar10():
    for split, each in (("train", 5000), ("test", 1000)):
        data = cifar10.load(split, 8, download=False)
        assert data.images.shape == (10 * each, 3, 8, 8) and data.labels.bincount().tolist() == [each] * 10
        # Mean colour of the set, to what encoding again may change; red before blue.
        mean = data.images.float().mean((0, 2, 3))
        expected = {"train": [125.3, 123.0, 113.9], "test": [126.0, 123.7, 114.9]}[split]
        torch.testing.assert_close(mean, torch.tensor(expected), atol=1.0, rtol=0)
        # Aeroplanes and ships are before the sky and the sea, frogs are not.
        blue = torch.stack([data.images[data.labels == label, 2].float().mean() for label in range(10)])
        assert min(blue[0], blue[8]) > blue[6] + 20


def test_no_pickle_is_read():
    """The files of CIFAR-10's Python version are pickles, which may run anything."""
    tree = ast.parse(Path(cifar10.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
    }
    assert not imported & {"pickle", "cPickle", "cloudpickle", "dill", "joblib"}
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {"load", "CIFAR10"}  # numpy's and torch's readers, torchvision's data set
