"""Update rules at work: what a rule remembers, one step, decay of the sign term, and a PyTorch optimiser of any rule.

A rule u turns the gradient into a step: w ← w − λ u. It is evaluated elementwise, so parameters of any shape, also
with leading axes for many networks at once, are stepped in one go. A rule remembers only what its operands need
(:func:`slots`): PowerSign one number a parameter, Adam two.

Source: Bello, Zoph, Vasudevan and Le (2017), section 4.1, and 5.3 for the decay of the internal sign term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.optimizers.language import Expression, parse
from helpers.runtime import generator
from helpers.validate import one_of, positive, whole

__all__ = [
    "ADDSIGN",
    "BASELINES",
    "PAPER_RULES",
    "POWERSIGN",
    "RuleOptimizer",
    "Settings",
    "decay",
    "evaluate",
    "remembered",
    "slots",
    "state_bytes",
    "step",
]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Constants of the operands.

    Attributes:
        beta1: decay of m.
        beta2: decay of v, the running average of g².
        beta3: decay of γ, the running average of g³.
        alpha: decay of RMSProp's own average, which is not bias-corrected (PyTorch's default).
        mu: decay of heavy-ball momentum.
        lion: decay of Lion's average in its step, and of what it remembers.
        epsilon: added to the roots in Adam and RMSProp.
        delta: added to every divisor.
        noise: deviation of the noise operand.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.999
    alpha: float = 0.99
    mu: float = 0.9
    lion: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-8
    delta: float = 1e-8
    noise: float = 0.01


DEFAULT = Settings()
# What each operand remembers, and how the memory takes a gradient in.
_NEEDS = {
    "m": ("m",), "sign(m)": ("m",), "v": ("v",), "gamma": ("gamma",), "adam": ("m", "v"), "rmsprop": ("r",),
    "momentum": ("b",), "lion": ("l",),
}  # fmt: skip


def slots(rule: Expression) -> tuple[str, ...]:
    """The running averages that the rule remembers for each parameter, sorted: of m, v, gamma, r (RMSProp's), b
    (momentum's) and l (Lion's)."""
    return tuple(sorted({slot for leaf in rule.leaves for slot in _NEEDS.get(leaf, ())}))


def remembered(rule: Expression, like: Tensor) -> State:
    """The rule's memory before the first step: zeros in the shape of ``like``."""
    return {slot: torch.zeros_like(like) for slot in slots(rule)}


def _remember(slot: str, old: Tensor, g: Tensor, s: Settings) -> Tensor:
    match slot:
        case "m":
            return s.beta1 * old + (1 - s.beta1) * g
        case "v":
            return s.beta2 * old + (1 - s.beta2) * g * g
        case "gamma":
            return s.beta3 * old + (1 - s.beta3) * g * g * g
        case "r":
            return s.alpha * old + (1 - s.alpha) * g * g
        case "b":
            return s.mu * old + g
        case _:
            return s.lion[1] * old + (1 - s.lion[1]) * g


class _Operands:
    """The operands at one step, computed when asked for and once."""

    def __init__(
        self, g: Tensor, w: Tensor, before: State, after: State, t: int, s: Settings, normal: Callable[[], Tensor]
    ) -> None:
        self.g, self.w, self.before, self.after, self.t, self.s, self.normal = g, w, before, after, t, s, normal
        self.known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            self.known[name] = self._compute(name)
        return self.known[name]

    def _corrected(self, slot: str, beta: float) -> Tensor:
        return self.after[slot] / (1 - beta**self.t)

    def _compute(self, name: str) -> Tensor:
        g, s = self.g, self.s
        match name:
            case "g":
                return g
            case "g**2":
                return g * g
            case "g**3":
                return g * g * g
            case "m":
                return self._corrected("m", s.beta1)
            case "v":
                return self._corrected("v", s.beta2)
            case "gamma":
                return self._corrected("gamma", s.beta3)
            case "sign(g)":
                return g.sign()
            case "sign(m)":
                return self.after["m"].sign()
            case "1" | "2":
                return torch.full_like(g, float(name))
            case "noise":
                return s.noise * self.normal()
            case "adam":
                return self["m"] / (self["v"].sqrt() + s.epsilon)
            case "rmsprop":
                return g / (self.after["r"].sqrt() + s.epsilon)
            case "momentum":
                return self.after["b"]
            case "lion":
                return (s.lion[0] * self.before["l"] + (1 - s.lion[0]) * g).sign()
        return float(name.removesuffix("*w")) * self.w


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "logabs": lambda x: x.abs().log(),
    "sqrtabs": lambda x: x.abs().sqrt(),
    "sign": torch.sign,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
}
_AGREEMENT = ("sign(g)", "sign(m)")  # the product that a schedule decays


def evaluate(
    rule: Expression, operands, settings: Settings, uniform: Callable[[], Tensor], scale: float = 1.0
) -> Tensor:
    """The value of a rule.

    Args:
        operands: ``operands[name]`` is the tensor of that operand.
        uniform: draws numbers in [0, 1) that broadcast to the parameters; ``drop`` uses it.
        scale: factor of every product sign(g) sign(m): the decay of the internal sign term.

    Returns:
        A tensor in the operands' shape. Nothing is caught: what overflows or divides by zero comes out as infinity or
        not-a-number, as tensor arithmetic has it.
    """
    if not rule.args:
        return operands[rule.op]
    values = [evaluate(arg, operands, settings, uniform, scale) for arg in rule.args]
    name, _, number = rule.op.partition(" ")
    if name == "clip":
        return values[0].clamp(-float(number), float(number))
    if name == "drop":  # as dropout does: what is kept is scaled up
        keep = 1 - float(number)
        return torch.where(uniform() < keep, values[0] / keep, torch.zeros_like(values[0]))
    if name == "div":
        return values[0] / (values[1] + settings.delta)
    value = _FUNCTIONS[name](*values)
    if scale != 1.0 and rule.op == "mul" and tuple(arg.op for arg in rule.args) == _AGREEMENT:
        value = scale * value
    return value


def step(
    rule: Expression,
    g: Tensor,
    w: Tensor,
    memory: State,
    t: int,
    settings: Settings = DEFAULT,
    random: torch.Generator | None = None,
    scale: float = 1.0,
    shared: int = 0,
) -> tuple[Tensor, State]:
    """One step's direction and the memory after it.

    Args:
        rule: the update rule u.
        g: gradient, in any shape.
        w: parameters, in the shape of ``g``.
        memory: what the rule remembers, from :func:`remembered` or the last step.
        t: number of this step, from 1; bias correction uses it.
        random: source of noise and dropped entries.
        scale: decay of the internal sign term, see :func:`decay`.
        shared: how many leading axes (of networks trained together) see the same random numbers.

    Returns:
        u in the shape of ``g``, to be multiplied by the learning rate and subtracted; and the new memory.

    Raises:
        UserError: in float16, where a square below 6e-8 is 0 and so are epsilon and delta.
    """
    if g.dtype == torch.float16:
        raise UserError("float16 holds neither squares of gradients nor epsilon: use float32 or bfloat16")
    after = {slot: _remember(slot, old, g, settings) for slot, old in memory.items()}
    shape = g.shape[shared:]

    def uniform() -> Tensor:
        return torch.rand(shape, generator=random, dtype=g.dtype, device=g.device)

    def normal() -> Tensor:
        return torch.randn(shape, generator=random, dtype=g.dtype, device=g.device).expand(g.shape)

    operands = _Operands(g, w, memory, after, t, settings, normal)
    return evaluate(rule, operands, settings, uniform, scale), after


RESTARTS = 5  # of a schedule with restarts


def decay(kind: str | None, t: int, steps: int) -> float:
    """Factor of the internal sign term at step ``t`` (from 0) of ``steps``; 0 from then on.

    Args:
        kind: None (no decay, 1), ``"linear"`` (1 − t/T), ``"cosine"`` (half a wave of the cosine, from 1 to 0), or
            ``"restarts"``: ``RESTARTS`` such half waves, one after the other.

    Raises:
        UserError: for another kind, or numbers of steps that are none.

    Source: Bello et al. (2017), section 5.3 (linear decay, cyclical decay, restarts; the paper has up to twenty, in
    hundreds of epochs).
    """
    one_of(kind, "decay", (None, "linear", "cosine", "restarts"))
    if kind is None:
        return 1.0
    part = min(whole(t, "number of a step", 0) / whole(steps, "number of steps of a decay"), 1.0)
    if part == 1:  # also the last of the restarts ends there, and does not begin again
        return 0.0
    if kind == "linear":
        return 1 - part
    return 0.5 * (1 + math.cos(math.pi * (part if kind == "cosine" else RESTARTS * part % 1)))


class RuleOptimizer(torch.optim.Optimizer):
    """Any update rule as a PyTorch optimiser: ``RuleOptimizer(net.parameters(), "g*exp(sign(g)*sign(m))", lr=0.1)``.

    Args:
        params: parameters, or groups of them.
        rule: an expression or its text.
        lr: learning rate λ.
        settings: constants of the operands.
        schedule: decay of the internal sign term, see :func:`decay`; needs ``steps``.
        steps: length of the training.
        seed: of the noise and the dropped entries.

    Raises:
        UserError: if the rule is none, a rate (also that of a group) is negative or not finite, the schedule unknown
            or without a number of steps; in a step, if weights are in float16.

    >>> import torch
    >>> w = torch.ones(3, requires_grad=True)
    >>> optimizer = RuleOptimizer([w], "sign(g)", lr=0.25)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> w.tolist()
    [0.75, 0.75, 0.75]
    """

    def __init__(
        self,
        params,
        rule: Expression | str,
        lr: float,
        settings: Settings = DEFAULT,
        schedule: str | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> None:
        decay(schedule, 0, 1)  # refuses an unknown one
        if schedule is not None:
            whole(steps, "number of steps of a schedule (pass steps=…)")
        self.rule = parse(rule) if isinstance(rule, str) else rule
        self.settings, self.schedule, self.steps, self.seed = settings, schedule, steps, seed
        self._slots = slots(self.rule)
        self._random: dict[torch.device, torch.Generator] = {}
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group of parameters, with a rate of its own where it names one; all groups come this way."""
        positive(param_group.get("lr", self.defaults["lr"]), "learning rate", zero=True)
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As of every PyTorch optimiser, and the states of the random generators, a uint8 tensor for each device."""
        return super().state_dict() | {"random": {str(at): g.get_state() for at, g in self._random.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; without generators in it, noise and drops begin with the seed."""
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "random"})
        self._random = {}
        for at, state in state_dict.get("random", {}).items():
            self._random[torch.device(at)] = generator(self.seed, at)
            self._random[torch.device(at)].set_state(state.cpu())

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every parameter that has a gradient; returns the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["step"] = 0
                    state |= remembered(self.rule, w)
                state["step"] += 1
                t = state["step"]
                scale = decay(self.schedule, t - 1, self.steps) if self.schedule else 1.0
                memory = {slot: state[slot] for slot in self._slots}
                if w.device not in self._random:
                    self._random[w.device] = generator(self.seed, w.device)
                random = self._random[w.device]
                update, memory = step(self.rule, w.grad, w, memory, t, self.settings, random, scale)
                w.sub_(group["lr"] * update)
                state |= memory
        return loss


POWERSIGN = "g*exp(sign(g)*sign(m))"
ADDSIGN = "g*(1 + sign(g)*sign(m))"
# The rules of Table 1 by the text of their formula, in the paper's order; and the optimisers above them.
BASELINES: dict[str, str] = {"SGD": "g", "Momentum": "momentum", "Adam": "adam", "RMSProp": "rmsprop"}
PAPER_RULES: tuple[str, ...] = (
    "(exp(sign(g)*sign(m)) + clip(g, 1e-4))*g",
    "clip(m, 1e-4)*exp(v)",
    "m*exp(v)",
    POWERSIGN,
    "drop(g, 0.3)*exp(sign(g)*sign(m))",
    "m*exp(g**2)",
    "drop(m, 0.1)/exp(g**2)",
    "drop(g, 0.1)*exp(sign(g)*sign(m))",
    "clip(rmsprop, 1e-5) + drop(m, 0.3)",
    "adam*exp(sign(g)*sign(m))",
    "adam*exp(m)",
    "g + drop(m, 0.3)",
    "drop(m, 0.1)*exp(g**3)",
    "g - clip(g**2, 1e-4)",
    "exp(g) - exp(m)",
    "drop(m, 0.3)*exp(1e-3*w)",
)


def state_bytes(rule: Expression | str, parameters: int = 1_000) -> float:
    """Bytes that the optimiser of a rule keeps a float32 parameter, counted in its state after a step."""
    w = torch.zeros(parameters, requires_grad=True)
    w.grad = torch.ones_like(w)
    optimizer = RuleOptimizer([w], rule, lr=0.0)
    optimizer.step()
    tensors = [value for value in optimizer.state[w].values() if isinstance(value, Tensor) and value.shape == w.shape]
    return sum(value.element_size() * value.numel() for value in tensors) / parameters
