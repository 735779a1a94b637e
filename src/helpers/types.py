"""The nouns of the book, and what the parts of the machine promise each other.

Any estimator meets any learner: the result is right, or refused in one sentence. An estimator asks for as little as it
can. :class:`Learner` is enough to differentiate a task loss, whatever happens inside. What takes the inner loop apart
rests on :class:`Descent`, and refuses a learner that has replaced a part which the estimator does not call.

All of them are pure functions of what they are given: parameters are dictionaries of tensors, randomness comes from an
explicit generator, and what varies during training is a value, never a constant of a recorded program.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Descent", "Estimator", "Examples", "Learner", "Model", "Params", "Started", "TaskFamily", "Tasks"]

Params = dict[str, Tensor]


class Model(Protocol):
    """A network family: how its parameters begin, how they are applied, and which of them a learner adapts.

    Attributes:
        head: what the names of the last layer's parameters begin with, such as ``"head."``.
    """

    @property
    def head(self) -> str: ...

    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params: ...

    def __call__(self, params: Params, x: Tensor) -> Tensor: ...

    def is_adapted(self, name: str) -> bool: ...


class Examples(NamedTuple):
    """Inputs and targets of a batch of tasks; both have a leading task axis.

    Attributes:
        x: inputs, ``[tasks, examples, ...]``.
        y: targets, ``[tasks, examples, ...]`` (regression) or ``[tasks, examples]`` class numbers (classification).

    >>> import helpers, torch
    >>> examples = helpers.Examples(torch.rand(4, 10, 1), torch.rand(4, 10, 1))  # ten examples of each of four tasks
    >>> x, y = examples
    >>> x.shape
    torch.Size([4, 10, 1])
    """

    x: Tensor
    y: Tensor


class Tasks(NamedTuple):
    """A batch of tasks: what the learner adapts on, and what the adapted learner is judged on.

    Attributes:
        support: the examples that the inner loop sees (the training set of the task).
        query: the examples that the outer loss is computed on (the test set of the task).

    >>> import helpers, torch
    >>> shown, asked = (helpers.Examples(torch.rand(4, n, 1), torch.rand(4, n, 1)) for n in (10, 5))
    >>> tasks = helpers.Tasks(support=shown, query=asked)
    >>> tasks.support.x.shape, tasks.query.y.shape
    (torch.Size([4, 10, 1]), torch.Size([4, 5, 1]))
    """

    support: Examples
    query: Examples


class Started(NamedTuple):
    """Tasks that also say where the inner loop begins, for learners whose θ is not an initialization.

    Attributes:
        support: as in :class:`Tasks`.
        query: as in :class:`Tasks`.
        start: the optimizee's first parameters, a dictionary of tensors ``[tasks, ...]``.
    """

    support: Examples
    query: Examples
    start: dict[str, Tensor]


class TaskFamily(Protocol):
    """A distribution over tasks, p(T)."""

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` independent tasks; all randomness comes from ``generator``."""
        ...


@runtime_checkable
class Learner(Protocol):
    """What every estimator asks for. Everything concerns one task; an estimator maps it over a batch of them."""

    @abstractmethod
    def init(self, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Params:
        """Fresh meta-parameters θ on the generator's device, a dictionary without task axes."""

    @abstractmethod
    def task_loss(self, theta: Params, task: Any) -> Tensor:
        """Query loss after adaptation: the summand of the meta-objective, a scalar for one task."""


@runtime_checkable
class Descent(Learner, Protocol):
    """A learner that adapts by steps, each along an inner gradient.

    A subclass says where it starts, what a step descends and how it moves; ``adapt`` and ``task_loss`` follow from
    that. So :func:`~helpers.estimators.explicit.stepwise` and others may go through the steps by themselves.

    Attributes:
        steps: number of inner steps; None where the support set says it.
        first_order: treat the inner gradients as constants: they do not change with φ.
    """

    steps: int | None
    first_order: bool

    @abstractmethod
    def start(self, theta: Params) -> Params:
        """Task parameters φ before adaptation, as far as θ gives them."""

    @abstractmethod
    def split(self, phi: Params) -> tuple[Params, Params]:
        """The adapted entries of ``phi``, and the others."""

    @abstractmethod
    def inner_gradient(self, theta: Params, phi: Params, support: Any) -> Params:
        """What an inner step descends, by the adapted parameters."""

    @abstractmethod
    def move(self, theta: Params, phi: Params, gradient: Params) -> Params:
        """φ after one step along an inner gradient."""

    @abstractmethod
    def query_loss(self, phi: Params, query: Any) -> Tensor:
        """The outer loss of task parameters φ on the query set."""

    def begin(self, theta: Params, task: Any) -> Params:
        """Where the inner loop begins on a task: here the same for all."""
        return self.start(theta)

    def per_step(self, support: Any, steps: int | None = None) -> list[Any]:
        """What each of ``steps`` (by default ``self.steps``) inner steps sees: here the whole support set."""
        return [support] * (self.steps if steps is None else steps)

    def step(self, theta: Params, phi: Params, support: Any) -> Params:
        """One inner step, φ ← move(φ, ∇)."""
        at = {name: value.detach() for name, value in phi.items()} if self.first_order else phi
        return self.move(theta, phi, self.inner_gradient(theta, at, support))

    def adapt(self, theta: Params, support: Any, steps: int | None = None, start: Params | None = None) -> Params:
        """Task parameters φ after ``steps`` (by default ``self.steps``) inner steps.

        Args:
            theta: meta-parameters; every value without a task axis.
            support: one task's examples, ``x`` ``[n, ...]`` and ``y`` ``[n, ...]``, or what :meth:`per_step` takes.
            start: where to begin; by default at θ's own parameters.

        Returns:
            φ, differentiable with respect to θ.
        """
        phi = self.start(theta) if start is None else start
        for seen in self.per_step(support, steps):
            phi = self.step(theta, phi, seen)
        return phi

    def task_loss(self, theta: Params, task: Any) -> Tensor:
        """Query loss after adaptation: the summand of the meta-objective, a scalar for one task."""
        return self.query_loss(self.adapt(theta, task.support, start=self.begin(theta, task)), task.query)

    def replace(self, **changes: Any) -> Self:
        """A copy with some attributes changed, such as ``steps=10``."""
        return replace(self, **changes)


Estimator = Callable[[Learner, Params, Tasks], tuple[Params, Tensor]]
