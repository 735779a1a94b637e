"""Learners of the next floor up: meta-training itself as what is adapted, and its start as what is learned.

Every estimator asks a learner for ``task_loss(theta, task)`` and maps it over the leading axis of ``tasks``. Nothing
says that a task is a regression. :class:`MetaLearner` takes a *family* of tasks for one task: its support set is a
batch of tasks of the family, adapting is some steps of meta-training on them, and the query loss is the meta-objective
on other tasks of the same family. So ``maml(MetaLearner(learner, ...), theta, families)`` is the gradient of the third
level, with third derivatives through both loops, and a ``MetaLearner`` of a ``MetaLearner`` goes on from there.

One level up every tensor of the tasks gets one more leading axis, and ``Tasks`` are nested: a batch of families is
``Tasks(support=Tasks(...), query=Tasks(...))`` with ``x`` of shape ``[families, tasks, examples, ...]``.

Source: the second level is Finn, Abbeel and Levine (2017), algorithm 1. Stacking levels is an old thought (Schmidhuber
1987); this way of doing it, MAML on top of MAML, is the book's own extension and not from a paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from helpers.errors import UserError
from helpers.estimators.explicit import maml
from helpers.types import Descent, Learner, Params, Tasks
from helpers.validate import positive, whole


@dataclass(frozen=True)
class MetaLearner(Descent):
    """Gradient descent on the meta-objective of another learner: a few steps of meta-training, differentiable.

    Everything here concerns one family; an estimator maps it over a batch of families with ``vmap``. What is adapted
    are the inner learner's meta-parameters, all of them, so φ of this floor is θ of the floor below.

    Attributes:
        inner: the learner of the floor below, such as :class:`~helpers.learners.descent.GradientDescent` or another
            ``MetaLearner``.
        rate: step size β of the steps; it is the outer rate of the floor below.
        steps: number of steps of meta-training.
        batches: the support tasks are dealt out, in order, to that many batches of equal size, and step i descends the
            meta-objective on batch i modulo their number. With ``batches=steps`` every step sees tasks of its own.
        first_order: treat the meta-gradients on the way as constants: no derivative is then of a higher order than
            those of the floor below.

    Raises:
        UserError: for a negative rate or number of steps, fewer than one batch, or an ``inner`` that is no learner.

    Source: Finn, Abbeel and Levine (2017), algorithm 1, is one step of it; to differentiate through the steps is the
    book's own extension.

    >>> import helpers
    >>> g, family = helpers.generator(0), helpers.Sinusoids(shots=5, queries=5)
    >>> below = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01)
    >>> learner = MetaLearner(below, rate=0.001, steps=2)
    >>> theta, task = learner.init(g), Tasks(support=family.sample(4, g), query=family.sample(4, g))  # one family
    >>> learner.task_loss(theta, task).shape
    torch.Size([])
    """

    inner: Learner
    rate: float
    steps: int = 1
    batches: int = 1
    first_order: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Learner):
            raise UserError(f"the inner learner of Meta must have init and task_loss, {self.inner!r} has not")
        positive(self.rate, "rate of meta-training", zero=True)
        whole(self.steps, "number of steps of meta-training", least=0)
        whole(self.batches, "number of batches")

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters: those of the floor below."""
        return self.inner.init(generator, dtype)

    def start(self, theta: Params) -> Params:
        """Where meta-training begins: at θ itself."""
        return theta

    def split(self, phi: Params) -> tuple[Params, Params]:
        """All of φ is adapted."""
        return phi, {}

    def batch(self, support: Tasks, number: int) -> Tasks:
        """The support tasks that step ``number``, counted from 0, sees.

        Raises:
            UserError: if the support set is no batch of tasks, or cannot be dealt out evenly.
        """
        if not isinstance(support, tuple) or not all(isinstance(part, tuple) for part in support[:2]):
            raise UserError(
                "the support set of a Meta learner is a batch of tasks, not of examples: "
                "pass Tasks(support=Tasks(...), query=Tasks(...)) with a leading axis of families"
            )
        count = len(tree_leaves(support)[0])
        if count % self.batches:
            raise UserError(
                f"{count} support tasks cannot be dealt out to {self.batches} batches of equal size: "
                f"draw a multiple of {self.batches}"
            )
        size, number = count // self.batches, number % self.batches
        return tree_map(lambda t: t[number * size : (number + 1) * size], support)

    def support_gradient(self, phi: Params, support: Tasks) -> Params:
        """The meta-gradient of the floor below on a batch of tasks."""
        gradient, _ = maml(self.inner, phi, support)
        return gradient

    def inner_gradient(self, theta: Params, phi: Params, support: Tasks) -> Params:
        """What a step descends: the meta-objective of the floor below."""
        return self.support_gradient(phi, support)

    def move(self, theta: Params, phi: Params, gradient: Params) -> Params:
        """φ ← φ − β ∇."""
        return {name: value - self.rate * gradient[name] for name, value in phi.items()}

    def per_step(self, support: Tasks, steps: int | None = None) -> list[Tasks]:
        """The batch of tasks that each step sees."""
        return [self.batch(support, number) for number in range(self.steps if steps is None else steps)]

    def step(self, theta: Params, phi: Params, support: Tasks, number: int | None = None) -> Params:
        """One step of meta-training, φ ← φ − β ∇J(φ), on all support tasks, or on the batch of step ``number``."""
        return super().step(theta, phi, support if number is None else self.batch(support, number))

    def query_loss(self, phi: Params, query: Tasks) -> Tensor:
        """The meta-objective of φ on the family's query tasks: their mean query loss after the inner adaptation."""
        return vmap(self.inner.task_loss, in_dims=(None, 0))(phi, query).mean()


def evaluations(learner: Learner, sizes: Sequence[tuple[int, int]] = (), order: int = 1) -> Counter[int]:
    """How many losses of a network one gradient asks for, by the order of the derivative that is taken of each.

    The cost of a level in a unit that no machine changes: one evaluation is one network on one set of examples. With
    E(learner, d) for the evaluations of a task loss that is differentiated d times,

        E(gradient descent, k steps; d) = k · [order d + 1] + 1 · [order d],
        E(MetaLearner, s steps on b tasks each, q query tasks; d) = s · b · E(inner; d + 1) + q · E(inner; d).

    A step contains a gradient and so adds one order; the query loss does not. A first-order floor adds none.

    Args:
        learner: a :class:`~helpers.learners.descent.GradientDescent` or a :class:`MetaLearner`.
        sizes: for each ``MetaLearner``, the uppermost first, the tasks that one step sees and the query tasks.
        order: d; 1 for a meta-gradient, 0 for a loss.

    Returns:
        Numbers by order, for one task of the learner; multiply by the size of the batch.

    Raises:
        UserError: if ``sizes`` are not as many as there are learners of that kind, or a learner has no number of
            steps, or a step or task loss of its own.

    >>> import helpers
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01, steps=5)
    >>> dict(evaluations(learner))  # five of the second order, one of the first
    {2: 5, 1: 1}
    """
    if isinstance(learner, MetaLearner):
        if not sizes:
            raise UserError("evaluations needs (tasks of a step, query tasks) for every Meta: too few sizes")
        (tasks, queries), below = sizes[0], sizes[1:]
        step = evaluations(learner.inner, below, 1 if learner.first_order else order + 1)
        query = evaluations(learner.inner, below, order)
        return Counter(
            {d: n for d in step | query if (n := learner.steps * tasks * step[d] + queries * query[d])},
        )
    if sizes:
        raise UserError("evaluations needs (tasks of a step, query tasks) for every Meta: too many sizes")
    for method in ("step", "task_loss"):  # what is counted is what Descent does there
        if isinstance(learner, Descent) and getattr(type(learner), method) is not getattr(Descent, method):
            raise UserError(f"evaluations cannot count those of {type(learner).__name__}, which has its own {method}")
    steps = whole(getattr(learner, "steps", None), "number of inner steps", least=0)
    own = Counter({(1 if getattr(learner, "first_order", False) else order + 1): steps})
    own[order] += 1
    return Counter({d: n for d, n in own.items() if n})
