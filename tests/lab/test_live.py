"""What a chapter measures for a claim: on the page one line, in the notebook the numbers, in data/records a record."""

from __future__ import annotations

import copy
import json

import jsonschema
import nbformat
import pytest
import torch
from refusals import refused

from helpers.lab import live, records
from helpers.lab.statistics import interval
from helpers.runtime import root
from helpers.site.compare import LIVE, differences


@pytest.fixture
def measured():
    samples = torch.rand(8, generator=torch.Generator().manual_seed(0))
    return live.Live("imaml-live-x", "imaml", {"error": interval(samples), "bytes": 12, "seconds_100": 0.25})


def executed(measured):
    output = nbformat.v4.new_output("execute_result", measured._repr_mimebundle_(), execution_count=1)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("measured", outputs=[output], execution_count=1)])


def test_the_record_is_what_the_notebook_holds(measured, tmp_path):
    assert live.keep(executed(measured), "04_imaml", tmp_path) == ["imaml-live-x"]
    record = records.load("imaml-live-x", where=tmp_path)
    jsonschema.validate(record, json.loads((root() / "data/schemas/record.schema.json").read_text()))
    assert record["kind"] == "live" and record["config"]["chapter"] == "04_imaml"
    assert record["metrics"]["error"]["n"] == 8 and record["metrics"]["error"]["per"] == "task"
    assert record["metrics"]["bytes"] == {"value": 12.0, "ci95": None, "n": 1}
    assert len(records.load_samples("imaml-live-x", tmp_path)["error"]) == 8
    assert record["metrics"] == measured.record()["metrics"]
    assert live.keep(nbformat.v4.new_notebook(), "04_imaml", tmp_path) == []


def test_the_regression_check_compares_all_but_times(measured):
    (output,) = executed(measured).cells[0].outputs

    def found(name, factor):
        other = copy.deepcopy(output)
        other["data"][LIVE]["metrics"][name]["value"] *= factor
        return differences([output], [other], rtol=0.01)

    assert not found("error", 1.005) and not found("seconds_100", 3.0)
    assert "number 1 differs" in found("error", 1.02)[0]


def test_nothing_measured_is_one_sentence():
    assert "x has no metrics" in refused(lambda: live.Live("x", "imaml", {}))


def test_committed_live_records_are_those_of_the_committed_notebooks(tmp_path):
    found = {}
    for path in sorted((root() / "notebooks").glob("*.ipynb")):
        for name in live.keep(nbformat.read(path, 4), path.stem, tmp_path):
            found[name] = records.load(name, where=tmp_path)
    committed = {name: record for name, record in records.load_all().items() if record.get("kind") == "live"}
    assert found.keys() == committed.keys()
    for name, record in committed.items():
        assert record["metrics"] == found[name]["metrics"], f"`metabook refresh {record['config']['chapter']}`"
        assert records.load_samples(name) == records.load_samples(name, tmp_path)
