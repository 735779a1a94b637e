"""Searching: probabilities, gradients and learning of the controller; evolution."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from helpers.optimizers.controller import Batch, Controller, encoded, policy_gradient, ppo_loss
from helpers.optimizers.evolution import Evolution, completed, mutated
from helpers.optimizers.language import BINARY, OPERANDS, UNARY, grammar
from helpers.runtime import generator

DOUBLE = torch.float64


def opinionated(depth: int, size: int = 4, seed: int = 0, strength: float = 1.0):
    """A controller whose policy is far from uniform, in float64."""
    words, draws = grammar(depth), generator(seed)
    controller = Controller(len(words), size, scale=1.0)
    params = controller.init(draws, DOUBLE)
    for name in ("head.weight", "head.bias", "bias"):
        params[name] = strength * torch.randn(params[name].shape, generator=draws, dtype=DOUBLE)
    return words, controller, params


# ---------------------------------------- probabilities


def choices(words, sequence) -> list[int]:
    return [int(words.mask(kind).sum()) for kind in words.expected(sequence)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_first_policy_is_uniform_over_what_is_allowed(depth):
    words = grammar(depth)
    controller = Controller(len(words), 8)
    params = controller.init(generator(0), DOUBLE)
    sequences = controller.sample(params, words, 40, generator(1))
    log, entropy = controller.log_probabilities(params, encoded(words, sequences))
    counts = [choices(words, sequence) for sequence in sequences]
    expected = torch.tensor([-sum(map(math.log, row)) for row in counts], dtype=DOUBLE)
    torch.testing.assert_close(log, expected, rtol=1e-12, atol=0)
    means = torch.tensor([sum(map(math.log, row)) / len(row) for row in counts], dtype=DOUBLE)
    torch.testing.assert_close(entropy, means, rtol=1e-12, atol=0)


def test_first_draws_are_uniform():
    """Frequencies of the first three tokens over many draws, within five standard errors."""
    words = grammar(1)
    controller = Controller(len(words), 4)
    drawn = controller.sample(controller.init(generator(0)), words, 6_000, generator(1))
    for place, kind in enumerate((BINARY, UNARY, OPERANDS)):
        counts = torch.tensor([sequence[place] for sequence in drawn]).bincount(minlength=len(words)).double()
        share = 1 / len(kind)
        expected = torch.tensor([share if token in kind else 0.0 for token in words.tokens], dtype=DOUBLE)
        assert ((counts / 6_000 - expected).abs() < 5 * math.sqrt(share / 6_000)).all()
        assert not counts[expected == 0].any(), "forbidden tokens are never drawn"


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_only_whole_rules_are_drawn(depth):
    words, controller, params = opinionated(depth, strength=5.0)
    for sequence in controller.sample(params, words, 200, generator(2)):
        assert words.complete(sequence) and len(sequence) <= words.length
        words.rule(sequence)


def test_draws_come_from_the_generator_alone():
    words, controller, params = opinionated(2)
    state = torch.random.get_rng_state()
    once, again, other = (controller.sample(params, words, 20, generator(seed)) for seed in (0, 0, 1))
    assert once == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def everything(words) -> list[Batch]:
    """All sequences of depth 1, those with one side and those with two."""
    numbers = {kind: [words.tokens.index(t) for t in has] for kind, has in
               (("binary", BINARY), ("unary", UNARY), ("operand", OPERANDS))}  # fmt: skip
    side = torch.tensor(list(product(numbers["unary"], numbers["operand"])))
    left = words.tokens.index("left")
    one = torch.cat([torch.full((len(side), 1), left), side], 1)
    first, second = side.repeat_interleave(len(side), 0), side.repeat(len(side), 1)
    two = [
        torch.cat([torch.full((len(first), 1), op), first, second], 1) for op in numbers["binary"] if op != left
    ]  # fmt: skip
    kinds = ["binary", "unary", "operand", "unary", "operand"]
    batches = []
    for tokens in (one, torch.cat(two)):
        mask = torch.stack([words.mask(kind) for kind in kinds[: tokens.shape[1]]]).expand(len(tokens), -1, -1)
        batches.append(Batch(tokens, mask, torch.ones_like(tokens, dtype=torch.bool)))
    return batches


def test_probabilities_of_all_rules_of_depth_1_sum_to_1():
    words, controller, params = opinionated(1, size=3)
    batches = everything(words)
    assert [len(batch.tokens) for batch in batches] == [204, 166_464]
    found = torch.cat([controller.log_probabilities(params, batch)[0] for batch in batches])
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert found.max() - found.min() > 5, "far from uniform"
    # Draws follow these probabilities: the most probable rules, within five standard errors.
    rows = [tuple(row) for batch in batches for row in batch.tokens.tolist()]
    drawn = controller.sample(params, words, 4_000, generator(3))
    for i in found.topk(20).indices.tolist():
        share, seen = found[i].exp().item(), sum(tuple(sequence) == rows[i] for sequence in drawn) / 4_000
        assert abs(seen - share) < 5 * math.sqrt(share / 4_000)


def test_probability_does_not_depend_on_padding():
    words, controller, params = opinionated(3)
    sequences = controller.sample(params, words, 200, generator(0))
    together = controller.log_probabilities(params, encoded(words, sequences))
    assert len({len(sequence) for sequence in sequences}) > 3
    for i, sequence in enumerate(sequences):
        alone = controller.log_probabilities(params, encoded(words, [sequence]))
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=1e-12, atol=1e-12)


def test_entropy_by_hand():
    """Of every choice −Σ p log p over the allowed tokens, averaged over a rule's choices."""
    words, controller, params = opinionated(1)
    sequence = controller.sample(params, words, 1, generator(0))[0]
    token, state = controller.begin(params, 1)
    log, entropies = 0.0, []
    for place, kind in enumerate(words.expected(sequence)):
        logits, state = controller.step(params, token, state)
        p = logits[0][words.mask(kind)].softmax(-1)
        entropies.append(-(p * p.log()).sum())
        number = int(words.mask(kind)[: sequence[place]].sum())
        log = log + p[number].log()
        token = torch.tensor([sequence[place]])
    found, entropy = controller.log_probabilities(params, encoded(words, [sequence]))
    torch.testing.assert_close(found[0], log)
    torch.testing.assert_close(entropy[0], sum(entropies) / len(entropies))


def test_encoding():
    words = grammar(2)
    sequences = Controller(len(words), 4).sample(Controller(len(words), 4).init(generator(0)), words, 20, generator(0))
    batch = encoded(words, sequences)
    assert batch.tokens.dtype == torch.long and batch.mask.shape == (*batch.tokens.shape, len(words))
    for i, sequence in enumerate(sequences):
        assert batch.tokens[i, : len(sequence)].tolist() == sequence and not batch.tokens[i, len(sequence) :].any()
        assert batch.real[i].tolist() == [place < len(sequence) for place in range(batch.tokens.shape[1])]
        for place, kind in enumerate(words.expected(sequence)):
            assert torch.equal(batch.mask[i, place], words.mask(kind))
    assert "whole rule" in refused(lambda: encoded(words, [sequences[0], sequences[1][:-1]]))
    refused(lambda: encoded(words, [[*sequences[0], 0]]))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: encoded(grammar(2), []), "no rule to encode"),
        (lambda: Controller(0), "number of tokens"),
        (lambda: Controller(5, 0), "size of a controller"),
        (lambda: Controller(5, scale=math.nan), "scale of a controller"),
        (lambda: Controller(5).sample({}, grammar(2), 1, generator(0)), "of 5 tokens writes no grammar"),
        (lambda: Controller(len(grammar(2))).sample({}, grammar(2), 0, generator(0)), "number of rules"),
        (lambda: Evolution(tournament=0), "tournament"),
        (lambda: Evolution(population=1.5), "population"),
        (lambda: Evolution().propose(grammar(2), [], -1, generator(0)), "number of rules"),
    ],
)
def test_nonsense_is_refused(action, message):
    assert message in refused(action)


# ---------------------------------------- gradients


def test_policy_gradient_by_central_differences():
    words, controller, params = opinionated(2, size=3)
    draws = generator(1)
    batch = encoded(words, controller.sample(params, words, 6, draws))
    with torch.no_grad():
        log_old = controller.log_probabilities(params, batch)[0]
        # Ratios on both sides of the clip, none near its corners.
        log_old = log_old - torch.tensor([1.1, 0.9, 1.5, 0.5, 1.4, 0.6], dtype=DOUBLE).log()
    advantage = torch.tensor([1.0, -1.0, 0.7, -0.4, -0.3, 0.9], dtype=DOUBLE)

    def value(params) -> float:
        return policy_gradient(controller, params, batch, log_old, advantage, clip=0.2, bonus=0.3)[1].item()

    gradient, _ = policy_gradient(controller, params, batch, log_old, advantage, clip=0.2, bonus=0.3)
    assert gradient.keys() == params.keys()
    h = 1e-5
    for name, g in gradient.items():
        for _ in range(2):
            direction = torch.randn(g.shape, generator=draws, dtype=DOUBLE)
            up, down = (value(params | {name: params[name] + sign * h * direction}) for sign in (1, -1))
            assert (up - down) / (2 * h) == pytest.approx((g * direction).sum().item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "surrogate", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),  # good and already more probable: no more
        (0.5, 2.0, 1.0, 1.0),  # good and less probable: back
        (1.0, -2.0, -2.0, -2.0),
        (0.9, -2.0, -1.8, -1.8),
        (0.5, -2.0, -1.6, 0.0),  # bad and already less probable: no more
        (1.5, -2.0, -3.0, -3.0),  # bad and more probable: back
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, surrogate, slope):
    """The surrogate of one rule, and its derivative by the log-probability; the loss is its negative."""
    log_old = torch.tensor([-3.0], dtype=DOUBLE)
    log_new = (log_old + math.log(ratio)).requires_grad_()
    loss = ppo_loss(log_new, log_old, torch.tensor([advantage], dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE), clip=0.2)
    assert loss.item() == pytest.approx(-surrogate)
    (found,) = torch.autograd.grad(loss, log_new)
    assert found.item() == pytest.approx(-slope)


def test_loss_is_a_mean_less_the_entropy():
    log = torch.tensor([-1.0, -2.0, -3.0])
    advantage, entropy = torch.tensor([3.0, 0.0, -1.5]), torch.tensor([1.0, 2.0, 3.0])
    assert ppo_loss(log, log, advantage, entropy, bonus=0.1).item() == pytest.approx(-(0.5 + 0.1 * 2))
    assert ppo_loss(log, log, advantage, entropy, bonus=0.0).item() == pytest.approx(-0.5)


def test_at_ratio_1_it_is_reinforce():
    words, controller, params = opinionated(2)
    batch = encoded(words, controller.sample(params, words, 10, generator(0)))
    advantage = torch.randn(10, generator=generator(1), dtype=DOUBLE)
    with torch.no_grad():
        log_old = controller.log_probabilities(params, batch)[0]
    found, _ = policy_gradient(controller, params, batch, log_old, advantage, bonus=0.0)
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    reinforce = -(advantage * controller.log_probabilities(leaves, batch)[0]).mean()
    expected = torch.autograd.grad(reinforce, list(leaves.values()))
    for g, e in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-13)


def test_descending_makes_good_rules_more_probable():
    words, controller, params = opinionated(2)
    batch = encoded(words, controller.sample(params, words, 2, generator(4)))
    advantage = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    before = controller.log_probabilities(params, batch)[0]
    gradient, _ = policy_gradient(controller, params, batch, before, advantage, bonus=0.0)
    after = controller.log_probabilities({name: params[name] - 1e-3 * gradient[name] for name in params}, batch)[0]
    good, bad = (after - before).tolist()
    assert good > bad and good - bad > 1e-4


def reward(words, sequence) -> float:
    return float("sign(m)" in str(words.rule(sequence)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns(seed):
    """Rules with sign(m) are rewarded: about one in eight at first, nearly all in the end."""
    words, draws = grammar(2), generator(seed)
    controller = Controller(len(words), 16)
    params = controller.init(draws)
    optimizer = torch.optim.Adam(params.values(), lr=0.03)
    means, baseline = [], None
    for _ in range(25):
        sequences = controller.sample(params, words, 16, draws)
        rewards = torch.tensor([reward(words, sequence) for sequence in sequences])
        means.append(rewards.mean().item())
        baseline = means[-1] if baseline is None else 0.8 * baseline + 0.2 * means[-1]
        batch = encoded(words, sequences)
        with torch.no_grad():
            log_old = controller.log_probabilities(params, batch)[0]
        for _ in range(4):
            gradient, _ = policy_gradient(controller, params, batch, log_old, rewards - baseline)
            for name, value in params.items():
                value.grad = gradient[name]
            optimizer.step()
    uniform = controller.init(generator(0))
    chance = [reward(words, sequence) for sequence in controller.sample(uniform, words, 300, draws)]
    assert sum(chance) / 300 < 0.3
    assert sum(means[-8:]) / 8 > 0.8


# ---------------------------------------- evolution


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**32))
def test_mutation_changes_the_tokens(depth, seed):
    words, draws = grammar(depth), generator(seed)
    parent = completed(words, [], draws)
    assert words.complete(parent)
    child = mutated(words, parent, draws)
    assert words.complete(child) and child != parent
    first = next(i for i, (a, b) in enumerate(zip(parent, child, strict=False)) if a != b)
    assert words.expected(parent)[first] == words.expected(child)[first]


def test_mutation_of_an_operand_keeps_the_rest():
    words = grammar(1)
    parent = [words.tokens.index(token) for token in ("mul", "exp", "g", "id", "m")]
    children = [mutated(words, parent, generator(seed)) for seed in range(200)]
    for child in children:
        if child[0] != words.tokens.index("left"):
            assert sum(a != b for a, b in zip(parent, child, strict=True)) == 1
        else:
            assert child[1:] == parent[1:3], "the second side is no more"
    places = {next(i for i, (a, b) in enumerate(zip(parent, child, strict=False)) if a != b) for child in children}
    assert places == set(range(5))


def test_completion_keeps_the_beginning_and_follows_the_wish():
    words = grammar(2)
    whole = [words.tokens.index(token) for token in ("add", "exp", "(", "left", "neg", "g", "sign", "v")]
    assert completed(words, whole, generator(0)) == whole
    assert completed(words, [], generator(0), whole) == whole
    assert completed(words, whole[:3], generator(0), whole[3:]) == whole
    for seed in range(20):
        found = completed(words, whole[:4], generator(seed))
        assert found[:4] == whole[:4] and words.complete(found)
        # After a token that does not fit, nothing is wished for any more.
        found = completed(words, whole[:1], generator(seed), [whole[0], *whole[1:]])
        assert words.complete(found)


def test_first_proposals_are_random():
    words = grammar(2)
    method = Evolution(population=10, tournament=3)
    known = [(completed(words, [], generator(9)), 1.0)] * 9
    assert method.propose(words, known, 5, generator(0)) == method.propose(words, [], 5, generator(0))
    draws = generator(0)
    assert method.propose(words, [], 5, generator(0)) == [completed(words, [], draws) for _ in range(5)]


def test_only_the_youngest_have_children():
    """One old rule has the best reward, but it has left the population."""
    words = grammar(1)
    old, young = ([words.tokens.index(t) for t in rule] for rule in (("left", "id", "g"), ("left", "exp", "m")))
    method = Evolution(population=4, tournament=4)
    differing = method.propose(words, [(old, 9.0)] + [(young, 0.1)] * 4, 50, generator(0))
    assert all(sum(a != b for a, b in zip(young, child, strict=False)) == 1 for child in differing if len(child) == 3)
    # With the old one among them it wins nearly every tournament.
    present = method.propose(words, [(young, 0.1)] * 3 + [(old, 9.0)], 50, generator(0))
    near = [sum(a != b for a, b in zip(old, child, strict=False)) == 1 for child in present if len(child) == 3]
    assert sum(near) > 0.5 * len(near)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_evolution_improves(seed):
    """The reward counts operands that are averages."""

    def averages(sequence) -> float:
        leaves = words.rule(sequence).leaves
        return sum(leaf in ("m", "v", "gamma", "sign(m)") for leaf in leaves) / 4

    words, draws, history = grammar(2), generator(seed), []
    method = Evolution(population=20, tournament=5)
    for _ in range(20):
        new = method.propose(words, history, 10, draws)
        assert len(new) == 10 and all(words.complete(sequence) for sequence in new)
        history += [(sequence, averages(sequence)) for sequence in new]
    early, late = (sum(value for _, value in part) / len(part) for part in (history[:20], history[-40:]))
    assert late > early + 0.3


def test_evolution_is_seeded():
    words = grammar(3)
    history = [(completed(words, [], generator(seed)), seed / 60) for seed in range(60)]
    state = torch.random.get_rng_state()
    once, again, other = (Evolution().propose(words, history, 10, generator(seed)) for seed in (0, 0, 1))
    assert once == again != other
    assert torch.equal(torch.random.get_rng_state(), state)
