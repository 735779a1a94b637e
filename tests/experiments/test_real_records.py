"""Committed records again: a checkpoint, evaluated on the real data, must give the record's numbers.

A test is skipped only where a raw data set is not on this machine. What is committed must be there and whole.
"""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from scipy import stats

from helpers import experiments
from helpers.errors import DataAbsent, UserError
from helpers.lab import checkpoints, records
from helpers.runtime import root

FOLDER = root() / "data" / "records"
NAMES = [name for name, record in records.load_all().items() if record.get("kind") != "live"]


@pytest.fixture(autouse=True)
def all_threads():
    """Evaluating takes a while, and here the order of a sum does not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    yield
    torch.set_num_threads(before)


def set_up(name):
    """The experiment, and the run for which its data are laid out."""
    try:
        experiment = experiments.find(name)
        return experiment, experiment.data(), experiment.setup(torch.device("cpu"), compiled=False)
    except DataAbsent as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_is_that_of_the_record(name):
    record = records.load(name)
    _, header = checkpoints.read_checkpoint(root() / "data" / "checkpoints" / f"{name}.safetensors.xz")
    assert header["config"] == record["config"], f"record and checkpoint of {name} are of different runs"
    done = record["iterations"]["done"]
    assert header["iteration"] == done, f"let {name} finish, or take record and checkpoint of one run"
    experiment = experiments.find(name)
    ours = json.loads(json.dumps(experiment.config()))
    assert ours == record["config"], f"the experiment {name} was changed since its record was made"


@pytest.mark.records
@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_gives_the_record(name):
    record = records.load(name)
    experiment, data, run = set_up(name)
    assert data == record["provenance"]["data"], "the record is of other data"
    recorded = {key: records.metric(record, key) for key in record["metrics"]}
    measured = run.spot_check(checkpoints.load_theta(name))
    if spot := {key: value for key, value in measured.items() if key.startswith("spot_")}:
        # A part of the tasks is enough here; what it cannot say must agree with it as far as chance allows.
        measured = spot
        assert measured.keys() < recorded.keys()
        for key in measured.keys() - set(experiment.spot_only):
            whole = recorded[key.removeprefix("spot_")]
            chance = 2 * (measured[key].ci95 + whole.ci95) + experiment.spot_chance.of(whole)
            assert abs(measured[key].value - whole.value) <= chance, key
    else:
        # Seconds belong to the run; nobody can measure them again.
        lasting = {key for key in recorded if not key.startswith("seconds")}
        measured = {key: value for key, value in measured.items() if key in lasting}
        assert measured.keys() == lasting
    assert all(value.n == recorded[key].n for key, value in measured.items())
    wrong = {
        key: (value.value, recorded[key].value)
        for key, value in measured.items()
        if abs(value.value - recorded[key].value) > experiment.tolerance(key, recorded)
    }
    assert not wrong, f"measured and recorded: {wrong}"
    # An interval is of the same samples: it moves by what they move, and a little.
    widths = {key: (value.ci95, recorded[key].ci95) for key, value in measured.items()}
    wrong = {
        key: pair
        for key, pair in widths.items()
        if math.isnan(pair[0]) != math.isnan(pair[1])
        or abs(pair[0] - pair[1]) > 2 * experiment.tolerance(key, recorded) + 0.05 * pair[1]
    }
    assert not wrong, f"half-widths, measured and recorded: {wrong}"


@pytest.mark.records
@pytest.mark.parametrize(
    "name", sorted(path.name.removesuffix(".csv.gz") for path in FOLDER.glob("*.csv.gz") if "samples" not in path.name)
)
def test_table_is_that_of_the_checkpoint(name, tmp_path, monkeypatch):
    _, _, run = set_up(name)
    committed = records.load_table(name)
    records.save_table(run.table(checkpoints.load_theta(name)), tmp_path / f"{name}.csv.gz")
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    assert records.load_table(name) == committed


@pytest.mark.parametrize("name", [name for name in NAMES if records.known_digest(records.load(name))])
def test_metrics_are_those_of_the_samples(name):
    """Value, interval and number of every metric, computed again with NumPy and SciPy alone."""
    record, samples = records.load(name), records.load_samples(name)
    for key, entry in record["metrics"].items():
        assert (key in samples) == ("per" in entry), key
        if key not in samples:
            continue
        values = np.array(samples[key])
        count = len(values)
        assert count == entry["n"], key
        assert entry["value"] == pytest.approx(values.mean(), rel=1e-5, abs=1e-7), key
        half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
        assert entry["ci95"] == pytest.approx(half, rel=1e-3, abs=1e-6 * max(1.0, abs(entry["value"]))), key


@pytest.mark.parametrize("name", NAMES)
def test_record_is_consistent(name):
    """What no schema can say: the slices join up to the iterations done, and the history is as long as it should be."""
    record = records.load(name)
    done, planned = record["iterations"]["done"], record["iterations"]["planned"]
    assert (record["status"] == "complete") == (done == planned)
    slices = record["provenance"]["slices"]
    assert [s["begin"] for s in slices] == [0, *(s["end"] for s in slices[:-1])] and slices[-1]["end"] == done
    assert len(record["losses"]["values"]) == done // record["losses"]["every"]
    assert [entry["iteration"] for entry in record["curve"]] == list(
        range(record["config"]["evaluate_every"], done + (done < planned), record["config"]["evaluate_every"])
    )
    assert record["provenance"]["seconds"] >= max(s["seconds"] for s in slices)


def test_only_absent_raw_data_is_a_reason_to_skip(tmp_path, monkeypatch):
    """Damage to what is committed is an error: the checkpoint that a run starts from, jets, names."""
    from helpers.tasks import cifar10, digits, jets, names, omniglot

    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("METABOOK_DATA", raising=False)
    for load in (
        lambda: omniglot.load("test", download=False),
        lambda: digits.load("test", "mnist", download=False),
        lambda: cifar10.load("test", 8, download=False),
    ):
        with pytest.raises(DataAbsent):
            load()
    for load in (jets.load, names.load, lambda: checkpoints.load_theta(NAMES[0])):
        with pytest.raises(UserError) as caught:
            load()
        assert caught.type is UserError
