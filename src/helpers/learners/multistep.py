"""A learner whose query loss is measured after every inner step: the multi-step loss of MAML++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.learners.descent import GradientDescent
from helpers.learners.learned import LearnedDescent
from helpers.types import Params
from helpers.validate import whole


@dataclass(frozen=True)
class MultiStepDescent(GradientDescent):
    """Gradient descent that is judged on its way: the outer loss is Σ wⱼ L(φⱼ, Q) over the inner steps j = 1, …, k.

    Estimators that look at the inner path alone, such as :func:`~helpers.estimators.explicit.reptile`, do not see the
    weights.

    Attributes:
        weights: w, a tensor ``[steps]`` on the device of θ, as :func:`annealed` makes it; None weighs all steps alike.
            They are data: new values need no new recording (:func:`~helpers.numerics.tracing.traced`).

    Raises:
        UserError: without an inner step, or for weights that are not a tensor with one number for each.

    Source: Antoniou, Edwards and Storkey (2019), section 4, "Multi-Step Loss Optimization (MSL)".
    """

    weights: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            whole(self.steps, "number of inner steps of a multi-step loss")
            self._check(self.steps)

    def _check(self, steps: int) -> None:
        weights = self.weights
        if weights is None or (isinstance(weights, Tensor) and weights.shape == (steps,)):
            return
        raise UserError(
            f"a multi-step loss has one weight for each inner step: give weights, a tensor of shape [{steps}]"
        )

    def task_loss(self, theta: Params, task: Any) -> Tensor:
        """The weighted sum of the query losses after each inner step, a scalar for one task."""
        seen = self.per_step(task.support)
        self._check(whole(len(seen), "number of inner steps of a multi-step loss"))
        phi, measured = self.begin(theta, task), []
        for support in seen:
            phi = self.step(theta, phi, support)
            measured.append(self.query_loss(phi, task.query))
        measured = torch.stack(measured)
        return measured.mean() if self.weights is None else (self.weights.to(measured.dtype) * measured).sum()


@dataclass(frozen=True)
class SummedDescent(MultiStepDescent, LearnedDescent):
    """A descent with learned parts that is judged after every inner step: how an update rule is trained.

    With tasks whose query set is their support set the outer loss is the paper's, the training loss along the way.

    Source: Andrychowicz et al. (2016), equation 3.

    >>> import helpers
    >>> from helpers.learners.learned import started
    >>> from helpers.optimizers.recurrent import RecurrentRule
    >>> g, network = helpers.generator(0), helpers.MLP((1, 8, 1))
    >>> learner = SummedDescent(network, helpers.mean_squared_error, 1.0, steps=3, rule=RecurrentRule(hidden=4))
    >>> tasks = started(network, helpers.Sinusoids().sample(4, g), g)
    >>> _, losses = helpers.maml(learner, learner.init(g), tasks._replace(query=tasks.support))
    >>> losses.shape
    torch.Size([4])
    """


def annealed(steps: int, iteration: int, over: int, device: torch.device | str = "cpu") -> Tensor:
    """The weights of the query losses at an iteration, counted from 0: at first alike, from ``over`` on the last alone.

    Those before the last fall on a straight line from 1/``steps`` to 0, and the last has what they lose; the sum is 1.

    Returns:
        Weights ``[steps]`` for :class:`MultiStepDescent`.

    Raises:
        UserError: for fewer than one step or iteration to go over, or a negative iteration.

    Source: Antoniou, Edwards and Storkey (2019), section 4. Their code (``get_per_step_loss_importance_vector``) goes
    by epochs of 500 iterations, and the weights stop at 3 % of their first value until the last step is left alone.
    """
    whole(steps, "number of inner steps")
    share = 1 - min(1, whole(iteration, "iteration", least=0) / whole(over, "iterations of the annealing"))
    weights = torch.full((steps,), share / steps, device=device)
    weights[-1] += 1 - share
    return weights
