"""The recorded experiments of the MAML chapter: Omniglot at the paper's set-up, and the sinusoid study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import evaluation, losses, metagradients, runtime
from helpers.learners import GradientDescent
from helpers.models import MLP, ConvNet, Params
from helpers.tasks import FewShot, Sinusoids, Tasks

ESTIMATORS = {"maml": metagradients.maml, "fomaml": metagradients.fomaml}
TEST_SEED = 20_170_806  # of the test tasks; the same tasks for every experiment and every evaluation


@dataclass(frozen=True)
class Omniglot:
    """Few-shot Omniglot, as in section 5.2 of the paper and the commands of its official code.

    Attributes:
        inner_rate: on the *mean* cross-entropy; the official code applies its 0.4 to the sum over classes, which is 2.0 here.
        headline_steps: inner steps of the metric ``test_accuracy``, fixed beforehand: those of the paper.
        chunk: tasks that are differentiated at once; changes rounding and speed, nothing else.
    """

    name: str
    estimator: str = "maml"
    ways: int = 5
    shots: int = 1
    queries: int = 1
    network: str = "conv"
    head_scale: float = 0.1
    inner_rate: float = 0.4
    inner_steps: int = 1
    meta_batch: int = 32
    iterations: int = 60_000
    outer_rate: float = 1e-3
    seed: int = 0
    test_tasks: int = 600
    test_steps: tuple[int, ...] = (1, 3, 10)
    headline_steps: int = 3
    evaluate_every: int = 2_500
    chunk: int = 4
    paper: str = "maml"

    def config(self) -> dict[str, Any]:
        """The configuration as JSON."""
        return asdict(self)

    def data(self) -> dict[str, Any]:
        """Digest of the images and of the split."""
        from helpers.tasks import omniglot

        return omniglot.provenance()

    def learner(self) -> GradientDescent:
        """Network, loss and inner loop."""
        model = ConvNet(self.ways, head_scale=self.head_scale) if self.network == "conv" else MLP((784, 256, 128, 64, 64, self.ways), norm=True)
        return GradientDescent(model, losses.cross_entropy, self.inner_rate, self.inner_steps)

    def test_batch(self, device: torch.device | str = "cpu") -> Tasks:
        """The test tasks, drawn on the CPU so that they are the same on every device."""
        from helpers.tasks import omniglot

        family = FewShot(omniglot.load("test").images, self.ways, self.shots, self.queries)
        tasks = family.sample(self.test_tasks, runtime.generator(TEST_SEED))
        return torch.utils._pytree.tree_map(lambda t: t.to(device), tasks)

    def setup(self, device: torch.device, compiled: bool) -> Training:
        """Load the images and build the estimator."""
        from helpers.tasks import omniglot

        family = FewShot(omniglot.load("train").images.to(device), self.ways, self.shots, self.queries)
        return Training(self, family, device, compiled)

    def evaluate(self, theta: Params, tasks: Tasks) -> dict[str, evaluation.Interval]:
        """Accuracy after each number of inner steps, transductive and not; ``test_accuracy`` comes first."""
        measured = {}
        for kind, transductive in (("transductive", True), ("inductive", False)):
            curve = evaluation.adaptation_curve(self.learner(), theta, tasks, self.test_steps, losses.accuracy, transductive, chunk=25)
            for steps, accuracies in zip(self.test_steps, curve):
                measured[f"{kind}_accuracy_{steps}"] = evaluation.interval(accuracies)
        return {"test_accuracy": measured[f"transductive_accuracy_{self.headline_steps}"]} | measured


class Training:
    """An Omniglot experiment on one device."""

    def __init__(self, experiment: Omniglot, family: FewShot, device: torch.device, compiled: bool) -> None:
        self.experiment, self.family, self.learner = experiment, family, experiment.learner()
        estimator = ESTIMATORS[experiment.estimator]
        # A CPU is fastest on the few tasks that fit its cache, a GPU on the whole meta-batch.
        chunk = experiment.chunk if device.type == "cpu" else None
        self.estimator = metagradients.chunked(torch.compile(estimator, dynamic=False) if compiled else estimator, chunk)
        self.test = experiment.test_batch(device)

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters."""
        return self.learner.init(generator)

    def gradient(self, theta: Params, generator: torch.Generator) -> tuple[Params, Tensor]:
        """Meta-gradient and mean query loss of a fresh meta-batch."""
        gradient, losses_ = self.estimator(self.learner, theta, self.family.sample(self.experiment.meta_batch, generator))
        return gradient, losses_.mean()

    def evaluate(self, theta: Params) -> dict[str, evaluation.Interval]:
        """The metrics of the record."""
        return self.experiment.evaluate(theta, self.test)


def experiments() -> list[Omniglot]:
    """The experiments of the chapter, the most important first."""
    return [
        Omniglot("maml-omniglot-5w1s"),
        Omniglot("fomaml-omniglot-5w1s", estimator="fomaml"),
        Omniglot("maml-omniglot-5w5s", shots=5, queries=5, chunk=1),
        Omniglot("maml-omniglot-5w1s-summed", inner_rate=2.0),
    ]
