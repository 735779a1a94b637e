"""`metabook train` and `metabook evaluate`: what is trained, where it goes, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from commands import call, train

from helpers import experiments, progress, runtime
from helpers.lab import checkpoints, statistics, training


def test_training_in_slices(project, capsys):
    status, out, _ = train(capsys, "first", "--budget", "0")
    assert status == 0 and out.startswith("first: 1 of 60 iterations; mse_0 ")
    status, out, _ = train(capsys, "first", "--threads", "1")
    assert status == 0 and out.startswith("first: 60 iterations;")
    record = json.loads((project / "data" / "records" / "first.json").read_text())
    assert [s["begin"] for s in record["provenance"]["slices"]] == [0, 1]
    status, out, _ = train(capsys, "first", "--fresh", "--budget", "0")
    assert status == 0 and "1 of 60" in out


def test_a_complete_run_is_not_written_again(project, capsys):
    """Neither a recorded one nor a variant; a damaged record alone is made anew."""
    for words in (("first",), ("first", "--seed", "3")):
        train(capsys, *words)
        home = project / "data" if len(words) == 1 else project / "_build" / "own"
        files = [path for path in home.rglob("*") if path.suffix in (".json", ".xz") and "first" in path.name]
        before = {path: path.stat().st_mtime_ns for path in files}
        status, out, _ = train(capsys, *words)
        assert status == 0 and "is complete (60 iterations): nothing to train" in out and len(files) == 2
        assert before == {path: path.stat().st_mtime_ns for path in files}
    record = project / "data" / "records" / "first.json"
    record.write_text("{")
    assert train(capsys, "first")[0] == 0 and json.loads(record.read_text())["status"] == "complete"


def test_short_runs_are_not_compiled_unless_asked(project, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "can_compile", lambda: True)
    monkeypatch.setattr(training, "train", lambda experiment, compiled, **_: asked.append(compiled))
    for words in ((), ("--set", "iterations=1000"), ("--compile",), ("--set", "iterations=1000", "--no-compile")):
        call(capsys, "train", "first", "--device", "cpu", *words)
    assert asked == [False, True, True, False]


def test_queue_goes_by_priority_until_the_time_is_spent(project, capsys):
    status, out, _ = train(capsys, "--queue", "paper")
    assert status == 0
    assert [line.split(";")[0] for line in out.splitlines()] == ["first: 60 iterations", "second: 60 iterations"]
    status, out, _ = train(capsys, "--queue", "paper")
    assert (status, out) == (0, "first: complete, nothing to do\nsecond: complete, nothing to do\n")

    (project / "data" / "checkpoints" / "second.safetensors.xz").unlink()
    (project / "data" / "records" / "second.json").unlink()
    status, out, _ = train(capsys, "--queue", "paper", "--budget", "0.01s")
    assert status == 0
    assert "first: complete" in out and re.search(r"second: \d+ of 60|the time is spent; second is next", out)


def test_queue_hands_on_the_time_that_is_left(project, capsys, monkeypatch):
    budgets = []

    def slow(experiment, budget, **_):
        budgets.append(budget)
        time.sleep(0.3)

    monkeypatch.setattr(training, "train", slow)
    _, out, _ = train(capsys, "--queue", "paper", "--budget", "10")
    assert 9.9 < budgets[0] <= 10 and 9 < budgets[1] <= 9.7
    budgets.clear()
    status, out, _ = train(capsys, "--queue", "paper", "--budget", "0.2s")
    assert status == 0 and len(budgets) == 1 and "the time is spent; second is next" in out


def test_queue_is_not_stopped_by_one_bad_experiment(project, capsys):
    folder = project / "data" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "first.safetensors.xz").write_bytes(b"broken")
    status, out, err = train(capsys, "--queue", "paper")
    assert status == 2
    assert "metabook: the checkpoint" in err and "is damaged" in err
    assert "second: 60 iterations" in out
    assert (folder / "first.safetensors.xz").read_bytes() == b"broken"


def test_queue_goes_on_after_any_error_and_says_so_at_the_end(project, capsys, monkeypatch):
    right = training.train

    def full(experiment, **settings):
        if experiment.name == "first":
            raise RuntimeError("out of memory")
        return right(experiment, **settings)

    monkeypatch.setattr(training, "train", full)
    status, out, err = train(capsys, "--queue", "paper")
    assert status == 2 and "second: 60 iterations" in out
    assert "first failed (RuntimeError: out of memory)" in err
    assert err.splitlines()[-1] == "metabook: not trained: first; the messages above say why"


def test_queue_passes_over_what_was_given_up(project, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "given_up", lambda experiment: experiment.name == "first")
    status, out, _ = train(capsys, "--queue", "paper")
    assert status == 0 and out.startswith("first: given up;") and "second: 60 iterations" in out


def test_a_complete_record_of_another_configuration_is_not_complete(project, capsys):
    train(capsys, "--queue", "paper")
    experiments.catalogue()["first"] = tiny.Tiny(name="first", iterations=61)
    status, _, err = train(capsys, "--queue", "paper")
    assert status == 2 and "another configuration (it differs in iterations)" in err


# ---------------------------------------- the list


def test_the_list_says_how_far_experiments_got_and_what_they_are(project, capsys, monkeypatch):
    known = experiments.catalogue()
    known["third"] = tiny.Tiny(name="third", iterations=1200, outer_rate=0.1)
    known["fourth"] = tiny.Tiny(name="fourth", hidden=3, iterations=60)
    train(capsys, "first")
    train(capsys, "third", "--budget", "0")
    (project / "data" / "records" / "fourth.json").write_text("{")
    status, out, err = call(capsys, "train", "--list")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 100
    assert out.startswith("maml: Sinusoids and a network of eight hidden units;")
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if line.startswith("  ")]
    assert rows == [
        ["first", "complete"],
        ["second", "no run"],
        ["third", "1 of 1,200", "iterations 1200, outer_rate 0.1"],
        ["fourth", "damaged", "hidden 3"],
    ]
    entries = json.loads(call(capsys, "train", "--list", "--json")[1])
    assert [(one["name"], one["state"]) for one in entries] == [(row[0], row[1]) for row in rows]
    assert entries[3]["differs"] == {"hidden": 3} and entries[0]["paper"] == "maml"


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_the_list_of_all_is_readable(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = call(capsys, "train", "--list")[1]
    assert max(map(len, out.splitlines())) <= max(60, min(100, columns))
    assert len([line for line in out.splitlines() if line.startswith("  ")]) == len(experiments.catalogue())


# ---------------------------------------- variants


def test_a_variant_is_named_after_its_changes_and_kept_apart(project, capsys):
    words = ["first", "--set", "hidden=3", "--set", "outer_rate=1", "--seed", "3"]
    status, out, _ = train(capsys, *words)
    name = "first_outer_rate-1.0_seed-3_hidden-3"
    assert status == 0 and out.splitlines()[-1] == f"`metabook evaluate {name}` measures it again"
    folder = project / "_build" / "own"
    record = json.loads((folder / "records" / f"{name}.json").read_text())
    assert record["experiment"] == name and record["status"] == "complete"
    assert (record["config"]["hidden"], record["config"]["outer_rate"], record["config"]["seed"]) == (3, 1.0, 3)
    assert not (project / "data").exists()
    mine = project / "my runs"
    status, out, _ = train(capsys, *words, "--out", str(mine), "--budget", "0")
    assert status == 0 and out.splitlines()[-1] == f"`metabook evaluate {name} --out '{mine}'` measures it again"
    assert (mine / "checkpoints" / f"{name}.safetensors.xz").exists()


def test_a_run_goes_on_in_another_folder_only_where_asked(project, capsys):
    status, out, _ = train(capsys, "first", "--out", str(project / "mine"), "--budget", "0")
    assert status == 0 and "1 of 60" in out and (project / "mine" / "records" / "first.json").exists()
    status, _, err = train(capsys, "first", "--seed", "3", "--out", str(project / "data"))
    assert status == 2 and "is for the recorded experiments alone" in err and not (project / "data").exists()


def test_values_without_sense_are_one_sentence(project, capsys, monkeypatch):
    monkeypatch.setattr(tiny.Tiny, "setup", lambda self, *_: {"maml": 1}[self.paper])
    status, out, err = train(capsys, "first", "--set", "paper=nowhere")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "first_paper-nowhere does not run with these values (KeyError: 'nowhere'); `metabook show first`" in err


# ---------------------------------------- evaluate


def test_an_evaluation_gives_the_record(project, capsys):
    train(capsys, "first")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    record = json.loads((project / "data" / "records" / "first.json").read_text())
    status, out, err = call(capsys, "evaluate", "first")
    assert (status, err) == (0, "") and out.startswith("first: 60 of 60 iterations, ")
    rows = [line.split() for line in out.partition("\n\n")[0].splitlines()[3:]]
    assert [row[0] for row in rows] == list(record["metrics"])
    assert all(len(row) == 5 and row[1] == row[4] for row in rows)
    path = project / "data" / "checkpoints" / "first.safetensors.xz"
    status, out, _ = call(capsys, "evaluate", str(path), "--json")
    found = json.loads(out)
    assert found["metrics"] == record["metrics"] and found["config"] == record["config"]
    assert (found["experiment"], found["iteration"], found["checkpoint"]) == ("first", 60, str(path))
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_an_own_run_is_evaluated_by_its_name(project, capsys):
    train(capsys, "first", "--set", "hidden=3")
    status, out, _ = call(capsys, "evaluate", "first_hidden-3")
    assert status == 0 and out.startswith("first_hidden-3: 60 of 60")
    status, _, err = call(capsys, "evaluate", "first_hidden-4")
    assert status == 2 and "(did you mean first_hidden-3?)" in err
    status, _, err = call(capsys, "evaluate", "first_hidden-3", "--set", "hidden=4")
    assert status == 2 and "holds other parameters than first_hidden-3_hidden-4 has" in err
    experiments.catalogue().pop("first")
    status, _, err = call(capsys, "evaluate", "first_hidden-3")
    assert status == 2 and "is of 'first_hidden-3', which is no experiment here nor a variant" in err


def test_a_run_elsewhere_is_evaluated_by_its_name_and_folder(project, capsys):
    mine = project / "mine"
    train(capsys, "first", "--out", str(mine), "--budget", "0")
    status, out, _ = call(capsys, "evaluate", "first", "--out", str(mine))
    rows = [line.split() for line in out.splitlines() if line.startswith("mse_")]
    assert status == 0 and "1 of 60" in out and all(row[1] == row[4] for row in rows), "beside its own record"
    status, _, err = call(capsys, "evaluate", "first")
    assert status == 2 and "`metabook train first` makes it, and --out FOLDER finds one elsewhere" in err
    status, _, err = call(capsys, "evaluate", "frist", "--out", str(mine))
    assert status == 2 and f"no checkpoint 'frist' in {mine} (did you mean first?); it holds first" in err


def test_an_evaluation_says_what_its_columns_are_and_how_long_it_takes(project, capsys, monkeypatch):
    train(capsys, "first", "--budget", "0")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    evaluate = tiny.TinyRun.evaluate
    monkeypatch.setattr(tiny.TinyRun, "evaluate", lambda self, theta: (time.sleep(3.5), evaluate(self, theta))[1])
    status, out, err = call(capsys, "evaluate", "first")
    assert status == 0 and "measuring first: 00:03" in err
    assert "n: how many values the mean is over" in out and "± 95 %: half the width" in out
    assert out.splitlines()[-1] == "`metabook show first` says what each metric means."


def test_ctrl_c_stops_an_evaluation_at_once(project, capsys, monkeypatch):
    train(capsys, "first", "--budget", "0")
    monkeypatch.setattr(tiny.TinyRun, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    status, out, err = call(capsys, "evaluate", "first")
    assert (status, out) == (130, "")
    assert err == "metabook: stopped; an evaluation writes nothing, so run the same command to measure anew\n"


def test_the_short_part_of_an_evaluation(project, capsys, monkeypatch):
    train(capsys, "first", "--budget", "0")
    part = {"spot_mse_0": statistics.Interval(1.5, float("nan"), 1)}
    monkeypatch.setattr(tiny.TinyRun, "spot_check", lambda *_: part, raising=False)
    assert json.loads(call(capsys, "evaluate", "first", "--spot", "--json")[1])["metrics"] == {
        "spot_mse_0": {"value": 1.5, "ci95": None, "n": 1}
    }
    assert "mse_1 " in call(capsys, "evaluate", "first")[1]


# ---------------------------------------- stopping


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch, tiny
from helpers import cli, experiments, progress
torch.set_num_threads(1)
progress.EVERY = 0.0
experiments.catalogue = lambda: {{"tiny": tiny.Tiny(pause={pause})}}
sys.exit(cli.main(["train", "tiny", "--device", "cpu", "--no-compile", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_a_record_and_goes_on_bit_for_bit(tmp_path, number):
    """A signal from outside, as Ctrl-C in a terminal or a machine that is shut down sends it."""
    environment = {**os.environ, "METABOOK_ROOT": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    code = RUN.format(tests=str(Path(tiny.__file__).parent), pause=0.02)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        seen = ""
        while not re.search(r" [1-9]\d*/240 \[", seen):  # the progress bar moves: it trains
            assert process.poll() is None, seen
            seen = (seen + process.stderr.read(1))[-200:]
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "metabook: stopped; what was finished is kept, run the same command to go on"
    record = json.loads((tmp_path / "data" / "records" / "tiny.json").read_text())
    assert record["status"] == "partial" and 0 < record["iterations"]["done"] < 240
    assert f"tiny: {record['iterations']['done']} of 240 iterations" in out
    tiny.train(tmp_path / "data")
    tiny.train(tmp_path / "whole")
    tiny.assert_same(tmp_path / "data", tmp_path / "whole")


def test_devices():
    assert runtime.pick_device("cpu") == torch.device("cpu")
    assert runtime.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
