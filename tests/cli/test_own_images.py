"""`--data-folder`: experiments on a reader's own images, how such runs are called, and who may judge them."""

from __future__ import annotations

import json
import shutil

import pytest
from commands import call, train
from pictures import folder

from helpers.lab import checkpoints
from helpers.numerics import tracing

SMALL = [
    word
    for setting in ("iterations=2", "meta_batch=1", "test_tasks=3", "queries=1", "own.size=16")
    for word in ("--set", setting)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty checkout, beside it a folder of coloured images in eighteen uneven classes; nothing is recorded."""
    (tmp_path / "checkout" / "notebooks").mkdir(parents=True)
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path / "checkout"))
    monkeypatch.setattr(tracing, "_specialized", lambda function, build: function)
    return folder(tmp_path / "my pictures", [4, 5, 6] * 6)


@pytest.mark.slow
def test_a_run_on_own_images_from_training_to_evaluation(place, tmp_path, capsys):
    own = tmp_path / "checkout" / "_build" / "own"
    status, out, err = train(capsys, "maml-omniglot-5w1s", "--data-folder", str(place), *SMALL)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].startswith(f"{place}: 90 images of 18 classes, ") and "scaled to 16×16 in colour" in lines[0]
    (path,) = (own / "records").glob("*.json")
    record = json.loads(path.read_text())
    digest, name = record["config"]["own"]["sha256"], record["experiment"]
    assert name.startswith(f"maml-omniglot-5w1s_own-folder-{digest[:8]}_own.size-16_")
    assert lines[-1] == f"`metabook evaluate {name} --data-folder '{place}'` measures it again"
    assert record["provenance"]["data"] | {"content": ""} == {
        "data": "own folder", "folder": "my pictures", "sha256": digest, "split": "drawn", "split_seed": 0,
        "size": 16, "channels": 3, "content": "",
    }  # fmt: skip
    assert str(place) not in path.read_text(), "where the folder lies is nobody's business"
    assert not (tmp_path / "checkout" / "data").exists()

    status, _, err = call(capsys, "evaluate", name)
    assert status == 2 and err.count("\n") == 1
    assert f"about images of your own (SHA-256 {digest[:8]}…): name their folder with --data-folder" in err

    moved = shutil.move(place, tmp_path / "elsewhere")
    status, out, err = call(capsys, "evaluate", name, "--data-folder", str(moved))
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if "accuracy" in line]
    assert len(rows) == 7 and all(row[1] == row[4] for row in rows)

    judged = ["--set", "own.judged=validation", "--json"]
    status, out, err = call(capsys, "evaluate", name, "--data-folder", str(moved), *judged)
    assert status == 0 and json.loads(out)["config"]["own"]["judged"] == "validation" and "18 classes" in err

    other = folder(tmp_path / "others", [4] * 15, mode="L")
    status, out, err = call(capsys, "evaluate", name, "--data-folder", str(other))
    assert status == 0 and "scaled to 16×16 in colour" in out, err
    assert f"it was trained on other images (SHA-256 {digest[:8]}…)" in err
    assert all(line.split()[4] == "–" for line in out.splitlines() if "accuracy_" in line)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["maml-sinusoid-5", "--data-folder", "{place}"], "maml-sinusoid-5 does not take images of your own"),
        (["--data-folder", "{place}"], "are for one experiment: name it"),
        (["--queue", "paper", "--data-folder", "{place}"], "are for one experiment: name it"),
        (["maml-omniglot-5w1s", "--set", "own.size=16"], "own of maml-omniglot-5w1s is None and has no field 'size'"),
        (["maml-omniglot-5w1s", "--data-folder", "{place}x"], "there is no folder"),
        (["maml-omniglot-5w1s", "--data-folder", "{place}", "--set", "ways=7"], "7-way tasks need at least 21"),
        (["maml-omniglot-5w1s", "--data-folder", "{place}", "--set", "shots=5"], "need 6 images of a class, but class"),
        (["maml-omniglot-5w1s", "--data-folder", "{place}", "--set", "own.channels=2"], "no number of channels 2"),
        (
            ["imaml-omniglot-5w1s", "--data-folder", "{place}", "--set", "query_sets=1", "--set", "start=other"],
            "cannot start from other, whose network is for other images or ways",
        ),
    ],
)
def test_what_does_not_work_is_one_sentence(place, capsys, words, sentence, monkeypatch):
    monkeypatch.setattr(checkpoints, "load_theta", lambda *_: {})
    status, _, err = train(capsys, *(word.format(place=place) for word in words))
    assert status == 2 and err.count("\n") == 1 and sentence in err


def test_the_help_shows_it(capsys):
    for verb in ("train", "evaluate"):
        status, out, _ = call(capsys, verb, "--help")
        assert status == 0 and "--data-folder FOLDER" in out and "--data-folder drawings" in out
