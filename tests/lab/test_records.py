"""Records as files: written whole or not at all, and one sentence for each kind of damage."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
from refusals import refused

from helpers import runtime
from helpers.lab import records
from helpers.lab.claims import DIRECTION, MISSED, NOT_RUN, REPRODUCED, Claim, verdict
from helpers.lab.statistics import Interval


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


def test_the_four_verdicts():
    claim = Claim(
        "maml",
        "c",
        "accuracy",
        "Table 1",
        "one",
        "test_accuracy",
        0.987,
        0.004,
        direction=({"left": "one/test_accuracy", "right": "two/test_accuracy"},),
    )
    near, below, far = record(value=0.975), record("two", 0.8), record(value=0.9)
    assert verdict(claim, {"one": near}) == REPRODUCED  # 0.975 + 0.01 reaches 0.987 − 0.004
    assert verdict(claim, {"one": far, "two": below}) == DIRECTION
    assert verdict(claim, {"one": far, "two": record("two", 0.89)}) == MISSED  # the intervals touch
    assert verdict(claim, {"two": below}) == NOT_RUN


def test_lower_may_be_better():
    claim = Claim(
        "maml",
        "c",
        "error",
        "Figure 2",
        "one",
        "mse",
        0.5,
        better="lower",
        direction=({"left": "one/mse", "right": 0.8},),
    )
    found = {
        value: verdict(claim, {"one": record(metrics={"mse": {"value": value, "ci95": 0.05, "n": 5}})})
        for value in (0.2, 0.54, 0.6, 0.78)
    }
    assert found == {
        0.2: REPRODUCED, 0.54: REPRODUCED, 0.6: DIRECTION, 0.78: MISSED,
    }  # fmt: skip


def test_committed_records_are_laid_out_as_they_are_saved():
    paths = sorted((runtime.root() / "data" / "records").glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert records.laid_out(json.loads(text)) + "\n" == text, path.name


def test_layout_changes_no_content():
    awkward = record(notes=['a {\n "b" ]', "[ 1,\n 2 ]", ""], curve=[{"deep": [[1, 2], []]}, {}])
    assert json.loads(records.laid_out(awkward)) == awkward
