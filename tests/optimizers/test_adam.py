"""Adam as a pure function is PyTorch's, bit for bit the written-out form of earlier records, and works under vmap."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from helpers.optimizers.adam import Adam, adam
from helpers.runtime import generator


def gradients(steps: int, dtype: torch.dtype = torch.float64) -> list[dict[str, torch.Tensor]]:
    """Of two tensors, some of whose entries are tiny and some always 0."""
    draws = generator(0)
    scale = torch.tensor([1.0, 1e-4, 1e-9, 0.0], dtype=dtype)
    shapes = {"weight": (3, 4), "bias": (4,)}
    return [{n: scale * torch.randn(s, generator=draws, dtype=dtype) for n, s in shapes.items()} for _ in range(steps)]


@pytest.mark.parametrize("settings", [{}, {"betas": (0.0, 0.99), "epsilon": 1e-3}])
def test_it_is_that_of_torch(settings):
    found = {n: torch.ones_like(g) for n, g in gradients(1)[0].items()}
    params, state = {n: v.clone().requires_grad_() for n, v in found.items()}, Adam.of(found)
    names = {"betas": settings.get("betas", (0.9, 0.999)), "eps": settings.get("epsilon", 1e-8)}
    optimizer = torch.optim.Adam(params.values(), lr=0.1, **names)
    for gradient in gradients(20):
        direction, state = adam(gradient, state, **settings)
        found = {n: v - 0.1 * direction[n] for n, v in found.items()}
        for name, value in params.items():
            value.grad = gradient[name]
        optimizer.step()
    assert state.steps == 20
    for name, value in params.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-14)


def test_state_is_left_as_it_was_and_tasks_go_side_by_side():
    first, second = (torch.stack([g["weight"], 2 * g["weight"]]) for g in gradients(2))
    start = Adam.of({"weight": first[0]})

    def two_steps(a, b):
        _, state = adam({"weight": a}, start)
        return adam({"weight": b}, state)[0]["weight"]

    torch.testing.assert_close(vmap(two_steps)(first, second)[1], two_steps(first[1], second[1]))
    assert start.steps == 0 and not start.first["weight"].any() and not start.second["weight"].any()


def test_single_precision_is_the_written_out_form():
    """Records were computed by it; 1 − 0.9 and 0.1 differ in double precision alone."""
    drawn = gradients(5, torch.float32)
    state = Adam.of(drawn[0])
    first, second = (torch.zeros(3, 4) for _ in range(2))
    for step, gradient in enumerate(drawn):
        g = gradient["weight"]
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        here, spread = 1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)
        direction, state = adam(gradient, state)
        assert torch.equal(direction["weight"], first / here / ((second / spread).sqrt() + 1e-8))
