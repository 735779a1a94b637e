"""CUDA graphs of functions, on the stand-in: what is handed over, what comes back, and what happens where it fails."""

from __future__ import annotations

import pytest
import standin
import torch

from helpers import runtime
from helpers.numerics import tracing
from helpers.numerics.tracing import captured


@pytest.fixture(autouse=True)
def _card():
    if torch.cuda.is_available():
        pytest.skip("the stand-in is for machines without a card")
    with standin.card():
        yield


def on_card(*values):
    return torch.tensor(values, device="cuda")


def test_a_replay_is_one_launch_between_copies():
    calls = []
    fast = captured(lambda x, rate: (calls.append(1), (x * rate).sin().exp() + 1)[1], strict=True)
    fast(on_card(1.0), 0.5)
    before = len(calls)
    with standin.Launches() as seen:
        fast(on_card(1.0).neg(), 0.5)
    # Neg; the float, what goes in, the graph, what comes out. The tensor is made on the host, and waited for.
    assert len(calls) == before and seen.count - len(seen.waits) == 5 and len(seen.waits) == 1


def test_inputs_are_copied_and_outputs_are_not_overwritten():
    fast, x = captured(lambda x, rate: {"y": rate * x}, strict=True), on_card(1.0, 2.0)
    first = fast(x, 3.0)
    x.zero_()  # what was handed over is not looked at again
    second, third = fast(on_card(5.0, 6.0), 3.0), fast(on_card(5.0, 6.0), 0.5)
    assert [one["y"].tolist() for one in (first, second, third)] == [[3, 6], [15, 18], [2.5, 3]]
    assert fast(on_card(1.0), 2.0)["y"].tolist() == [2], "another shape is another graph"


def steps(fast, count: int = 3):
    """What a function that draws and writes gives, and what it leaves."""
    draws, weight = runtime.generator(3, "cuda"), torch.zeros(2, device="cuda")

    def step(x):
        drawn = torch.rand(2, generator=draws, device="cuda")
        weight.add_(drawn * x)
        return drawn.sum(), weight * 2

    run, x = fast(step, lambda x: ([weight], [draws])), on_card(1.0, -1.0)
    return [run(x) for _ in range(count)], weight, draws.get_state()


def test_draws_and_steps_go_on_as_if_nothing_had_been_tried():
    found, weight, state = steps(lambda *it: captured(*it, strict=True))
    expected, plain, others = steps(lambda function, _: function)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert torch.equal(weight, plain) and torch.equal(state, others)


def failing(kind):
    def fails(x):
        if kind == "waits":
            return x * x.sum().item()
        if kind == "copies":
            return x + torch.tensor([1.0], device="cuda")
        assert not torch.cuda.is_current_stream_capturing(), "not this one"
        return 2 * x

    return fails


@pytest.mark.parametrize(
    "kind, reason", [("waits", "not permitted"), ("copies", "not permitted"), ("raises", "not th")]
)
def test_where_capturing_fails_one_line_says_so_and_the_function_runs(kind, reason, capsys):
    fast, x = captured(failing(kind)), on_card(1.0, 2.0)
    for _ in range(2):
        assert torch.equal(fast(x), failing(kind)(x))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and reason in lines[0] and lines[0].endswith("going on without")
    with pytest.raises((RuntimeError, AssertionError), match=reason):
        captured(failing(kind), strict=True)(x)


def test_a_replay_that_differs_is_not_used(capsys):
    """What Python counts is a constant of the graph."""
    calls = []

    def counts(x):
        calls.append(1)
        return x * len(calls)

    fast = captured(counts)
    assert fast(on_card(1.0)).item() == len(calls)
    assert "a replay differs by" in capsys.readouterr().err


def test_a_capture_that_failed_leaves_a_generator_that_draws(capsys):
    draws = runtime.generator(0, "cuda")

    def fails_late(x):
        drawn = torch.rand(2, generator=draws, device="cuda")
        return drawn * float(x.sum())

    fast = captured(fails_late, lambda x: ([], [draws]))
    found, (first, second) = fast(on_card(1.0)), torch.rand(2, 2, generator=runtime.generator(0, "cuda"), device="cuda")
    assert torch.equal(found, first) and torch.equal(fast(on_card(1.0)), second)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_generator_that_was_not_named_is_refused(capsys):
    draws = runtime.generator(0, "cuda")
    captured(lambda x: x + torch.rand(1, generator=draws, device="cuda"))(on_card(1.0))
    assert "registered" in capsys.readouterr().err


def test_nothing_is_there_before_the_first_replay():
    graph, x, weight = torch.cuda.CUDAGraph(), on_card(1.0), on_card(4.0)
    with torch.cuda.graph(graph):
        y = x + 1
        weight.mul_(2)
    assert y.isnan().all() and weight.item() == 4
    x.fill_(2.0)
    graph.replay()
    assert y.item() == 3 and weight.item() == 8


def test_what_was_tried_is_undone():
    weight, draws = torch.ones(2), runtime.generator(0)
    with pytest.raises(KeyError), tracing.unchanged([weight], [draws]):
        weight.zero_()
        torch.rand(3, generator=draws)
        raise KeyError
    assert weight.tolist() == [1, 1] and torch.equal(draws.get_state(), runtime.generator(0).get_state())
