"""A run goes on with another kind of device, there and back; its record says where the generator was seeded anew."""

from __future__ import annotations

import shutil

import pytest
import standin
import torch

from helpers import experiments
from helpers.experiments.maml import SinusoidStudy
from helpers.lab import checkpoints, records, training
from helpers.runtime import root

TINY = SinusoidStudy("tiny", iterations=3, hidden=(4,), meta_batch=2, seeds=2, test_tasks=3, test_steps=(0, 1, 10))


def train(device, data, experiment=TINY):
    """One iteration, whatever the budget."""
    quiet = {"progress": False, "say": lambda _: None}
    return training.train(experiment, device=device, budget=0.0, data=data, **quiet)


def kept(data, name="tiny"):
    return checkpoints.read_checkpoint(data / "checkpoints" / f"{name}.safetensors.xz")


def test_there_and_back(tmp_path):
    train("cpu", tmp_path)
    tensors, header = kept(tmp_path)
    assert header["generator"] == "cpu" and len(tensors["generator"]) == 5056
    with standin.card():
        record = train("cuda", tmp_path)
        there = torch.cuda.get_device_name()
    tensors, header = kept(tmp_path)
    assert header["generator"] == "cuda" and len(tensors["generator"]) == 16
    assert record["iterations"]["done"] == header["iteration"] == 2
    record = train("cpu", tmp_path)
    slices = record["provenance"]["slices"]
    assert [piece.get("reseeded", False) for piece in slices] == [False, True, True]
    assert [piece["device"] == there for piece in slices] == [False, True, False]
    assert [(piece["begin"], piece["end"]) for piece in slices] == [(0, 1), (1, 2), (2, 3)]
    assert record["status"] == "complete"


def test_on_one_kind_nothing_is_seeded_anew(tmp_path):
    with standin.card():
        for _ in range(TINY.iterations):
            record = train("cuda", tmp_path / "parts")
        quiet = {"progress": False, "say": lambda _: None}
        training.train(TINY, device="cuda", data=tmp_path / "whole", **quiet)
    assert not any(piece.get("reseeded") for piece in record["provenance"]["slices"])
    (parts, _), (whole, _) = kept(tmp_path / "parts"), kept(tmp_path / "whole")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


def partial() -> list[str]:
    """Committed runs that are not finished, the smallest checkpoint first."""
    found = [name for name, record in records.load_all().items() if record["status"] == "partial"]
    found = [name for name in found if not checkpoints.given_up(experiments.find(name))]
    return sorted(found, key=lambda name: (root() / "data/checkpoints" / f"{name}.safetensors.xz").stat().st_size)


@pytest.mark.slow
def test_a_committed_run_goes_on_there(tmp_path):
    """Its parameters and optimiser are taken over; the generator is seeded anew, as any device would have to."""
    names = partial()
    if not names:
        pytest.skip("no committed run is unfinished")
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(root() / "data/checkpoints" / f"{names[0]}.safetensors.xz", tmp_path / "checkpoints")
    tensors, header = kept(tmp_path, names[0])
    experiment = experiments.find(names[0])
    with standin.card():
        draws = torch.Generator(device="cuda").manual_seed(experiment.seed)
        theta = {
            name.removeprefix("theta/"): torch.zeros(value.shape, device="cuda")
            for name, value in tensors.items()
            if name.startswith("theta/")
        }
        state = checkpoints.State(theta, experiment.outer_rate, draws, experiment.outer)
        state.restore(
            tmp_path / "checkpoints" / f"{names[0]}.safetensors.xz",
            experiment.config(),
            experiment.iterations,
            experiment.seed,
        )
        assert state.reseeded and state.iteration == header["iteration"]
        for name, value in state.values().items():
            assert value.is_cuda and torch.equal(value.cpu(), tensors[f"theta/{name}"].to(value.dtype))
        state.apply({name: torch.ones_like(value) for name, value in state.values().items()})
        assert all(value.is_cuda and value.isfinite().all() for value in state.values().values())
