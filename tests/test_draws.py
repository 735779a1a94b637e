"""A seed means the same draws in every version of PyTorch: first values of each kind of draw in use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from scipy import stats

import helpers
from helpers.models.mlp import MLP
from helpers.optimizers.controller import drawn
from helpers.runtime import generator
from helpers.tasks.sinusoid import Sinusoids

# The same under PyTorch 2.5.0 and 2.13.0.
FIRST = {
    "rand": (lambda g: torch.rand(3, generator=g), [0.49625659, 0.768221796, 0.088477433]),
    "rand, double": (
        lambda g: torch.rand(3, generator=g, dtype=torch.float64),
        [0.970053002, 0.707819864, 0.459382943],
    ),
    "rand, many": (lambda g: torch.rand(1000, generator=g)[-3:], [0.339188695, 0.501794398, 0.40386343]),
    "randn": (lambda g: torch.randn(3, generator=g), [1.540996075, -0.293428898, -2.178789377]),
    "randn, double": (
        lambda g: torch.randn(3, generator=g, dtype=torch.float64),
        [1.540996108, -0.293428906, -2.178789382],
    ),
    "randn, many": (lambda g: torch.randn(1000, generator=g)[-3:], [1.464195371, 0.126418144, -0.586172104]),
    "uniform_": (lambda g: torch.empty(3).uniform_(-0.5, 0.5, generator=g), [-0.00374341, 0.268221796, -0.411522567]),
    "randint": (lambda g: torch.randint(50, (5,), generator=g), [44, 39, 33, 10, 13]),
    "randint, large": (lambda g: torch.randint(2**62, (2,), generator=g), [900450186894289455, 3969543146641149120]),
    "randperm": (lambda g: torch.randperm(8, generator=g), [4, 0, 7, 3, 2, 5, 1, 6]),
    "randperm, many": (lambda g: torch.randperm(60_000, generator=g)[:4], [36044, 10678, 57327, 55074]),
    "poisson": (lambda g: torch.poisson(torch.full((5,), 40.0), generator=g), [39.0, 43.0, 33.0, 41.0, 39.0]),
    "cut normal": (lambda g: MLP((1, 3, 1)).init(g)["linear1.weight"][0], [0.016320495, 0.00519701, -0.000973329]),
    "uniform weights": (
        lambda g: MLP((1, 3, 1), scale=None).init(g)["linear1.weight"][0],
        [-0.00748682, 0.536443591, -0.823045135],
    ),
    "tokens": (lambda g: drawn(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(8, 1), g), [3, 3, 2, 3, 3, 3, 1, 2]),
    "tasks": (lambda g: Sinusoids(2, 1).sample(1, g).support.x.flatten(), [-4.115225792, -3.679695129]),
}


@pytest.mark.parametrize("kind", FIRST)
def test_first_values(kind):
    draw, expected = FIRST[kind]
    torch.testing.assert_close(
        draw(generator(0)), torch.tensor(expected, dtype=draw(generator(0)).dtype), rtol=2e-6, atol=1e-7
    )


def test_no_draw_is_left_to_a_routine_that_changes():
    """``trunc_normal_`` and ``multinomial`` differ between the two versions; the others are in nobody's promise."""
    changing = r"multinomial|bernoulli|trunc_normal|nn\.init|torch\.distributions|\.(normal|exponential|random)_\("
    for path in Path(helpers.__file__).parent.rglob("*.py"):
        code = re.sub(r'"""(?s:.*?)"""', "", path.read_text(encoding="utf-8"))
        assert not re.search(changing, code), path


def test_the_cut_normal_distribution():
    weight = MLP((200, 200, 1), scale=0.3).init(generator(0), torch.float64)["linear1.weight"].flatten()
    assert weight.abs().max() <= 0.6
    assert stats.kstest(weight.numpy(), stats.truncnorm(-2, 2, scale=0.3).cdf).pvalue > 0.01
    assert torch.equal(MLP((1, 3, 1), scale=0.0).init(generator(0))["linear1.weight"], torch.zeros(1, 3))


def test_a_seed_means_the_same_weights_in_single_and_double_precision():
    single, double = (MLP((3, 4, 1)).init(generator(0), dtype) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single, {name: value.float() for name, value in double.items()})


def test_tokens_have_their_probabilities_and_none_that_is_0():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    counts = drawn(probabilities.repeat(20_000, 1), generator(0)).bincount(minlength=6) / 20_000
    torch.testing.assert_close(counts[None], probabilities, rtol=0, atol=0.015)
    assert not counts[[0, 2, 5]].any()
