"""Estimators that go through the inner path: MAML and its first-order variant, Reptile, and MAML step by step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, wraps

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap
from torch.utils._pytree import tree_map

from helpers.errors import UserError
from helpers.estimators.checks import adapted_names, check, name_of, number_of_tasks, watched
from helpers.numerics import ranks
from helpers.numerics.tracing import linearized, traced
from helpers.types import Descent, Estimator, Examples, Learner, Params, Tasks
from helpers.validate import whole

__all__ = [
    "chunked", "combination", "divided", "fomaml", "inner_step", "maml", "query_gradient", "reptile", "stepwise",
]  # fmt: skip


def maml(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """The exact meta-gradient: differentiate the mean query loss through every inner step.

    Args:
        learner: any; its ``first_order`` must be off for the exact gradient.
        theta: meta-parameters, a dictionary of tensors without a task axis.
        tasks: a batch, every tensor with a leading task axis.

    Returns:
        The gradient of the mean query loss with respect to θ, a dictionary like θ, and the query losses ``[tasks]``.

    Source: Finn, Abbeel and Levine (2017), equation 1 and algorithm 1, line 8. Written out in the MAML chapter,
    section "The core".

    >>> import helpers
    >>> g = helpers.generator(0)
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01, steps=2)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> gradient, losses = helpers.maml(learner, theta, tasks)
    >>> gradient.keys() == theta.keys(), losses.shape
    (True, torch.Size([4]))
    """
    check("MAML", learner, theta, tasks)

    def objective(theta: Params) -> tuple[Tensor, Tensor]:
        losses = vmap(learner.task_loss, in_dims=(None, 0))(theta, tasks)
        return losses.mean(), losses

    with watched(learner):
        gradient, (_, losses) = grad_and_value(objective, has_aux=True)(theta)
    return gradient, losses


def fomaml(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """First-order MAML: the same, with the inner gradients held constant, so that ∂φ/∂θ is taken for the identity.

    Arguments and returns are those of :func:`maml`; the learner has a ``first_order``. No second derivative by the
    adapted parameters is computed.

    Source: Finn, Abbeel and Levine (2017), section 5.2, "first-order approximation".

    >>> import helpers, torch
    >>> g = helpers.generator(0)
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.1)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> (exact, losses), (short, same) = (f(learner, theta, tasks) for f in (helpers.maml, helpers.fomaml))
    >>> torch.allclose(losses, same), torch.allclose(exact["linear2.bias"], short["linear2.bias"])
    (True, False)
    """
    if not hasattr(learner, "first_order"):
        raise UserError(f"first-order MAML holds inner gradients constant, and {name_of(learner)} has none: use maml")
    return maml(learner.replace(first_order=True), theta, tasks)


def reptile(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
    """Reptile: θ minus the mean of the adapted parameters, so that an outer step of size ε goes θ ← θ + ε (φ̄ − θ).

    Not the gradient of any function, and in no need of a query set: nothing is differentiated through the inner loop.
    With plain SGD inside it is the inner rate times the sum of the inner gradients. What an inner optimiser carries
    from task to task (``carried:…``) comes out the same way, as its old value minus the mean of the new ones.

    Args:
        learner: any that adapts θ itself; the official code's is :class:`~helpers.learners.minibatch.MinibatchAdam`.
        theta: meta-parameters. Parameters of the model that are not adapted stay as they are, their entry is 0.
        tasks: a batch, their supports cut into minibatches for a minibatch learner.

    Returns:
        θ − mean φ, a dictionary like θ, and the query losses ``[tasks]``, which are measured and otherwise unused.

    Source: Nichol, Achiam and Schulman (2018), algorithm 2 (the batch version). Written out in the Reptile chapter.

    >>> import helpers
    >>> g = helpers.generator(0)
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01, steps=5)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> step, losses = helpers.reptile(learner, theta, tasks)
    >>> theta = {name: value - 0.1 * step[name] for name, value in theta.items()}  # ε = 0.1
    """
    check("Reptile", learner, theta, tasks, carries=True)
    adapted = adapted_names("Reptile", learner, theta)
    phi = vmap(learner.adapt, in_dims=(None, 0))(theta, tasks.support)
    losses = vmap(learner.query_loss)(phi, tasks.query)
    still = {name: torch.zeros_like(value) for name, value in theta.items()}
    return still | {name: theta[name] - phi[name].mean(0) for name in theta if name in adapted}, losses


def combination(weights: Sequence[float]) -> Estimator:
    """An estimator that moves θ by a weighted sum of the gradients met on the inner path, Σ wᵢ gᵢ.

    The path is the learner's own. With plain SGD inside, ``(1, 1)`` is two-step Reptile divided by the inner rate,
    ``(0, 1)`` is first-order MAML judged on a minibatch of its own, and ``(1,)`` is joint training: the gradient of the
    expected loss.

    Args:
        weights: one for each inner step, that is for each minibatch of the support set.

    Returns:
        An estimator for learners such as :class:`~helpers.learners.minibatch.MinibatchDescent`.

    Source: Nichol, Achiam and Schulman (2018), section 6.2 and Figure 3.

    >>> import helpers, torch
    >>> g = helpers.generator(0)
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01, steps=2)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> both, _ = combination((1, 1))(learner, theta, tasks)
    >>> torch.allclose(0.01 * both["linear2.bias"], helpers.reptile(learner, theta, tasks)[0]["linear2.bias"])
    True
    """

    def one(learner: Descent, theta: Params, task: Tasks) -> tuple[Params, Tensor]:
        seen = learner.per_step(task.support)
        if len(seen) != len(weights):
            raise UserError(f"{len(seen)} inner steps were given {len(weights)} weights: give one for each step")
        phi, total = learner.begin(theta, task), {name: torch.zeros_like(value) for name, value in theta.items()}
        for support, weight in zip(seen, weights, strict=True):
            gradient = learner.inner_gradient(theta, phi, support)
            total |= {name: total[name] + weight * g for name, g in gradient.items()}
            phi = learner.move(theta, phi, gradient)
        return total, learner.query_loss(phi, task.query)

    def run(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        check("a combination of inner gradients", learner, theta, tasks, rests_on=("step", "adapt"))
        adapted_names("a combination of inner gradients", learner, theta)
        totals, losses = vmap(partial(one, learner), in_dims=(None, 0))(theta, tasks)
        return {name: total.mean(0) for name, total in totals.items()}, losses

    return run


def combinations(longest: int) -> dict[str, tuple[float, ...]]:
    """Name and weights of the combinations of Figure 3 of Reptile's paper, in the order of its legend.

    Of k = 1 … ``longest`` gradients: their sum, the sum divided by k, and the last alone.

    >>> list(combinations(2))
    ['g1', 'g1+g2', '(g1+g2)/2', 'g2']
    """
    found = {}
    for k in range(1, longest + 1):
        total = "+".join(f"g{i}" for i in range(1, k + 1))
        found[total] = (1.0,) * k
        if k > 1:
            found[f"({total})/{k}"] = (1.0 / k,) * k
            found[f"g{k}"] = (0.0,) * (k - 1) + (1.0,)
    return found


def slug(kind: str) -> str:
    """A combination's name as the beginning of a metric's: ``(g1+g2)/2`` is ``mean_g1_g2``."""
    gradients = kind.split("/")[0].strip("()").replace("+", "_")
    return f"mean_{gradients}" if kind.startswith("(") else gradients


def inner_step(learner: Descent, theta: Params, phi: Params, support: Examples) -> Params:
    """One inner step of every task."""
    return vmap(learner.step, in_dims=(None, 0, 0))(theta, phi, support)


def query_gradient(learner: Descent, phi: Params, query: Examples) -> tuple[Params, Tensor]:
    """Gradients of the query losses by φ, and the losses."""
    return vmap(grad_and_value(learner.query_loss))(phi, query)


def chunked(estimator: Estimator, size: int | None) -> Estimator:
    """The same estimator, ``size`` tasks at a time: memory then does not grow with the meta-batch.

    On a CPU small chunks are also faster, since the activations of a few tasks stay in the cache. ``None`` leaves it
    as it is.

    >>> import helpers, torch
    >>> g = helpers.generator(0)
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> whole, parts = (f(learner, theta, tasks)[0] for f in (helpers.maml, helpers.chunked(helpers.maml, 2)))
    >>> all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in theta)
    True
    """
    if size is None:
        return estimator
    size = whole(size, "number of tasks at a time")

    @wraps(estimator)
    def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count = number_of_tasks(tasks)
        total: Params | None = None
        losses = []
        for begin in range(0, count, size):
            part = tree_map(lambda t, begin=begin: t[begin : begin + size], tasks)
            gradient, loss = estimator(learner, theta, part)
            weighted = {name: g * (len(loss) / count) for name, g in gradient.items()}
            total = weighted if total is None else {name: total[name] + g for name, g in weighted.items()}
            losses.append(loss)
        return total, torch.cat(losses)

    return run


def divided(estimator: Estimator) -> Estimator:
    """The same estimator, of which each rank computes its part of the tasks (:mod:`helpers.numerics.ranks`).

    All ranks give it the same θ and the same tasks, and all get the gradient and the losses of all tasks, equal to
    those of one process up to rounding. Alone it is the estimator itself.

    Raises:
        UserError: for fewer tasks than ranks.

    >>> import helpers
    >>> divided(helpers.maml) is helpers.maml  # this process is alone
    True
    """
    if (parts := ranks.count()) == 1:
        return estimator

    @wraps(estimator)
    def run(learner: Learner, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        count = number_of_tasks(tasks)
        if count < parts:
            raise UserError(f"{parts} processes cannot share {count} tasks: start at most {count}")
        begin, end = (count * (ranks.number() + more) // parts for more in (0, 1))
        gradient, losses = estimator(learner, theta, tree_map(lambda t: t[begin:end], tasks))
        weighted = [g * ((end - begin) / count) for g in gradient.values()]
        all_losses = losses.new_zeros(count)
        all_losses[begin:end] = losses.detach()
        *sums, all_losses = ranks.summed([*weighted, all_losses])
        return dict(zip(gradient, sums, strict=True)), all_losses

    return run


def stepwise() -> Estimator:
    """MAML's exact meta-gradient, one inner step at a time, and so as quick to trace for any number of them.

    Let φ ← U(θ, φ) be one inner step, and v the gradient of the query loss by the last φ. Going back through a step,
    v ← (∂U/∂φ)ᵀ v, and (∂U/∂θ)ᵀ v is what that step's own use of θ (shifts, learned rates) adds to the meta-gradient;
    what v is in the end belongs to the initial φ, and so to what θ gave of it. All steps are the same program, so it is
    recorded once.

    Returns:
        An estimator equal to :func:`maml`, for learners whose task loss is that of :class:`~helpers.types.Descent`.

    >>> import helpers, torch
    >>> g = helpers.generator(0)
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 1)), helpers.mean_squared_error, rate=0.01, steps=3)
    >>> theta, tasks = learner.init(g), helpers.Sinusoids().sample(4, g)
    >>> whole, parts = (f(learner, theta, tasks)[0] for f in (helpers.maml, helpers.stepwise()))
    >>> all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in theta)
    True
    """

    advance, measure = linearized(inner_step, by=(1, 2)), traced(query_gradient)

    def run(learner: Descent, theta: Params, tasks: Tasks) -> tuple[Params, Tensor]:
        check("stepwise", learner, theta, tasks, rests_on=("adapt", "task_loss"))
        phi, by_start = vjp(lambda theta: vmap(learner.begin, in_dims=(None, 0))(theta, tasks), theta)
        phi, pulls = {name: value.contiguous() for name, value in phi.items()}, []
        seen = vmap(learner.per_step)(tasks.support)
        learner = learner.replace(steps=1)  # for the recordings all lengths are one
        for support in seen:
            phi, pull = advance(learner, theta, phi, support)
            pulls.append(pull)
        v, losses = measure(learner, phi, tasks.query)
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        while pulls:
            by_theta, v = pulls.pop()(v)
            total = {name: total[name] + g for name, g in by_theta.items()}
        total = {name: total[name] + g for name, g in by_start(v)[0].items()}
        return {name: g / len(losses) for name, g in total.items()}, losses

    return run
