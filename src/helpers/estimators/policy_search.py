"""MAML for reinforcement learning: the data of the query set are sampled by what the support set made of the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._pytree import tree_map

from helpers.estimators.explicit import maml
from helpers.learners.descent import GradientDescent
from helpers.models.layers import expanded
from helpers.models.policies import GaussianPolicy
from helpers.numerics.tracing import traced
from helpers.optimizers.trust_region import Moved, natural_step
from helpers.tasks.control.experience import act
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.surrogates import collect, divergence, metric, parts, surrogate
from helpers.types import Examples, Params, Tasks

__all__ = ["PolicySearch", "descend", "fisher_product", "judged", "policy_descent"]


def policy_descent(policy: GaussianPolicy, kind: str, rate: float, steps: int = 1) -> GradientDescent:
    """The learner: policy-gradient steps on sampled experience, judged by the likelihood ratio.

    Args:
        policy: what adapts, all of it.
        kind: of the inner loss, a key of :data:`~helpers.tasks.control.surrogates.SURROGATES`.
        rate: the inner rate α.
        steps: inner steps; with 0 the policy is judged as it is.
    """
    return GradientDescent(policy, surrogate(kind), rate, steps, outer_loss=surrogate("ratio"))


def descend(learner: GradientDescent, phi: Params, support: Examples) -> Params:
    """One policy-gradient step of every policy ``[tasks, ...]`` on its own experience."""
    return vmap(lambda phi, seen: learner.step(phi, phi, seen))(phi, support)


def adapted_outputs(learner: GradientDescent, theta: Params, tasks: Tasks) -> Tensor:
    """What the adapted policies say where they were: ``[tasks, n, horizon, 2 m]``."""

    def one(task: Tasks) -> Tensor:
        return learner.outputs(learner.adapt(theta, task.support), task.query.x)

    return vmap(one)(tasks)


def judged(learner: GradientDescent, theta: Params, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """The mean outer loss, and the mean KL of the adapted policies from those that sampled the query sets."""
    outputs = adapted_outputs(learner, theta, tasks)
    _, old, _, weight = parts(outputs, tasks.query.y)
    losses = vmap(learner.outer_loss)(outputs, tasks.query.y)
    return losses.mean(), (weight * divergence(outputs, old)).sum() / weight.sum()


def fisher_product(learner: GradientDescent, theta: Params, tasks: Tasks, v: Params) -> Params:
    """The second derivative of that KL by θ, times v, where the adapted policies are those that sampled.

    There the KL and its gradient by the outputs are 0, so that what is left is Jᵀ M J, with J the derivative of the
    outputs by θ, through the inner step, and M the second one of the KL by the outputs: exact, and without a third.
    """

    def outputs(theta: Params) -> Tensor:
        return adapted_outputs(learner, theta, tasks)

    value, pull = vjp(outputs, theta)
    _, moved = jvp(outputs, (theta,), (v,))
    weight = parts(value, tasks.query.y)[-1]
    (found,) = pull(metric(value) * moved * (weight / weight.sum())[..., None])
    return found


class PolicySearch:
    """One outer iteration of MAML on policies: algorithm 3 of the paper, with a trust region.

    The machine is that of every chapter: a task's support set are trajectories of θ, its query set trajectories of φ,
    the meta-gradient is :func:`~helpers.estimators.explicit.maml`'s. With a learner of no steps this is plain
    trust-region policy optimisation on all goals at once.

    Args:
        env: where policies act.
        learner: of :func:`policy_descent`.
        trajectories: of each support and each query set. Without inner steps there is no support set, and twice as many
            are in the query set: as many steps of the environment.
        limit: of the KL in an outer step.
        curvature: the metric of the natural gradient is measured on so many trajectories of each support and query set,
            which only turns the step; the gradient and the length of the step are measured on all. None: on all, too.
        check_clock: called between the pieces of an iteration.

    Source: Finn, Abbeel and Levine (2017), algorithm 3 and appendix A.2.

    >>> import helpers
    >>> from helpers.models import MLP, GaussianPolicy
    >>> env, g = Navigation(horizon=10), helpers.generator(0)
    >>> policy = GaussianPolicy(MLP((2, 8, 2), scale="xavier"), first_std=1.0, smallest_std=0.0, first_scale=1.0)
    >>> search = PolicySearch(env, policy_descent(policy, "score", 0.5), trajectories=4)
    >>> moved, returns = search(policy.init(g), env.goals(3, g), g)
    >>> moved.divergence <= 0.01, returns.shape
    (True, torch.Size([3, 4]))
    """

    def __init__(
        self,
        env: Navigation,
        learner: GradientDescent,
        trajectories: int,
        limit: float = 0.01,
        curvature: int | None = None,
        check_clock: Callable[[], None] = lambda: None,
    ) -> None:
        self.env, self.learner, self.trajectories, self.limit = env, learner, trajectories, limit
        self.curvature, self.check_clock = curvature, check_clock
        self.act, self.descend, self.maml = traced(act), traced(descend), traced(maml)
        self.judged, self.product = traced(judged), traced(fisher_product)

    def sample(self, phi: Params, goals: Tensor, n: int, generator: torch.Generator) -> tuple[Examples, Tensor]:
        """Experience and returns of policies ``[tasks, ...]``."""
        self.check_clock()
        return collect(self.env, self.learner.model, phi, goals, n, generator, step=self.act)

    def tasks(self, theta: Params, goals: Tensor, generator: torch.Generator) -> tuple[Tasks, Tensor]:
        """Support sets of θ, query sets of what each made of it; and the returns of the latter."""
        phi, n = expanded(theta, len(goals)), self.trajectories
        if not self.learner.steps:
            query, returns = self.sample(phi, goals, 2 * n, generator)
            return Tasks(query, query), returns
        support, _ = self.sample(phi, goals, n, generator)
        query, returns = self.sample(self.descend(self.learner, phi, support), goals, n, generator)
        return Tasks(support, query), returns

    def __call__(self, theta: Params, goals: Tensor, generator: torch.Generator) -> tuple[Moved, Tensor]:
        """An outer step on tasks of these goals ``[tasks, 2]``.

        Returns:
            What came of it, and the returns of the query sets, ``[tasks, trajectories]``.
        """
        tasks, returns = self.tasks(theta, goals, generator)
        few = tree_map(lambda t: t[:, : self.curvature].contiguous(), tasks)
        gradient, _ = self.maml(self.learner, theta, tasks)

        def product(v: Params) -> Params:
            self.check_clock()
            return self.product(self.learner, theta, few, v)

        def judge(theta: Params) -> tuple[Tensor, Tensor]:
            self.check_clock()
            return self.judged(self.learner, theta, tasks)

        return natural_step(theta, gradient, product, judge, self.limit), returns

    def returns(
        self, theta: Params, goals: Tensor, rates: Sequence[float], n: int, generator: torch.Generator
    ) -> Tensor:
        """Mean returns ``[len(rates) + 1, tasks]`` before and after each step of an adaptation to new goals.

        Every step is made on ``n`` fresh trajectories, whose returns are those before the step.
        """
        phi, found = expanded(theta, len(goals)), []
        for rate in (*rates, None):
            support, returns = self.sample(phi, goals, n, generator)
            found.append(returns.mean(-1))
            if rate is not None:
                phi = self.descend(self.learner.replace(rate=rate), phi, support)
        return torch.stack(found)
