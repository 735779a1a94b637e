"""One experiment, trained by several processes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from miniatures import MINIATURES
from miniatures import little as little  # a fixture
from processes import together
from tiny import Tiny

from helpers.errors import UserError
from helpers.experiments import maml
from helpers.lab import checkpoints, few_shot, training
from helpers.numerics import ranks


@pytest.fixture(autouse=True)
def plain_steps(monkeypatch):
    """Adam at first goes by the signs of the gradient, which rounding decides where it is small."""
    monkeypatch.setattr(maml.Omniglot, "outer", "sgd")


def experiment():
    return replace(MINIATURES["maml-mlp"](), iterations=4, evaluate_every=2, meta_batch=3)


def trained(place, **settings):
    """What remains of a run: its record without times, and its parameters."""
    settings = {"data": place, "progress": False, "say": lambda _: None} | settings
    record = training.train(experiment(), **settings)
    return record["metrics"], record["status"], [(s["end"], s.get("ranks")) for s in record["provenance"]["slices"]]


def parameters(place):
    return checkpoints.load_theta("mini", place / "checkpoints")


KEPT = []


@pytest.fixture
def one(little, tmp_path):  # noqa: F811
    """Metrics and parameters of the run of one process, which is trained once for all tests."""
    if not KEPT:
        KEPT.append((trained(tmp_path / "one")[0], parameters(tmp_path / "one")))
    return KEPT[0]


@pytest.mark.parametrize("count", [2, 3])
def test_the_run_is_that_of_one_process(count, tmp_path, one):
    found = together(count, lambda: trained(tmp_path / "many"))
    assert found == [found[0]] * count  # every rank is told the record
    metrics, status, slices = found[0]
    assert status == "complete" and slices == [(4, count)]
    assert metrics.keys() == one[0].keys()
    for name, entry in metrics.items():
        assert entry["value"] == pytest.approx(one[0][name]["value"], abs=1e-6), name
    for name, value in one[1].items():
        torch.testing.assert_close(parameters(tmp_path / "many")[name], value, rtol=1e-3, atol=1e-4)


def stopped_by(monkeypatch, rank, iteration, number):
    """Send a signal to one rank within an iteration."""
    gradient = few_shot.FewShotRun.gradient

    def struck(self, theta, generator, at):
        if at == iteration and ranks.number() == rank and ranks.count() > 1:
            os.kill(os.getpid(), number)
        return gradient(self, theta, generator, at)

    monkeypatch.setattr(few_shot.FewShotRun, "gradient", struck)


@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_is_lost_the_run_goes_on_from_a_checkpoint_with_another_number(lost, tmp_path, one, monkeypatch):
    stopped_by(monkeypatch, lost, 2, signal.SIGKILL)
    found = together(2, lambda: trained(tmp_path / "many", save_every=0.0))
    assert found[lost] is None
    name, sentence = found[1 - lost]
    assert name == "Lost" and "another process of this run is gone" in sentence
    assert "run the same command again, with any number of processes" in sentence
    kept = checkpoints.read_checkpoint(tmp_path / "many" / "checkpoints" / "mini.safetensors.xz")[1]["iteration"]
    assert kept == 2
    _, status, slices = trained(tmp_path / "many")
    assert status == "complete" and slices == [(2, 2), (4, None)]
    for name, value in one[1].items():
        torch.testing.assert_close(parameters(tmp_path / "many")[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("asked", [0, 1])
def test_when_one_is_asked_to_stop_all_stop_after_the_same_iteration(asked, tmp_path, little, monkeypatch):  # noqa: F811
    stopped_by(monkeypatch, asked, 1, signal.SIGINT)
    found = together(2, lambda: trained(tmp_path))
    assert [name for name, _ in found] == ["KeyboardInterrupt", "SystemExit"]
    kept = checkpoints.read_checkpoint(tmp_path / "checkpoints" / "mini.safetensors.xz")[1]["iteration"]
    assert kept == 2


def test_a_budget_ends_all(tmp_path, little):  # noqa: F811
    first, second = together(2, lambda: trained(tmp_path, budget=0))
    assert first == second and first[1:] == ("partial", [(1, 2)])


def test_what_is_not_divided_is_refused(tmp_path):
    def run():
        training.train(Tiny(), data=tmp_path, progress=False, say=lambda _: None)

    first, _ = together(2, run)
    assert first == ("UserError", "tiny is not divided among processes: train it by one, without torchrun")


def test_a_run_that_is_being_trained_is_left_alone(tmp_path, little):  # noqa: F811
    from helpers import runtime

    path = tmp_path / "checkpoints" / "mini.safetensors.xz"
    path.parent.mkdir()
    with runtime.only_one(path, "training mini"):
        first, second = together(2, lambda: trained(tmp_path))
    assert first[0] == "Busy" and second == ("SystemExit", "2")
    with pytest.raises(UserError, match="there is no checkpoint"):
        parameters(tmp_path)
