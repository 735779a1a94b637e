"""The language of update rules: canonical form, text, LaTeX, tokens, refusals."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.mathtext import MathTextParser
from refusals import refused

from helpers.errors import UserError
from helpers.optimizers.evolution import completed
from helpers.optimizers.language import (
    BESIDE,
    BINARY,
    OPERANDS,
    UNARY,
    Expression,
    Grammar,
    build,
    grammar,
    latex,
    parse,
    text,
)
from helpers.optimizers.rules import ADDSIGN, BASELINES, PAPER_RULES, POWERSIGN, Settings, evaluate, remembered, step
from helpers.runtime import generator

ALL_RULES = (*PAPER_RULES, *BASELINES.values(), POWERSIGN, ADDSIGN, "lion")
g, m = Expression("g"), Expression("m")


def drawn(depth: int, seed: int) -> list[int]:
    """A random sequence of tokens, every choice equally probable."""
    return completed(grammar(depth), [], generator(seed))


def raw(words: Grammar, sequence) -> Expression:
    """The tree that a sequence spells as it stands, not canonical: with ``id`` and without the second side of left."""
    rest = iter(sequence)

    def side() -> Expression:
        op = words.tokens[next(rest)]
        return Expression(op, (argument(),) if op == "left" else (argument(), argument()))

    def argument() -> Expression:
        unary, operand = words.tokens[next(rest)], words.tokens[next(rest)]
        return Expression(unary, (side() if operand == words.NESTED else Expression(operand),))

    return side()


def canonical(tree: Expression) -> Expression:
    """The tree, built from its operands up."""
    args = [canonical(arg) for arg in tree.args]
    return args[0] if tree.op == "left" and len(args) == 1 else build(tree.op, *args)


seeds = st.integers(0, 2**32)
token_rules = st.builds(lambda depth, seed: raw(grammar(depth), drawn(depth, seed)), st.integers(1, 3), seeds)
raw_trees = st.recursive(
    st.sampled_from([*OPERANDS, *BESIDE]).map(Expression),
    lambda below: st.one_of(
        st.builds(lambda op, x: Expression(op, (x,)), st.sampled_from(list(UNARY)), below),
        st.builds(lambda op, x, y: Expression(op, (x, y)), st.sampled_from(list(BINARY)), below, below),
    ),
    max_leaves=10,
)
# Few names, so that what simplifies meets often.
crowded_trees = st.recursive(
    st.sampled_from(["g", "g**2", "m", "1", "sign(g)"]).map(Expression),
    lambda below: st.one_of(
        st.builds(
            lambda op, x: Expression(op, (x,)), st.sampled_from(["neg", "sign", "clip 1e-5", "clip 1e-3"]), below
        ),
        st.builds(lambda op, x, y: Expression(op, (x, y)), st.sampled_from(list(BINARY)), below, below),
    ),
    max_leaves=10,
)
trees = st.one_of(token_rules, raw_trees, crowded_trees)


# ---------------------------------------- canonical form


@settings(max_examples=200, deadline=None)
@given(trees)
def test_text_is_read_back(tree):
    rule = canonical(tree)
    assert parse(text(rule)) == rule
    assert str(rule) == text(rule)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_the_canonical_form_is_its_own(tree):
    rule = canonical(tree)
    assert canonical(rule) == rule
    assert not {"id", "left"} & set(rule.functions)


@settings(max_examples=80, deadline=None)
@given(trees, trees, st.sampled_from(["exp", "logabs", "sqrtabs", "clip 1e-4", "drop 0.3", "sign"]))
def test_laws(x, y, op):
    x, y, one = canonical(x), canonical(y), Expression("1")

    def neg(z):
        return build("neg", z)

    assert build("add", x, y) == build("add", y, x)
    assert build("mul", x, y) == build("mul", y, x)
    assert build("id", x) == build("left", x, y) == x
    assert build("mul", x, one) == build("mul", one, x) == build("div", x, one) == x
    assert neg(neg(x)) == x
    assert neg(build("sub", x, y)) == build("sub", y, x)
    assert build("sign", build("sign", x)) == build("sign", x)
    assume("sub" not in (x.op, y.op))  # a difference takes a minus sign in, and it stays there
    assert build("add", x, neg(y)) == build("sub", x, y) == build("add", neg(y), x)
    assert build("sub", x, neg(y)) == build("add", x, y)
    assert build("sub", neg(x), y) == neg(build("add", x, y))
    assert build("add", neg(x), neg(y)) == neg(build("add", x, y))
    assert build("sub", neg(x), neg(y)) == build("sub", y, x)
    for times in ("mul", "div"):
        assert build(times, neg(x), y) == build(times, x, neg(y)) == neg(build(times, x, y))
        assert build(times, neg(x), neg(y)) == build(times, x, y)
    if op in ("logabs", "sqrtabs"):
        assert build(op, neg(x)) == build(op, x)
    elif op != "exp":
        assert build(op, neg(x)) == neg(build(op, x))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("g*g", "g**2"),
        ("g*g*g", "g**3"),
        ("g*g**2", "g**3"),
        ("g**2*g", "g**3"),
        ("-g*-g", "g**2"),
        ("-g*g", "-g**2"),
        ("sign(m)*sign(g)", "sign(g)*sign(m)"),
        ("sign(g**3)", "sign(g)"),
        ("sign(-g)", "-sign(g)"),
        ("sign(sign(v*m))", "sign(m*v)"),
        ("sign(1)", "1"),
        ("clip(clip(g, 1e-3), 1e-5)", "clip(g, 1e-5)"),
        ("clip(clip(g, 1e-5), 1e-3)", "clip(g, 1e-5)"),
        ("clip(-clip(g, 1e-5), 1e-3)", "-clip(g, 1e-5)"),
        ("drop(-g, 0.1)", "-drop(g, 0.1)"),
        ("drop(drop(g, 0.1), 0.1)", "drop(drop(g, 0.1), 0.1)"),
        ("logabs(-g)", "logabs(g)"),
        ("sqrtabs(-(g*m))", "sqrtabs(g*m)"),
        ("exp(-g)", "exp(-g)"),
        ("-(g - m)", "m - g"),
        ("m - -g", "g + m"),
        ("-m - g", "-(g + m)"),
        ("g/-m", "-(g/m)"),
        ("1*g/1", "g"),
        ("---g", "-g"),
        ("g - (m - v)", "g - (m - v)"),
        ("g/(m/v)", "g/(m/v)"),
        ("-(1e-4*w)", "-(1e-4*w)"),
        ("0.001 * w", "1e-3*w"),
        ("clip(g, 0.00001)", "clip(g, 1e-5)"),
        (" g ", "g"),
        (POWERSIGN, "exp(sign(g)*sign(m))*g"),
        (ADDSIGN, "(1 + sign(g)*sign(m))*g"),
    ],
)
def test_canonical_texts(written, expected):
    assert text(parse(written)) == expected


def test_what_is_not_the_same_stays_different():
    different = ["g - m", "m - g", "g/m", "m/g", "g", "-g", "g*2", "g + g", "exp(g)", "exp(-g)", "clip(g, 1e-3)"]
    different += ["clip(g, 1e-4)", "drop(g, 0.1)", "sign(g)", "sign(g**2)", "2", "1", "1/g", "1e-4*w", "1e-1*w"]
    assert len({parse(written) for written in different}) == len(different)


class Naive:
    """A raw tree evaluated as it stands. δ is 0, as the canonical form takes it; ``divided`` marks divisions by 0, of
    which the sign is rounding's."""

    def __init__(self, operands, uniform):
        self.operands, self.uniform = operands, uniform
        self.divided = torch.zeros_like(uniform, dtype=torch.bool)

    def __call__(self, tree):
        x, *y = [self(arg) for arg in tree.args] or [None]
        name, _, number = tree.op.partition(" ")
        match name:
            case "id" | "left":
                return x
            case "neg":
                return -x
            case "exp":
                return x.exp()
            case "logabs":
                return x.abs().log()
            case "sqrtabs":
                return x.abs().sqrt()
            case "sign":
                return x.sign()
            case "clip":
                return x.clamp(-float(number), float(number))
            case "drop":
                return torch.where(self.uniform < 1 - float(number), x / (1 - float(number)), 0.0)
            case "add":
                return x + y[0]
            case "sub":
                return x - y[0]
            case "mul":
                return x * y[0]
            case "div":
                self.divided |= y[0] == 0
                return x / y[0]
        return self.operands[tree.op]


def numbers(seed: int, shape=(64,)):
    """Every operand, fixed and consistent with the others, and numbers for drop."""
    draws = generator(seed)
    values = {name: torch.randn(shape, generator=draws, dtype=torch.float64) for name in [*OPERANDS, *BESIDE]}
    gradient, average = values["g"], values["m"]
    values |= {"g**2": gradient * gradient, "g**3": gradient * gradient * gradient, "v": values["v"].square()}
    values |= {"sign(g)": gradient.sign(), "sign(m)": average.sign()}
    values |= {str(number): torch.full(shape, float(number), dtype=torch.float64) for number in (1, 2)}
    return values, torch.rand(shape, generator=draws, dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(trees, seeds)
def test_the_canonical_form_computes_the_same(tree, seed):
    values, uniform = numbers(seed)
    naive = Naive(values, uniform)
    expected = naive(tree)
    found = evaluate(canonical(tree), values, Settings(delta=0.0), lambda: uniform)
    sound = ~naive.divided
    torch.testing.assert_close(found[sound], expected[sound], rtol=1e-12, atol=0, equal_nan=True)


def test_one_as_divisor_has_no_delta():
    """x/1 is x although x/(1 + δ) is not quite; any other divisor keeps its δ."""
    values, uniform = numbers(0)
    coarse = Settings(delta=0.5)
    assert torch.equal(evaluate(parse("g/1"), values, coarse, None), values["g"])
    torch.testing.assert_close(evaluate(parse("g/2"), values, coarse, None), values["g"] / 2.5)
    torch.testing.assert_close(evaluate(parse("g/-2"), values, coarse, None), -values["g"] / 2.5)


def test_depth_leaves_and_functions():
    rule = parse("clip(g, 1e-4)*exp(m - v/g)")
    assert rule.depth == 3
    assert rule.leaves == ("g", "m", "v", "g")
    assert rule.functions == ("mul", "clip 1e-4", "exp", "sub", "div")
    assert (g.depth, g.leaves, g.functions) == (0, ("g",), ())
    assert parse("sign(m)").leaves == ("sign(m)",), "sign(g) and sign(m) are operands"


@pytest.mark.parametrize("written", ALL_RULES)
def test_published_rules_parse_print_and_step(written):
    rule = parse(written)
    assert parse(text(rule)) == rule and canonical(rule) == rule and rule.depth <= 3
    gradient, w = torch.tensor([0.3, -2.0, 0.0]), torch.tensor([1.0, -1.0, 0.5])
    memory, random = remembered(rule, w), generator(0)
    for t in (1, 2, 3):
        direction, memory = step(rule, gradient, w, memory, t, random=random)
        assert direction.shape == w.shape and direction.isfinite().all()


def test_table_1_has_16_different_rules():
    assert len({parse(written) for written in PAPER_RULES}) == len(PAPER_RULES) == 16
    assert parse(POWERSIGN) in {parse(written) for written in PAPER_RULES}


# ---------------------------------------- refusals


@pytest.mark.parametrize(
    "written",
    [
        "", " ", "g+", "g g", "import os", '__import__("os")', "g**4", "g**2.0", "g**m", "g**2**2", "clip(g, 2)",
        "clip(g)", "clip(g, 1e-4, 1e-4)", "clip(g, True)", "clip(g, [1])", "clip(g, 1e-2)", "drop(g, 0.2)", "f(g)",
        "f(g, 1)", "exp(g, g)", "exp()", "exp(x=g)", "exp(*g)", "exp", "neg", "left", "id(g)", "g.exp()", "g[0]", "3",
        "True", "1.0", "2.0", "-3", "w", "2*w", "1e-5*w", "[]*w", "{}*w", "+g", "g % m", "g @ m", "g // m", "g; g",
        "g, m", "g if g else m", "lambda: g", "g = m", "(g := m)", "G", "grad", '"g"', 'f"{g}"', "\0", "g\nm",
        "(" * 500 + "g" + ")" * 500, "sign(" * 500 + "g" + ")" * 500, "-" * 50_000 + "g", "+".join(["g"] * 50_000),
        "+".join(["g"] * 300), "exp(" * 150 + "g" + ")" * 150,
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(written):
    assert len(refused(lambda: parse(written))) < 600


def test_long_rules_have_text_and_operands():
    """What :func:`parse` takes, every function takes."""
    rule = parse("+".join(["g"] * 100))
    assert len(rule.leaves) == 100 and rule.depth == 99 and parse(text(rule)) == rule and latex(rule)
    values, _ = numbers(0)
    torch.testing.assert_close(evaluate(rule, values, Settings(), None), 100 * values["g"])


def test_build_refuses():
    assert "no 'power'" in refused(lambda: build("power", g, g))
    assert "takes 2 arguments, not 1" in refused(lambda: build("add", g))
    assert "takes 1 arguments, not 2" in refused(lambda: build("exp", g, m))
    assert "takes 0 arguments, not 1" in refused(lambda: build("g", g))


# ---------------------------------------- LaTeX


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("g", "g"),
        (POWERSIGN, r"e^{\operatorname{sign}(g) \cdot \operatorname{sign}(\hat m)} \cdot g"),
        (ADDSIGN, r"\left(1 + \operatorname{sign}(g) \cdot \operatorname{sign}(\hat m)\right) \cdot g"),
        ("clip(m, 1e-4)*exp(v)", r"\operatorname{clip}(\hat m, 10^{-4}) \cdot e^{\hat v}"),
        ("drop(m, 0.1)/exp(g**2)", r"\frac{\operatorname{drop}(\hat m, 0.1)}{e^{g^2} + \delta}"),
        ("g - clip(g**2, 1e-4)", r"g - \operatorname{clip}(g^2, 10^{-4})"),
        (
            "clip(rmsprop, 1e-5) + drop(m, 0.3)",
            r"\operatorname{clip}(\mathrm{RMSProp}, 10^{-5}) + \operatorname{drop}(\hat m, 0.3)",
        ),
        ("drop(m, 0.3)*exp(1e-3*w)", r"\operatorname{drop}(\hat m, 0.3) \cdot e^{10^{-3}w}"),
        ("-(g*m)", r"-\left(g \cdot \hat m\right)"),
        ("-(g + m)", r"-\left(g + \hat m\right)"),
        ("g - (m - v)", r"g - \left(\hat m - \hat v\right)"),
        ("m*v*g", r"g \cdot \left(\hat m \cdot \hat v\right)"),  # put in order
        ("g/(m - v)", r"\frac{g}{\hat m - \hat v + \delta}"),
        ("sign(momentum)", r"\operatorname{sign}(\mathrm{momentum})"),
        ("logabs(gamma)*sqrtabs(noise)", r"\log\left|\hat\gamma\right| \cdot \sqrt{\left|\varepsilon\right|}"),
    ],
)
def test_latex(written, expected):
    assert latex(parse(written)) == expected


def balanced(source: str) -> bool:
    depth = 0
    for character in source:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0 and source.count(r"\left") == source.count(r"\right") and source.count("(") == source.count(")")


def test_different_rules_have_different_latex():
    rules = {canonical(raw(grammar(depth), drawn(depth, seed))) for seed in range(1000) for depth in (1, 2, 3)}
    rules |= {parse(written) for written in ALL_RULES}
    printed = {rule: latex(rule) for rule in rules}
    assert len(rules) > 1500
    assert len(set(printed.values())) == len(rules)
    assert all(balanced(source) for source in printed.values())
    assert len({text(rule) for rule in rules}) == len(rules)


def test_matplotlib_prints_the_latex():
    parser = MathTextParser("path")
    rules = [parse(written) for written in ALL_RULES]
    rules += [canonical(raw(grammar(2), drawn(2, seed))) for seed in range(15)]
    for rule in rules:
        assert parser.parse(f"${latex(rule)}$").width > 0


# ---------------------------------------- tokens


def spelled(words: Grammar, *tokens: str) -> list[int]:
    return [words.tokens.index(token) for token in tokens]


@pytest.mark.parametrize(("depth", "length"), [(1, 5), (2, 15), (3, 35)])
def test_longest_sequences(depth, length):
    words = Grammar(depth)
    assert words.length == length and grammar(depth) is grammar(depth)
    deepest = []
    while length >= len(deepest) < len(kinds := words.expected(deepest)):
        kind = kinds[-1]
        choice = {"binary": "mul", "unary": "exp", "operand": "g", "nested": "("}[kind]
        deepest += spelled(words, choice)
    assert len(deepest) == length and words.complete(deepest)
    assert words.rule(deepest).depth == depth


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3), seeds)
def test_complete_sequences_are_rules(depth, seed):
    words, sequence = grammar(depth), drawn(depth, seed)
    assert 3 <= len(sequence) <= words.length
    rule = words.rule(sequence)
    assert rule == canonical(raw(words, sequence)) == parse(text(rule)) and rule.depth <= depth
    kinds = words.expected(sequence)
    assert len(kinds) == len(sequence) and words.complete(sequence)
    assert all(words.mask(kind)[token] for kind, token in zip(kinds, sequence, strict=True))
    for cut in range(len(sequence)):
        assert not words.complete(sequence[:cut])
        assert words.expected(sequence[:cut]) == kinds[: cut + 1], "the next place is known"
    refused(lambda: words.rule(sequence[:-1]))
    refused(lambda: words.rule([*sequence, sequence[0]]))
    assert "cut them" in refused(lambda: words.complete([*sequence, sequence[0]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), seeds, st.data())
def test_masks_are_exact(depth, seed, data):
    words, sequence = grammar(depth), drawn(depth, seed)
    place = data.draw(st.integers(0, len(sequence) - 1))
    kind = words.expected(sequence)[place]
    for token in range(-2, len(words) + 2):
        beginning = [*sequence[:place], token]
        if 0 <= token < len(words) and words.mask(kind)[token]:
            assert words.expected(beginning)[place] == kind
        else:
            refused(lambda beginning=beginning: words.expected(beginning))


def test_masks_by_hand():
    words = Grammar(2)
    assert len(words) == len(words.tokens) == len(BINARY) + len(UNARY) + len(OPERANDS) + 1 == 35
    for kind, allowed in (
        ("binary", set(BINARY)), ("unary", set(UNARY)), ("operand", set(OPERANDS)), ("nested", {*OPERANDS, "("}),
    ):  # fmt: skip
        assert {token for token, may in zip(words.tokens, words.mask(kind).tolist(), strict=True) if may} == allowed
    assert words.expected([]) == ["binary"]
    assert words.expected(spelled(words, "left", "exp")) == ["binary", "unary", "nested"]
    nested = spelled(words, "add", "id", "(", "left", "exp", "g")
    assert words.expected(nested) == ["binary", "unary", "nested", "binary", "unary", "operand", "unary"]
    assert words.expected(spelled(words, "left", "id", "g")) == ["binary", "unary", "nested"]


def test_what_tokens_spell():
    words = Grammar(3)
    powersign = spelled(words, "mul", "exp", "(", "mul", "id", "sign(g)", "id", "sign(m)", "id", "g")
    assert words.rule(powersign) == parse(POWERSIGN)
    assert words.rule(spelled(words, "left", "neg", "(", "left", "neg", "adam")) == parse("adam")
    assert words.rule(spelled(words, "sub", "id", "g", "clip 1e-4", "g**2")) == parse("g - clip(g**2, 1e-4)")
    assert "whole rule" in refused(lambda: words.rule([]))
    for choice in BESIDE:
        assert choice not in words.tokens


@pytest.mark.parametrize("depth", [0, 4, -1, None, "3"])
def test_other_depths_are_refused(depth):
    assert "1 to 3 deep" in refused(lambda: Grammar(depth))


def test_every_rule_of_table_1_is_in_the_language():
    """Each can be spelled at depth 3: its depth is at most that and its operands and functions are tokens."""
    words = grammar(3)
    for written in PAPER_RULES:
        rule = parse(written)
        assert rule.depth <= 3 and {*rule.leaves, *rule.functions} <= set(words.tokens)


def test_depth_1_has_as_many_rules_as_counted():
    """Distinct canonical rules of one binary function over a few operands and functions, counted by hand."""
    unary, operands = ("id", "neg"), ("g", "m")
    sides = [build(u, Expression(o)) for u, o in product(unary, operands)]
    rules = {build(op, x, y) for op in BINARY for x, y in product(sides, sides)}
    # left: ±g, ±m. mul: ±g², ±m·m, ±gm. div: ± four quotients. add and sub: ±(x + y) of three pairs, x − y of four.
    assert len(rules) == 4 + 6 + 8 + 6 + 4
    assert math.prod((len(unary), len(operands))) == len(sides)


def test_errors_are_for_readers():
    with pytest.raises(UserError) as caught:
        parse("g**4")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="gmvw()+-*/ .,1e4expsign", max_size=20))
def test_any_text_is_a_rule_or_refused(written):
    try:
        rule = parse(written)
    except UserError:
        return
    assert parse(text(rule)) == rule
