"""A campaign trains by priority, side by side, loses nothing when it is killed, and is merged with care."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
import yaml
from refusals import refused

from helpers import campaign, cli, experiments, runtime
from helpers.lab import checkpoints

QUICK = ("maml-sinusoid-5", "turtles-random")  # from nothing; the first needs minutes, the second seconds


def iteration(folder, name=QUICK[0]):
    return checkpoints.read_checkpoint(folder / "checkpoints" / f"{name}.safetensors.xz")[1]["iteration"]


def command(out, data, minutes):
    """The campaign in a process of its own, over another folder than the committed data."""
    program = (
        "import sys; from pathlib import Path; from helpers import campaign; "
        "campaign.run(Path(sys.argv[1]), minutes=float(sys.argv[3]), device='cpu', names=sys.argv[4:], jobs=2, "
        "data=Path(sys.argv[2]), save_every=1)"
    )
    return [sys.executable, "-c", program, str(out), str(data), str(minutes), *QUICK]


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_and_comes_home(tmp_path):
    out, data = tmp_path / "out", tmp_path / "data"
    child = subprocess.Popen(command(out, data, 10), stderr=subprocess.DEVNULL, start_new_session=True)
    path = out / "work" / "checkpoints" / f"{QUICK[0]}.safetensors.xz"
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None and not path.exists():
        time.sleep(0.2)
    children = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split()
    workers = [int(pid) for pid in children]
    assert path.exists() and workers
    for pid in (child.pid, *workers):  # the machine goes away: nobody has time to say goodbye
        os.kill(pid, signal.SIGKILL)
    child.wait()
    for leftover in path.parent.glob(".*"):
        leftover.unlink()
    before = iteration(out / "work")
    assert before > 0

    ran = subprocess.run(command(out, data, 0.5), check=True, capture_output=True, text=True)
    assert iteration(out / "work") > before
    written = out / "work" / "records" / f"{QUICK[0]}.json"
    # On a busy machine the evaluation may come too late, which is said.
    assert written.exists() != (f"{QUICK[0]}: stopped before its evaluation was over" in ran.stdout)
    packs = sorted(out.glob("campaign-*.tar"))
    assert packs and len(packs) <= campaign.PACKS and all(p.stat().st_size <= campaign.PACK_BYTES for p in packs)

    assert QUICK[0] in campaign.merge(out, data, say=lambda _: None)
    assert iteration(data) == iteration(out / "work")
    if written.exists():
        record = json.loads((data / "records" / f"{QUICK[0]}.json").read_text())
        assert record["status"] == "partial" and record["iterations"]["done"] == iteration(data)
    said = []
    assert "were refused" in refused(lambda: campaign.merge(out, data, say=said.append))
    assert any("no further than what is there" in line for line in said)


# ---------------------------------------- merging


def brought(folder, name, change=lambda header: None, record=None, iterations=3):
    """A pack with one small run of that name."""
    tiny = experiments.find(name)
    work = folder / "work"
    generator = runtime.generator(0)
    state = checkpoints.State({"w": torch.zeros(2)}, 1e-3, generator)
    state.iteration = iterations
    path = work / "checkpoints" / f"{name}.safetensors.xz"
    config = tiny.config()
    change(config)
    state.save(path, config)
    if record is not None:
        runtime.write_atomically(work / "records" / f"{name}.json", record)
    campaign.pack(folder, folder / "nothing", say=lambda _: None)
    return folder


def test_a_run_of_another_configuration_is_refused_and_the_rest_is_taken(tmp_path):
    brought(tmp_path, "maml-sinusoid-5", lambda config: config.update(shots=7))
    brought(tmp_path, "maml-sinusoid-10")
    said = []
    assert "1 of 2 runs" in refused(lambda: campaign.merge(tmp_path, tmp_path / "data", say=said.append))
    assert any("maml-sinusoid-5: refused, it is of another configuration" in line for line in said)
    assert [path.name for path in (tmp_path / "data" / "checkpoints").iterdir()] == ["maml-sinusoid-10.safetensors.xz"]
    # Without a record the numbers are still to be measured, which is said.
    assert any("without a record" in line for line in said) and not (tmp_path / "data" / "records").exists()


def test_a_damaged_record_or_pack_is_refused_and_nothing_is_written(tmp_path):
    brought(tmp_path, "maml-sinusoid-5", record=b'{"experiment": ')
    said = []
    refused(lambda: campaign.merge(tmp_path, tmp_path / "data", say=said.append))
    assert any("its record is damaged" in line for line in said)
    assert not list((tmp_path / "data" / "checkpoints").iterdir())
    (tmp_path / "campaign-1.tar").write_bytes(b"not an archive")
    assert "is damaged" in refused(lambda: campaign.merge(tmp_path, tmp_path / "data"))


@pytest.mark.parametrize(
    "member", ["../records/x.json", "records/a/b.json", "/etc/passwd", "records/.x.json", "x.json"]
)
def test_a_pack_cannot_write_elsewhere(tmp_path, member):
    (tmp_path / "x").write_text("{}")
    with tarfile.open(tmp_path / "campaign-1.tar", "w") as archive:
        archive.add(tmp_path / "x", arcname=member)
    assert "no file of a campaign" in refused(lambda: campaign.merge(tmp_path, tmp_path / "data"))


def test_nothing_to_merge_is_said(tmp_path):
    assert "no files campaign-" in refused(lambda: campaign.merge(tmp_path))


def test_packs_hold_what_is_new_and_say_what_does_not_fit(tmp_path, monkeypatch):
    for name in ("maml-sinusoid-5", "maml-sinusoid-10", "reptile-sine"):
        brought(tmp_path, name)
    same = tmp_path / "data" / "checkpoints" / "reptile-sine.safetensors.xz"
    same.parent.mkdir(parents=True)
    same.write_bytes((tmp_path / "work" / "checkpoints" / same.name).read_bytes())
    size = (tmp_path / "work" / "checkpoints" / "maml-sinusoid-5.safetensors.xz").stat().st_size
    monkeypatch.setattr(campaign, "PACK_BYTES", size + 3000)
    monkeypatch.setattr(campaign, "PACKS", 1)
    said = []
    (pack,) = campaign.pack(tmp_path, tmp_path / "data", said.append)
    with tarfile.open(pack) as archive:
        assert archive.getnames() == ["checkpoints/maml-sinusoid-10.safetensors.xz"]
    assert "maml-sinusoid-5: not packed, since it does not fit" in said


# ---------------------------------------- the plan


def test_the_plan_names_experiments_and_puts_a_gpus_first():
    known, plan = set(experiments.catalogue()), campaign.plan()
    entries = yaml.safe_load((runtime.root() / "data" / "campaign.yaml").read_text())["runs"]
    assert plan == [entry["run"] for entry in entries] and len(plan) == len(set(plan))
    assert all(entry["hours"] > 0 and entry["decides"] for entry in entries)
    missing = set(plan) - known
    assert not missing, missing
    marked = {entry["run"] for entry in entries if entry.get("gpu")}
    on_gpu = campaign.plan(device="cuda")
    assert set(on_gpu[: len(marked)]) == marked and sorted(on_gpu) == sorted(plan)
    assert [name for name in plan if name not in marked] == on_gpu[len(marked) :]


@pytest.mark.parametrize("text", ["runs: 3", "[]", "runs: [{name: x}]", "a: [", ""])
def test_a_plan_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    assert "cannot be read" in refused(lambda: campaign.plan(path))
    assert "there is no plan" in refused(lambda: campaign.plan(tmp_path / "none.yaml"))


def test_a_wrong_gradient_is_refused(monkeypatch):
    from helpers import estimators

    assert campaign.check_gradient(torch.device("cpu")) == 0
    right, calls = estimators.maml, []

    def wrong(*arguments):
        gradient, values = right(*arguments)
        calls.append(1)
        return {name: g * (1.01 if len(calls) == 2 else 1) for name, g in gradient.items()}, values

    monkeypatch.setattr(estimators, "maml", wrong)
    assert "do not train there" in refused(lambda: campaign.check_gradient(torch.device("cpu")))


def test_mistakes_of_the_command_line_are_one_sentence(tmp_path, capsys):
    folder = str(tmp_path)
    for words, message in (
        (["campaign"], "needs --minutes and --out"),
        (["campaign", "--out", folder, "--minutes", "1", "none"], "no experiment 'none'"),
        (["campaign", "--merge", folder, "--out", folder], "takes a folder and nothing else"),
        (["campaign", "--merge", folder], "no files campaign-"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
