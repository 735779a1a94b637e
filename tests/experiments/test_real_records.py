"""Committed records again: a checkpoint, evaluated on the real data, must give the record's numbers.

A test is skipped only where a raw data set is not on this machine. What is committed must be there and whole.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from helpers import experiments
from helpers.errors import DataAbsent, UserError
from helpers.experiments.maml import DIVERGED
from helpers.lab import checkpoints, records
from helpers.runtime import root

FOLDER = root() / "data" / "records"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))

# Rounding differs between machines, and inner steps amplify it, so that a prediction on the border between two classes
# may flip. One flip in 600 five-way tasks with one query a class moves an accuracy by 1/3000; five of them are allowed,
# less than half of such a record's interval.
FLIPS = 5
# A mean squared error averages many thousand smooth functions of the same rounding. Where adaptation diverges on some
# tasks, rounding decides what becomes of a task on the brink: one of them may go the other way.
RELATIVE = 1e-3


# What a run is watched by, on the way and at the end.
WATCHED = ("spot_residual", "spot_stationarity", "spot_indefinite")


def tolerance(name: str, record: dict) -> float:
    metric, config = record["metrics"][name], record["config"]
    if record["paper"] == "ml3":
        # Hundreds of steps across kinks, or a rollout, amplify rounding; what a learned loss is judged by must stay
        # inside what five of them differ by, a share may change by one in fifty, and a rate that was picked not at all.
        return 0.0 if name.endswith("_rate") else 0.5 * (metric["ci95"] or 0) + 0.01 * abs(metric["value"]) + 0.02
    if record["paper"] == "nos":
        # Hundreds of steps from scratch amplify rounding, as another start would: about what a child differs by then.
        return 0.03
    if record["paper"] == "jets":
        # Jets of nearly the same score change places, and so may two nearly level inner rates, then next to each other.
        if name.startswith(("rate_", "steps_")):
            return 2.5 * metric["value"]
        return 0.1 * metric["value"] if name.startswith("rejection") else 0.01
    if record["paper"] == "metanmt":
        # A letter on the brink changes all that is written after it: a few names of the six hundred may come out
        # otherwise. With the processor's vector units switched off none did.
        return 0.01 + 0.01 * metric["value"]
    if record["paper"] in ("ways", "combined"):
        # Means over seeds and tasks of up to twenty steps across kinks; glyphs are normalised by small batches.
        return 0.5 * (metric["ci95"] or 0) + 0.03 * abs(metric["value"])
    if record["paper"] == "turtles":
        # Hundreds of iterations at the largest rates amplify rounding, measured by up to a fifth of an interval. Of two
        # settings of the grid that are nearly level another may be picked, and a seed may just miss a level of loss.
        if name.startswith("picked_"):
            return len(config["sgd_rates"]) + len(config["adam_rates"])
        if name.startswith("reached_"):
            return 1.5 / config["seeds"]
        return 0.5 * (metric["ci95"] or 0) + (2 if name.startswith("iterations_to_") else 0)
    if "accuracy" in name:
        return (FLIPS + 0.5) / (metric["n"] * config["ways"] * config["queries"])
    if "_diverged_" in name:
        return 1.5 / (config["test_tasks"] * config["seeds"])
    if name in WATCHED or name.startswith("solver_"):  # single precision after many steps across kinks: its order
        return 0.1 * abs(metric["value"]) + 0.05
    if name.startswith("scratch_"):  # nothing was learned for this start: steps bounce off kinks and narrow valleys
        return 0.5 * metric["ci95"]
    some_diverge = record["metrics"].get(name.replace("_mse_", "_diverged_"), {}).get("value", 0) > 0
    allowed = RELATIVE * abs(metric["value"])
    return allowed + DIVERGED / (config["test_tasks"] * config["seeds"]) if some_diverge else allowed


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
    _, data, run = set_up(name)
    assert data == record["provenance"]["data"], "the record is of other data"
    theta, spot = checkpoints.load_theta(name), getattr(run, "spot_check", None)
    measured = spot(theta) if spot else run.evaluate(theta)
    if spot:
        # A part of the tasks is enough here; what it cannot say must agree with it as far as chance allows.
        measured = {key: value for key, value in measured.items() if key.startswith("spot_")}
        assert measured and measured.keys() < record["metrics"].keys()
        for key, value in measured.items():
            if key in WATCHED:  # measured on training tasks, of which there is no larger part
                continue
            whole = record["metrics"][key.removeprefix("spot_")]
            # Taggers, and seeds, share their test tasks, so that the interval over them leaves out by how much few
            # tasks differ: sinusoids by their amplitude, squared.
            few = {"jets": 0.03, "ways": 0.3 * whole["value"], "combined": 0.3 * whole["value"]}
            few = few.get(record["paper"], 1e-9)
            assert abs(value.value - whole["value"]) <= 2 * (value.ci95 + whole["ci95"]) + few, key
    else:
        # Seconds belong to the run; nobody can measure them again.
        lasting = {key for key in record["metrics"] if not key.startswith("seconds")}
        measured = {key: value for key, value in measured.items() if key in lasting}
        assert measured.keys() == lasting
    wrong = {}
    for key in measured:
        metric = record["metrics"][key]
        assert measured[key].n == metric["n"]
        if abs(measured[key].value - metric["value"]) > tolerance(key, record):
            wrong[key] = (measured[key].value, metric["value"])
    assert not wrong, f"measured and recorded: {wrong}"


@pytest.mark.records
@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".csv.gz") for path in FOLDER.glob("*.csv.gz")))
def test_table_is_that_of_the_checkpoint(name, tmp_path, monkeypatch):
    _, _, run = set_up(name)
    committed = records.load_table(name)
    records.save_table(run.table(checkpoints.load_theta(name)), tmp_path / f"{name}.csv.gz")
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    assert records.load_table(name) == committed


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
