"""In which form a run is executed: on a GPU as one graph, and where that fails as the next best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import standin
import torch
from miniatures import MINIATURES, judged_once
from miniatures import little as little  # a fixture
from refusals import refused

from helpers import runtime
from helpers.lab import checkpoints, few_shot, training
from helpers.lab.checkpoints import State
from helpers.lab.forms import settled
from helpers.numerics import tracing

pytestmark = pytest.mark.usefixtures("little")


@pytest.fixture(autouse=True)
def _card():
    with standin.card():
        yield


def begun(name: str = "maml-mlp"):
    """A run and its state, on the card."""
    device, experiment = torch.device("cuda"), MINIATURES[name]()
    run, draws = experiment.setup(device, compiled=False), runtime.generator(0, device)
    return run, State(run.init(draws), experiment.outer_rate, draws, experiment.outer)


def fail(monkeypatch, *forms):
    """These forms do not work."""

    def broken(*_, **__):
        raise RuntimeError("no such luck\nand more")

    if "captured" in forms:
        monkeypatch.setattr(tracing, "_capture", broken)
    for form in set(forms) - {"captured"}:
        monkeypatch.setitem(tracing.FORMS, form, lambda function: broken)


@pytest.mark.parametrize("failing, expected", [((), "captured"), (("captured",), "traced"), (("traced",), "eager")])
def test_it_falls_back_with_one_line_each(failing, expected, monkeypatch):
    run, state = begun()
    fail(monkeypatch, *failing)
    before, said = [t.clone() for t in state.changes()[0]], []
    drawn = state.generator.get_state()
    assert settled("captured", run, state, torch.device("cuda"), say=said.append) == expected
    assert all(torch.equal(old, new) for old, new in zip(before, state.changes()[0], strict=True))
    assert torch.equal(drawn, state.generator.get_state())
    assert len(said) == {"captured": 0, "traced": 1, "eager": 2}[expected]
    assert all(line.endswith("failed (no such luck and more); going on without") for line in said)
    assert run.iterate(state, 0.1).isfinite()


def test_where_nothing_works_one_sentence_says_so(monkeypatch):
    run, state = begun()
    fail(monkeypatch, *tracing.FORMS)
    assert "none of its forms" in refused(lambda: settled("captured", run, state, torch.device("cuda"), say=print))


def test_the_fastest_is_found_and_what_fails_is_passed_over(monkeypatch):
    run, state = begun()
    fail(monkeypatch, "traced")
    monkeypatch.setattr(runtime, "can_compile", lambda: False)
    monkeypatch.setattr("helpers.lab.forms._PATIENCE", 0.01)
    said = []
    assert settled("fastest", run, state, torch.device("cuda"), say=said.append) == "eager"
    assert [line.split(":")[0] for line in said[:2]] == ["traced", "captured"] and "ms an iteration: eager" in said[-1]


@pytest.mark.parametrize("name", ["maml-mlp", "maml-MultiStep", "reptile", "imaml-newton"])
def test_captured_iterations_are_the_traced_ones(name):
    """With what changes from one to the next: the outer rate and the learner; the outer step is Adam's or plain."""
    ends = []
    for form in ("traced", "captured"):
        run, state = begun(name)
        run.use(form)
        losses = []
        for rate in (1e-2, 1e-3, 0.0):
            losses.append(run.iterate(state, rate))
            state.iteration += 2_000
        ends.append([*losses, *state.changes()[0]])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_captured_run_goes_on_bit_for_bit_and_says_what_it_was(tmp_path, monkeypatch):
    judged_once(monkeypatch)
    runtime.allow_tf32(False)
    monkeypatch.setattr(few_shot.FewShotRun, "in_chunks", lambda run, estimator: run.watching(estimator))
    experiment = replace(MINIATURES["maml-mlp"](), iterations=3, evaluate_every=3)
    quiet = {"device": "cuda", "progress": False, "say": lambda _: None}
    for _ in range(experiment.iterations):
        record = training.train(experiment, budget=0.0, data=tmp_path / "parts", **quiet)
    training.train(experiment, data=tmp_path / "whole", **quiet)
    (parts, _), (whole, _) = (
        checkpoints.read_checkpoint(tmp_path / folder / "checkpoints" / "mini.safetensors.xz")
        for folder in ("parts", "whole")
    )
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    assert [piece["form"] for piece in record["provenance"]["slices"]] == ["captured"] * 3
    assert [piece["tf32"] for piece in record["provenance"]["slices"]] == [False] * 3


def test_tf32_is_one_choice_that_a_record_names():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            runtime.allow_tf32(allowed)
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
            assert runtime.machine("cuda")["tf32"] is allowed and "tf32" not in runtime.machine("cpu")
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
