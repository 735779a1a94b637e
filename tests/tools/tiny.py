"""An experiment that trains in a second, and what its checkpoints must agree in."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers import estimators, losses, runtime
from helpers.fields import limited
from helpers.lab import checkpoints, evaluation, records, statistics, training
from helpers.lab.experiment import Experiment, Run
from helpers.learners.descent import GradientDescent
from helpers.models.mlp import MLP
from helpers.tasks.sinusoid import Sinusoids
from helpers.validate import whole

ANY_OR_NONE = partial(whole, least=-1)


@dataclass(frozen=True)
class Tiny(Experiment):
    """Sinusoids and a network of eight hidden units; ``pause`` and ``poison`` are no part of the configuration."""

    made_of = "sinusoids"

    name: str = "tiny"
    iterations: int = 240
    outer_rate: float = 1e-3
    seed: int = 0
    evaluate_every: int = 90
    paper: str = "maml"
    hidden: int = 8
    pause: float = 0.0
    poison: int = limited(ANY_OR_NONE, -1)  # iteration from which the loss is NaN
    stop: int = limited(ANY_OR_NONE, -1)  # iteration in which Ctrl-C comes

    def config(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("pause", "poison", "stop")}

    def setup(self, device, compiled):
        return TinyRun(self)


class TinyRun(Run):
    def __init__(self, experiment: Tiny) -> None:
        self.experiment, self.calls = experiment, 0
        self.learner = GradientDescent(MLP((1, experiment.hidden, 1), scale=0.5), losses.mean_squared_error, 0.01)

    def init(self, generator):
        return self.learner.init(generator)

    def gradient(self, theta, generator, iteration):
        time.sleep(self.experiment.pause)
        self.calls += 1
        if self.calls == self.experiment.stop:
            os.kill(os.getpid(), signal.SIGINT)
        gradient, values = estimators.maml(self.learner, theta, Sinusoids(5, 5).sample(4, generator))
        factor = float("nan") if 0 <= self.experiment.poison < self.calls else 1.0
        return {name: g * factor for name, g in gradient.items()}, values.mean() * factor

    def evaluate(self, theta):
        tasks = Sinusoids(5, 5).sample(20, runtime.generator(1))
        curve = evaluation.adaptation_curve(self.learner, theta, tasks, (0, 1), losses.mean_squared_error)
        return {f"mse_{steps}": statistics.interval(row) for steps, row in zip((0, 1), curve, strict=True)}


def train(folder: Path, experiment: Tiny | None = None, **settings) -> records.Record:
    return training.train(experiment or Tiny(), data=folder, progress=False, say=lambda _: None, **settings)


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "tiny.safetensors.xz"


def stored(folder: Path):
    """Everything in a checkpoint that must not depend on interruptions; times and dates may."""
    tensors, header = checkpoints.read_checkpoint(checkpoint(folder))
    return tensors, {key: header[key] for key in ("iteration", "losses", "window", "curve", "config")}


def assert_same(folder: Path, other: Path) -> None:
    """Bit-identical parameters, optimiser and generator; the same history."""
    (tensors, header), (others, other_header) = stored(folder), stored(other)
    assert header == other_header
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
