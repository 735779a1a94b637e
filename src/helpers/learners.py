"""The learner: how meta-parameters and a support set become task parameters, ``φ = adapt(θ, support)``.

Any estimator meets any learner: the result is right, or refused in one sentence. A learner honours each of its
attributes, or refuses it when it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from helpers.losses import LOSS, LearnedLoss
from helpers.models import Model, Params, stacked
from helpers.optimizers.recurrent import RULE, RecurrentRule
from helpers.runtime import UserError
from helpers.solvers import conjugate_gradient
from helpers.tasks import Examples, Started, Tasks
from helpers.types import Descent
from helpers.validate import finite, one_of, positive, whole

# Prefixes of what θ holds beside the initial parameters.
RATE = "rate:"  # a learned inner rate
STRENGTH = "strength:"  # a learned strength of the pull towards θ
CARRIED = "carried:"  # what an inner optimiser remembers from task to task; an outer step replaces it
STATE = "state"  # in φ: what a learned rule remembers of every coordinate
PREFIXES = (RATE, STRENGTH, CARRIED, STATE, LOSS, RULE)


def detached(params: Params) -> Params:
    """The same values, cut off from every gradient."""
    return {name: value.detach() for name, value in params.items()}


def own(params: Params) -> Params:
    """The model's own parameters: without learned rates, an optimiser's memory and the like."""
    return {name: value for name, value in params.items() if not name.startswith(PREFIXES)}


@dataclass(frozen=True)
class GradientDescent(Descent):
    """Gradient descent on the support loss from θ: the learner of MAML, first-order MAML and Meta-SGD.

    Everything here concerns one task; an estimator maps it over a batch of tasks with ``vmap``.

    Attributes:
        model: the network.
        loss: ``loss(outputs, y)``, minimised on the support set and, unless ``outer_loss`` is given, measured on the
            query set.
        rate: the inner rate α, on ``loss`` as it is (for a mean loss, no factor N); of learned rates the initial value.
        steps: number of inner steps.
        learn_rates: one learned inner rate a parameter, kept in θ under ``rate:NAME`` (Meta-SGD, Li et al. 2017).
        first_order: treat the inner gradients as constants, ∂φ/∂θ ≈ I. They still change with what θ holds beside the
            initial parameters, such as a learned loss, and with the θ in a pull.
        outer_loss: the loss on the query set, where it differs.
        query_sets: the query set comes as so many sets that are classified apart, its examples of a class dealt out to
            them in order; the outer loss is their mean. With normalisation by batch statistics this is not the same as
            one large set: training then sees queries in sets as small as those of the test.

    Raises:
        UserError: for a negative rate or number of steps, or fewer than one query set.

    Source: Finn, Abbeel and Levine (2017), algorithm 1, line 6.
    """

    model: Model
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float
    steps: int = 1
    learn_rates: bool = False
    first_order: bool = False
    outer_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    query_sets: int = 1

    steps_optional: ClassVar[bool] = False  # whether ``steps`` may be None

    def __post_init__(self) -> None:
        positive(self.rate, "inner rate", zero=True)
        if self.steps is not None or not self.steps_optional:
            whole(self.steps, "number of inner steps", least=0)
        whole(self.query_sets, "number of query sets")

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ: the model's and, with ``learn_rates``, one rate beside each adapted entry."""
        theta = self.model.init(generator, dtype)
        if self.learn_rates:
            moving, _ = self.split(theta)
            theta |= {RATE + name: torch.full_like(value, self.rate) for name, value in moving.items()}
        return theta

    def start(self, theta: Params) -> Params:
        """The model's parameters before adaptation: θ without the learned rates and the like."""
        return own(theta)

    def split(self, phi: Params) -> tuple[Params, Params]:
        """The adapted entries of ``phi``, and the others."""
        moving = {n: v for n, v in phi.items() if not n.startswith(PREFIXES) and self.model.adapts(n)}
        return moving, {name: value for name, value in phi.items() if name not in moving}

    def outputs(self, phi: Params, x: Tensor) -> Tensor:
        """What the model gives for inputs ``x``; it sees its own entries of φ alone.

        Raises:
            UserError: if the model asks for a parameter that φ lacks.
        """
        try:
            return self.model(own(phi), x)
        except KeyError as missing:
            raise UserError(f"the model asks for a parameter {missing} that neither θ nor the task gives") from missing

    def _moving(self, phi: Params) -> tuple[Params, Params]:
        """As :meth:`split`, for an inner loop that has something to do."""
        moving, fixed = self.split(phi)
        if not moving:
            raise UserError("there is nothing to adapt: neither θ nor the task gives a parameter that the model adapts")
        return moving, fixed

    def support_gradient(self, phi: Params, support: Examples) -> Params:
        """Gradient of the support loss with respect to the adapted parameters of ``phi``."""
        moving, fixed = self._moving(phi)
        return grad(lambda p: self.loss(self.outputs(p | fixed, support.x), support.y))(moving)

    def inner_gradient(self, theta: Params, phi: Params, support: Examples) -> Params:
        """What an inner step descends, by the adapted parameters: here the support loss."""
        return self.support_gradient(phi, support)

    def move(self, theta: Params, phi: Params, gradient: Params) -> Params:
        """φ ← φ − α ∇, with learned rates entry by entry."""
        return phi | {name: phi[name] - theta.get(RATE + name, self.rate) * g for name, g in gradient.items()}

    def query_loss(self, phi: Params, query: Examples) -> Tensor:
        """The outer loss of task parameters φ on the query set."""
        loss = self.outer_loss or self.loss
        if self.query_sets == 1:
            return loss(self.outputs(phi, query.x), query.y)
        if len(query.x) % self.query_sets:
            raise UserError(f"{len(query.x)} query examples cannot be dealt out to {self.query_sets} equal sets")
        x, y = (t.unflatten(0, (-1, self.query_sets)) for t in query)
        return vmap(lambda x, y: loss(self.outputs(phi, x), y), in_dims=1)(x, y).mean()


@dataclass(frozen=True)
class MinibatchDescent(GradientDescent):
    """Gradient descent in which every inner step sees a minibatch of its own: stochastic gradient descent.

    The support set is given as a sequence of minibatches, ``x`` ``[steps, batch, ...]``, as
    :func:`~helpers.tasks.minibatches` draws them.

    Attributes:
        steps: use the first so many minibatches; by default all of them.

    Source: Nichol, Achiam and Schulman (2018), algorithm 1, with SGD inside.
    """

    steps: int | None = None

    steps_optional: ClassVar[bool] = True

    def per_step(self, support: Examples, steps: int | None = None) -> list[Examples]:
        """The minibatches, one for each step.

        Raises:
            UserError: if there are fewer than ``steps``.
        """
        steps, given = self.steps if steps is None else steps, len(support.x)
        if steps is not None and steps > given:
            raise UserError(f"{steps} inner steps need as many minibatches, not {given}: draw more or take fewer steps")
        return [Examples(support.x[batch], support.y[batch]) for batch in range(given if steps is None else steps)]


@dataclass(frozen=True)
class MinibatchAdam(MinibatchDescent):
    """Adam without momentum on minibatches: the inner optimiser of Reptile's official code.

    φ holds, beside the parameters, what Adam remembers: ``carried:square:NAME``, the running mean of the squared
    gradients, and ``carried:count``, the number of steps so far. With ``carry`` they belong to θ: a task begins with
    what the tasks before it left, in training and in evaluation alike, since the official code never resets its
    optimiser. Without, every task begins with an empty memory, and Adam's first step is ±``rate`` in every coordinate
    whose gradient is far above 3e-7 (see ``epsilon``).

    Attributes:
        decay: of the running mean, β₂. β₁ is 0.
        epsilon: added to the root of the squares *before* the bias of their mean is corrected: the ε̂ of Kingma and Ba
            (2015), the remark at the end of section 2 before 2.1, and of TensorFlow. In their algorithm 1, and in
            ``torch.optim.Adam``, it is added after, so that ε̂ acts as an ε of ε̂ / √(1 − β₂ᵗ), at the first step 32
            times as large. It matters for gradients below 1e-5, where a first step is 3 % shorter; at 1e-6, 24 %.
        carry: hand the memory on from task to task; :func:`~helpers.metagradients.reptile` alone does that.

    Raises:
        UserError: for ``learn_rates``, which Adam's step has no place for, or a decay outside [0, 1).

    Source: Nichol, Achiam and Schulman (2018), section 6 ("Adam with β₁ = 0") and ``reptile.py`` of the official code.
    """

    decay: float = 0.999
    epsilon: float = 1e-8
    carry: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_rates:
            raise UserError("MinibatchAdam has no learned rates: leave learn_rates off, or use MinibatchDescent")
        positive(self.epsilon, "epsilon of Adam")
        if not isinstance(self.decay, Tensor) and not 0 <= positive(self.decay, "decay of Adam", zero=True) < 1:
            raise UserError(f"the decay of Adam must be at least 0 and less than 1, not {self.decay}")

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ, with an empty memory where it is carried."""
        theta = super().init(generator, dtype)
        return theta | self._empty(theta) if self.carry else theta

    def start(self, theta: Params) -> Params:
        """The parameters and the optimiser's memory before adaptation."""
        phi = super().start(theta)
        memory = {n: v for n, v in theta.items() if n.startswith(CARRIED)} if self.carry else self._empty(theta)
        return phi | memory

    def _empty(self, theta: Params) -> Params:
        moving, _ = self.split(theta)
        memory = {f"{CARRIED}square:{name}": torch.zeros_like(value) for name, value in moving.items()}
        return memory | {f"{CARRIED}count": next(iter(theta.values())).new_zeros(())}

    def move(self, theta: Params, phi: Params, gradient: Params) -> Params:
        """One step of Adam with β₁ = 0 (Kingma and Ba 2015, the last form of the update before section 2.1)."""
        count = phi[f"{CARRIED}count"] + 1
        rate = self.rate * (1 - self.decay**count).sqrt()
        new = {f"{CARRIED}count": count}
        for name, g in gradient.items():
            memory = f"{CARRIED}square:{name}"
            square = new[memory] = self.decay * phi[memory] + (1 - self.decay) * g * g
            # The root has no derivative at 0, where a gradient has always been 0; the step there is g / ε to first
            # order, so the root counts for nothing in its derivative.
            some = square > 0
            root = torch.where(some, torch.where(some, square, 1).sqrt(), 0)
            new[name] = phi[name] - rate * g / (root + self.epsilon)
        return phi | new


@dataclass(frozen=True)
class Proximal(GradientDescent):
    """Gradient descent on the support loss plus a pull towards θ: L(φ) + ½ (φ − θ)ᵀ Λ (φ − θ), the learner of iMAML.

    Attributes:
        strength: λ, where Λ = λ I; of a learned Λ the initial value.
        learn_strength: None for the fixed λ, or what is learned, kept in θ: ``"scalar"``, ``"layer"`` (one λ for each
            parameter tensor) or ``"diagonal"`` (one for each coordinate), all as log λ, so that they stay positive; or
            ``"matrix"``, a full Λ = A Aᵀ over all adapted coordinates, for small problems.

    Raises:
        UserError: for an unknown kind of ``learn_strength``, or a strength that is not positive and finite.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), equation 3; section 3 proposes the matrix.
    """

    strength: float = 1.0
    learn_strength: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.strength, "proximal strength, on which an implicit gradient rests,")
        one_of(self.learn_strength, "learn_strength", (None, "scalar", "layer", "diagonal", "matrix"))

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ, with Λ where it is learned."""
        theta = super().init(generator, dtype)
        return theta | self._initial_strength(theta)

    def _initial_strength(self, theta: Params) -> Params:
        moving, _ = self._moving(theta)
        like = next(iter(moving.values()))
        log = torch.full((), self.strength, dtype=like.dtype, device=like.device).log()
        match self.learn_strength:
            case "scalar":
                return {STRENGTH: log}
            case "layer":
                return {STRENGTH + name: log.clone() for name in moving}
            case "diagonal":
                return {STRENGTH + name: log.expand_as(value).clone() for name, value in moving.items()}
            case "matrix":
                size = sum(value.numel() for value in moving.values())
                return {STRENGTH: self.strength**0.5 * torch.eye(size, dtype=like.dtype, device=like.device)}
        return {}

    def pull(self, theta: Params, delta: Params) -> Params:
        """Λ δ for a difference δ = φ − θ of adapted parameters."""
        if self.learn_strength is None:
            return {name: self.strength * value for name, value in delta.items()}
        if self.learn_strength == "matrix":
            root = theta[STRENGTH]
            flat = root @ (root.mT @ torch.cat([value.flatten() for value in delta.values()]))
            parts = flat.split([value.numel() for value in delta.values()])
            return {name: part.view_as(delta[name]) for name, part in zip(delta, parts, strict=True)}
        one = self.learn_strength == "scalar"
        return {name: theta[STRENGTH if one else STRENGTH + name].exp() * value for name, value in delta.items()}

    def inner_gradient(self, theta: Params, phi: Params, support: Examples) -> Params:
        """Gradient of the whole inner objective, ∇L(φ) + Λ (φ − θ), by the adapted parameters; 0 at φ*(θ)."""
        moving, _ = self.split(phi)
        pull = self.pull(theta, {name: value - theta[name] for name, value in moving.items()})
        return {name: g + pull[name] for name, g in self.support_gradient(phi, support).items()}

    def inner_objective(self, theta: Params, phi: Params, support: Examples) -> Tensor:
        """L(φ; support) + ½ (φ − θ)ᵀ Λ (φ − θ)."""
        moving, _ = self.split(phi)
        delta = {name: value - theta[name] for name, value in moving.items()}
        pull = sum((delta[name] * value).sum() for name, value in self.pull(theta, delta).items())
        return self.loss(self.outputs(phi, support.x), support.y) + pull / 2


@dataclass(frozen=True)
class HessianFree(Proximal):
    """The proximal inner problem solved by truncated Newton steps, "Hessian-free": the other inner solver of iMAML.

    Each of the ``steps`` solves (∇²L(φ) + Λ) d = −∇ by conjugate gradients with Hessian-vector products and goes along
    d by the best of a few lengths, 0 among them, so that the objective never grows. Where the curvature along a search
    direction is not positive, the direction found so far is used, or minus ``rate`` times the gradient if there is none
    yet.

    Attributes:
        solver_steps: conjugate-gradient steps of one Newton step.
        damping: added to the curvature for the direction alone (Levenberg and Marquardt), never to the objective.
        lengths: step lengths that are tried.

    Raises:
        UserError: for ``learn_rates``, which have no meaning here, and for ``first_order``, since a Newton step is
            more than an inner gradient.

    Source: Rajeswaran, Finn, Kakade and Levine (2019), section 4, "Hessian-free"; Martens (2010); Nocedal and Wright
    (2006), algorithm 7.1. No public code of it exists.
    """

    solver_steps: int = 5
    damping: float = 0.0
    lengths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_rates or self.first_order:
            raise UserError("HessianFree has neither learned rates nor a first-order form: use Proximal for them")
        whole(self.solver_steps, "number of conjugate-gradient steps")
        positive(self.damping, "damping", zero=True)
        if not self.lengths:
            raise UserError("HessianFree needs at least one step length to try")
        for length in self.lengths:
            finite(length, "step length")

    def step(self, theta: Params, phi: Params, support: Examples) -> Params:
        """One truncated Newton step."""
        moving, fixed = self._moving(phi)
        gradient, curvature = vjp(lambda p: self.inner_gradient(theta, p | fixed, support), moving)
        batch = {name: -g[None] for name, g in gradient.items()}  # the solver wants an axis of problems

        def product(v: Params) -> Params:
            (by_phi,) = curvature({name: value[0] for name, value in v.items()})
            return {name: value[None] for name, value in by_phi.items()}

        found = conjugate_gradient(product, batch, self.solver_steps, damping=self.damping)
        none = found.iterations[0] == 0
        direction = {n: torch.where(none, -self.rate * gradient[n], value[0]) for n, value in found.x.items()}
        lengths = next(iter(moving.values())).new_tensor(self.lengths)

        def along(length: Tensor) -> Tensor:
            return self.inner_objective(theta, phi | {n: moving[n] + length * d for n, d in direction.items()}, support)

        best = lengths[vmap(along)(lengths).nan_to_num(torch.inf).argmin()]
        return phi | {name: moving[name] + best * d for name, d in direction.items()}


@dataclass(frozen=True)
class LearnedDescent(GradientDescent):
    """A descent whose loss, rule and start may each be learned: three boxes of the machine, three arguments.

    Where the start is not learned it is given with each task (:class:`~helpers.tasks.Started`). Where the loss is not
    learned the inner loop descends the task's own, and where the rule is not, it goes ``rate`` times the gradient.

    Attributes:
        learned: the learned loss that the inner loop descends; the task's own is measured on the query set, at
            meta-training only.
        transform: applied to the inner gradient, a dictionary like φ, before the step; for instance a normalisation.
        learn_start: begin at θ's own parameters, as MAML does.
        rule: a learned update rule in place of the step along the gradient.
        learn_fixed: what the inner loop leaves alone (``model.adapts``), such as the choice of an architecture, belongs
            to θ also where the start does not.

    Raises:
        UserError: for ``learn_rates`` beside a rule, which goes at no rate, or without a start in θ to belong to.

    Source: Bechtle et al. (2020), algorithm 1; Andrychowicz et al. (2016), equation 3; Finn et al. (2017), algorithm 1.
    """

    learned: LearnedLoss | None = None
    transform: Callable[[Params], Params] | None = None
    learn_start: bool = False
    rule: RecurrentRule | None = None
    learn_fixed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_rates and (self.rule or not self.learn_start):
            raise UserError("learn_rates belong to a learned start without a rule: set learn_start, and leave rule out")

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh θ: the parameters of the loss and of the rule, the first parameters, or those that stay."""
        theta = {}
        for piece in (self.learned, self.rule):
            theta |= piece.init(generator, dtype) if piece else {}
        if self.learn_start:
            theta |= super().init(generator, dtype)
        elif self.learn_fixed:
            theta |= self.split(self.model.init(generator, dtype))[1]
        return theta

    def inner_gradient(self, theta: Params, phi: Params, support: Examples) -> Params:
        """Gradient of the inner loss by the adapted parameters, transformed."""
        moving, fixed = self._moving(phi)

        def loss(moving: Params) -> Tensor:
            outputs = self.outputs(moving | fixed, support.x)
            return self.learned(theta, support.x, outputs, support.y) if self.learned else self.loss(outputs, support.y)

        gradient = grad(loss)(moving)
        return self.transform(gradient) if self.transform else gradient

    def move(self, theta: Params, phi: Params, gradient: Params) -> Params:
        """One inner step, by the rule if there is one; what it remembers of each coordinate is kept in φ."""
        if self.rule is None:
            return super().move(theta, phi, gradient)
        together = torch.cat([g.flatten() for g in gradient.values()])  # the rule is the same for all coordinates
        update, memory = self.rule(theta, together, phi[STATE] if STATE in phi else self.rule.empty(together))
        parts = update.split([g.numel() for g in gradient.values()])
        moved = zip(gradient, parts, strict=True)
        return phi | {STATE: memory} | {name: phi[name] + part.view_as(phi[name]) for name, part in moved}

    def begin(self, theta: Params, task: Tasks | Started) -> Params:
        """The start that the task gives, with all that θ knows better.

        Raises:
            UserError: if neither gives one.
        """
        phi = getattr(task, "start", {}) | self.start(theta)
        if not self.split(phi)[0]:
            raise UserError("no start is learned, so the tasks must give one: make them with helpers.learners.started")
        return phi


@dataclass(frozen=True)
class LossDescent(LearnedDescent):
    """Gradient descent on a learned loss, the learner of ML3: θ is not where it begins but what it descends.

    Raises:
        UserError: without a learned loss.

    Source: Bechtle et al. (2020), algorithm 1 and equations 2 to 4.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learned is None:
            raise UserError("LossDescent needs a loss to descend: pass learned=LearnedLoss(...)")


def started(model: Model, tasks: Tasks, generator: torch.Generator, count: int = 1) -> Started:
    """Every task ``count`` times, each time from other first parameters.

    Args:
        model: draws the parameters.
        tasks: T tasks.
        count: initialisations; all tasks share them.

    Returns:
        T · ``count`` tasks, those of one task together.
    """
    like = tasks.support.x
    drawn = [model.init(generator, like.dtype) for _ in range(count)]
    start = {n: v.repeat(len(like), *[1] * (v.dim() - 1)).to(like.device) for n, v in stacked(drawn).items()}
    support, query = (Examples(*(t.repeat_interleave(count, 0) for t in examples)) for examples in tasks)
    return Started(support, query, start)
