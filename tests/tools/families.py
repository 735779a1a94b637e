"""Families of models with tasks for them, in float64, and the same meta-gradients from plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from helpers import losses
from helpers.learners.descent import RATE, GradientDescent
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics import differences
from helpers.runtime import generator
from helpers.types import Examples, Tasks

TASKS = 3


@dataclass(frozen=True)
class Family:
    """A model with a loss, and how to draw inputs and targets for it."""

    model: MLP | ConvNet
    loss: object
    shape: tuple[int, ...]
    rate: float

    def examples(self, n: int, draws: torch.Generator) -> Examples:
        x = torch.randn(TASKS, n, *self.shape, generator=draws, dtype=torch.float64)
        if self.loss is losses.mean_squared_error:
            return Examples(x, torch.randn(TASKS, n, 1, generator=draws, dtype=torch.float64))
        return Examples(x, torch.randint(0, 3, (TASKS, n), generator=draws))


FAMILIES = {
    "mlp": Family(MLP((2, 6, 5, 1)), losses.mean_squared_error, (2,), 0.05),
    "mlp-norm": Family(MLP((3, 5, 4, 3), norm=True), losses.cross_entropy, (3,), 0.2),
    "conv": Family(ConvNet(ways=3, filters=2, blocks=2), losses.cross_entropy, (1, 5, 6), 0.2),
}


def case(family: str, steps: int = 1, learn_rates: bool = False, seed: int = 0, **settings):
    """A learner with meta-parameters and tasks: all parameters random, also the biases and shifts that begin at 0."""
    f, draws = FAMILIES[family], generator(seed)
    learner = GradientDescent(f.model, f.loss, f.rate, steps, learn_rates=learn_rates, **settings)
    theta = learner.init(draws, torch.float64)
    for name, value in theta.items():
        noise = torch.randn(value.shape, generator=draws, dtype=torch.float64)
        # Learned rates get a different value everywhere, of either size, so that no two can be mixed up.
        theta[name] = value * (1 + 0.5 * noise.tanh()) if name.startswith(RATE) else value + 0.5 * noise
    return learner, theta, Tasks(f.examples(6, draws), f.examples(5, draws))


def error(gradient, reference):
    """The largest relative error of a parameter tensor.

    The bias of a linear layer that is normalised next has gradient 0, since the mean takes it away again; so has its
    learned rate. There the gradient is held against the size of the others.
    """

    def layer(name):
        return name.removeprefix(RATE).removeprefix("linear").removesuffix(".bias")

    return differences.error(
        gradient, reference, {name for name in reference if f"norm{layer(name)}.shift" in reference}
    )


@dataclass(frozen=True)
class Linear:
    """Linear regression without a bias, y = x w: its squared error is a quadratic, so all can be written down."""

    features: int

    def init(self, generator, dtype=torch.float32):
        return {"w": torch.randn(self.features, 1, generator=generator, dtype=dtype)}

    def __call__(self, params, x):
        return x @ params["w"]

    def is_adapted(self, name):
        return True


def linear_tasks(draws, n=7, features=4):
    x = torch.randn(2, TASKS, n, features, generator=draws, dtype=torch.float64)
    y = torch.randn(2, TASKS, n, 1, generator=draws, dtype=torch.float64)
    return Tasks(*(Examples(*part) for part in zip(x, y, strict=True)))


def plain_loop(learner, theta, tasks, create_graph=True):
    """The same meta-gradient from torch.autograd, task after task, without torch.func and the learner's methods."""
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    moving = [name for name in theta if not name.startswith(RATE) and learner.model.is_adapted(name)]
    total, values = {name: torch.zeros_like(value) for name, value in theta.items()}, []
    count = len(tasks.support.x)
    for i in range(count):
        phi = {name: value for name, value in theta.items() if not name.startswith(RATE)}
        for _ in range(learner.steps):
            inner = learner.loss(learner.model(phi, tasks.support.x[i]), tasks.support.y[i])
            gradients = torch.autograd.grad(inner, [phi[name] for name in moving], create_graph=create_graph)
            if not create_graph:
                gradients = [g.detach() for g in gradients]
            rates = [theta[RATE + name] if learner.learn_rates else learner.rate for name in moving]
            phi = phi | {name: phi[name] - r * g for name, r, g in zip(moving, rates, gradients, strict=True)}
        value = learner.loss(learner.model(phi, tasks.query.x[i]), tasks.query.y[i])
        for name, g in zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True):
            total[name] += g / count
        values.append(value.detach())
    return total, torch.stack(values)
