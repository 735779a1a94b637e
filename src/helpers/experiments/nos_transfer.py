"""The recorded experiments of the Neural Optimizer Search chapter: rules on other targets than they were found on.

Every rule gets the same sweep of learning rates, from a start that is not judged later, and is then trained from the
same few starts at its best rate. Source: Bello, Zoph, Vasudevan and Le (2017), sections 5.2 to 5.4 and Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from helpers import losses
from helpers.fields import among
from helpers.lab import records
from helpers.lab.experiment import Experiment, Run
from helpers.lab.statistics import Interval, Tolerance, both_names, chosen, interval, over_seeds
from helpers.learners.descent import CARRIED
from helpers.models.layers import subtree
from helpers.models.seq2seq import Seq2Seq, token_accuracy, translation_loss
from helpers.models.wide_resnet import WideResNet
from helpers.optimizers.child_training import RATES, Population
from helpers.optimizers.children import child
from helpers.optimizers.entries import POWERSIGN_LABEL, SCORES, SIGNS, TABLE, Entry, networks_of, swept, trained
from helpers.optimizers.language import parse
from helpers.optimizers.rules import state_bytes
from helpers.optimizers.search import best
from helpers.tasks import numerals, small_images
from helpers.types import Examples, Params

TARGETS = ("child", "wide-resnet", "translation")
RESULTS = CARRIED + "results/"


@dataclass(frozen=True)
class Transfer(Experiment):
    """Rules on one target.

    The first iteration sweeps the rates of all rules, each further one trains all of them from one start.

    Attributes:
        target: ``"child"``, ``"wide-resnet"`` or ``"translation"``.
        rules: label, text and decay of each.
        search: the search whose best rules are added.
        size: height and width of the images.
        train: training images; for translation the split is that of the numbers.
        valid: validation images.
        test: test images.
        epochs: of the training.
        sweep_epochs: of each rate's trial.
        seeds: starts that are judged; 1 to ``seeds``, while the sweep has start 0.
        chunk: networks in one batched program.
        batch: examples in a minibatch.
        found: of the search's best rules so many.
        rates: that are swept for every rule.
    """

    name: str
    target: str = among(*TARGETS, default="child")
    rules: tuple[Entry, ...] = TABLE + SIGNS
    search: str = "nos-cifar10"
    found: int = 3
    size: int = 16
    train: int = 45_000
    valid: int = 5_000
    test: int = 10_000
    batch: int = 100
    epochs: int = 5
    sweep_epochs: int = 1
    rates: tuple[float, ...] = RATES
    seeds: int = 3
    chunk: int = 14
    iterations: int = 4
    outer_rate: float = 0.0
    seed: int = 0
    evaluate_every: int = 1_000_000
    paper: str = "nos"

    tolerances = (("*", Tolerance(0.03)),)  # as of a search

    def data(self) -> dict[str, Any]:
        """Digests of the images, and the rules that came from the search."""
        found = {"found": [rule for _, rule, _ in self.entries[len(self.rules) :]]}
        return ({"data": "numerals"} if self.target == "translation" else small_images.provenance("cifar10")) | found

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All rules: those given, and the best that the search's controllers found beside them."""
        given = {parse(rule) for _, rule, _ in self.rules}
        rows = [row for row in records.load_table(self.search) if row["method"] == "controller"] if self.found else []
        new = [row["rule"] for row in best(rows, len(given) + self.found) if parse(row["rule"]) not in given]
        return self.rules + tuple((f"found{i}", rule, None) for i, rule in enumerate(new[: self.found], start=1))

    def setup(self, device: torch.device, compiled: bool) -> TransferRun:
        """Load the data, and choose network, loss and score for the target."""
        loss, score = losses.cross_entropy, losses.accuracy
        if self.target == "translation":
            parts = [numerals.load(split) for split in numerals.SPLITS]
            model = Seq2Seq(numerals.VOCABULARY, parts[0].x.shape[1])
            parts = [numerals.examples(*part, self.batch) for part in parts]
            loss, score = translation_loss, token_accuracy
        else:
            parts = small_images.images("cifar10", self.size, self.train, self.valid, self.test)
            model = child(self.size, 3) if self.target == "child" else WideResNet()
        parts = [Examples(*(t.to(device) for t in part)) for part in parts]

        def population(seed: int) -> Population:
            settings = {"loss": loss, "score": score, "chunk": self.chunk, "fused": compiled}
            steps = self.epochs * (len(parts[0].y) // self.batch)
            return Population(model, parts[0], parts[1], self.batch, seed, horizon=steps, **settings)

        return TransferRun(self, population, parts[2])


@dataclass(eq=False)
class TransferRun(Run):
    """A transfer made ready. θ holds only results, under ``carried:results/``: ``rates`` ``[rules]``, ``sweep``
    ``[rules, rates]``, ``scores`` ``[rules, seeds, 4]`` (see ``SCORES``) and ``done``, the iterations done."""

    transfer: Transfer
    population: Callable[[int], Population]
    test: Examples

    def __post_init__(self) -> None:
        self.experiment = self.transfer

    def init(self, generator: torch.Generator) -> Params:
        """Empty tables of results, which the iterations fill."""
        t = self.transfer
        rules = len(t.entries)
        shapes = {"rates": (rules,), "sweep": (rules, len(t.rates)), "scores": (rules, t.seeds, 4), "done": ()}
        return {RESULTS + name: torch.zeros(shape) for name, shape in shapes.items()}

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Measure; what comes back as a gradient makes the outer step write the results down."""
        t, results = self.transfer, {name: value.clone() for name, value in subtree(theta, RESULTS).items()}
        done = int(results["done"])
        if done == 0:
            results["sweep"].copy_(swept(self._population(0), t.entries, t.rates, t.sweep_epochs))
            results["rates"].copy_(torch.tensor(t.rates)[results["sweep"].argmax(1)])
        else:
            population, rates = self._population(done), results["rates"].tolist()
            results["scores"][:, done - 1] = trained(population, t.entries, rates, t.epochs, self.test)
        results["done"] += 1
        loss = -(results["sweep"].max(1).values if done == 0 else results["scores"][:, done - 1, 1]).mean()
        return {RESULTS + name: theta[RESULTS + name] - value for name, value in results.items()}, loss

    def _population(self, seed: int) -> Population:
        """Networks from one start, whose training looks at the clock of an iteration."""
        population = self.population(seed)
        population.check_clock = lambda: self.check_clock()
        return population

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """Scores over the starts, the differences from SGD and Adam start by start, and the rates."""
        results = subtree(theta, RESULTS)
        seen, labels = max(1, int(results["done"]) - 1), [label for label, _, _ in self.transfer.entries]
        scores = results["scores"][:, :seen].double()
        metrics: dict[str, Interval] = {}
        order = sorted(range(len(labels)), key=lambda i: labels[i] != POWERSIGN_LABEL)  # the headline first
        for i in order:
            for number, kind in enumerate(SCORES):
                metrics[f"{labels[i]}_{kind}"] = over_seeds(scores[i, :, number])
            for reference in ("sgd", "adam", "rmsprop"):
                if labels[i] != reference and reference in labels:
                    difference = scores[i, :, 0] - scores[labels.index(reference), :, 0]
                    metrics[f"{labels[i]}_over_{reference}"] = over_seeds(difference)
            metrics[f"{labels[i]}_rate"] = chosen(results["rates"][i].item())
            metrics[f"{labels[i]}_bytes"] = chosen(state_bytes(self.transfer.entries[i][1]))
        return metrics | both_names(self.spot_check(theta))

    def spot_check(self, theta: Params) -> dict[str, Interval]:
        """The first rule trained for one epoch from the first start once more; interval over the test minibatches."""
        entries = self.transfer.entries[:1]
        population = self._population(1)
        networks = networks_of(population, entries, subtree(theta, RESULTS)["rates"][:1].tolist())
        population.run(networks, 1)
        parts = zip(self.test.x.split(self.transfer.batch), self.test.y.split(self.transfer.batch), strict=True)
        values = torch.cat([population.scores(networks, Examples(x, y)) for x, y in parts])
        return {f"spot_{entries[0][0]}_first_epoch": interval(values)}

    def table(self, theta: Params) -> list[dict[str, Any]]:
        """Every rule from every start: ``label``, ``rule``, ``decay``, ``rate``, ``seed`` and the four scores."""
        results, rows = subtree(theta, RESULTS), []
        for i, (label, rule, schedule) in enumerate(self.transfer.entries):
            for seed in range(int(results["done"]) - 1):
                scores = {kind: round(results["scores"][i, seed, n].item(), 6) for n, kind in enumerate(SCORES)}
                rate = float(f"{results['rates'][i].item():.3g}")
                rows.append(
                    {"label": label, "rule": str(parse(rule)), "decay": schedule or "", "rate": rate, "seed": seed + 1}
                    | scores
                )
        return rows


def experiments() -> list:
    """The experiments, the most important first."""
    some = {"sgd", "momentum", "adam", "rmsprop", POWERSIGN_LABEL, "rule03", "rule10", "rule12", "addsign"}
    few = tuple(entry for entry in TABLE + SIGNS if entry[0] in some)
    return [
        Transfer("nos-child"),
        Transfer("nos-wide-resnet", "wide-resnet", few, train=5_000, valid=1_000, test=2_000, chunk=1),
        Transfer("nos-translation", "translation", few, train=8_000, valid=1_000, test=1_000, epochs=10, chunk=7),
    ]
