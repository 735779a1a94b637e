"""The translating network: its cell against torch's, a whole by torch's layers, padding, derivatives, populations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional

from helpers.errors import UserError
from helpers.models.layers import stacked
from helpers.models.seq2seq import Seq2Seq, exact_match, greedy, recurrence, token_accuracy, translation_loss
from helpers.models.tokens import BEGIN, END, PAD
from helpers.runtime import generator
from helpers.tasks.numerals import VOCABULARY, decode, encode, english, german

S, T, V = 6, 5, 9  # of the small examples
LONG = 4  # columns of more padding
BOTH = pytest.mark.parametrize("attention", [True, False])


def small(attention=True, source_length=S):
    return Seq2Seq(V, source_length, hidden=4, embedding=3, attention=attention)


def drawn(model, seed=0):
    return model.init(generator(seed), torch.float64)


def rows(n=4, seed=0):
    """Sources of 1 to S tokens, targets of 1 to T − 2 and their ends."""
    draws, x, y = generator(seed), torch.zeros(n, S, dtype=torch.int64), torch.zeros(n, T, dtype=torch.int64)
    for i in range(n):
        source, target = (1 + (i * 5 + 2) % S, 1 + i % (T - 2))
        x[i, :source] = torch.randint(3, V, (source,), generator=draws)
        y[i, 0], y[i, 1 + target] = BEGIN, END
        y[i, 1 : 1 + target] = torch.randint(3, V, (target,), generator=draws)
    return torch.cat([x, y[:, :-1]], 1), y[:, 1:]


def loss(model):
    return lambda params, x, y: translation_loss(model(params, x), y)


def test_cell_is_torchs():
    cell = torch.nn.GRUCell(5, 7, dtype=torch.float64)
    x, state = (torch.randn(3, size, generator=generator(size), dtype=torch.float64) for size in (5, 7))
    contribution = x @ cell.weight_ih.mT + cell.bias_ih
    ours = recurrence(contribution[None], cell.weight_hh.mT, cell.bias_hh, state)
    torch.testing.assert_close(ours[0], cell(x, state), rtol=1e-12, atol=1e-12)


@BOTH
def test_network_by_torchs_layers(attention):
    """Row by row without padding: torch.nn.GRU with our weights, and attention written out."""
    model = small(attention)
    params, x = drawn(model), rows()[0]
    logits = model(params, x)
    assert logits.shape == (4, T - 1, V) and logits.dtype == torch.float64
    for i in range(len(x)):
        states, last = {}, None
        for part, tokens in (("encoder", x[i, :S]), ("decoder", x[i, S:])):
            tokens = tokens[tokens != PAD]
            gru = torch.nn.GRU(3, 4, batch_first=True, dtype=torch.float64)
            with torch.no_grad():
                gru.weight_ih_l0.copy_(params[f"{part}.input.weight"].mT)
                gru.weight_hh_l0.copy_(params[f"{part}.hidden.weight"].mT)
                gru.bias_ih_l0.copy_(params[f"{part}.input.bias"])
                gru.bias_hh_l0.copy_(params[f"{part}.hidden.bias"])
            out, last = gru(functional.embedding(tokens, params["embedding.weight"])[None], last)
            states[part] = out[0]
        for t, d in enumerate(states["decoder"]):
            weights = torch.softmax(torch.stack([d @ e for e in states["encoder"]]), 0)
            mean = sum(w * e for w, e in zip(weights, states["encoder"], strict=True))
            seen = torch.cat([d, mean]) if attention else d
            expected = seen @ params["head.weight"] + params["head.bias"]
            torch.testing.assert_close(logits[i, t], expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_padding_does_not_matter(attention, dtype):
    """More of it behind the source changes no logit; behind the target, no loss and no gradient."""
    model, longer = small(attention), small(attention, S + LONG)
    params, (x, y) = model.init(generator(0), dtype), rows()
    params = {name: 5 * value for name, value in params.items()}  # saturated gates
    source, target = x.split((S, T - 1), 1)
    x_longer = torch.cat([functional.pad(source, (0, LONG)), target], 1)
    torch.testing.assert_close(longer(params, x_longer), model(params, x), rtol=1e-5, atol=1e-5)
    read = model.read(params, source)
    last = (source != PAD).sum(1) - 1
    assert torch.equal(read[:, -1], read[torch.arange(len(x)), last])  # not nearly: the state is not touched

    found = grad(loss(longer))(params, functional.pad(x_longer, (0, 3)), functional.pad(y, (0, 3)))
    for name, gradient in grad(loss(model))(params, x, y).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert not found["embedding.weight"][PAD].any()


@BOTH
def test_gradient_by_finite_differences(attention):
    """Along a random direction for each parameter; and that of the gradient."""
    model = small(attention)
    params, (x, y) = drawn(model), rows()
    value, gradient, h = loss(model), grad(loss(model)), 1e-5
    found = gradient(params, x, y)
    way = {}
    for seed, (name, at) in enumerate(params.items()):
        way[name] = torch.randn(at.shape, generator=generator(seed), dtype=at.dtype)
        ahead, back = (value(params | {name: at + s * h * way[name]}, x, y) for s in (1, -1))
        assert ((ahead - back) / (2 * h)).item() == pytest.approx((found[name] * way[name]).sum().item(), rel=1e-7)
    second = grad(lambda p: sum((g * way[name]).sum() for name, g in gradient(p, x, y).items()))(params)
    ahead, back = (gradient({k: p + s * h * way[k] for k, p in params.items()}, x, y) for s in (1, -1))
    for name in params:
        torch.testing.assert_close(second[name], (ahead[name] - back[name]) / (2 * h), rtol=1e-6, atol=1e-7)


@BOTH
def test_a_population_is_what_its_members_are(attention):
    """Values and gradients under ``vmap``, taken outside and inside, with data for all or for each."""
    model = small(attention)
    members, (x, y) = [drawn(model, seed) for seed in range(3)], rows()
    population = {name: value.requires_grad_() for name, value in stacked(members).items()}
    out = vmap(model, (0, None))(population, x)
    losses = vmap(translation_loss, (0, None))(out, y)
    outside = dict(zip(population, torch.autograd.grad(losses.sum(), list(population.values())), strict=True))
    population = {name: value.detach() for name, value in population.items()}
    inside = vmap(grad(loss(model)), (0, None, None))(population, x, y)
    own = [rows(seed=seed) for seed in range(3)]
    apart = vmap(grad(loss(model)))(population, *(torch.stack(part) for part in zip(*own, strict=True)))
    for metric in (token_accuracy, exact_match):
        expected = torch.stack([metric(each, y) for each in out])
        assert torch.equal(vmap(metric, (0, None))(out, y), expected)
    for i, params in enumerate(members):
        torch.testing.assert_close(out[i], model(params, x), rtol=1e-12, atol=1e-12)
        for name, expected in grad(loss(model))(params, x, y).items():
            for found in (outside, inside):
                torch.testing.assert_close(found[name][i], expected, rtol=1e-10, atol=1e-12)
        for name, expected in grad(loss(model))(params, *own[i]).items():
            torch.testing.assert_close(apart[name][i], expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_shapes_names_and_types(attention):
    model = Seq2Seq(VOCABULARY, 10, attention=attention)
    for dtype in (torch.float32, torch.float64):
        params = model.init(generator(0), dtype)
        assert {value.dtype for value in params.values()} == {dtype}
        assert model(params, torch.ones(3, 17, dtype=torch.int64)).shape == (3, 7, VOCABULARY)
    shapes = {name: tuple(value.shape) for name, value in params.items()}
    grus = {
        f"{part}.{name}": shape
        for part in ("encoder", "decoder")
        for name, shape in {
            "input.weight": (32, 192), "input.bias": (192,), "hidden.weight": (64, 192), "hidden.bias": (192,),
        }.items()
    }  # fmt: skip
    rest = {
        "embedding.weight": (VOCABULARY, 32),
        "head.weight": (128 if attention else 64, VOCABULARY),
        "head.bias": (VOCABULARY,),
    }
    assert shapes == grus | rest and all(model.is_adapted(name) for name in shapes)
    assert 0.12 < params["encoder.hidden.weight"].abs().max() <= 1 / 8
    again, other = model.init(generator(0), dtype), model.init(generator(1), dtype)
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert not torch.equal(params["head.weight"], other["head.weight"])


def test_measures_by_hand():
    """Two targets, of two tokens and of one; the second is predicted, the first by half."""
    y = torch.tensor([[3, END, PAD], [END, PAD, PAD]])
    predicted = torch.tensor([[3, 4, 4], [END, 3, 3]])
    likely = (predicted[..., None] == torch.arange(5)).double()
    logits = likely * math.log(0.6) + (1 - likely) * math.log(0.1)
    assert token_accuracy(logits, y).item() == pytest.approx(2 / 3)
    assert exact_match(logits, y).item() == 0.5
    expected = -(2 * math.log(0.6) + math.log(0.1)) / 3
    assert translation_loss(logits, y).item() == pytest.approx(expected, rel=1e-12)


def test_greedy_decoding_agrees_with_teacher_forcing():
    """What it writes is what the network predicts when it is given just that; after the end there is padding."""
    model, ends = small(), 0
    x, _ = rows(8)
    for seed in range(5):
        params = {name: 3 * value for name, value in drawn(model, seed).items()}
        written = greedy(model, params, x[:, :S], 12)
        begins = torch.full_like(written[:, :1], BEGIN)
        predicted = model(params, torch.cat([x[:, :S], begins, written[:, :-1]], 1)).argmax(-1)
        before = ((written == END).cumsum(1) - (written == END).int()) == 0  # up to the first end
        assert torch.equal(predicted[before], written[before])
        assert not written[~before].any()
        ends += (~before).any().item()
    assert ends


def test_it_learns_twenty_pairs():
    chosen = [n * 37 % 100 for n in range(20)]
    x, y = encode([english(n) for n in chosen]), encode([german(n) for n in chosen], ends=True)
    model = Seq2Seq(VOCABULARY, x.shape[1])
    params = {name: value.requires_grad_() for name, value in model.init(generator(0)).items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    for _ in range(120):
        value = translation_loss(model(params, torch.cat([x, y[:, :-1]], 1)), y[:, 1:])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    logits = model(params, torch.cat([x, y[:, :-1]], 1))
    assert token_accuracy(logits, y[:, 1:]) == exact_match(logits, y[:, 1:]) == 1
    written = greedy(model, params, x, y.shape[1])
    assert decode(written) == [german(n) for n in chosen] and not written.requires_grad


def test_bad_input_is_refused():
    for name in ("vocabulary", "source_length", "hidden", "embedding"):
        sizes = {"vocabulary": 5, "source_length": 5} | {name: 0}
        with pytest.raises(
            UserError, match=f"the {name} of a translating network must be a whole number of at least 1, not 0"
        ):
            Seq2Seq(**sizes)
    model = small()
    params = drawn(model)
    for x in (torch.ones(2, S, dtype=torch.int64), torch.ones(9, dtype=torch.int64), torch.ones(2, S + 1)):
        with pytest.raises(UserError, match=r"this network takes tokens int64 \[n, 6 \+ length of the target - 1\]"):
            model(params, x)
    for source, length in ((torch.ones(2, S + 1, dtype=torch.int64), 3), (torch.ones(2, S, dtype=torch.int64), 0)):
        with pytest.raises(UserError, match=r"a source of int64 \[n, 6\] tokens|number of tokens to write"):
            greedy(model, params, source, length)
