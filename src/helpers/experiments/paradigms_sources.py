"""What transfer learns from: one source or many, curves or images with their classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from helpers import runtime
from helpers.tasks.episodes import pooled
from helpers.tasks.images import ImageClasses
from helpers.types import Params


class Sources:
    """The sources of every seed, and learning from them.

    Args:
        experiment: a :class:`~helpers.experiments.paradigms.ParadigmExperiment`.
        classes: the training images; None for curves.
        seed: of the choice of the sources; each seed of the experiment has others.
        device: where they are.
    """

    def __init__(self, experiment: Any, classes: ImageClasses | None, seed: int, device: torch.device) -> None:
        self.experiment, self.device = experiment, device
        count = range(experiment.seeds)
        self.all = [self._images(s, classes) if classes else self._curves(seed + s) for s in count]

    def _curves(self, seed: int) -> tuple[Tensor, Tensor]:
        """Amplitudes and phases."""
        e, generator = self.experiment, runtime.generator(seed)
        amplitude = 0.1 + 4.9 * torch.rand(e.sources, generator=generator)
        return amplitude.to(self.device), (math.pi * torch.rand(e.sources, generator=generator)).to(self.device)

    def _images(self, number: int, classes: ImageClasses) -> tuple[Tensor, Tensor]:
        """Images with their classes. One source is another script for each seed, the largest first; many sources are
        all scripts. A reader's own training classes are all of one group."""
        scripts = sorted(set(classes.groups), key=lambda script: -classes.groups.count(script))
        wanted = [scripts[number % len(scripts)]] if self.experiment.sources == 1 else scripts
        rows = [i for i, script in enumerate(classes.groups) if script in wanted]
        pool = pooled(classes.select(rows).to(self.device).images)
        return pool.images, torch.arange(len(rows), device=self.device).repeat_interleave(pool.sizes)

    def outputs(self, number: int) -> int:
        """Outputs of the network that learns from the sources of a seed."""
        e = self.experiment
        return e.sources if e.family == "sinusoid" else int(self.all[number][1].max()) + 1

    def gradient(self, theta: Params, number: int, generator: torch.Generator) -> tuple[Params, Tensor]:
        """One minibatch of the sources of a seed, all heads at once: gradient and loss."""
        e, (first, second) = self.experiment, self.all[number]
        if e.family == "sinusoid":
            x = -5 + 10 * torch.rand(e.minibatch, 1, generator=generator, device=self.device)
            y = first * torch.sin(x - second)
        else:
            rows = torch.randint(len(first), (e.minibatch,), generator=generator, device=self.device)
            x, y = first[rows].to(torch.float32) / 255, second[rows]
        model = e.model(self.outputs(number))
        return grad_and_value(lambda theta: e.loss(model(theta, x), y))(theta)

    def start(self, theta: Params) -> Params:
        """θ with a new last layer: the mean of the heads of curves, or zeros for classes."""
        e = self.experiment
        last = e.model().head
        weight, bias = theta[f"{last}weight"], theta[f"{last}bias"]
        if e.family == "sinusoid":
            new = {f"{last}weight": weight.mean(1, keepdim=True), f"{last}bias": bias.mean(0, keepdim=True)}
        else:
            new = {f"{last}weight": weight.new_zeros(len(weight), e.ways), f"{last}bias": bias.new_zeros(e.ways)}
        return theta | new
