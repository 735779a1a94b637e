"""The language of update rules: operands, unary and binary functions, and expressions made of them.

An expression is a small immutable tree (:class:`Expression`). :func:`parse` reads one from text such as
``exp(sign(g)*sign(m))*g`` and :func:`text` writes it; :func:`latex` prints it as the paper does. Every expression
that :func:`build` or :func:`parse` returns is in *canonical form*: two texts that differ by the order of a sum or
product, by an identity or by a double negation give the same tree, so a search can look a rule up instead of training
it again.

:class:`Grammar` is the same language as a sequence of tokens, which is what a controller emits.

Source: Bello, Zoph, Vasudevan and Le (2017), section 4.1 and its table of operands and functions.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from helpers.errors import UserError

__all__ = ["BESIDE", "BINARY", "Expression", "Grammar", "OPERANDS", "UNARY", "build", "latex", "parse", "text"]

# Operands by their text; bias-corrected running averages are called by their plain letter.
OPERANDS: dict[str, str] = {
    "g": "g",
    "g**2": "g^2",
    "g**3": "g^3",
    "m": r"\hat m",
    "v": r"\hat v",
    "gamma": r"\hat\gamma",
    "sign(g)": r"\operatorname{sign}(g)",
    "sign(m)": r"\operatorname{sign}(\hat m)",
    "1": "1",
    "2": "2",
    "noise": r"\varepsilon",
    "1e-4*w": "10^{-4}w",
    "1e-3*w": "10^{-3}w",
    "1e-2*w": "10^{-2}w",
    "1e-1*w": "10^{-1}w",
    "adam": r"\mathrm{Adam}",
    "rmsprop": r"\mathrm{RMSProp}",
}
# Not in the paper's space and never drawn by a search: what other optimisers need beside it.
BESIDE: dict[str, str] = {"momentum": r"\mathrm{momentum}", "lion": r"\mathrm{Lion}"}
# Unary functions: name -> text with the argument left open.
UNARY: dict[str, str] = {
    "id": "{}",
    "neg": "-{}",
    "exp": "exp({})",
    "logabs": "logabs({})",
    "sqrtabs": "sqrtabs({})",
    "clip 1e-5": "clip({}, 1e-5)",
    "clip 1e-4": "clip({}, 1e-4)",
    "clip 1e-3": "clip({}, 1e-3)",
    "drop 0.1": "drop({}, 0.1)",
    "drop 0.3": "drop({}, 0.3)",
    "drop 0.5": "drop({}, 0.5)",
    "sign": "sign({})",
}
BINARY: dict[str, str] = {"add": "+", "sub": "-", "mul": "*", "div": "/", "left": ""}
DEPTH = 3  # the deepest expressions of the paper
NESTING = 100  # functions inside each other in a text; deeper ones would meet Python's limit somewhere


@dataclass(frozen=True, order=True)
class Expression:
    """A tree: ``op`` is an operand's text, or the name of a unary or binary function of ``args``.

    Use :func:`build` or :func:`parse` to make one; both return canonical trees. ``str`` gives the text.
    """

    op: str
    args: tuple[Expression, ...] = ()

    def __str__(self) -> str:
        return text(self)

    @property
    def depth(self) -> int:
        """Binary functions on the longest way from the root to an operand."""
        return (self.op in BINARY) + max((arg.depth for arg in self.args), default=0)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The operands, from left to right, with repetitions."""
        return tuple(leaf for arg in self.args for leaf in arg.leaves) if self.args else (self.op,)

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions, from the root down, with repetitions."""
        return (self.op, *(name for arg in self.args for name in arg.functions)) if self.args else ()


def build(op: str, *args: Expression) -> Expression:
    """The canonical form of ``op(*args)``, for canonical arguments.

    Sums and products are ordered; the identity, ``left`` and products with 1 go; minus signs travel outwards until they
    meet each other or a sum; signs of signs, clips of clips and powers of the gradient become the shorter form. The δ
    of divisors is not looked at: x/1 is x, and x/−y is −(x/y).

    Raises:
        UserError: for an unknown function or a wrong number of arguments.
    """
    if op in OPERANDS or op in BESIDE:
        wanted = 0
    elif op in UNARY or op in BINARY:
        wanted = 1 if op in UNARY else 2
    else:
        raise UserError(f"the language of update rules has no {op!r}: see helpers.optimizers.language for what it has")
    if len(args) != wanted:
        raise UserError(f"{op!r} takes {wanted} arguments, not {len(args)}: see helpers.optimizers.language")
    return _unary(op, *args) if wanted == 1 else _binary(op, *args) if wanted == 2 else Expression(op)


def _unary(op: str, x: Expression) -> Expression:
    if op == "id":
        return x
    if op == "neg":
        if x.op == "neg":
            return x.args[0]
        return Expression("sub", x.args[::-1]) if x.op == "sub" else Expression("neg", (x,))
    if x.op == "neg":
        inner = _unary(op, x.args[0])
        if op in ("logabs", "sqrtabs"):  # even
            return inner
        if op != "exp":  # sign, clip and drop are odd
            return _unary("neg", inner)
    if op == "sign":
        if x.op == "sign" or x.op in ("sign(g)", "sign(m)", "1"):
            return x
        if x.op in ("g", "m"):
            return Expression(f"sign({x.op})")
        if x.op == "g**3":
            return Expression("sign(g)")
    if op.startswith("clip") and x.op.startswith("clip"):
        return Expression(min(op, x.op, key=_constant), x.args)
    return Expression(op, (x,))


def _constant(op: str) -> float:
    return float(op.split()[1])


_POWERS = {("g", "g"): "g**2", ("g", "g**2"): "g**3"}


def _binary(op: str, x: Expression, y: Expression) -> Expression:
    if op == "left":
        return x
    minus = x.op == "neg", y.op == "neg"
    if any(minus):
        a, b = (z.args[0] if z.op == "neg" else z for z in (x, y))
        if op in ("mul", "div"):
            return _binary(op, a, b) if all(minus) else _unary("neg", _binary(op, a, b))
        if op == "sub":  # -a - b, a - -b, -a - -b
            return _binary("sub", b, a) if all(minus) else _binary("add", a, b) if minus[1] else _negated_sum(a, b)
        return _negated_sum(a, b) if all(minus) else _binary("sub", a, b) if minus[1] else _binary("sub", b, a)
    if op == "mul" and x.op == "1":
        return y
    if op in ("mul", "div") and y.op == "1":
        return x
    if op in ("add", "mul"):
        x, y = sorted((x, y))
        if op == "mul" and (x.op, y.op) in _POWERS:
            return Expression(_POWERS[x.op, y.op])
    return Expression(op, (x, y))


def _negated_sum(x: Expression, y: Expression) -> Expression:
    return _unary("neg", _binary("add", x, y))


# ---------------------------------------- text
def text(rule: Expression) -> str:
    """The rule as text, which :func:`parse` reads back."""
    return _text(rule, 0)


def _text(x: Expression, binding: int) -> str:
    """Text that may stand beside an operator of strength ``binding``: 1 sum, 2 product, 3 minus or second factor."""
    if not x.args:
        strength, out = (2 if "*w" in x.op else 4), x.op
    elif x.op == "neg":
        strength, out = 2, f"-{_text(x.args[0], 3)}"
    elif x.op in UNARY:
        strength, out = 4, UNARY[x.op].format(_text(x.args[0], 0))
    else:
        strength = 1 if x.op in ("add", "sub") else 2
        out = f"{_text(x.args[0], strength)}{_spaced(x.op)}{_text(x.args[1], strength + 1)}"
    return f"({out})" if strength < binding else out


def _spaced(op: str) -> str:
    return f" {BINARY[op]} " if op in ("add", "sub") else BINARY[op]


_OPERATORS = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_DECAYED = {1e-4: "1e-4*w", 1e-3: "1e-3*w", 1e-2: "1e-2*w", 1e-1: "1e-1*w"}
_PARAMETERS = {"clip": {1e-5: "1e-5", 1e-4: "1e-4", 1e-3: "1e-3"}, "drop": {0.1: "0.1", 0.3: "0.3", 0.5: "0.5"}}


def parse(written: str) -> Expression:
    """Read a rule: ``exp(sign(g)*sign(m))*g``, ``clip(m, 1e-4)*exp(v)``, ``g - clip(g**2, 1e-4)``, ``drop(m, 0.3)*…``.

    Returns:
        The canonical tree.

    Raises:
        UserError: if the text is no rule of the language.

    >>> rule = parse("sign(g) * m")
    >>> rule == parse("m * sign(g)"), rule.leaves
    (True, ('m', 'sign(g)'))
    """
    try:
        return _read(ast.parse(written.strip(), mode="eval").body, NESTING)
    except (SyntaxError, ValueError, RecursionError, KeyError, TypeError, MemoryError):
        raise UserError(
            f"{written[:80]!r} is no update rule: combine {', '.join(OPERANDS)} with + - * / and "
            "exp, logabs, sqrtabs, clip(x, 1e-4), drop(x, 0.3), sign"
        ) from None


def _read(node: ast.expr, room: int) -> Expression:
    if not room:
        raise ValueError
    room -= 1
    match node:
        case ast.BinOp(ast.Constant(value=factor), ast.Mult(), ast.Name("w")):
            return build(_DECAYED[factor])
        case ast.BinOp(ast.Name("g"), ast.Pow(), ast.Constant(value=2 | 3 as power)):
            return build(f"g**{power}")
        case ast.BinOp(left, operator, right):
            return build(_OPERATORS[type(operator)], _read(left, room), _read(right, room))
        case ast.UnaryOp(ast.USub(), operand):
            return build("neg", _read(operand, room))
        case ast.Call(ast.Name(name), [argument], []) if name in ("exp", "logabs", "sqrtabs", "sign"):
            return build(name, _read(argument, room))
        case ast.Call(ast.Name(name), [argument, ast.Constant(value=number)], []):
            return build(f"{name} {_PARAMETERS[name][number]}", _read(argument, room))
        case ast.Constant(value=1 | 2 as number) if type(number) is int:
            return build(str(number))
        case ast.Name(name) if name in OPERANDS or name in BESIDE:
            return build(name)
    raise ValueError


def latex(rule: Expression) -> str:
    """The rule in LaTeX, as the paper prints it."""
    return _latex(rule, 0)


def _latex(x: Expression, binding: int) -> str:
    if not x.args:
        strength, out = 4, (OPERANDS | BESIDE)[x.op]
    elif x.op == "neg":
        strength, out = 2, f"-{_latex(x.args[0], 3)}"
    elif x.op in UNARY:
        inner = _latex(x.args[0], 0)
        name, _, number = x.op.partition(" ")
        strength, out = 4, {
            "exp": f"e^{{{inner}}}",
            "logabs": rf"\log\left|{inner}\right|",
            "sqrtabs": rf"\sqrt{{\left|{inner}\right|}}",
            "sign": rf"\operatorname{{sign}}({inner})",
            "clip": rf"\operatorname{{clip}}({inner}, 10^{{{number[-2:]}}})",
            "drop": rf"\operatorname{{drop}}({inner}, {number})",
        }[name]  # fmt: skip
    elif x.op == "div":
        strength, out = 4, rf"\frac{{{_latex(x.args[0], 0)}}}{{{_latex(x.args[1], 1)} + \delta}}"
    else:
        strength = 2 if x.op == "mul" else 1
        sign = {"add": " + ", "sub": " - ", "mul": r" \cdot "}[x.op]
        out = f"{_latex(x.args[0], strength)}{sign}{_latex(x.args[1], strength + 1)}"
    return rf"\left({out}\right)" if strength < binding else out


# ---------------------------------------- tokens
class Grammar:
    """Rules as sequences of tokens, in the order b, u₁, op₁, u₂, op₂.

    A rule is b(u₁(op₁), u₂(op₂)). An operand slot may hold the token ``(`` instead, and then a whole expression
    follows, up to ``depth`` of them inside each other. The function ``left`` (the paper's x) keeps its first side, and
    its second one is not emitted.

    Attributes:
        tokens: all tokens, by number.
        depth: how deep expressions may be, 1 to 3.
        length: the longest sequence.
    """

    NESTED = "("

    def __init__(self, depth: int = DEPTH) -> None:
        if depth not in range(1, DEPTH + 1):
            raise UserError(f"the expressions of a search are 1 to {DEPTH} deep, not {depth!r}")
        self.depth = depth
        self.tokens = [*BINARY, *UNARY, *OPERANDS, self.NESTED]
        kinds = {"binary": BINARY, "unary": UNARY, "operand": OPERANDS, "nested": OPERANDS | {self.NESTED: ""}}
        self._masks = {kind: torch.tensor([token in has for token in self.tokens]) for kind, has in kinds.items()}
        self.length = 5
        for _ in range(depth - 1):
            self.length = 5 + 2 * self.length

    def __len__(self) -> int:
        return len(self.tokens)

    def expected(self, sequence: Sequence[int]) -> list[str]:
        """What may stand at each place of a sequence, and at the next one: ``binary``, ``unary``, ``operand`` or
        ``nested`` (an operand or a whole expression); nothing comes next when the rule is complete.

        Raises:
            UserError: if a token may not stand where it does.
        """
        waiting, found = [("binary", self.depth)], []
        for number in sequence:
            if not waiting:
                raise UserError("the rule is complete before its tokens end: cut them")
            kind, depth = waiting.pop()
            found.append(kind)
            if not 0 <= number < len(self):
                raise UserError(f"there is no token number {number}: they are 0 to {len(self) - 1}")
            token = self.tokens[number]
            if not self._masks[kind][number]:
                raise UserError(f"the token {token!r} may not stand where a {kind} is expected")
            if kind == "binary":
                slot = "nested" if depth > 1 else "operand"
                waiting += [(slot, depth), ("unary", 0)] * (1 if token == "left" else 2)
            elif token == self.NESTED:
                waiting.append(("binary", depth - 1))
        return found + [waiting[-1][0]] if waiting else found

    def mask(self, kind: str) -> Tensor:
        """Which tokens ``[len(grammar)]`` may stand where that kind is expected."""
        return self._masks[kind]

    def complete(self, sequence: Sequence[int]) -> bool:
        """Whether the tokens are a whole rule."""
        return len(self.expected(sequence)) == len(sequence)

    def rule(self, sequence: Sequence[int]) -> Expression:
        """The canonical rule that a complete sequence spells.

        Raises:
            UserError: if the tokens are not one whole rule.
        """
        if not self.complete(sequence):
            raise UserError("the tokens are no whole rule: complete them")
        rest = iter(sequence)
        return self._side(rest)

    def _side(self, rest) -> Expression:
        op = self.tokens[next(rest)]
        first = self._argument(rest)
        return first if op == "left" else build(op, first, self._argument(rest))

    def _argument(self, rest) -> Expression:
        unary, operand = self.tokens[next(rest)], self.tokens[next(rest)]
        return build(unary, self._side(rest) if operand == self.NESTED else Expression(operand))


@cache
def grammar(depth: int = DEPTH) -> Grammar:
    """The grammar of that depth, made once."""
    return Grammar(depth)
