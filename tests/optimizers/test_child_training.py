"""Many networks at once: each is what it would be alone, and rules are rewarded by what they do."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused
from torch.func import grad_and_value

from helpers import losses, progress, runtime
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics import recording, tracing
from helpers.optimizers.child_training import RATES, Population
from helpers.optimizers.language import parse
from helpers.optimizers.rules import POWERSIGN, RuleOptimizer, slots
from helpers.runtime import generator
from helpers.types import Examples

WRITTEN = (POWERSIGN, "drop(adam, 0.3)", "momentum*exp(noise)", "g", "rmsprop - clip(m, 1e-3)")
EXPLOSIVE = parse("exp(2/(g - g))")  # infinite at the first step
GROWING = parse("-(1e-1*w)")  # weights grow as long as the rate says


def examples(n: int, seed: int) -> Examples:
    """Points of three classes that a linear map tells apart."""
    draws = generator(seed)
    teacher = torch.randn(4, 3, generator=generator(100))
    x = torch.randn(n, 4, generator=draws)
    return Examples(x, (x @ teacher).argmax(-1))


def population(**changes) -> Population:
    settings = {"model": MLP((4, 8, 3), scale=0.5), "batch": 10, "chunk": 4, "seed": 3}
    return Population(**settings | {"train": examples(40, 0), "valid": examples(20, 1)} | changes)


def images(**changes) -> Population:
    draws = generator(0)
    parts = [Examples(torch.randn(n, 1, 4, 4, generator=draws), torch.arange(n) % 3) for n in (24, 12)]
    net = ConvNet(3, filters=4, blocks=2, head_scale=None, flatten=True, affine=True, size=4)
    return Population(net, *parts, **{"batch": 6, "chunk": 3} | changes)


def assert_same_network(one, other):
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-4, atol=1e-5)
    assert one.memory.keys() == other.memory.keys() and one.steps == other.steps and one.alive == other.alive
    for name, value in one.memory.items():
        torch.testing.assert_close(value, other.memory[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------- a network alone and in company


@pytest.mark.parametrize("make", [population, images])
def test_company_makes_no_difference(make):
    rules, rates = [parse(written) for written in WRITTEN], (0.01, 0.1)
    crowd = make()
    together = [crowd.network(rule, rate) for rate in rates for rule in rules]
    means = crowd.advance(together, 6)
    scores = crowd.scores(together)
    assert means.shape == scores.shape == (10,)
    solitary = make(chunk=1)
    for i, network in enumerate(together):
        alone = solitary.network(network.rule, network.rate)
        own = solitary.advance([alone], 6)
        assert_same_network(network, alone)
        torch.testing.assert_close(means[i : i + 1], own, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores[i : i + 1], solitary.scores([alone]), rtol=0, atol=1e-6)
    moved = torch.stack([network.weights for network in together])
    assert len(moved.unique(dim=0)) == len(together), "every rule and rate leads elsewhere"


def test_place_in_the_list_makes_no_difference():
    crowd = population()
    rules = [parse(written) for written in WRITTEN]
    forwards = [crowd.network(rule, 0.05) for rule in rules]
    backwards = [crowd.network(rule, 0.05) for rule in rules[::-1]]
    one, other = crowd.advance(forwards, 5), crowd.advance(backwards, 5)
    torch.testing.assert_close(one, other.flip(0), rtol=1e-5, atol=1e-6)
    for a, b in zip(forwards, backwards[::-1], strict=True):
        assert_same_network(a, b)


def test_steps_may_be_cut_anywhere():
    crowd = population()
    whole, cut = ([crowd.network(parse(written), 0.05) for written in WRITTEN] for _ in range(2))
    crowd.advance(whole, 7)
    for steps in (1, 4, 2):
        crowd.advance(cut, steps)
    for a, b in zip(whole, cut, strict=True):
        assert a.steps == b.steps == 7 and torch.equal(a.weights, b.weights)


@pytest.mark.parametrize("make", [population, images])
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        ("g", lambda params: torch.optim.SGD(params, lr=0.05)),
        ("momentum", lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)),
        ("adam", lambda params: torch.optim.Adam(params, lr=0.05)),
    ],
)
def test_is_a_plain_loop(make, rule, theirs):
    crowd = make()
    network = crowd.network(parse(rule), 0.05)
    before = network.weights.clone()
    mean = crowd.advance([network, crowd.network(parse("v"), 0.1)], 10)[0]
    params = {name: value.clone().requires_grad_() for name, value in crowd.first.items()}
    optimizer, values = theirs(list(params.values())), []
    for t in range(10):
        x, y = crowd.minibatch(t)
        optimizer.zero_grad()
        value = losses.cross_entropy(crowd.model(params, x), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    expected = torch.cat([value.detach().flatten() for value in params.values()])
    torch.testing.assert_close(network.weights, expected, rtol=1e-3, atol=1e-4)
    assert (network.weights - before).abs().max() > 0.05
    assert mean.item() == pytest.approx(sum(values) / 10, rel=1e-4)
    with torch.no_grad():
        batches = zip(crowd.valid.x.split(crowd.batch), crowd.valid.y.split(crowd.batch), strict=True)
        right = sum((crowd.model(params, x).argmax(-1) == y).sum().item() for x, y in batches)
    assert crowd.scores([network]).item() == pytest.approx(right / len(crowd.valid.y), abs=1e-6)


def test_schedule_is_the_optimizers():
    """The internal sign term decays as in RuleOptimizer, beside networks whose term does not."""
    crowd = population(horizon=8)
    rule = parse(POWERSIGN)
    networks = [crowd.network(rule, 0.05, schedule) for schedule in ("linear", None, "cosine", "linear")]
    crowd.advance(networks, 5)
    crowd.advance(networks, 3)
    for network in networks:
        params = {name: value.clone().requires_grad_() for name, value in crowd.first.items()}
        settings = {"schedule": network.schedule, "steps": 8} if network.schedule else {}
        optimizer = RuleOptimizer(params.values(), rule, lr=0.05, **settings)
        for t in range(8):
            x, y = crowd.minibatch(t)
            optimizer.zero_grad()
            losses.cross_entropy(crowd.model(params, x), y).backward()
            optimizer.step()
        expected = torch.cat([value.detach().flatten() for value in params.values()])
        torch.testing.assert_close(network.weights, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(networks[0].weights, networks[3].weights)
    assert not torch.equal(networks[0].weights, networks[1].weights)
    assert not torch.equal(networks[0].weights, networks[2].weights)


def test_networks_share_no_memory():
    crowd = population()
    networks = [crowd.network(parse("adam"), 0.1) for _ in range(3)]
    assert set(networks[0].memory) == set(slots(parse("adam")))
    crowd.advance(networks, 1)
    places = {t.untyped_storage().data_ptr() for n in networks for t in (n.weights, *n.memory.values())}
    assert len(places) == 9
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for n in networks for t in (n.weights, *n.memory.values()))


def test_weights_by_name():
    crowd = population()
    vector = crowd.network(parse("g"), 0.1).weights
    for name, value in crowd.params(vector).items():
        assert torch.equal(value, crowd.first[name])
    many = crowd.params(vector.expand(2, 5, -1))
    assert all(value.shape == (2, 5, *crowd.first[name].shape) for name, value in many.items())
    again = population(seed=4)
    assert not torch.equal(again.network(parse("g"), 0.1).weights, vector)


# ---------------------------------------- minibatches


def test_every_epoch_uses_every_example_once():
    numbered = Examples(torch.arange(40.0)[:, None].expand(-1, 4), torch.arange(40) % 3)
    crowd, twin = (population(train=numbered) for _ in range(2))
    assert crowd.epoch == 4
    orders = []
    for epoch in range(3):
        batches = [crowd.minibatch(4 * epoch + place) for place in range(4)]
        assert all(batch.x.shape == (10, 4) and batch.y.shape == (10,) for batch in batches)
        order = torch.cat([batch.x[:, 0] for batch in batches])
        assert torch.equal(order.sort().values, torch.arange(40.0))
        assert torch.equal(torch.cat([batch.y for batch in batches]), order.long() % 3), "labels stay with inputs"
        orders.append(order)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    for number in (11, 0, 5):  # in any order, by anyone
        assert torch.equal(twin.minibatch(number).x, crowd.minibatch(number).x)
    assert not torch.equal(population(train=numbered, seed=4).minibatch(0).x, crowd.minibatch(0).x)


def test_randomness_comes_from_the_seed_alone():
    state = torch.random.get_rng_state()
    found = [population().rewards([parse("drop(g, 0.5) + noise")], 2, (0.1, 1.0))[0] for _ in range(2)]
    assert found[0]._replace(seconds=0) == found[1]._replace(seconds=0)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 7}, {"batch": 20, "valid": examples(30, 1)}, {"train": examples(0, 0)}, {"valid": examples(0, 0)},
        {"batch": 0}, {"batch": -10}, {"chunk": 0}, {"batch": 80}, {"chunk": 1.5}, {"batch": True}, {"horizon": 0},
    ],
)  # fmt: skip
def test_bad_sizes_are_refused(changes):
    refused(lambda: population(**changes))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda crowd: crowd.network(parse("g"), math.nan), "learning rate"),
        (lambda crowd: crowd.network(parse("g"), -0.1), "learning rate"),
        (lambda crowd: crowd.advance([crowd.network(parse("g"), 0.1)], 0), "number of steps"),
        (lambda crowd: crowd.run([], -1), "number of epochs"),
        (lambda crowd: crowd.run([], 1, 0), "between two looks"),
        (lambda crowd: crowd.rewards([parse("g")], 0), "number of epochs"),
        (lambda crowd: crowd.rewards([parse("g")], 1, ()), "at least one learning rate"),
    ],
)
def test_bad_numbers_are_refused(action, message):
    assert message in refused(lambda: action(population()))


def test_schedule_needs_a_horizon():
    assert "set the horizon" in refused(lambda: population().network(parse(POWERSIGN), 0.1, "linear"))
    assert population(horizon=8).network(parse(POWERSIGN), 0.1, "linear").schedule == "linear"


# ---------------------------------------- what diverges


def test_the_dead_are_left_behind():
    crowd = population()
    rules = [parse("g"), EXPLOSIVE, parse("adam"), EXPLOSIVE, parse("m")]
    networks = [crowd.network(rule, 0.05) for rule in rules]
    first = crowd.advance(networks, 2)
    assert [network.alive for network in networks] == [True, False, True, False, True]
    assert first[[0, 2, 4]].isfinite().all()
    then = crowd.advance(networks, 2)
    assert then.isnan().tolist() == [False, True, False, True, False]
    assert [network.steps for network in networks] == [4, 2, 4, 2, 4]
    scores = crowd.scores(networks)
    assert scores[1] == scores[3] == 0
    for i in (0, 2, 4):
        alone = crowd.network(rules[i], 0.05)
        crowd.advance([alone], 4)
        assert_same_network(networks[i], alone)
        assert scores[i] == crowd.scores([alone])[0] > 0
    dead = [networks[1], networks[3]]
    assert crowd.advance(dead, 3).isnan().all() and not crowd.scores(dead).any()
    crowd.run(dead, 5)
    assert dead[0].steps == 2


def test_run_makes_every_step():
    for epochs, check in ((1, None), (3, None), (2.5, None), (2, 3), (1, 100), (0, None)):
        crowd = population()
        networks = [crowd.network(parse("g"), 0.1), crowd.network(EXPLOSIVE, 0.1)]
        crowd.run(networks, epochs, check)
        assert networks[0].steps == max(0, round(epochs * 4))
        assert networks[1].steps <= (check or 1) and networks[1].alive == (epochs <= 0)


def test_score_that_is_no_number_is_0():
    crowd = population(score=lambda outputs, y: outputs.sum() * math.nan)
    assert crowd.scores([crowd.network(parse("g"), 0.1)]).item() == 0


def test_scores_of_other_examples():
    crowd = population()
    networks = [crowd.network(parse("g"), 0.3) for _ in range(5)]
    crowd.run(networks, 3)
    on_train = crowd.scores(networks, crowd.train)
    params = crowd.params(networks[0].weights)
    right = (crowd.model(params, crowd.train.x).argmax(-1) == crowd.train.y).float().mean()
    torch.testing.assert_close(on_train, right.expand(5))


# ---------------------------------------- rewards


def test_rewards():
    """Good rules, one that climbs the loss, and one that is infinite at once."""
    crowd, rates = population(), (1e-3, 0.1, 0.5)
    rules = [parse(written) for written in ("g", "adam", "drop(g, 0.5)", "-g")] + [EXPLOSIVE]
    found = crowd.rewards(rules, 8, rates)
    assert [outcome.status for outcome in found[:3]] == ["complete"] * 3 and min(o.reward for o in found[:3]) > 0.6
    assert found[3].reward < 0.4
    assert found[4].status == "diverged" and found[4].reward == 0 and found[4].sweep == (0, 0, 0)
    for outcome in found:
        assert 0 <= outcome.reward <= 1 and outcome.seconds > 0
        assert len(outcome.sweep) == 3 and all(0 <= score <= 1 for score in outcome.sweep)
        assert outcome.rate == rates[outcome.sweep.index(max(outcome.sweep))]


def test_divergence_after_the_sweep():
    crowd = population()
    (growing,) = crowd.rewards([GROWING], 5, (1e3,))
    assert growing.sweep[0] > 0 and (growing.status, growing.reward) == ("diverged", 0.0)


def test_hopeless_rules_are_cut():
    crowd = population()
    kept = crowd.rewards([parse("g"), parse("-g"), EXPLOSIVE], 5, (0.1, 0.3))
    level = max(kept[1].sweep)
    assert level < max(kept[0].sweep), "or the test says nothing"
    found = crowd.rewards([parse("g"), parse("-g"), EXPLOSIVE], 5, (0.1, 0.3), hopeless=level)
    assert [outcome.status for outcome in found] == ["complete", "cut", "diverged"]
    assert found[1].reward == level and found[0].reward == kept[0].reward
    everything = crowd.rewards([parse("g")], 5, (0.1, 0.3), hopeless=1.0)[0]
    assert everything.status == "cut" and everything.reward == max(everything.sweep)


def test_going_on_is_training_anew():
    crowd, rules = population(), [parse(written) for written in WRITTEN]
    rates = (1e-2, 0.1, 0.5)
    found = crowd.rewards(rules, 4, rates)
    for rule, outcome in zip(rules, found, strict=True):
        anew = crowd.network(rule, outcome.rate)
        crowd.run([anew], 4)
        assert anew.steps == 16 and outcome.status == "complete"
        assert crowd.scores([anew]).item() == pytest.approx(outcome.reward, abs=1e-6)
        swept = [crowd.network(rule, rate) for rate in rates]
        crowd.run(swept, 1)
        assert crowd.scores(swept).tolist() == pytest.approx(outcome.sweep, abs=1e-6)


def test_one_epoch_is_the_sweep():
    outcome = population().rewards([parse("g")], 1, (0.1, 0.3))[0]
    assert outcome.status == "complete" and outcome.reward == max(outcome.sweep)


def test_rewards_of_no_rule_and_of_many(capsys, monkeypatch):
    monkeypatch.setattr(progress, "redraws", lambda: True)  # as in a terminal
    crowd = population(chunk=2)
    assert crowd.rewards([]) == []
    rules = [parse(written) for written in (*WRITTEN, "m", "v", "sign(g)", "g + m", "lion")]
    many = crowd.rewards(rules, 2, (0.1, 0.3), label="rules")  # more than fit at a time
    assert "rules" in capsys.readouterr().err
    for rule, outcome in zip(rules, many, strict=True):
        (alone,) = crowd.rewards([rule], 2, (0.1, 0.3))
        assert alone._replace(seconds=0) == outcome._replace(seconds=0)
    assert capsys.readouterr().err == ""


def test_rates_are_the_papers():
    assert pytest.approx((1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10)) == RATES


# ---------------------------------------- fused


def test_one_program_serves_every_number_of_networks(monkeypatch):
    """Fewer networks than a chunk are padded, so nothing is recorded a second time."""
    made = []
    record = recording.record
    monkeypatch.setattr(tracing, "record", lambda *args: made.append(0) or record(*args))
    crowd = population()
    for count in (1, 2, 3, 4, 5, 9):
        networks = [crowd.network(parse("g"), 0.1) for _ in range(count)]
        crowd.advance(networks, 2)
        crowd.scores(networks)
    assert len(made) == 2


def test_gradient_is_each_networks_own():
    crowd = population()
    draws = generator(0)
    weights = torch.randn(4, len(crowd.network(parse("g"), 1.0).weights), generator=draws)
    x, y = crowd.minibatch(0)
    found, each = crowd._gradient(weights, x, y)
    for row, gradient, value in zip(weights, found, each, strict=True):
        expected, loss = grad_and_value(lambda w: losses.cross_entropy(crowd.model(crowd.params(w), x), y))(row)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(value, loss)


@pytest.mark.slow
def test_fused_is_the_same():
    if not runtime.can_compile():
        pytest.skip("torch.compile needs a C++ compiler")
    plain, fused = population(), population(fused=True)
    rows = [[crowd.network(parse(written), 0.05) for written in WRITTEN] for crowd in (plain, fused)]
    means = [crowd.advance(networks, 6) for crowd, networks in zip((plain, fused), rows, strict=True)]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)
    for one, other in zip(*rows, strict=True):
        assert_same_network(one, other)
    torch.testing.assert_close(plain.scores(rows[0]), fused.scores(rows[1]), rtol=0, atol=1e-6)


def test_other_losses_and_scores():
    """Regression: mean squared error, scored by its negative."""
    draws = generator(0)
    parts = [Examples(x := torch.randn(n, 4, generator=draws), x[:, :3].sin()) for n in (40, 20)]
    crowd = population(
        train=parts[0], valid=parts[1], loss=losses.mean_squared_error,
        score=lambda outputs, y: 1 - losses.mean_squared_error(outputs, y),
    )  # fmt: skip
    still, moving = crowd.network(parse("g"), 0.0), crowd.network(parse("g"), 0.3)
    crowd.run([still, moving], 5)
    before, after = crowd.scores([still, moving]).tolist()
    assert after > before
