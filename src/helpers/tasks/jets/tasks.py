"""Jets of one or more prongs, across phase space: the file of simulated jets, a detector, images, and tasks.

``data/jets.npz`` holds what :mod:`helpers.tasks.jets.simulation` made: trimmed jets of five processes in five windows
of transverse momentum, with several showers, in three splits whose generators had different seeds. Reading it needs
neither Pythia nor FastJet. Detector and images come after: functions of ``particles``, a float tensor ``[n, slots, 3]``
whose rows are pT (GeV), η and φ relative to the jet's axis; slots without a particle have pT 0.

Inside a window the shape of the pT spectrum is chosen, not predicted: flat in steps of a fifth, the same for signal and
background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.runtime import generator as seeded
from helpers.tasks.episodes import check_draw
from helpers.tasks.jets.detector import Detector, View
from helpers.tasks.jets.samples import CHUNK, JetSamples, window_name
from helpers.types import Examples, Tasks
from helpers.validate import whole

__all__ = ["Domain", "JetTasks", "domains"]


# ---------------------------------------- tasks
class Domain(NamedTuple):
    """Where in phase space, of what and with what a task is about.

    Attributes:
        signal: the process to find among QCD jets.
        window: 0 … 4, of ``WINDOWS``.
        shower: one of ``SHOWERS``.
        detector: what measures the jets.
    """

    signal: str
    window: int
    shower: str
    detector: Detector


def domains(
    signals: Iterable[str], windows: Iterable[int], showers: Iterable[str], detectors: Iterable[Detector]
) -> tuple[Domain, ...]:
    """All combinations, the last varying fastest."""
    return tuple(Domain(*values) for values in product(signals, windows, showers, detectors))


@dataclass(frozen=True, eq=False)
class JetTasks:
    """Tell jets of a signal from QCD jets: label 1 is the signal.

    Every task draws its domain, and different jets of it; support and query set share none, and in each both classes
    are equally frequent. Jets of another split come from generators with other seeds, so tasks for meta-training,
    validation and test have none in common.

    A domain's jets are measured once, by a generator whose seed is ``seed`` and the domain's position, when a task is
    first drawn from it; then they are kept (half precision, 1.2 MB for 1,000 images). As in an experiment, a jet that
    is drawn twice looks the same twice.

    Args:
        samples: the jets.
        domains: what tasks are drawn from, all equally often.
        split: one of ``SPLITS``.
        shots: support examples of each class, K.
        queries: query examples of each class.
        view: what the tagger sees.
        seed: of the detectors.

    Raises:
        UserError: for an unknown name, a number that is not positive, no domain, or one with too few jets.
    """

    samples: JetSamples
    domains: Sequence[Domain]
    split: str
    shots: int
    queries: int
    view: View = View()
    seed: int = 0
    _seen: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.domains:
            raise UserError("tasks of jets need at least one domain to draw from")
        for name in ("shots", "queries"):
            whole(getattr(self, name), f"{name} of a class")
        for at in range(len(self.domains)):
            self._enough(at, self.shots + self.queries)

    def available(self, domain: int) -> int:
        """Jets of each class in a domain, of which signal and QCD have equally many in use."""
        return min(len(rows) for rows in self._rows(domain))

    def inputs(self, domain: int) -> Tensor:
        """All measured jets of a domain, QCD first: float16 ``[2, n, 1, 25, 25]``, or ``[2, n, 40, 3]`` of particles.

        Args:
            domain: position in ``domains``.
        """
        if domain not in self._seen:
            rows, n = self._rows(domain), self.available(domain)
            draws = seeded(self.seed * 1_000_003 + domain, self.samples.codes.device)
            detector = self.domains[domain].detector
            parts = []
            for chunk in torch.cat([one[:n] for one in rows]).split(CHUNK):
                parts.append(self.view(detector(self.samples.particles(chunk), draws)).half())
            self._seen[domain] = torch.cat(parts).unflatten(0, (2, n))
        return self._seen[domain]

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw ``n_tasks`` tasks.

        Args:
            n_tasks: how many tasks, T.
            generator: the only source of randomness; it must live on the device of the jets.

        Returns:
            ``Tasks`` with, for the support set (and alike for the query set with ``queries`` in place of ``shots``),
            ``x``: float32 ``[T, 2 * shots, 1, 25, 25]``, or ``[T, 2 * shots, 40, 3]`` for a view of particles;
            ``y``: int64 ``[T, 2 * shots]``, first all 0, QCD, then all 1.

        Raises:
            UserError: when ``n_tasks`` is not positive or the generator lives on another device.
        """
        return self.of(self._choose(n_tasks, generator), generator)

    def of(self, chosen: Sequence[int], generator: torch.Generator, shots: int | None = None) -> Tasks:
        """As :meth:`sample`, of given domains: one task for each position in ``domains``, with ``shots`` if given."""
        support, query = [], []
        shots = self.shots if shots is None else shots
        whole(shots, "shots of a class")
        for at in chosen:
            if shots > self.shots:
                self._enough(at, shots + self.queries)
            pool = self.inputs(at)
            rows = torch.stack([self._different(pool, shots + self.queries, generator) for _ in (0, 1)])
            x = torch.stack([pool[label, rows[label]] for label in (0, 1)])
            support.append(x[:, :shots].flatten(0, 1))
            query.append(x[:, shots:].flatten(0, 1))
        return Tasks(_labelled(support, shots), _labelled(query, self.queries))

    def bags(
        self, n_tasks: int, size: int, generator: torch.Generator, proportions: Sequence[float] = (0.2, 0.8)
    ) -> Tasks:
        """Draw tasks whose support set is unlabelled: bags of jets, of which only the share of signal is known.

        Args:
            n_tasks: how many tasks, T.
            size: jets in a bag.
            generator: the only source of randomness, on the device of the jets.
            proportions: the share of signal in each of the B bags, rounded to whole jets. With equal shares a constant
                output fits them all.

        Returns:
            ``Tasks`` with the query set of :meth:`sample`, and a support set of ``x``: float32
            ``[T, B * size, 1, 25, 25]`` (or ``[T, B * size, 40, 3]``), bag after bag, so that
            ``x.unflatten(1, (B, size))`` separates them, in random order within; ``y``: float32 ``[T, B * size]``, of
            each jet the share of signal in its bag. No jet is in two bags, or in a bag and the query set.

        Raises:
            UserError: for an impossible number or share, or too few jets.

        Source: Dery et al. (2017), arXiv:1702.00414 (label proportions); Metodiev et al. (2017), arXiv:1708.02949.
        """
        return self.bags_of(self._choose(n_tasks, generator), size, generator, proportions)

    def bags_of(
        self, chosen: Sequence[int], size: int, generator: torch.Generator, proportions: Sequence[float] = (0.2, 0.8)
    ) -> Tasks:
        """As :meth:`bags`, of given domains: one task for each position in ``domains``."""
        whole(size, "size of a bag")
        if not proportions or not all(0 <= share <= 1 for share in proportions):
            raise UserError(f"shares of signal must be between 0 and 1, not {tuple(proportions)}")
        signal = [round(share * size) for share in proportions]
        needed = [sum(size - count for count in signal), sum(signal)]
        support, query = [], []
        for at in chosen:
            self._enough(at, max(needed) + self.queries)
            pool = self.inputs(at)
            rows = [self._different(pool, needed[label] + self.queries, generator) for label in (0, 1)]
            query.append(torch.cat([pool[label, rows[label][: self.queries]] for label in (0, 1)]))
            start = [self.queries, self.queries]
            for count in signal:
                bag = []
                for label, number in ((0, size - count), (1, count)):
                    bag.append(pool[label, rows[label][start[label] : start[label] + number]])
                    start[label] += number
                order = torch.randperm(size, generator=generator, device=pool.device)
                support.append(torch.cat(bag)[order])
        x = torch.stack(support).float().unflatten(0, (len(query), len(signal))).flatten(1, 2)
        y = torch.tensor(signal, dtype=torch.float32, device=x.device) / size
        y = y.repeat_interleave(size).expand(len(query), -1).contiguous()
        return Tasks(Examples(x, y), _labelled(query, self.queries))

    def _choose(self, n_tasks: int, generator: torch.Generator) -> list[int]:
        check_draw(self.samples.codes, n_tasks, generator)
        return torch.randint(len(self.domains), (n_tasks,), generator=generator, device=generator.device).tolist()

    def _rows(self, domain: int) -> tuple[Tensor, Tensor]:
        signal, window, shower, _ = self.domains[domain]
        if signal == "QCD":
            raise UserError("QCD jets are the background of every task: choose another signal")
        return tuple(self.samples.select(process, shower, self.split, window) for process in ("QCD", signal))

    def _enough(self, domain: int, needed: int) -> None:
        for process, rows in zip(("QCD", self.domains[domain].signal), self._rows(domain), strict=True):
            if len(rows) < needed:
                where = f"{window_name(self.domains[domain].window)} with {self.domains[domain].shower}"
                raise UserError(
                    f"a task needs {needed:,} jets of each class, but there are {len(rows):,} of {process} for "
                    f"{self.split} at {where}: choose fewer, or another domain"
                )

    @staticmethod
    def _different(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
        return torch.randperm(pool.shape[1], generator=generator, device=pool.device)[:count]


def _labelled(x: list[Tensor], each: int) -> Examples:
    inputs = torch.stack(x).float()
    labels = torch.arange(2, device=inputs.device).repeat_interleave(each).expand(len(x), -1).contiguous()
    return Examples(inputs, labels)
