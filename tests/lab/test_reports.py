"""A checkpoint that is measured again gives the same record, with its samples; nothing is trained."""

from __future__ import annotations

import json

import pytest
from refusals import refused
from tiny import Tiny, checkpoint, train

from helpers.lab import records, reports, statistics


def without_times(record):
    evaluated = record["provenance"]["evaluated"]
    return record | {
        "provenance": record["provenance"]
        | {"evaluated": {key: value for key, value in evaluated.items() if "seconds" not in key}}
    }


@pytest.mark.parametrize("budget", [None, 0], ids=["complete", "partial"])
def test_a_checkpoint_measured_again_gives_its_record(tmp_path, budget):
    record = train(tmp_path, budget=budget)
    before, path = checkpoint(tmp_path).read_bytes(), tmp_path / "records" / "tiny.json"
    path.write_text("damaged")
    said = []
    again = reports.again(Tiny(), data=tmp_path, say=said.append)
    assert without_times(again) == without_times(record)
    assert again == json.loads(path.read_text()) == records.load("tiny", where=tmp_path / "records")
    assert checkpoint(tmp_path).read_bytes() == before
    assert said[0].startswith("tiny: ") and "mse_0" in said[0]


def test_a_record_keeps_where_and_how_long_it_was_measured_and_the_values_behind_it(tmp_path):
    record = train(tmp_path, budget=0)
    evaluated = record["provenance"]["evaluated"]
    assert evaluated["seconds"] >= 0 and evaluated["processor_seconds"] >= 0 and evaluated["threads"] >= 1
    samples = records.load_samples("tiny", tmp_path / "records")
    assert samples.keys() == record["metrics"].keys()
    for name, entry in record["metrics"].items():
        assert entry["per"] == "task" and len(samples[name]) == entry["n"]
        assert sum(samples[name]) / entry["n"] == pytest.approx(entry["value"], rel=1e-5)


def test_what_the_run_took_is_kept(tmp_path):
    record = train(tmp_path, budget=0)
    path = tmp_path / "records" / "tiny.json"
    seconds = {"value": 0.5, "ci95": None, "n": 9}
    record["metrics"]["seconds_per_iteration"] = seconds
    del record["provenance"]["evaluated"]["digest"]
    records.save(record, path)
    assert reports.again(Tiny(), data=tmp_path)["metrics"]["seconds_per_iteration"] == seconds


def test_what_is_not_finite_touches_no_file(tmp_path, monkeypatch):
    train(tmp_path, budget=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    from tiny import TinyRun

    monkeypatch.setattr(TinyRun, "evaluate", lambda *_: {"mse_0": statistics.Interval(float("nan"), 1.0, 2)})
    assert "its metrics mse_0 are not finite" in refused(lambda: reports.again(Tiny(), data=tmp_path))
    assert {path.name: path.read_bytes() for path in (tmp_path / "records").iterdir()} == before


def test_without_a_checkpoint_there_is_nothing_to_measure(tmp_path):
    assert "there is no checkpoint" in refused(lambda: reports.again(Tiny(), data=tmp_path))


def test_a_compiled_measurement_says_so(tmp_path, monkeypatch):
    record, asked = train(tmp_path, budget=0), []
    setup = Tiny.setup
    monkeypatch.setattr(
        Tiny, "setup", lambda self, device, compiled: asked.append(compiled) or setup(self, device, False)
    )
    again = reports.again(Tiny(), data=tmp_path, compiled=True)
    assert asked == [True] and again["provenance"]["evaluated"]["compiled"] is True
    assert again["metrics"] == record["metrics"] and "compiled" not in record["provenance"]["evaluated"]
