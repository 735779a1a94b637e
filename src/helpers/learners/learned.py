"""Learners whose loss, update rule and start may each be learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from helpers.errors import UserError
from helpers.learners.descent import STATE, GradientDescent
from helpers.losses import LearnedLoss
from helpers.models.layers import stacked
from helpers.optimizers.recurrent import RecurrentRule
from helpers.types import Examples, Model, Params, Started, Tasks


@dataclass(frozen=True)
class LearnedDescent(GradientDescent):
    """A descent whose loss, rule and start may each be learned: three boxes of the machine, three arguments.

    Where the start is not learned it is given with each task (:class:`~helpers.types.Started`). Where the loss is not
    learned the inner loop descends the task's own, and where the rule is not, it goes ``rate`` times the gradient.

    Attributes:
        learned: the learned loss that the inner loop descends; the task's own is measured on the query set, at
            meta-training only.
        transform: applied to the inner gradient, a dictionary like φ, before the step; for instance a normalisation.
        learn_start: begin at θ's own parameters, as MAML does.
        rule: a learned update rule in place of the step along the gradient.
        learn_frozen: what the inner loop leaves alone (``model.is_adapted``), such as the choice of an architecture,
            belongs to θ also where the start does not.

    Raises:
        UserError: for ``learn_rates`` beside a rule, which goes at no rate, or without a start in θ to belong to.

    Source: Bechtle et al. (2020), algorithm 1; Andrychowicz et al. (2016), equation 3; Finn et al. (2017), algorithm 1.

    >>> import helpers
    >>> g, network, learned = helpers.generator(0), helpers.MLP((1, 8, 1)), LearnedLoss(helpers.MLP((2, 8, 1)))
    >>> learner = helpers.LearnedDescent(network, helpers.mean_squared_error, rate=0.01, learned=learned)
    >>> tasks = started(network, helpers.Sinusoids().sample(4, g), g)  # the start is not learned, so they give it
    >>> gradient, losses = helpers.maml(learner, learner.init(g), tasks)
    >>> next(iter(gradient)), losses.shape
    ('loss:linear1.weight', torch.Size([4]))
    """

    learned: LearnedLoss | None = None
    transform: Callable[[Params], Params] | None = None
    learn_start: bool = False
    rule: RecurrentRule | None = None
    learn_frozen: bool = False

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
        elif self.learn_frozen:
            theta |= self.split(self.model.init(generator, dtype))[1]
        return theta

    def inner_gradient(self, theta: Params, phi: Params, support: Examples) -> Params:
        """Gradient of the inner loss by the adapted parameters, transformed."""
        adapted, frozen = self._adapted(phi)

        def loss(adapted: Params) -> Tensor:
            outputs = self.outputs(adapted | frozen, support.x)
            return self.learned(theta, support.x, outputs, support.y) if self.learned else self.loss(outputs, support.y)

        gradient = grad(loss)(adapted)
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
            raise UserError(
                "no start is learned, so the tasks must give one: make them with helpers.learners.learned.started"
            )
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


def begun(model: Model, tasks: Tasks | Started, generator: torch.Generator) -> Started:
    """Every task with first parameters of its own, drawn on the generator's device."""
    drawn = [model.init(generator, tasks.support.x.dtype) for _ in range(len(tasks.support.x))]
    return Started(*tasks[:2], stacked(drawn))
