"""Sinusoid tasks: shapes, ranges, what the oracle is told, repeatability, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused

from helpers.errors import UserError
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.families import SinusoidFamilies
from helpers.tasks.sinusoid import Sinusoids, halves
from helpers.types import Examples, Tasks

FAMILIES = SinusoidFamilies()
EXAMPLES = Sinusoids().sample(2, generator(0)).support


def test_shapes():
    tasks = Sinusoids(shots=5, queries=7).sample(3, generator(0))
    assert isinstance(tasks, Tasks)
    assert tasks.support.x.shape == tasks.support.y.shape == (3, 5, 1)
    assert tasks.query.x.shape == tasks.query.y.shape == (3, 7, 1)
    assert {part.dtype for examples in tasks for part in examples} == {torch.float32}


def test_halves_are_the_same_sinusoids_seen_on_the_right_and_judged_on_the_left():
    whole = Sinusoids(shots=5, queries=7, oracle=True).sample(3, generator(0))
    support, query = halves(whole)
    assert (support.x[..., 0] >= 0).all() and (query.x[..., 0] <= 0).all()
    for part, before in ((support, whole.support), (query, whole.query)):
        assert torch.equal(part.x[..., 1:], before.x[..., 1:]) and torch.equal(
            part.x[..., :1].abs(), before.x[..., :1].abs()
        )
        x, amplitude, phase = part.x.split(1, -1)
        torch.testing.assert_close(part.y, amplitude * torch.sin(x - phase))


def test_oracle_is_told_amplitude_and_phase():
    """From the inputs alone the oracle can write down every target."""
    tasks = Sinusoids(5, 7, oracle=True).sample(50, generator(0))
    for examples in tasks:
        x, amplitude, phase = examples.x.unbind(-1)
        torch.testing.assert_close(examples.y[..., 0], amplitude * torch.sin(x - phase))
    assert torch.equal(tasks.support.x[:, :1, 1:].expand(-1, 7, -1), tasks.query.x[:, :, 1:]), "one task, one sinusoid"
    plain = Sinusoids(5, 7).sample(50, generator(0))
    assert torch.equal(plain.query.y, tasks.query.y) and torch.equal(plain.query.x, tasks.query.x[..., :1])


def test_distributions_are_the_papers():
    """Uniform: ranges, and mean and deviation within five standard errors."""
    tasks = Sinusoids(2, 2, oracle=True).sample(20_000, generator(0))
    x, amplitude, phase = tasks.query.x.unbind(-1)
    for values, low, high in ((x.flatten(), -5, 5), (amplitude[:, 0], 0.1, 5), (phase[:, 0], 0, math.pi)):
        width, n = high - low, len(values)
        assert low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * n)
        assert abs(values.std() - width / math.sqrt(12)) < 5 * width / math.sqrt(12 * n)
    correlation = torch.corrcoef(torch.stack([amplitude[:, 0], phase[:, 0], x[:, 0], x[:, 1]]))
    assert (correlation - torch.eye(4)).abs().max() < 5 / math.sqrt(20_000)


def test_support_and_query_share_no_point():
    tasks = Sinusoids(10, 10).sample(200, generator(0))
    assert not (tasks.support.x == tasks.query.x.transpose(1, 2)).any()


def test_randomness_comes_from_the_generator_alone():
    state = torch.random.get_rng_state()
    draws = generator(0)
    first, second = (Sinusoids().sample(4, draws) for _ in range(2))
    again, other = Sinusoids().sample(4, generator(0)), Sinusoids().sample(4, generator(1))
    assert torch.equal(first.query.y, again.query.y)
    assert not torch.equal(first.query.y, second.query.y) and not torch.equal(first.query.y, other.query.y)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("settings", [{"shots": 0}, {"queries": -1}, {"shots": 1.5}, {"queries": "10"}])
def test_bad_numbers_are_refused(settings):
    with pytest.raises(UserError, match="must be a whole number of at least 1"):
        Sinusoids(**settings)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Sinusoids(True), "shots of a sinusoid task"),
        (lambda: Sinusoids(amplitudes=(0.1, math.nan)), "ends of the amplitudes"),
        (lambda: Sinusoids().sample(-1, generator(0)), "number of tasks"),
        (lambda: Sinusoids().sample(1.5, generator(0)), "number of tasks"),
        (lambda: Sinusoids().wave(2, 0, generator(0)), "number of points"),
        (lambda: Sinusoids().wave(True, 5, generator(0)), "number of tasks"),
        (lambda: SinusoidFamilies(shots=True), "shots of sinusoid families"),
        (lambda: SinusoidFamilies(inputs=(math.inf, 1.0)), "ends of the inputs"),
        (lambda: SinusoidFamilies(frequencies=((0.5, math.nan),)), "every band"),
        (lambda: FAMILIES.sample(0, generator(0)), "number of families"),
        (
            lambda: FAMILIES.tasks(FAMILIES.draw(1, generator(0)), 0, generator(0)),
            "number of tasks",
        ),
        (lambda: minibatches(EXAMPLES, 0, 2, generator(0)), "size of a minibatch"),
        (lambda: minibatches(EXAMPLES, 2, -1, generator(0)), "number of minibatches"),
        (lambda: minibatches(Examples(*(t[:, :0] for t in EXAMPLES)), 2, 2, generator(0)), "tasks without examples"),
        (lambda: minibatches(EXAMPLES, 11, 1, generator(0), replacement=True), "choose a smaller one"),
    ],
)
def test_nonsense_is_refused(action, message):
    assert message in refused(action)
