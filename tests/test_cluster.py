"""Runs and children on a cluster: as one process would, also when a worker dies in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from refusals import refused
from tiny import Tiny

from helpers import campaign, cli, cluster, experiments, runtime
from helpers.experiments.nos import Search
from helpers.lab import checkpoints, records, training
from helpers.optimizers.children import Children

pytestmark = pytest.mark.slow
LONG = Tiny(name="long", iterations=150, pause=0.02)
SHORT = replace(experiments.find("maml-sinusoid-10"), name="maml-sinusoid-10_short", iterations=2, test_tasks=20)
SMALL = Children(train=200, valid=100, test=100, epochs=2, filters=4, chunk=4)
SEARCH = Search("nos-digits_small", SMALL, searches=1, proposals=6, rounds=2, ppo_steps=1, recheck=2, iterations=2)


@pytest.fixture(scope="module")
def client():
    with cluster.connected("local:2") as client:
        yield client


def kill_a_worker(client) -> int:
    """Kill, without a word, a worker that is busy."""
    busy = next(worker for worker, tasks in client.processing().items() if tasks)
    (process,) = client.run(os.getpid, workers=[busy]).values()
    os.kill(process, signal.SIGKILL)
    return process


def same(experiment, one, other) -> None:
    """Checkpoint and record of two folders agree in everything but the time."""
    found = [
        checkpoints.read_checkpoint(checkpoints.files(experiment.name, place)[".safetensors.xz"])
        for place in (one, other)
    ]
    (tensors, _), (theirs, _) = found
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[name], theirs[name]) for name in tensors)
    ours, record = (records.load(experiment.name, where=place / "records") for place in (one, other))
    for key in ("metrics", "losses", "curve", "config", "iterations", "status"):
        assert ours.get(key) == record.get(key), key


def test_runs_come_home_as_from_one_process_though_a_worker_was_killed(client, tmp_path):
    home = checkpoints.files(LONG.name, tmp_path / "many")[checkpoints.SUFFIX]
    killed = []

    def kill():
        while not home.exists():
            time.sleep(0.02)
        killed.append(kill_a_worker(client))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    said = []
    assert cluster.train([LONG, SHORT], client, data=tmp_path / "many", piece=0.7, say=said.append) == []
    killer.join()
    assert killed and {line.partition(":")[0] for line in said} == {LONG.name, SHORT.name}
    for experiment in (LONG, SHORT):
        whole = client.submit(cluster.go_on, experiment, {}, None, True, {}, pure=False).result()  # in one go
        for suffix, path in checkpoints.files(experiment.name, tmp_path / "one").items():
            if suffix in whole.files:
                runtime.write_atomically(path, whole.files[suffix])
        same(experiment, tmp_path / "many", tmp_path / "one")


def test_a_run_that_fails_stops_no_other_and_is_named(client, tmp_path):
    wrong = Tiny(name="wrong", poison=3)
    said = []
    assert cluster.train([wrong, SHORT], client, data=tmp_path, say=said.append) == [wrong.name]
    assert any("no longer finite" in line for line in said)
    assert records.load(SHORT.name, where=tmp_path / "records")["status"] == "complete"


def test_when_the_time_is_over_what_is_there_is_measured(client, tmp_path):
    endless = replace(LONG, name="endless", iterations=10_000_000)
    cluster.train([endless], client, data=tmp_path, budget=2.0, piece=1.0, say=str)
    record = records.load(endless.name, where=tmp_path / "records")
    assert record["status"] == "partial" and record["iterations"]["done"] > 0


def test_children_are_tried_elsewhere_with_the_same_log(client, tmp_path):
    for folder, arrange in (("one", lambda run: None), ("many", cluster.spread(client))):
        training.train(SEARCH, data=tmp_path / folder, arrange=arrange, progress=False, say=str)
    one, many = (checkpoints.load_theta(SEARCH.name, tmp_path / folder / "checkpoints") for folder in ("one", "many"))
    assert one.keys() == many.keys()
    for name in one:
        if not name.endswith("log/seconds"):
            torch.testing.assert_close(one[name], many[name], rtol=0, atol=0, msg=name)


def test_a_campaign_on_a_cluster_packs_what_came_home(client, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connected", lambda where: nullcontext(client))
    monkeypatch.setattr(experiments, "catalogue", lambda: {"short": Tiny(name="short", iterations=5)})
    out, data = tmp_path / "out", tmp_path / "data"
    assert campaign.run(out, minutes=1, device="cpu", names=["short"], cluster="local:1", data=data)
    assert campaign.merge(out, data, say=str) == ["short"]
    assert records.load("short", where=data / "records")["status"] == "complete"


def test_what_is_no_cluster_is_refused(monkeypatch):
    assert "is no cluster" in refused(lambda: cluster.connected("local:many").__enter__())
    assert "answers at" in refused(lambda: cluster.connected("nowhere").__enter__())
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    assert "needs Dask" in refused(lambda: cluster.connected("local:2").__enter__())


@pytest.mark.parametrize("option", [["--fresh"], ["--seed", "3"], ["--compile"], ["--out", "mine"]])
def test_what_is_for_this_machine_is_refused(option, capsys):
    assert cli.main(["train", "maml-sinusoid-5", "--cluster", "local:2", *option]) == 2
    assert "leave --cluster out" in capsys.readouterr().err
