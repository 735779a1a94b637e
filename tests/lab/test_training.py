"""Training: whatever interrupts it, it goes on bit for bit; what goes wrong is one sentence and costs nothing."""

from __future__ import annotations

import errno
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import safetensors.torch
import torch
from processes import beside
from refusals import refused
from tiny import Tiny, TinyRun, assert_same, checkpoint, stored, train

from helpers import runtime
from helpers.errors import Terminated, UserError
from helpers.lab import checkpoints, records, schedules, statistics, training
from helpers.models.mlp import MLP
from helpers.runtime import root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


# ---------------------------------------- records of runs


def test_record_of_a_complete_run(whole):
    folder, record = whole
    assert record == json.loads((folder / "records" / "tiny.json").read_text())
    assert record["status"] == "complete" and record["iterations"] == {"done": 240, "planned": 240}
    assert record["metrics"]["mse_1"]["n"] == 20 and record["metrics"]["mse_1"]["ci95"] > 0
    assert [entry["iteration"] for entry in record["curve"]] == [90, 180]
    assert len(record["losses"]["values"]) == 240 // record["losses"]["every"]
    assert record["losses"]["values"][-1] < record["losses"]["values"][0], "it learned nothing"
    (only,) = record["provenance"]["slices"]
    assert (only["begin"], only["end"]) == (0, 240) and only["commit"] and only["torch"] == torch.__version__


def test_records_follow_the_schema(whole, tmp_path):
    schema = json.loads((root() / "data" / "schemas" / "record.schema.json").read_text())
    jsonschema.validate(whole[1], schema)
    jsonschema.validate(train(tmp_path, budget=0), schema)


def test_same_seed_same_run_other_seed_other_run(whole, tmp_path):
    train(tmp_path / "again")
    assert_same(whole[0], tmp_path / "again")
    train(tmp_path / "other", Tiny(seed=1))
    ours, theirs = (stored(f)[0]["theta/linear1.weight"] for f in (whole[0], tmp_path / "other"))
    assert not torch.equal(ours, theirs)


def test_theta_can_be_loaded_alone(whole):
    theta = checkpoints.load_theta("tiny", whole[0] / "checkpoints")
    assert {name: tuple(value.shape) for name, value in theta.items()} == {
        "linear1.weight": (1, 8), "linear1.bias": (8,), "linear2.weight": (8, 1), "linear2.bias": (1,),
    }  # fmt: skip
    assert "there is no checkpoint" in refused(lambda: checkpoints.load_theta("none", whole[0] / "checkpoints"))


# ---------------------------------------- interruptions


def test_budget_stops_cleanly_and_the_run_goes_on_bit_for_bit(whole, tmp_path):
    """Slices of different lengths, none of which ends where the history gets an entry."""
    done, slices = 0, 0
    while done < 240:
        record = train(tmp_path, budget=0.03 + 0.04 * (slices % 3))
        assert record["iterations"]["done"] > done
        done, slices = record["iterations"]["done"], slices + 1
        assert record["status"] == ("complete" if done == 240 else "partial")
    assert slices > 1
    spans = [(s["begin"], s["end"]) for s in record["provenance"]["slices"]]
    assert spans[0][0] == 0 and spans[-1][1] == 240
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
    assert_same(whole[0], tmp_path)
    assert record["metrics"] == whole[1]["metrics"]


def test_smallest_budget_makes_one_iteration(tmp_path):
    assert train(tmp_path, budget=0)["iterations"]["done"] == 1


def test_a_complete_run_is_not_trained_further(whole, tmp_path):
    train(tmp_path)
    again = train(tmp_path)
    assert_same(whole[0], tmp_path)
    assert again["metrics"] == whole[1]["metrics"] and len(again["provenance"]["slices"]) == 1


def test_killed_runs_go_on_bit_for_bit(whole, tmp_path):
    """SIGKILL at moments that nobody chose, twice, while a checkpoint is written after every iteration."""
    for wanted in (5, 80):
        with beside(lambda: train(tmp_path, Tiny(pause=0.002), save_every=0)) as gone:
            until = time.monotonic() + 120
            while iteration(tmp_path) < wanted:
                assert gone() is None and time.monotonic() < until
                time.sleep(0.01)
            assert "another process is training tiny at this moment" in refused(lambda: train(tmp_path))
        assert gone() == -signal.SIGKILL
        assert wanted <= iteration(tmp_path) < 240
        assert not (tmp_path / "records" / "tiny.json").exists()
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def iteration(folder: Path) -> int:
    return checkpoints.read_checkpoint(checkpoint(folder))[1]["iteration"] if checkpoint(folder).exists() else 0


def test_ctrl_c_keeps_everything(whole, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Tiny(stop=77))
    assert signal.getsignal(signal.SIGINT) is before
    record = json.loads((tmp_path / "records" / "tiny.json").read_text())
    assert record["status"] == "partial" and record["iterations"]["done"] == iteration(tmp_path) == 77
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_that_was_saved(whole, tmp_path, monkeypatch):
    """In the middle of an iteration; what was saved before is there, and nothing half done lies beside it."""
    gradient = TinyRun.gradient
    for number, error in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)):
        saved = iteration(tmp_path) + 20

        def impatient(self, theta, generator, at, number=number, last=saved):
            if at == last:
                signal.raise_signal(number)
                signal.raise_signal(number)
                pytest.fail("it went on")
            return gradient(self, theta, generator, at)

        with monkeypatch.context() as patch:
            patch.setattr(TinyRun, "gradient", impatient)
            with pytest.raises(error):
                train(tmp_path, save_every=0)
        assert iteration(tmp_path) == saved and not (tmp_path / "records" / "tiny.json").exists()
        assert [path.name for path in checkpoint(tmp_path).parent.iterdir()] == [checkpoint(tmp_path).name]
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def test_what_killed_saves_left_is_removed_at_the_next_start(tmp_path):
    left = [tmp_path / "checkpoints" / ".tiny.safetensors.xz.abc_1234", tmp_path / "records" / ".tiny.json.abc_1234"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    train(tmp_path, budget=0)
    assert not any(path.exists() for path in left)


def test_a_finished_run_is_set_aside_not_lost(tmp_path):
    said = []
    before = [train(tmp_path), checkpoint(tmp_path).read_bytes()]
    record = tmp_path / "records" / "tiny.json"
    assert before[0] == json.loads(record.read_text())
    for suffix in ("", "1"):
        files = (checkpoint(tmp_path), record, record.with_name("tiny.samples.csv.gz"))
        kept = [path.with_name(f"{path.name}.old{suffix}") for path in files]
        contents = [path.read_bytes() for path in files]
        training.train(Tiny(), data=tmp_path, fresh=True, budget=0, progress=False, say=said.append)
        assert [path.read_bytes() for path in kept] == contents
        assert f"tiny: the earlier run is kept as {', '.join(map(str, kept))}" in said
        assert iteration(tmp_path) == 1


# ---------------------------------------- iterations that take long


class Slow(TinyRun):
    """From its third iteration of a call on it draws and then waits for the clock, for a minute at most."""

    ctrl_c = False

    def gradient(self, theta, generator, iteration):
        if self.calls >= self.quick:
            torch.rand(3, generator=generator)
            if self.ctrl_c and self.calls == self.quick:
                os.kill(os.getpid(), signal.SIGINT)
            late = time.monotonic() + 60
            while time.monotonic() < late:
                self.check_clock()
                time.sleep(0.01)
        return super().gradient(theta, generator, iteration)


@pytest.fixture
def slow(monkeypatch):
    """Iterations that take a minute, and little patience with them."""
    monkeypatch.setattr(training, "PATIENCE", 0.1)
    monkeypatch.setattr(training, "RECORDING", 0.1)
    monkeypatch.setattr(Slow, "quick", 2, raising=False)
    setup = Tiny.setup
    monkeypatch.setattr(Tiny, "setup", lambda self, device, compiled: Slow(self))
    return lambda: monkeypatch.setattr(Tiny, "setup", setup)


def test_a_budget_ends_an_iteration_that_looks_at_the_clock(whole, tmp_path, slow):
    began = time.monotonic()
    record = train(tmp_path, budget=0.3)
    assert time.monotonic() - began < 10 and record["iterations"]["done"] == iteration(tmp_path) == 2
    slow()
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def test_ctrl_c_ends_an_iteration_that_looks_at_the_clock(whole, tmp_path, slow, monkeypatch):
    monkeypatch.setattr(Slow, "ctrl_c", True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert json.loads((tmp_path / "records" / "tiny.json").read_text())["iterations"]["done"] == 2
    slow()
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def test_a_budget_within_the_first_iteration_is_refused_and_a_later_one_costs_nothing(tmp_path, slow, monkeypatch):
    monkeypatch.setattr(Slow, "quick", 0)
    assert "an iteration of tiny takes longer than the 0 s" in refused(lambda: train(tmp_path, budget=0.2))
    assert not checkpoint(tmp_path).exists() and not (tmp_path / "records" / "tiny.json").exists()
    monkeypatch.setattr(Slow, "quick", 1)
    train(tmp_path, budget=0)
    monkeypatch.setattr(Slow, "quick", 0)
    record = train(tmp_path, budget=0.2)
    assert record["iterations"]["done"] == 1 and len(record["provenance"]["slices"]) == 1


class OnlyMeasures(TinyRun):
    """Nothing is learned: what was measured is carried along."""

    def init(self, generator):
        return {"carried:done": torch.zeros(())}

    def gradient(self, theta, generator, iteration):
        return {"carried:done": torch.tensor(-1.0)}, torch.zeros(())

    def evaluate(self, theta):
        return {"done": statistics.Interval(theta["carried:done"].item(), float("nan"), 1)}


def test_a_run_that_only_measures_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "setup", lambda self, device, compiled: OnlyMeasures(self))
    train(tmp_path, Tiny(iterations=3), budget=0)
    assert train(tmp_path, Tiny(iterations=3))["metrics"]["done"]["value"] == 3


def test_fresh_starts_over(whole, tmp_path):
    train(tmp_path, Tiny(seed=1), budget=0)
    assert "another configuration" in refused(lambda: train(tmp_path))
    record = train(tmp_path, fresh=True)
    assert [s["begin"] for s in record["provenance"]["slices"]] == [0]
    assert_same(whole[0], tmp_path)


# ---------------------------------------- what a finished run leaves


class Measured(TinyRun):
    """Judged by its parameters themselves; ``ci95`` says how much they may move."""

    ci95 = 1.0

    def evaluate(self, theta):
        total = sum(value.double().abs().sum().item() for value in theta.values())
        return {"size": statistics.Interval(total, self.ci95, 2)}


def test_a_finished_run_keeps_its_parameters_alone_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "setup", lambda self, device, compiled: Measured(self))
    train(tmp_path, budget=0)
    begun, header = checkpoints.read_checkpoint(checkpoint(tmp_path))
    assert "generator" in begun and any(name.startswith("adam/") for name in begun), "it could not go on"
    assert header["precision"] == "single"
    record = train(tmp_path)
    kept, header = checkpoints.read_checkpoint(checkpoint(tmp_path))
    assert header["precision"] == "half" and {value.dtype for value in kept.values()} == {torch.float16}
    assert all(name.startswith("theta/") for name in kept)
    theta = checkpoints.load_theta("tiny", tmp_path / "checkpoints")
    assert {value.dtype for value in theta.values()} == {torch.float32}
    # The record is of the file, not of what was in memory.
    assert record["metrics"]["size"]["value"] == pytest.approx(Measured(Tiny()).evaluate(theta)["size"].value, rel=1e-9)
    again = train(tmp_path)
    assert again["metrics"] == record["metrics"] and again["provenance"]["slices"] == record["provenance"]["slices"]


def test_single_precision_stays_where_half_would_move_a_metric(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "setup", lambda self, device, compiled: Measured(self))
    monkeypatch.setattr(Measured, "ci95", 1e-9)
    said = []
    record = training.train(Tiny(), data=tmp_path, progress=False, say=said.append)
    tensors, header = checkpoints.read_checkpoint(checkpoint(tmp_path))
    assert header["precision"] == "single" and {value.dtype for value in tensors.values()} == {torch.float32}
    assert "half of it would move size" in said[0]
    theta = checkpoints.load_theta("tiny", tmp_path / "checkpoints")
    assert record["metrics"]["size"]["value"] == pytest.approx(Measured(Tiny()).evaluate(theta)["size"].value, rel=1e-9)


def test_what_half_precision_would_destroy_stays_single():
    theta = {"weight": torch.randn(50, generator=runtime.generator(0)), "square": torch.tensor([1e-5, 1e-9])}
    theta |= {"large": torch.tensor([1e5]), "count": torch.tensor([3])}
    stored = schedules.halved(theta)
    assert {name: value.dtype for name, value in stored.items()} == {
        "weight": torch.float16, "square": torch.float32, "large": torch.float32, "count": torch.int64,
    }  # fmt: skip


def test_metrics_that_move():
    def some(value, ci95, name="metric"):
        return {name: statistics.Interval(value, ci95, 3)}

    assert checkpoints.moved(some(1.0, 0.1), some(1.009, 0.1)) == []
    assert checkpoints.moved(some(1.0, 0.1), some(1.011, 0.1)) == ["metric"]
    assert checkpoints.moved(some(1.0, float("nan")), some(1.002, float("nan"))) == ["metric"]
    assert checkpoints.moved(some(1.0, 0.1), some(float("nan"), 0.1)) == ["metric"]
    assert checkpoints.moved(some(1.0, 0.1, "seconds_each"), some(2.0, 0.1, "seconds_each")) == []


def test_seconds_of_the_run_outlive_a_second_evaluation(tmp_path, monkeypatch):
    def evaluate(self, theta):
        return Measured.evaluate(self, theta) | (
            {"seconds_per_iteration": statistics.Interval(0.5, float("nan"), 9)} if self.calls else {}
        )

    monkeypatch.setattr(TinyRun, "evaluate", evaluate)
    monkeypatch.setattr(TinyRun, "ci95", 1.0, raising=False)
    assert train(tmp_path)["metrics"]["seconds_per_iteration"]["value"] == 0.5
    assert train(tmp_path)["metrics"]["seconds_per_iteration"]["value"] == 0.5


def test_a_damaged_record_of_a_finished_run_is_written_anew(tmp_path):
    """As the message about it says: run `metabook train` again."""
    record = train(tmp_path)
    (tmp_path / "records" / "tiny.json").write_text('{"experiment": ')
    assert train(tmp_path)["metrics"] == record["metrics"]


def test_the_form_is_named_where_it_was_chosen_and_nowhere_else(tmp_path, monkeypatch):
    (own,) = train(tmp_path / "own", budget=0)["provenance"]["slices"]
    assert "form" not in own and own["compiled"] is False
    used = []
    monkeypatch.setattr(TinyRun, "forms", ("eager",))
    monkeypatch.setattr(TinyRun, "use", lambda self, form: used.append(form))
    (named,) = training.train(Tiny(), data=tmp_path, budget=0, form="eager", progress=False, say=print)["provenance"][
        "slices"
    ]
    assert used == ["eager"] and named["form"] == "eager"


def test_a_signal_stops_the_evaluation_too(tmp_path, monkeypatch):
    experiment = Tiny(evaluate_every=1000)
    with monkeypatch.context() as patch:
        patch.setattr(TinyRun, "evaluate", lambda self, theta: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="its checkpoint at iteration 240 is kept, run the same command"):
            train(tmp_path, experiment)
    assert iteration(tmp_path) == 240 and not (tmp_path / "records" / "tiny.json").exists()
    assert train(tmp_path, experiment)["status"] == "complete"


@pytest.mark.parametrize("how", ["Ctrl-C", "death"])
def test_what_stops_a_measurement_on_the_way_costs_no_iteration(whole, tmp_path, monkeypatch, how):
    """The measurement is dropped at once, and the next call makes it."""
    said = []

    def interrupted(self, theta):
        if how == "death":
            raise SystemExit
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(training, "PATIENCE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(TinyRun, "spot_check", interrupted)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            training.train(Tiny(), data=tmp_path, progress=False, say=said.append)
    assert iteration(tmp_path) == 90 and checkpoints.read_checkpoint(checkpoint(tmp_path))[1]["curve"] == []
    assert (tmp_path / "records" / "tiny.json").exists() == (how == "Ctrl-C")
    assert said[:1] == ["tiny: stopped while it measured iteration 90; the next call does that"] * (how == "Ctrl-C")
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def rewritten(folder: Path, drop: str = "", **changes) -> None:
    """The checkpoint with other words in its header, or without some of its tensors; with a right digest."""
    tensors, header = checkpoints.read_checkpoint(checkpoint(folder))
    tensors = {name: value for name, value in tensors.items() if not drop or not name.startswith(drop)}
    text = json.dumps(header | changes)
    write(folder, tensors, {"metabook": text, "sha256": checkpoints.digest(text, tensors)})


def write(folder: Path, tensors, metadata) -> None:
    """A file of the right form, whatever it holds."""
    checkpoint(folder).parent.mkdir(parents=True, exist_ok=True)
    checkpoint(folder).write_bytes(lzma.compress(safetensors.torch.save(tensors, metadata)))


def test_an_unfinished_run_without_optimiser_or_generator_is_refused(tmp_path):
    for drop, message in (("adam/", "does not fit this experiment"), ("generator", "was given up at iteration 1,")):
        train(tmp_path, fresh=True, budget=0)
        assert not checkpoints.given_up(Tiny(), tmp_path / "checkpoints")
        rewritten(tmp_path, drop)
        assert message in refused(lambda: train(tmp_path))
    assert checkpoints.given_up(Tiny(), tmp_path / "checkpoints")
    assert not checkpoints.given_up(Tiny(), tmp_path), "there is no checkpoint"
    assert not checkpoints.given_up(Tiny(seed=1), tmp_path / "checkpoints"), "it is another run's"
    train(tmp_path, fresh=True)
    assert not checkpoints.given_up(Tiny(), tmp_path / "checkpoints"), "it is finished"


def test_a_checkpoint_without_a_digest_is_refused(tmp_path):
    train(tmp_path, budget=0)
    tensors, header = checkpoints.read_checkpoint(checkpoint(tmp_path))
    write(tmp_path, tensors, {"metabook": json.dumps(header)})
    assert "'sha256'" in refused(lambda: train(tmp_path))


# ---------------------------------------- another kind of device


def test_a_generator_of_another_kind_is_seeded_anew(tmp_path):
    """A file that says it comes from a GPU goes on here, from seed and iteration, and the record says so."""
    few = Tiny(iterations=20)
    train(tmp_path, few, budget=0)
    at = iteration(tmp_path)
    rewritten(tmp_path, generator="cuda")
    record = train(tmp_path, few)
    assert [s.get("reseeded", False) for s in record["provenance"]["slices"]] == [False, True]
    first = stored(tmp_path)
    for folder, generator in (("same", "cuda"), ("kept", "cpu")):
        train(tmp_path / folder, few, budget=0)
        assert iteration(tmp_path / folder) == at
        rewritten(tmp_path / folder, generator=generator)
        train(tmp_path / folder, few)
    assert_same(tmp_path, tmp_path / "same")
    assert not torch.equal(first[0]["theta/linear1.weight"], stored(tmp_path / "kept")[0]["theta/linear1.weight"])


def test_no_two_runs_take_over_with_the_same_seed():
    seeds = {schedules.seed_at(seed, iteration) for seed in range(30) for iteration in range(0, 3000, 100)}
    assert len(seeds) == 30 * 30 and all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------- a run that loses its footing


def test_the_rule_of_quiet_points():
    assert schedules.steady([9.0]) and schedules.steady([1.0, 50.0, 2.0, 3.0, 100.0]), "five points come first"
    quiet = [1.0, 1.0, 1.2, 0.9, 1.0]
    assert schedules.steady([*quiet, 2.0]) is True
    assert schedules.steady([*quiet, 2.1]) is None and schedules.steady([*quiet, 4.0]) is None
    assert schedules.steady([*quiet, 4.1]) is False and schedules.steady([*quiet, float("nan")]) is False
    assert schedules.steady([100.0, *quiet, 2.0]) is True, "the last five points count"


@dataclass(frozen=True)
class Watched(Tiny):
    """Its metric jumps where the outer rate has not been halved by iteration 80."""

    iterations: int = 120
    evaluate_every: int = 10
    watched: str = "noise"

    def config(self):
        return {key: value for key, value in super().config().items() if key != "watched"}

    def setup(self, device, compiled):
        return WatchedRun(self)


class WatchedRun(TinyRun):
    seen: int = 0

    def evaluate(self, theta):
        self.seen += 1
        return {"noise": statistics.Interval(10.0 if self.seen == 8 else 1.0, 0.1, 2)}


def test_a_watched_run_goes_back_and_on_at_half_the_rate(tmp_path, monkeypatch):
    rates = []
    apply = checkpoints.State.apply
    monkeypatch.setattr(
        checkpoints.State, "apply", lambda self, g, rate: (rates.append((self.iteration, rate)), apply(self, g, rate))
    )
    record = train(tmp_path, Watched())
    assert record["provenance"]["returns"] == [{"from": 80, "to": 70}]
    assert rates[:80] == [(i, 1e-3) for i in range(80)] and rates[80:] == [(i, 5e-4) for i in range(70, 120)]
    assert [point["iteration"] for point in record["curve"]] == list(range(10, 120, 10))
    (only,) = record["provenance"]["slices"]
    assert (only["begin"], only["end"]) == (0, 120) and record["status"] == "complete"


def test_to_go_back_is_to_go_back_with_the_optimiser():
    """Moments and steps of Adam are those of the quiet point."""
    draws = torch.Generator().manual_seed(0)
    state = checkpoints.State({"w": torch.ones(3)}, 0.1, draws)
    for _ in range(3):
        state.apply({"w": torch.randn(3, generator=draws)})
    state.remember()
    before = {name: value.clone() for name, value in (state._moments() | state.values()).items()}
    state.apply({"w": torch.full((3,), 100.0)})
    state.go_back()
    after = state._moments() | state.values()
    assert after.keys() == before.keys() and len(after) == 4
    assert all(torch.equal(after[name], value) for name, value in before.items())


@dataclass(frozen=True)
class Annealed(Tiny):
    """Whose outer rate goes to 0."""

    outer_rate_final: float | None = 0.0


def test_every_iteration_has_the_outer_rate_of_its_number(tmp_path, monkeypatch):
    rates, apply = [], checkpoints.State.apply
    monkeypatch.setattr(checkpoints.State, "apply", lambda self, g, rate: (rates.append(rate), apply(self, g, rate)))
    train(tmp_path, Annealed(iterations=4))
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_a_watched_run_goes_back_no_further_than_where_it_was_resumed(tmp_path, monkeypatch):
    calls = []
    gradient = TinyRun.gradient

    def interrupted(self, theta, generator, iteration):
        calls.append(1)
        if len(calls) == 75:
            os.kill(os.getpid(), signal.SIGINT)
        return gradient(self, theta, generator, iteration)

    monkeypatch.setattr(TinyRun, "gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Watched())
    assert iteration(tmp_path) == 75
    # The evaluation of the interrupted run's record counts as one look, so that the jump comes at the next point.
    monkeypatch.setattr(WatchedRun, "seen", 7)
    record = train(tmp_path, Watched())
    assert record["provenance"]["returns"] == [{"from": 80, "to": 75}]
    assert [(s["begin"], s["end"]) for s in record["provenance"]["slices"]] == [(0, 75), (75, 120)]


# ---------------------------------------- what goes wrong


def test_nan_stops_with_iteration_and_checkpoint_named(tmp_path):
    train(tmp_path, budget=0)
    before = checkpoint(tmp_path).read_bytes()
    message = refused(lambda: train(tmp_path, Tiny(poison=122)))
    # One iteration was done before, so the call with number 122 (from 0) is iteration 123 (from 0).
    assert "no longer finite at iteration 123;" in message and str(checkpoint(tmp_path)) in message
    assert checkpoint(tmp_path).read_bytes() == before
    assert all(value.isfinite().all() for value in checkpoints.load_theta("tiny", tmp_path / "checkpoints").values())


def test_nan_never_reaches_a_checkpoint(tmp_path):
    """Also where one is written after every iteration: the last one is that before the NaN."""
    message = refused(lambda: train(tmp_path, Tiny(poison=30), save_every=0))
    assert "iteration 30;" in message and "last good checkpoint" in message
    assert iteration(tmp_path) == 30
    assert all(value.isfinite().all() for value in stored(tmp_path)[0].values())


def test_nan_before_any_checkpoint(tmp_path):
    assert "no checkpoint of this run had been written" in refused(lambda: train(tmp_path, Tiny(poison=0)))
    assert not checkpoint(tmp_path).exists()


def test_nan_in_a_fresh_run_does_not_call_an_older_runs_checkpoint_good(tmp_path):
    train(tmp_path, Tiny(seed=1), budget=0)
    before = checkpoint(tmp_path).read_bytes()
    assert "no checkpoint of this run" in refused(lambda: train(tmp_path, Tiny(poison=0), fresh=True))
    assert checkpoint(tmp_path).read_bytes() == before


def damage_end(content: bytes) -> bytes:
    return content[:-10]


def damage_start(content: bytes) -> bytes:
    return content[:100]


def damage_byte(content: bytes) -> bytes:
    return content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]


def damage_value(content: bytes) -> bytes:
    """One bit of a parameter, in a file that can be unpacked."""
    return lzma.compress(damage_byte(lzma.decompress(content)))


def damage_header(content: bytes) -> bytes:
    return lzma.compress(lzma.decompress(content).replace(b'\\"iteration\\": ', b'\\"iteration\\":9'))


@pytest.mark.parametrize(
    "damage",
    [
        damage_end,
        damage_start,
        damage_byte,
        damage_value,
        damage_header,
        lambda _: b"",
        lambda _: b"not a checkpoint at all",
    ],
)
def test_damaged_checkpoint_is_refused_and_kept(tmp_path, damage):
    train(tmp_path, budget=0)
    whole = checkpoint(tmp_path).read_bytes()
    broken = damage(whole)
    assert broken != whole
    checkpoint(tmp_path).write_bytes(broken)
    message = refused(lambda: train(tmp_path))
    assert "is damaged or not of this book" in message and "--fresh" in message and str(checkpoint(tmp_path)) in message
    assert checkpoint(tmp_path).read_bytes() == broken
    train(tmp_path, fresh=True, budget=0)


def test_foreign_safetensors_are_refused(tmp_path):
    for metadata in (None, {"metabook": "[]"}, {"metabook": "{}"}, {"metabook": '{"format": "other"}'}):
        write(tmp_path, {"weight": torch.zeros(2)}, metadata)
        assert "is damaged or not of this book" in refused(lambda: train(tmp_path))


def test_checkpoint_of_another_configuration_is_refused_and_kept(tmp_path):
    train(tmp_path, Tiny(seed=3, outer_rate=0.1), budget=0)
    before = checkpoint(tmp_path).read_bytes()
    message = refused(lambda: train(tmp_path))
    assert "another configuration (it differs in outer_rate, seed)" in message and "--fresh" in message
    assert checkpoint(tmp_path).read_bytes() == before


def test_checkpoint_of_another_network_is_refused(tmp_path, monkeypatch):
    """The configuration is the same, but the code that makes the network from it is not."""
    train(tmp_path, budget=0)
    monkeypatch.setattr(TinyRun, "init", lambda self, generator: MLP((1, 1, 1)).init(generator))
    assert "holds other parameters" in refused(lambda: train(tmp_path))


def test_a_folder_that_cannot_be_made_is_found_before_training(tmp_path, monkeypatch):
    """The tests may run as root, whom permissions do not stop: a file where the folder should be stops everybody."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(TinyRun, "gradient", lambda *_: pytest.fail("it trained"))
    message = refused(lambda: train(tmp_path / "file" / "data"))
    assert message.startswith("cannot write into ") and "then run again" in message


def test_a_read_only_folder_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyRun, "gradient", lambda *_: pytest.fail("it trained"))

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert "cannot write into" in refused(lambda: train(tmp_path))


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_full_disk_leaves_the_old_checkpoint(whole, tmp_path, monkeypatch, place):
    train(tmp_path, budget=0)
    before = checkpoint(tmp_path).read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, place, full)
        message = refused(lambda: train(tmp_path))
    assert "No space left on device" in message and "the previous file is intact" in message
    assert checkpoint(tmp_path).read_bytes() == before
    assert [path.name for path in checkpoint(tmp_path).parent.iterdir()] == ["tiny.safetensors.xz"], (
        "a half file is left"
    )
    train(tmp_path)
    assert_same(whole[0], tmp_path)


def test_a_record_that_cannot_be_written_costs_only_the_record(whole, tmp_path, monkeypatch):
    def full(*_):
        raise UserError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(records, "save", full)
        refused(lambda: train(tmp_path))
    assert_same(whole[0], tmp_path)
    assert train(tmp_path)["status"] == "complete"
    assert (tmp_path / "records" / "tiny.json").exists()


def test_commit_is_that_of_the_start(tmp_path, monkeypatch):
    """A commit made while a run is under way is not the code that runs."""
    names = iter(["aaaa", "bbbb", "cccc", "dddd"])
    monkeypatch.setattr(runtime, "commit", lambda: next(names))
    record = train(tmp_path, budget=0.2, save_every=0)
    assert [s["commit"] for s in record["provenance"]["slices"]] == ["aaaa"]
    assert record["provenance"]["evaluated"]["commit"] == "aaaa"
    record = train(tmp_path)
    assert [s["commit"] for s in record["provenance"]["slices"]] == ["aaaa", "bbbb"]


def git(folder, *words):
    """Run git in a folder, as nobody in particular."""
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Wherever ``METABOOK_ROOT`` points; of a package in an environment inside a repository it is unknown."""
    ours = runtime.commit()
    other = tmp_path / "other"
    package = other / "src" / "helpers"
    package.mkdir(parents=True)
    (package / "runtime.py").write_text("before")
    git(other, "init", "--quiet")
    monkeypatch.setenv("METABOOK_ROOT", str(other))
    monkeypatch.delenv("METABOOK_COMMIT", raising=False)
    assert runtime.commit() == ours
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert runtime.commit() == "unknown", "in a repository, but no part of it"
    monkeypatch.setenv("METABOOK_COMMIT", "abc")
    assert runtime.commit() == "abc"
    git(other, "add", "--all")
    git(other, "commit", "--quiet", "--message", "first")
    head = git(other, "rev-parse", "--short=12", "HEAD")
    assert runtime.commit() == head
    (other / "notes").write_text("beside the code")
    assert runtime.commit() == head
    (package / "runtime.py").write_text("after")
    assert runtime.commit() == f"{head}+"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "number of iterations"),
        ({"iterations": 1.5}, "number of iterations"),
        ({"outer_rate": -1.0}, "outer rate"),
        ({"outer_rate": math.nan}, "outer rate"),
        ({"final_rate": math.inf}, "final outer rate"),
    ],
)
def test_fit_refuses_nonsense(settings, message):
    settings = {"iterations": 1} | settings
    assert message in refused(lambda: training.fit(lambda theta: (theta, torch.zeros(1)), {}, **settings))


# ---------------------------------------- what it needs

BLOCKED = ("matplotlib", "torchvision", "papermill", "nbformat", "scipy", "sklearn", "PIL", "IPython", "pandas")
ALONE = f"""
import sys

class Without:
    'A finder of modules that does not find these.'

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
from helpers import campaign, cli, estimators, experiments, learners, losses, models, runtime
from helpers.experiments import maml
from helpers.lab import evaluation, records, training
from helpers.tasks import episodes, images, omniglot, sinusoid

assert cli.main(["train", "--list"]) == 0
small = maml.SinusoidStudy("maml-sinusoid-5", shots=5, seeds=2, test_tasks=10, test_queries=5)
maml.experiments = lambda: [small]
assert cli.main(["train", small.name, "--budget", "0", "--no-compile", "--device", "cpu"]) == 0
assert not {{name.partition(".")[0] for name in sys.modules}} & set({BLOCKED})
"""


@pytest.mark.slow
def test_training_needs_few_packages(tmp_path):
    """A machine with torch, numpy, PyYAML, safetensors and tqdm can train."""
    environment = {**os.environ, "METABOOK_ROOT": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "data" / "records" / "maml-sinusoid-5.json").exists()


def test_the_gradient_is_told_the_iteration(monkeypatch, tmp_path):
    """Also where a run goes on: what changes with the iteration is then as in one go."""
    told = []
    gradient = TinyRun.gradient

    def listening(self, theta, generator, iteration):
        told.append(iteration)
        return gradient(self, theta, generator, iteration)

    monkeypatch.setattr(TinyRun, "gradient", listening)
    training.train(Tiny(iterations=3), data=tmp_path, budget=0, progress=False, say=str)
    training.train(Tiny(iterations=3), data=tmp_path, progress=False, say=str)
    assert told == [0, 1, 2]
    told.clear()
    training.fit(lambda theta, iteration: (told.append(iteration) or theta, torch.zeros(1)), {"w": torch.ones(1)}, 3)
    assert told == [0, 1, 2]
