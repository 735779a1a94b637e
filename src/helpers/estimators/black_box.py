"""The meta-gradient of single updates of policies, through no more of the environment than what they met."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import grad_and_value, vmap

from helpers.learners.learned import LossDescent
from helpers.numerics.tracing import linearized, traced
from helpers.types import Examples, Params


class OneStep:
    """The meta-gradient of one update of many policies, each by a learned loss.

    Nothing is differentiated through the environment: where the learned loss led to is judged by the gradient of the
    learner's own loss, such as the score function's, on fresh trajectories.

    Args:
        learner: what an update is, and what it is judged by.
    """

    def __init__(self, learner: LossDescent) -> None:
        self.learner = learner
        self.update = traced(self._update)
        self._differentiable_update = linearized(self._update, by=(0,))
        self._judge = traced(self._judged)

    def _update(self, theta: Params, params: Params, given: Examples) -> Params:
        """One update of every policy, ``[seeds, policies, ...]``."""
        step = vmap(self.learner.step, in_dims=(None, 0, 0))
        return vmap(step)(theta, params, given)

    def _judged(self, moved: Params, fresh: Examples) -> tuple[Params, Tensor]:
        """Gradients of the outer objective by the updated policies, and its values, ``[seeds, policies, ...]``."""
        return vmap(vmap(grad_and_value(self.learner.query_loss)))(moved, fresh)

    def __call__(
        self, theta: Params, params: Params, given: Examples, judged: Callable[[Params], Examples]
    ) -> tuple[Params, Params]:
        """∂θ_new/∂ψ, transposed, times the outer gradient at θ_new.

        Args:
            theta: learned losses ``[seeds, ...]``.
            params: policies ``[seeds, policies, ...]``.
            given: what the update learns from, ``[seeds, policies, ...]``.
            judged: from the updated policies to fresh trajectories, as
                :func:`helpers.tasks.control.experience.query` gives them.

        Returns:
            The gradient of the outer objective's mean over the policies, and the updated policies.
        """
        moved, pull = self._differentiable_update(theta, params, given)
        outer, _ = self._judge(moved, judged(moved))
        count = next(iter(outer.values())).shape[1]
        (gradient,) = pull({name: value / count for name, value in outer.items()})
        return gradient, moved
