"""Fine-tuning of several starts on several tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap

from helpers import runtime
from helpers.learners.minibatch import MinibatchAdam
from helpers.models.seq2seq import token_accuracy
from helpers.numerics.tracing import traced
from helpers.tasks.batches import minibatches
from helpers.types import Examples, Model, Params


class FineTuning:
    """Fine-tuning of many networks in one batched program: Adam without momentum, memory empty at the start.

    Args:
        model: the network.
        loss: what it descends.
        seed: of the minibatches, the same for every network.
        batch: examples of a minibatch, or as many as there are.
    """

    def __init__(self, model: Model, loss: Callable[[Tensor, Tensor], Tensor], seed: int, batch: int = 20) -> None:
        self.model, self.learner = model, MinibatchAdam(model, loss, 0.0, carry=False)
        self.seed, self.batch = seed, batch
        self._recorded: Callable = traced(self._one_step)

    @staticmethod
    def _one_step(learner: MinibatchAdam, phi: Params, rate: Tensor, batch: Examples) -> Params:
        return vmap(lambda phi, x, y: learner.replace(rate=rate).step({}, phi, Examples(x, y)))(phi, *batch)

    def path(self, theta: Params, support: Examples, rate: float, steps: Sequence[int]) -> Iterator[Params]:
        """Every seed's network on every language, after each of some numbers of steps.

        Args:
            theta: starts, tensors ``[seeds, ...]``.
            support: what to adapt on, ``[languages, names, ...]``; the same for all seeds.
            rate: of Adam.
            steps: increasing numbers.

        Yields:
            Parameters ``[seeds · languages, ...]``, those of a seed together, and what Adam remembers.
        """
        seeds, (languages, shots) = len(next(iter(theta.values()))), support.x.shape[:2]
        draws = runtime.generator(self.seed, support.x.device)
        batches = minibatches(support, min(shots, self.batch), max(1, *steps), draws)
        repeated = {name: value.repeat_interleave(languages, 0) for name, value in theta.items()}
        phi = vmap(self.learner.start)(repeated)
        # Recording a step takes as long as some dozens of them.
        step = self._recorded if max(steps) > 50 else self._one_step
        done, at = 0, torch.tensor(rate, dtype=next(iter(theta.values())).dtype, device=support.x.device)
        for target in steps:
            for i in range(done, target):
                batch = Examples(*(t[:, i].repeat(seeds, *[1] * (t.dim() - 2)) for t in batches))
                phi = step(self.learner, phi, at, batch)
            done = target
            yield phi

    def accuracy(self, phi: Params, query: Examples) -> Tensor:
        """Share of right tokens given those before, ``[seeds · languages]``; query ``[languages, names, ...]``."""
        times = len(next(iter(phi.values()))) // len(query.x)
        x, y = (t.repeat(times, *[1] * (t.dim() - 1)) for t in query)
        return vmap(lambda phi, x, y: token_accuracy(self.model(phi, x), y))(phi, x, y)
