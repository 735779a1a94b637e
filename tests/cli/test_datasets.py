"""`metabook data`: counts and digests, or one sentence."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import toy_jets
from commands import call

from helpers.errors import UserError


def test_no_image_data(project, capsys, monkeypatch):
    from helpers.tasks import omniglot

    def offline():
        raise UserError("no network")

    monkeypatch.delenv("METABOOK_DATA", raising=False)
    monkeypatch.setattr(omniglot, "fetch", offline)
    status, _, err = call(capsys, "data", "omniglot")
    assert status == 2 and err.count("\n") == 1
    assert f"are not in {project / 'data' / 'raw'}" in err and "metabook data omniglot" in err


def test_data_prints_counts_and_digests(project, capsys, monkeypatch):
    from helpers.tasks import glyphs
    from helpers.tasks.images import ImageClasses

    def load(split):
        images = torch.zeros(3, 20, 28, 28, dtype=torch.uint8)
        return ImageClasses(images, ["a", "b", "c"], ["x", "x", "y"], {"data": "glyphs", "images_sha256": split * 2})

    monkeypatch.setattr(glyphs, "load", load)
    status, out, _ = call(capsys, "data", "glyphs")
    assert status == 0
    assert out.splitlines() == [
        "glyphs train: 3 classes × 20 images of 28×28 pixels, 2 groups", "  images_sha256 traintrain",
        "glyphs test: 3 classes × 20 images of 28×28 pixels, 2 groups", "  images_sha256 testtest",
    ]  # fmt: skip


def test_data_prints_the_counts_of_labelled_images(project, capsys, monkeypatch):
    from helpers.tasks import cifar10

    def load(split):
        images, labels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
        return cifar10.Labelled(images, labels, {"data": "cifar10", "split": split, "sha256": split * 2})

    monkeypatch.setattr(cifar10, "load", load)
    monkeypatch.setattr(cifar10, "find", lambda: Path("there"))
    assert call(capsys, "data", "cifar10")[1].splitlines() == [
        "image files: there",
        "cifar10 train: 10 classes × 2 images of 32×32 pixels in colour", "  sha256 traintrain",
        "cifar10 test: 10 classes × 2 images of 32×32 pixels in colour", "  sha256 testtest",
    ]  # fmt: skip


@pytest.fixture
def jet_file(project):
    """A few jets, where the shipped file would be."""
    from helpers.tasks import jets

    (project / "data").mkdir(exist_ok=True)
    jets.home().write_bytes(jets.pack(toy_jets.arrays(), {"samples": []}))
    return jets.load().header["sha256"]


JETS = [
    f"jets {split}: {process} with {shower}, 40 + 40 + 40 + 40 + 40 jets"
    for process, shower, split in (
        ("W", "fsr-half", "train"), ("QCD", "fsr-half", "train"), ("W", "fsr-one", "train"),
        ("QCD", "fsr-one", "train"), ("W", "monash", "test"), ("QCD", "monash", "test"),
    )
]  # fmt: skip


def test_data_prints_the_counts_of_jets(jet_file, capsys, monkeypatch):
    from helpers.tasks.jets import simulation

    monkeypatch.setattr(simulation, "generate", lambda *_: pytest.fail("nothing is to be simulated"))
    status, out, err = call(capsys, "data", "jets")
    assert (status, err) == (0, "") and out.splitlines() == [*JETS, f"  sha256 {jet_file}"]


def test_jets_are_simulated_where_a_number_is_given(jet_file, capsys, monkeypatch):
    from helpers.tasks.jets import simulation

    asked = []
    monkeypatch.setattr(simulation, "generate", asked.append)
    assert call(capsys, "data", "jets", "--jets", "40")[1].splitlines() == [*JETS, f"  sha256 {jet_file}"]
    assert asked == [40]


def test_without_pythia_one_sentence_says_what_to_install(jet_file, capsys, monkeypatch):
    from helpers.tasks import jets
    from helpers.tasks.jets import simulation

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(simulation, "import_module", missing)
    before = jets.home().read_bytes()
    status, out, err = call(capsys, "data", "jets", "--jets", "20")
    assert (status, out) == (2, "") and err.startswith("metabook: ") and err.count("\n") == 1
    assert "needs Pythia 8 and FastJet: `pip install pythia8mc==8.317.2 fastjet awkward`" in err
    assert jets.home().read_bytes() == before


@pytest.mark.parametrize(
    ("name", "module", "file"), [("mnist", "digits", "train-images"), ("cifar10", "cifar10", "data_batch_1.bin")]
)
def test_files_are_found_or_one_sentence_says_where_they_were_looked_for(
    project, capsys, monkeypatch, name, module, file
):
    library = importlib.import_module(f"helpers.tasks.{module}")

    def no_network():
        raise UserError(f"{name} could not be downloaded")

    monkeypatch.delenv("METABOOK_DATA", raising=False)
    monkeypatch.setattr(library, "fetch", no_network)
    status, out, err = call(capsys, "data", name)
    assert status == 2 and "none here" in out
    assert len(err.splitlines()) == 1 and file in err and "METABOOK_DATA" in err
