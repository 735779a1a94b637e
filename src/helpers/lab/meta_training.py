"""How fast starts are meta-trained on families of tasks, with several outer optimisers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers.learners.descent import GradientDescent
from helpers.optimizers.adam import Adam, adam
from helpers.types import Estimator, Params, Tasks


def meta_training(
    estimator: Estimator,
    learner: GradientDescent,
    starts: Params,
    draw: Callable[[], Tasks],
    test: Tasks,
    settings: Sequence[tuple[float, bool]],
    measured: Sequence[int],
) -> Tensor:
    """The loss on test tasks in the course of meta-training.

    Args:
        estimator: of several θ at once, see :func:`helpers.lab.seeds.side_by_side`.
        learner: what is meta-trained.
        starts: one θ for each family, ``[families, ...]``.
        draw: gives the tasks of an iteration, ``[families, tasks, ...]``, the same for every setting.
        test: tasks that the loss is measured on, ``[families, tasks, ...]``, on the device of the starts.
        settings: rate, and whether the outer optimiser is Adam or plain descent.
        measured: numbers of iterations after which the loss is measured.

    Returns:
        ``[measured, settings, families]``.
    """
    device, many = test.support.x.device, len(settings)
    families = len(next(iter(starts.values())))

    def spread(values: Sequence[float]) -> Tensor:
        """One value a setting, as a factor on parameters ``[settings · families, ...]``."""
        return torch.tensor(values, device=device).repeat_interleave(families)

    rates, adaptive = spread([rate for rate, _ in settings]), spread([is_adam for _, is_adam in settings])
    phi = {n: v.repeat(many, *[1] * (v.dim() - 1)) for n, v in starts.items()}
    state, losses = Adam.of(phi), []

    def loss(phi: Params, tasks: Tasks) -> Tensor:
        return vmap(learner.task_loss, in_dims=(None, 0))(phi, tasks).mean()

    for iteration in range(max(measured) + 1):
        if iteration in measured:
            parts = [{n: v.unflatten(0, (many, -1))[k] for n, v in phi.items()} for k in range(many)]
            losses.append(torch.stack([vmap(loss)(part, test) for part in parts]))
        tasks = tree_map(lambda t: t.repeat(many, *[1] * (t.dim() - 1)).to(device), draw())
        gradient, _ = estimator(learner, phi, tasks)
        adaptively, state = adam(gradient, state)
        for name, value in phi.items():
            shape = (-1, *[1] * (value.dim() - 1))
            direction = torch.where(adaptive.view(shape), adaptively[name], gradient[name])
            phi[name] = value - rates.view(shape) * direction
    return torch.stack(losses)
