"""Update rules at work: known optimisers, what is remembered, randomness, schedules, and the PyTorch optimiser."""

from __future__ import annotations

import io
import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from helpers.optimizers.evolution import completed
from helpers.optimizers.language import OPERANDS, Expression, build, grammar, parse
from helpers.optimizers.rules import (
    ADDSIGN,
    BASELINES,
    PAPER_RULES,
    POWERSIGN,
    RESTARTS,
    RuleOptimizer,
    Settings,
    decay,
    evaluate,
    remembered,
    slots,
    step,
)
from helpers.runtime import generator

RANDOM = ("noise", "drop(g, 0.3)", "drop(m, 0.5)*exp(noise)", "drop(drop(g, 0.1), 0.5) - noise", "sign(noise)*adam")


def problem(dtype=torch.float64) -> list[torch.Tensor]:
    """Parameters of two shapes to be moved by :func:`loss`."""
    draws = generator(0)
    return [torch.randn(shape, generator=draws).to(dtype).requires_grad_() for shape in ((3, 2), (4,))]


def loss(params) -> torch.Tensor:
    """Not quadratic, and its minimum is nowhere near the beginning."""
    a, b = params
    return ((a - 2) ** 4).sum() / 10 + (torch.sin(3 * b) + (b + 1) ** 2).sum() + torch.tanh(a.sum() * b.sum())


def trained(optimizer, params, steps: int):
    """Where the steps lead, and every point on the way."""
    points = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(params).backward()
        optimizer.step()
        points.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(points)


def by_hand(update, steps: int, rate: float) -> torch.Tensor:
    """The points of ``w ← w − rate · update(g, memory, t)``, all parameters as one vector; memory starts empty."""
    params, memory, points = problem(), {}, []
    for t in range(1, steps + 1):
        gradients = torch.autograd.grad(loss(params), params)
        flat = torch.cat([g.flatten() for g in gradients])
        moves = (rate * update(flat, memory, t)).split([p.numel() for p in params])
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p -= move.view_as(p)
        points.append(torch.cat([p.detach().flatten() for p in params]))
    return torch.stack(points)


# ---------------------------------------- known optimisers


@pytest.mark.parametrize(
    ("rule", "theirs", "rate"),
    [
        ("g", lambda params: torch.optim.SGD(params, lr=0.02), 0.02),
        ("momentum", lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9), 0.01),
        ("adam", lambda params: torch.optim.Adam(params, lr=0.05), 0.05),
        ("rmsprop", lambda params: torch.optim.RMSprop(params, lr=0.01), 0.01),
        ("g + 1e-2*w", lambda params: torch.optim.SGD(params, lr=0.02, weight_decay=0.01), 0.02),
    ],
)
def test_is_pytorchs(rule, theirs, rate):
    """100 steps, to rounding in float64."""
    mine, other = problem(), problem()
    found = trained(RuleOptimizer(mine, rule, lr=rate), mine, 100)
    expected = trained(theirs(other), other, 100)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert (found[-1] - found[0]).abs().max() > 0.1, "something moved"


def test_settings_are_pytorchs():
    mine, other = problem(), problem()
    constants = Settings(beta1=0.8, beta2=0.95, epsilon=1e-3)
    found = trained(RuleOptimizer(mine, "adam", lr=0.05, settings=constants), mine, 50)
    expected = trained(torch.optim.Adam(other, lr=0.05, betas=(0.8, 0.95), eps=1e-3), other, 50)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def average(memory, g, beta=0.9):
    memory["m"] = beta * memory.get("m", 0.0) + (1 - beta) * g
    return memory["m"]


def lion(g, memory, t):
    old = memory.get("l", torch.zeros_like(g))
    memory["l"] = 0.99 * old + 0.01 * g
    return torch.sign(0.9 * old + 0.1 * g)


def powersign(g, memory, t):
    return g * torch.exp(g.sign() * average(memory, g).sign())


def addsign(g, memory, t):
    return g * (1 + g.sign() * average(memory, g).sign())


def corrected(g, memory, t):
    return average(memory, g) / (1 - 0.9**t)


def third_moment(g, memory, t):
    memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g**2
    memory["c"] = 0.999 * memory.get("c", 0.0) + 0.001 * g**3
    return memory["c"] / (memory["v"] + 1e-8 * (1 - 0.999**t))


@pytest.mark.parametrize(
    ("rule", "update", "rate"),
    [
        ("lion", lion, 0.01),
        (POWERSIGN, powersign, 0.01),
        (ADDSIGN, addsign, 0.01),
        ("m", corrected, 0.02),
        ("gamma/v", third_moment, 0.01),
        ("clip(g, 1e-3)", lambda g, *_: g.clamp(-1e-3, 1e-3), 1.0),
        ("logabs(g) - sqrtabs(g)", lambda g, *_: g.abs().log() - g.abs().sqrt(), 0.01),
        ("-sign(g)*(2 - 1)", lambda g, *_: -g.sign(), 0.01),
    ],
)
def test_is_the_loop_by_hand(rule, update, rate):
    params = problem()
    found = trained(RuleOptimizer(params, rule, lr=rate), params, 60)
    torch.testing.assert_close(found, by_hand(update, 60, rate), rtol=1e-11, atol=1e-12)


def test_bias_correction_makes_the_first_averages_the_gradients():
    g, w = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name, expected in (("m", g), ("v", g**2), ("gamma", g**3), ("adam", g.sign()), ("momentum", g)):
        rule = parse(name)
        found, _ = step(rule, g, w, remembered(rule, w), 1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    rule = parse("rmsprop")  # its average is not corrected
    found, _ = step(rule, g, w, remembered(rule, w), 1)
    torch.testing.assert_close(found, g.sign() * 10, rtol=1e-6, atol=0)


def test_delta_keeps_a_division_by_zero_finite():
    g = torch.tensor([0.0, 2.0], dtype=torch.float64)
    found, _ = step(parse("1/g"), g, g, {}, 1)
    torch.testing.assert_close(found, torch.tensor([1e8, 0.5], dtype=torch.float64), rtol=1e-6, atol=0)


# ---------------------------------------- memory


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("g", ()), (POWERSIGN, ("m",)), (ADDSIGN, ("m",)), ("adam", ("m", "v")), ("rmsprop", ("r",)),
        ("momentum", ("b",)), ("lion", ("l",)), ("gamma*m/v", ("gamma", "m", "v")), ("adam*exp(m)", ("m", "v")),
        ("clip(rmsprop, 1e-5) + drop(m, 0.3)", ("m", "r")), ("noise*exp(1e-3*w) - g**3", ()), ("sign(g)/2", ()),
    ],
)  # fmt: skip
def test_only_what_the_operands_need_is_remembered(rule, expected):
    assert slots(parse(rule)) == expected
    params = problem(torch.float32)
    optimizer = RuleOptimizer(params, rule, lr=0.001)
    trained(optimizer, params, 3)
    for p in params:
        state = optimizer.state[p]
        held = [value for value in state.values() if isinstance(value, torch.Tensor)]
        assert sum(t.numel() * t.element_size() for t in held) == 4 * len(expected) * p.numel()
        assert sum(t.untyped_storage().nbytes() for t in held) == 4 * len(expected) * p.numel()
        assert set(state) == {"step", *expected} and state["step"] == 3


def test_memory_begins_at_zero_and_the_old_one_is_left_alone():
    rule, w = parse("adam*momentum*lion*gamma/rmsprop"), torch.randn(3, generator=generator(0))
    memory = remembered(rule, w)
    assert set(memory) == {"m", "v", "b", "l", "gamma", "r"}
    kept, g = {name: value.clone() for name, value in memory.items()}, torch.ones(3)
    _, after = step(rule, g, w, memory, 1)
    assert all(torch.equal(memory[name], kept[name]) and not memory[name].any() for name in kept)
    assert all(after[name].all() for name in kept) and torch.equal(g, torch.ones(3))


# ---------------------------------------- arithmetic at the edge

EXTREMES = [0.0, -0.0, 1.0, -1e-3, 1e38, -1e38, 1e-45, -1e-40, math.inf, -math.inf, math.nan]


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(EXTREMES), min_size=6, max_size=6),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([(6,), (2, 3), (1, 3, 2), ()]),
    st.sampled_from([1, 2, 10**6]),
)
def test_no_rule_raises(depth, seed, values, dtype, shape, t):
    words = grammar(depth)
    rule = words.rule(completed(words, [], generator(seed)))
    draws = torch.tensor(values, dtype=dtype)
    g, w = (draws.view(shape), draws.flip(0).view(shape)) if shape else (draws[0], draws[1])
    memory, random = remembered(rule, w), generator(seed)
    for _ in range(2):
        found, memory = step(rule, g, w, memory, t, random=random, scale=0.5)
        assert found.shape == g.shape and found.dtype == dtype
        assert all(value.shape == g.shape and value.dtype == dtype for value in memory.values())


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_at_the_edge(name):
    g = torch.tensor(EXTREMES)
    rule = Expression(name)
    found, _ = step(rule, g, g.flip(0), remembered(rule, g), 1, random=generator(0))
    assert found.shape == g.shape and found.dtype == g.dtype


# ---------------------------------------- randomness


@pytest.mark.parametrize("written", [*PAPER_RULES, *BASELINES.values(), *RANDOM, "lion"])
@pytest.mark.parametrize(("shared", "lead"), [(1, (4,)), (2, (2, 3)), (0, ())])
def test_leading_axes_are_many_networks(written, shared, lead):
    """One step of all is each one's own step, with the same random numbers for each."""
    rule, draws = parse(written), generator(1)
    g, w = torch.randn(2, *lead, 5, 2, generator=draws, dtype=torch.float64)
    memory = {name: torch.rand(g.shape, generator=draws, dtype=torch.float64) for name in slots(rule)}
    together, after = step(rule, g, w, memory, 3, random=generator(5), shared=shared)
    assert together.shape == g.shape
    for at in product(*map(range, lead)):
        own = {name: value[at] for name, value in memory.items()}
        alone, own_after = step(rule, g[at], w[at], own, 3, random=generator(5))
        torch.testing.assert_close(together[at], alone, rtol=1e-12, atol=1e-14)
        for name, value in own_after.items():
            torch.testing.assert_close(after[name][at], value, rtol=1e-14, atol=0)


def test_networks_see_different_noise_unless_shared():
    g = torch.ones(4, 6)
    for written in ("noise", "drop(g, 0.5)"):
        apart, _ = step(parse(written), g, g, {}, 1, random=generator(0))
        shared, _ = step(parse(written), g, g, {}, 1, random=generator(0), shared=1)
        assert not torch.equal(apart[0], apart[1]) and torch.equal(shared[0], shared[1])


def test_drop_keeps_the_mean():
    g = torch.ones(200_000)
    for rate in (0.1, 0.3, 0.5):
        found, _ = step(parse(f"drop(g, {rate})"), g, g, {}, 1, random=generator(0))
        keep = 1 - rate
        torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / keep]))
        assert abs((found > 0).float().mean() - keep) < 5 * math.sqrt(keep * rate / len(g))
        assert abs(found.mean() - 1) < 5 * math.sqrt(rate / keep / len(g))


def test_noise_is_gaussian_and_the_same_wherever_a_rule_uses_it():
    g = torch.zeros(100_000)
    found, _ = step(parse("noise"), g, g, {}, 1, random=generator(0))
    assert abs(found.mean()) < 5 * 0.01 / math.sqrt(len(g)) and abs(found.std() - 0.01) < 5 * 0.01 / math.sqrt(2e5)
    louder, _ = step(parse("noise"), g, g, {}, 1, Settings(noise=1.0), generator(0))
    torch.testing.assert_close(louder, 100 * found)
    same, _ = step(parse("noise - noise"), g, g, {}, 1, random=generator(0))
    assert not same.any(), "an operand has one value in a step"
    other, _ = step(parse("drop(g, 0.5) - drop(g, 0.5)"), g + 1, g, {}, 1, random=generator(0))
    assert other.any(), "each drop draws for itself"


def test_optimizer_draws_from_its_seed():
    state, points = torch.random.get_rng_state(), []
    for seed in (0, 0, 1):
        params = problem()
        points.append(trained(RuleOptimizer(params, "drop(g, 0.3) + noise", lr=0.01, seed=seed), params, 5))
    assert torch.equal(points[0], points[1]) and not torch.equal(points[0], points[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (points[0][1:] - points[0][:-1]).unique(dim=0).shape[0] == 4, "new numbers at every step"


# ---------------------------------------- decay of the sign term


def test_decay_by_hand():
    assert [decay(None, t, 4) for t in (0, 2, 4)] == [1, 1, 1]
    assert [decay("linear", t, 4) for t in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    half = math.sqrt(0.5)
    cosine = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
    assert [decay("cosine", t, 4) for t in range(5)] == pytest.approx(cosine, abs=1e-15)
    again = [*cosine[:4] * RESTARTS, 0]  # it begins again after each stretch, but not at the end
    assert [decay("restarts", t, 4 * RESTARTS) for t in range(4 * RESTARTS + 1)] == pytest.approx(again, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "restarts"])
def test_decay_stays_where_it_ended(kind):
    assert decay(kind, 0, 10) == 1
    assert decay(kind, 10, 10) == decay(kind, 15, 10) == decay(kind, 10**6, 10) == pytest.approx(0, abs=1e-15)
    assert all(0 <= decay(kind, t, 10) <= 1 for t in range(30))


@pytest.mark.parametrize(("t", "steps", "message"), [(0, 0, "steps of a decay"), (0, 1.5, "steps"), (-1, 5, "a step")])
def test_decay_over_no_steps_is_refused(t, steps, message):
    assert message in refused(lambda: decay("linear", t, steps))


def test_unknown_decay_is_refused():
    for kind in ("exponential", "", "Linear", 1):
        assert "use one of None, linear, cosine, restarts" in refused(lambda kind=kind: decay(kind, 0, 10))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_decays_the_sign_term_alone(kind):
    """The first step has factor 1, the step after the last 0: PowerSign has become gradient descent."""
    steps = 20

    def update(g, memory, t):
        factor = decay(kind, min(t - 1, steps), steps)
        return g * torch.exp(factor * g.sign() * average(memory, g).sign())

    params = problem()
    found = trained(RuleOptimizer(params, POWERSIGN, lr=0.01, schedule=kind, steps=steps), params, steps + 5)
    torch.testing.assert_close(found, by_hand(update, steps + 5, 0.01), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("sign(g)*sign(m)", lambda g, m: g.sign() * m.sign() / 2),
        ("sign(m)*sign(g)", lambda g, m: g.sign() * m.sign() / 2),
        ("-(sign(g)*sign(m))", lambda g, m: -g.sign() * m.sign() / 2),
        (ADDSIGN, lambda g, m: g + g * g.sign() * m.sign() / 2),
        ("sign(g)", lambda g, m: g.sign()),
        ("sign(m)*2", lambda g, m: 2 * m.sign()),
        ("sign(g) + sign(m)", lambda g, m: g.sign() + m.sign()),
    ],
)
def test_scale_belongs_to_the_product_of_signs(written, expected):
    g, m = torch.tensor([3.0, -2.0, 5.0]), torch.tensor([-7.0, -7.0, 9.0])  # one step does not change the signs of m
    rule = parse(written)
    found, _ = step(rule, g, g, {slot: m for slot in slots(rule)}, 2, scale=0.5)
    torch.testing.assert_close(found, expected(g, m))


def test_evaluate_takes_any_operands():
    """Operands are looked up by name, so a figure may ask for a rule's value on a grid."""
    grid = {"sign(g)": torch.tensor([1.0, -1.0]), "sign(m)": torch.tensor([1.0, 1.0]), "g": torch.tensor([1.0, -1.0])}
    found = evaluate(parse(POWERSIGN), grid, Settings(), None)
    torch.testing.assert_close(found, torch.tensor([math.e, -1 / math.e]))


# ---------------------------------------- the PyTorch optimiser


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "g +"}, "is no update rule"),
        ({"lr": -0.1}, "at least 0"),
        ({"lr": math.nan}, "at least 0"),
        ({"lr": math.inf}, "learning rate"),
        ({"lr": "0.1"}, "learning rate"),
        ({"schedule": "linear"}, "pass steps"),
        ({"schedule": "linear", "steps": 0}, "pass steps"),
        ({"schedule": "linear", "steps": -5}, "pass steps"),
        ({"schedule": "exponential", "steps": 10}, "use one of None, linear"),
    ],
)
def test_optimizer_refuses(settings, message):
    """Also where the rate is that of a group."""
    if "lr" in settings:
        group = {"params": problem(), "lr": settings["lr"]}
        assert message in refused(lambda: RuleOptimizer([group], "g", lr=0.1))
        assert message in refused(lambda: RuleOptimizer(problem(), "g", lr=0.1).add_param_group(group))
    assert message in refused(lambda: RuleOptimizer(problem(), **{"rule": "g", "lr": 0.1} | settings))


def test_closure():
    params, plain = problem(), problem()
    optimizer = RuleOptimizer(params, "adam", lr=0.05)
    values = []

    def closure():
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    with torch.no_grad():
        for _ in range(10):
            values.append(optimizer.step(closure).item())
    expected = trained(RuleOptimizer(plain, "adam", lr=0.05), plain, 10)
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), expected[-1])
    assert values[0] == loss(problem()).item() and values[-1] < values[0]
    assert RuleOptimizer(problem(), "g", lr=0.1).step() is None


def test_groups_have_rates_of_their_own():
    (a, b), (c, d) = problem(), problem()
    found = trained(RuleOptimizer([{"params": [a], "lr": 0.001}, {"params": [b]}], "adam", lr=0.05), (a, b), 10)
    groups = [{"params": [c], "lr": 0.001}, {"params": [d], "lr": 0.05}]
    torch.testing.assert_close(found, trained(torch.optim.Adam(groups), (c, d), 10), rtol=1e-11, atol=1e-12)


def test_parameters_without_a_gradient_stay():
    a, b = problem()
    before = b.detach().clone()
    optimizer = RuleOptimizer([a, b], "adam", lr=0.1)
    a.square().sum().backward()
    optimizer.step()
    assert torch.equal(b, before) and b not in optimizer.state and optimizer.state[a]["step"] == 1


def test_learning_rate_schedulers_work():
    params, other = problem(), problem()
    for parameters, optimizer in (
        (params, RuleOptimizer(params, "g", lr=0.02)),
        (other, torch.optim.SGD(other, lr=0.02)),
    ):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for _ in range(5):
            trained(optimizer, parameters, 1)
            scheduler.step()
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


SAVED = ["g", "adam*exp(m)", "momentum", "lion", "rmsprop*clip(gamma, 1e-3)", POWERSIGN, "g + drop(m, 0.3)", "noise"]


@pytest.mark.parametrize("rule", SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_state_continues_exactly(rule, dtype):
    def made(params):
        return RuleOptimizer(params, rule, lr=0.01, schedule="linear", steps=12)

    whole = problem(dtype)
    expected = trained(made(whole), whole, 12)
    assert expected.isfinite().all()
    params = problem(dtype)
    first = made(params)
    trained(first, params, 5)
    file = io.BytesIO()
    torch.save({"state": first.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file)
    again = [p.clone().requires_grad_() for p in saved["params"]]
    second = made(again)
    second.load_state_dict(saved["state"])
    assert torch.equal(trained(second, again, 7)[-1], expected[-1])
    for p in again:
        state = second.state[p]
        assert state["step"] == 12 and isinstance(state["step"], int)
        assert all(value.dtype == dtype for value in state.values() if isinstance(value, torch.Tensor))


def test_state_without_generators_is_taken():
    """As state was saved before it held them."""
    params = problem()
    optimizer = RuleOptimizer(params, "drop(m, 0.3)", lr=0.01, seed=3)
    trained(optimizer, params, 4)
    saved = optimizer.state_dict()
    del saved["random"]
    points = []
    for _ in range(2):
        again = problem()
        optimizer = RuleOptimizer(again, "drop(m, 0.3)", lr=0.01, seed=3)
        optimizer.load_state_dict(saved)
        points.append(trained(optimizer, again, 3))
    assert torch.equal(*points)


@pytest.mark.parametrize("rule", ["adam", "rmsprop", "g/m"])
def test_half_precision_is_refused_or_holds(rule):
    """float16 knows no 1e-8: the quotient of two zeros would be no number; bfloat16 and float32 do."""
    for dtype in (torch.float32, torch.bfloat16):
        zero = torch.zeros(3, dtype=dtype)
        update, _ = step(parse(rule), zero, zero, remembered(parse(rule), zero), 1)
        assert not update.any()
    w = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    w.grad = torch.zeros_like(w)
    assert "float32 or bfloat16" in refused(RuleOptimizer([w], rule, lr=0.1).step)


def test_rule_may_be_an_expression():
    params, other = problem(), problem()
    rule = build("mul", Expression("g"), build("exp", build("mul", Expression("sign(m)"), Expression("sign(g)"))))
    found = trained(RuleOptimizer(params, rule, lr=0.01), params, 5)
    assert torch.equal(found, trained(RuleOptimizer(other, POWERSIGN, lr=0.01), other, 5))


def test_optimizer_trains_a_module():
    """PowerSign fits a small network."""
    draws = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=draws))
    x = torch.randn(32, 2, generator=draws)
    y = x.prod(-1, keepdim=True)
    optimizer = RuleOptimizer(net.parameters(), POWERSIGN, lr=0.03)
    values = []
    for _ in range(200):
        optimizer.zero_grad()
        value = (net(x) - y).square().mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.3 * values[0]
