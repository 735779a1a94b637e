"""Learners that see one minibatch a step: SGD, and the Adam of Reptile's official code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.learners.descent import CARRIED, GradientDescent
from helpers.types import Examples, Params
from helpers.validate import positive


@dataclass(frozen=True)
class MinibatchDescent(GradientDescent):
    """Gradient descent in which every inner step sees a minibatch of its own: stochastic gradient descent.

    The support set is given as a sequence of minibatches, ``x`` ``[steps, batch, ...]``, as
    :func:`~helpers.tasks.batches.minibatches` draws them.

    Attributes:
        steps: use the first so many minibatches; by default all of them.

    Source: Nichol, Achiam and Schulman (2018), algorithm 1, with SGD inside.

    >>> import helpers
    >>> from helpers.tasks.batches import minibatches
    >>> g = helpers.generator(0)
    >>> support, query = helpers.Sinusoids(shots=10).sample(4, g)
    >>> learner = helpers.MinibatchDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01)
    >>> tasks = helpers.Tasks(minibatches(support, size=5, count=3, generator=g), query)  # three inner steps
    >>> helpers.reptile(learner, learner.init(g), tasks)[1].shape
    torch.Size([4])
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
        carry: hand the memory on from task to task; :func:`~helpers.estimators.explicit.reptile` alone does that.

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
        adapted, _ = self.split(theta)
        memory = {f"{CARRIED}square:{name}": torch.zeros_like(value) for name, value in adapted.items()}
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
