"""Many networks, each with an update rule and a rate of its own, trained at once on the same minibatches.

This is what a search over update rules spends its time on. All networks begin with the same weights and see the same
images in the same order, so a difference between two is their rules' doing. Their gradients are one batched program
(:mod:`helpers.numerics.tracing`); then every rule steps its own rows. A network's result does not depend on its
company.

Source: Bello, Zoph, Vasudevan and Le (2017), section 5.1: a child is trained once with each of several rates for one
epoch, and with the best of them to the end; its validation accuracy is the reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from helpers import losses, runtime
from helpers.errors import UserError
from helpers.numerics.tracing import compiled, traced
from helpers.optimizers.language import Expression
from helpers.optimizers.rules import DEFAULT, Settings, State, decay, remembered, step
from helpers.progress import progress_bar
from helpers.types import Examples, Model, Params
from helpers.validate import positive, whole

RATES = tuple(10.0**power for power in range(-5, 2))  # the paper's sweep
SHUFFLE, NOISE = 1_000_003, 1_009  # keep the seeds of epochs and of steps apart


@dataclass(eq=False)
class Network:
    """One network on its way: its rule and rate, its weights as one vector, and what the rule remembers.

    Attributes:
        rule, rate: how it steps.
        weights: ``[parameters]``.
        memory: the rule's running averages, each ``[parameters]``.
        steps: steps made.
        alive: whether all weights were finite when last looked at.
        schedule: decay of the internal sign term, see :func:`helpers.optimizers.rules.decay`.
    """

    rule: Expression
    rate: float
    weights: Tensor
    memory: State
    steps: int = 0
    alive: bool = True
    schedule: str | None = None


class Outcome(NamedTuple):
    """What became of one rule.

    Attributes:
        reward: validation score at the end; of a rule that was cut its best score after the sweep; 0 if it diverged.
        rate: the chosen rate.
        sweep: score of each rate after the sweep, 0 where it diverged.
        status: ``complete``, ``cut`` (hopeless after the sweep) or ``diverged``.
        seconds: its share of the time.
    """

    reward: float
    rate: float
    sweep: tuple[float, ...]
    status: str
    seconds: float


@dataclass(eq=False)
class Population:
    """Trains networks of one family on one data set.

    Attributes:
        model: the family.
        train: inputs ``[n, ...]`` and targets ``[n, ...]``; n is a multiple of ``batch``.
        valid: the examples that networks are scored on; a multiple of ``batch`` too.
        batch: examples in a minibatch, in training and in scoring (normalisation uses the statistics of the batch).
        seed: of the first weights, the order of the examples, and the rules' noise.
        loss, score: ``(outputs, y) -> scalar``; a higher score is better.
        chunk: networks in one batched program.
        fused: compile the program; it pays from some hundred networks on.
        settings: constants of the update rules.
        horizon: steps of a whole training, for schedules.
        check_clock: called before every step of a chunk, so that a training that takes long can be ended by an
            exception.

    Raises:
        UserError: if the examples cannot be cut into minibatches, or a batch, chunk or horizon is none.
    """

    model: Model
    train: Examples
    valid: Examples
    batch: int = 100
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy
    score: Callable[[Tensor, Tensor], Tensor] = losses.accuracy
    chunk: int = 16
    fused: bool = False
    settings: Settings = DEFAULT
    horizon: int | None = None
    check_clock: Callable[[], None] = field(default=lambda: None, repr=False)
    _orders: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        whole(self.batch, "batch of a population")
        whole(self.chunk, "chunk of a population")
        if self.horizon is not None:
            whole(self.horizon, "horizon of a population")
        for name, examples in (("training", self.train), ("validation", self.valid)):
            if len(examples.y) % self.batch or not len(examples.y):
                raise UserError(f"{len(examples.y)} {name} examples are no multiple of the batch of {self.batch}")

    @property
    def epoch(self) -> int:
        """Minibatches that cover the training examples once."""
        return len(self.train.y) // self.batch

    @cached_property
    def first(self) -> Params:
        """The weights that all networks begin with."""
        return self.model.init(runtime.generator(self.seed, self.train.x.device))

    def network(self, rule: Expression, rate: float, schedule: str | None = None) -> Network:
        """A network before its first step.

        Raises:
            UserError: for a rate that is negative or not finite, or if a schedule is asked for and the population has
                no horizon.
        """
        positive(rate, "learning rate", zero=True)
        if schedule is not None and not self.horizon:
            raise UserError("a schedule of the sign term needs the length of the training: set the horizon")
        weights = torch.cat([value.flatten() for value in self.first.values()])
        return Network(rule, rate, weights, remembered(rule, weights), schedule=schedule)

    def params(self, weights: Tensor) -> Params:
        """Weights ``[..., parameters]`` by name, each ``[..., *shape]``."""
        sizes = [value.numel() for value in self.first.values()]
        parts = weights.split(sizes, -1)
        return {
            name: part.unflatten(-1, value.shape) if value.dim() else part.squeeze(-1)
            for (name, value), part in zip(self.first.items(), parts, strict=True)
        }

    def minibatch(self, number: int) -> Examples:
        """The examples of a step (from 0): every epoch is a new order of all, the same for every network."""
        epoch, place = divmod(number, self.epoch)
        if epoch not in self._orders:
            generator = runtime.generator(self.seed * SHUFFLE + epoch)
            self._orders[epoch] = torch.randperm(len(self.train.y), generator=generator).to(self.train.y.device)
        rows = self._orders[epoch][place * self.batch : (place + 1) * self.batch]
        return Examples(self.train.x[rows], self.train.y[rows])

    @cached_property
    def _gradient(self) -> Callable:
        def gradient(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            def total(weights: Tensor) -> tuple[Tensor, Tensor]:
                each = vmap(lambda w: self.loss(self.model(self.params(w), x), y))(weights)
                return each.sum(), each

            # The sum over networks is differentiated, not each network by itself: shared images stay shared.
            gradient, (_, each) = grad_and_value(total, has_aux=True)(weights)
            return gradient, each

        return (compiled if self.fused else traced)(gradient)

    @cached_property
    def _scores(self) -> Callable:
        def scores(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return vmap(lambda w: self.score(self.model(self.params(w), x), y))(weights)

        return (compiled if self.fused else traced)(scores)

    def _padded(self, weights: Tensor) -> Tensor:
        """Weights of ``chunk`` networks: one program serves every number of them."""
        missing = self.chunk - len(weights)
        return torch.cat([weights, weights[:1].expand(missing, -1)]) if missing else weights

    def advance(self, networks: Sequence[Network], steps: int) -> Tensor:
        """Make so many steps with every network that is alive, in place; all must have made equally many.

        Returns:
            Mean training loss of these steps of each network ``[networks]``; not-a-number for the dead.

        Raises:
            UserError: for a number of steps below 1.
        """
        whole(steps, "number of steps")
        every = torch.full((len(networks),), float("nan"))
        living = [(i, network) for i, network in enumerate(networks) if network.alive]
        living.sort(key=lambda pair: pair[1].rule)  # equal rules step together
        for begin in range(0, len(living), self.chunk):
            part = living[begin : begin + self.chunk]
            every[[i for i, _ in part]] = self._advance([network for _, network in part], steps).cpu()
        return every

    def _advance(self, networks: list[Network], steps: int) -> Tensor:
        weights = torch.stack([network.weights for network in networks])
        groups, end = [], 0
        for (rule, schedule), members in groupby(networks, key=lambda network: (network.rule, network.schedule)):
            members = list(members)
            begin, end = end, end + len(members)
            memory = {slot: torch.stack([m.memory[slot] for m in members]) for slot in members[0].memory}
            rates = torch.tensor([m.rate for m in members], dtype=weights.dtype, device=weights.device)[:, None]
            groups.append([slice(begin, end), rule, schedule, rates, memory])
        done, total = networks[0].steps, 0
        for t in range(done, done + steps):
            self.check_clock()
            gradient, each = self._gradient(self._padded(weights), *self.minibatch(t))
            total = total + each[: len(networks)]
            moved = []
            for group in groups:
                rows, rule, schedule, rates, memory = group
                random = runtime.generator(self.seed * NOISE + t, weights.device)
                scale = decay(schedule, t, self.horizon) if schedule else 1.0
                update, group[4] = step(
                    rule, gradient[rows], weights[rows], memory, t + 1, self.settings, random, scale, shared=1
                )
                moved.append(weights[rows] - rates * update)
            weights = torch.cat(moved)
        finite = weights.isfinite().all(1).tolist()
        for rows, *_, memory in groups:
            for i in range(rows.start, rows.stop):
                networks[i].memory = {slot: value[i - rows.start].clone() for slot, value in memory.items()}
        for network, own, alive in zip(networks, weights, finite, strict=True):
            network.weights, network.steps, network.alive = own.clone(), done + steps, alive
        return total / steps

    @torch.no_grad()
    def scores(self, networks: Sequence[Network], examples: Examples | None = None) -> Tensor:
        """The score of each network on ``examples`` (by default those for validation) ``[networks]``, the mean over
        minibatches; 0 for the dead and for a score that is not finite."""
        examples = self.valid if examples is None else examples
        every = torch.zeros(len(networks))
        living = [i for i, network in enumerate(networks) if network.alive]
        for begin in range(0, len(living), self.chunk):
            rows = living[begin : begin + self.chunk]
            weights = self._padded(torch.stack([networks[i].weights for i in rows]))
            values = [
                self._scores(weights, x, y)
                for x, y in zip(examples.x.split(self.batch), examples.y.split(self.batch), strict=True)
            ]
            every[rows] = torch.stack(values).mean(0)[: len(rows)].nan_to_num(0, 0, 0).cpu()
        return every

    def run(self, networks: Sequence[Network], epochs: float, check: int | None = None) -> None:
        """Train for so many epochs; every ``check`` steps (a quarter of an epoch) the dead are left behind.

        Raises:
            UserError: for a negative number of epochs, or a ``check`` below 1.
        """
        left = round(positive(epochs, "number of epochs", zero=True) * self.epoch)
        check = max(1, self.epoch // 4) if check is None else whole(check, "steps between two looks")
        while left > 0 and any(network.alive for network in networks):
            self.advance(networks, min(left, check))
            left -= check

    def rewards(
        self,
        rules: Sequence[Expression],
        epochs: int = 5,
        rates: Sequence[float] = RATES,
        hopeless: float = 0.0,
        label: str | None = None,
    ) -> list[Outcome]:
        """Reward of each rule: every rate for one epoch, the best one to the end.

        The best network goes on from where the sweep left it, which is what training it anew would come to.

        Args:
            rules: canonical rules.
            epochs: of the whole training, the sweep's included.
            rates: learning rates to try.
            hopeless: rules whose best score after the sweep is not above this are not trained further.
            label: show a progress bar of that name.

        Returns:
            One outcome a rule, in order. A rule that diverges is an outcome, not an error.

        Raises:
            UserError: without a rate to try, or for a number of epochs below 1.
        """
        whole(epochs, "number of epochs")
        if not len(rates):
            raise UserError("a sweep needs at least one learning rate: there is none")
        outcomes = []
        together = 4 * self.chunk  # rules at a time: enough that those left after the sweep still fill programs
        with progress_bar(total=len(rules), desc=label, unit="rule", disable=label is None, leave=False) as bar:
            for begin in range(0, len(rules), together):
                part = rules[begin : begin + together]
                outcomes += self._rewards(part, epochs, rates, hopeless)
                bar.update(len(part))
        return outcomes

    def _rewards(
        self, rules: Sequence[Expression], epochs: int, rates: Sequence[float], hopeless: float
    ) -> list[Outcome]:
        started = time.perf_counter()
        tried = [[self.network(rule, rate) for rate in rates] for rule in rules]
        everyone = [network for row in tried for network in row]
        self.run(everyone, 1)
        swept = self.scores(everyone).view(len(rules), len(rates))
        best = swept.argmax(1).tolist()
        chosen = [row[i] for row, i in zip(tried, best, strict=True)]
        promising = [i for i, network in enumerate(chosen) if network.alive and swept[i].max() > hopeless]
        rest = [chosen[i] for i in promising]
        del tried, everyone
        self.run(rest, epochs - 1)
        final = dict(zip(promising, self.scores(rest).tolist(), strict=True))
        seconds = (time.perf_counter() - started) / max(1, len(rules))
        outcomes = []
        for i, network in enumerate(chosen):
            status = "complete" if i in final and network.alive else "cut" if network.alive else "diverged"
            reward = final.get(i, swept[i].max().item()) if network.alive else 0.0
            outcomes.append(Outcome(reward, network.rate, tuple(swept[i].tolist()), status, seconds))
        return outcomes
