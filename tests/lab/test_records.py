"""Records as files: written whole or not at all, and one sentence for each kind of damage."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os

import pytest
import torch
from refusals import refused

from helpers import runtime
from helpers.lab import records
from helpers.lab.checkpoints import entries
from helpers.lab.statistics import Interval, interval, over_seeds


def record(name="one", value=0.95, done=20_000, **extra):
    return {
        "experiment": name,
        "paper": "maml",
        "status": "complete" if done == 60_000 else "partial",
        "iterations": {"done": done, "planned": 60_000},
        "metrics": {
            "test_accuracy": {"value": value, "ci95": 0.01, "n": 600},
            "one": {"value": 1, "ci95": None, "n": 1},
        },
        "config": {"name": name},
        "provenance": {},
    } | extra


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    return tmp_path / "data" / "records"


def test_saved_records_come_back(folder):
    path = records.save(record("two") | {"note": "±"})
    assert path == folder / "two.json" and path.read_text(encoding="utf-8").endswith("\n")
    records.save(record())
    assert records.load("two")["note"] == "±"
    assert list(records.load_all()) == ["one", "two"]
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_missing_record(folder):
    assert records.load("one", missing_ok=True) is None
    assert records.load_all() == {}
    assert "make it with `metabook train one`" in refused(lambda: records.load("one"))


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"experiment": "one"', "\x00\x01", "nonsense"],
)
def test_damaged_record(folder, text):
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(text)
    message = refused(lambda: records.load("one"))
    assert "is damaged" in message and "restore it from version control" in message
    assert "is damaged" in refused(records.load_all)
    assert (folder / "one.json").read_text() == text


def test_record_that_is_not_text(folder):
    folder.mkdir(parents=True)
    (folder / "one.json").write_bytes(b"\xff\xfe\xff")
    assert "is damaged" in refused(lambda: records.load("one"))


@pytest.mark.parametrize(
    "content",
    [
        [],
        3,
        None,
        {"experiment": "one"},
        record("two"),
        record(metrics=[]),
        record(metrics={"a": 0.5}),
        record(metrics={"a": {"value": 1}}),
        record(iterations={"done": 1}),
        record(iterations={"done": "1", "planned": 2}),
    ],
)
def test_other_content_is_no_record(folder, content):
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps(content))
    assert "is not a record of one" in refused(lambda: records.load("one"))


def test_metrics():
    assert records.metric(record(), "test_accuracy") == Interval(0.95, 0.01, 600)
    assert math.isnan(records.metric(record(), "one").ci95)
    assert "has no metric 'speed'; it has: test_accuracy, one" in refused(lambda: records.metric(record(), "speed"))


def test_progress():
    assert records.progress(record()) == "20,000 of 60,000 iterations"
    assert records.progress(record(done=60_000)) == "60,000 iterations"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_does_not_know_are_not_written(folder, value):
    records.save(record())
    before = (folder / "one.json").read_bytes()
    assert "its metrics test_accuracy are not finite" in refused(lambda: records.save(record(value=value)))
    assert "one of its numbers is not finite" in refused(lambda: records.save(record(curve=[value])))
    assert (folder / "one.json").read_bytes() == before


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_old_file(folder, monkeypatch, place, number):
    records.save(record())
    before = (folder / "one.json").read_bytes()

    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, place, fails)
    message = refused(lambda: records.save(record(value=0.5)))
    assert os.strerror(number) in message and "the previous file is intact" in message
    assert (folder / "one.json").read_bytes() == before and len(list(folder.iterdir())) == 1
    assert "nothing was written" in refused(lambda: records.save(record("two")))


def test_writing_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "nothing was written" in refused(lambda: runtime.write_atomically(tmp_path / "file" / "x", b""))
    assert "cannot write into" in refused(lambda: runtime.ensure_writable(tmp_path / "file" / "x"))


def test_ensuring_leaves_nothing_behind(tmp_path):
    runtime.ensure_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# ---------------------------------------- samples


def measured():
    draws = torch.Generator().manual_seed(0)
    return {
        "accuracy": interval(torch.rand(40, generator=draws)),
        "error": over_seeds(torch.rand(3, generator=draws)),
        "chosen": Interval(0.1, math.nan, 1),
    }


def signed(folder, metrics):
    """A record with its samples beside it, as training leaves them."""
    content = record(metrics=entries(metrics))
    folder.mkdir(parents=True, exist_ok=True)
    samples = records.save_samples(metrics, folder / "one.samples.csv.gz")
    content["provenance"] = {"evaluated": {"digest": records.digest(content, samples)}}
    records.save(content)
    return content


def test_samples_come_back_and_are_those_of_the_metrics(folder):
    metrics = measured()
    signed(folder, metrics)
    found = records.load_samples("one")
    assert list(found) == ["accuracy", "error"], "what has no spread has no samples"
    for name, values in found.items():
        again = (interval if name == "accuracy" else over_seeds)(torch.tensor(values, dtype=torch.float64))
        assert again.n == metrics[name].n
        assert again.value == pytest.approx(metrics[name].value, rel=1e-6)
        assert again.ci95 == pytest.approx(metrics[name].ci95, rel=1e-5)
    assert records.load_samples("two") == {}


@pytest.mark.parametrize(
    "path, value",
    [
        ("accuracy/value", 0.123),
        ("accuracy/ci95", 0.001),
        ("error/ci95", None),
        ("error/n", 5),
    ],
)
def test_a_digit_that_was_changed_in_a_record_is_found(folder, path, value):
    content = signed(folder, measured())
    name, key = path.split("/")
    content["metrics"][name][key] = value
    records.save(content)
    assert "its metrics and one.samples.csv.gz are not those that were measured together" in refused(
        lambda: records.load("one")
    )


def test_samples_that_were_changed_or_lost_are_found(folder):
    content = signed(folder, measured())
    assert records.load("one") == content
    records.save_samples(
        measured() | {"error": over_seeds(torch.tensor([0.1, 0.2, 0.3]))}, folder / "one.samples.csv.gz"
    )
    assert "measured together" in refused(lambda: records.load("one"))
    (folder / "one.samples.csv.gz").unlink()
    assert "measured together" in refused(lambda: records.load("one"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b", b"a,b\n1\n", gzip.compress(b"a,b\n1\n"), gzip.compress(b"a\nx\n")],
    ids=["empty", "cut off", "not compressed", "ragged", "no number"],  # a compressed text has its time in it
)
def test_damaged_samples_are_one_sentence(folder, content):
    folder.mkdir(parents=True)
    (folder / "one.samples.csv.gz").write_bytes(content)
    assert "one.samples.csv.gz are damaged" in refused(lambda: records.load_samples("one"))


def test_without_a_spread_there_is_no_file_of_samples(folder):
    folder.mkdir(parents=True)
    path = folder / "one.samples.csv.gz"
    path.write_bytes(b"of an earlier evaluation")
    assert records.save_samples({"chosen": Interval(0.1, math.nan, 1)}, path) == b"" and not path.exists()


def test_committed_records_are_laid_out_as_they_are_saved():
    paths = sorted((runtime.root() / "data" / "records").glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert records.laid_out(json.loads(text)) + "\n" == text, path.name


def test_layout_changes_no_content():
    awkward = record(notes=['a {\n "b" ]', "[ 1,\n 2 ]", ""], curve=[{"deep": [[1, 2], []]}, {}])
    assert json.loads(records.laid_out(awkward)) == awkward
