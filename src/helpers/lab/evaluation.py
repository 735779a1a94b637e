"""Judging meta-parameters on new tasks: accuracy or loss after 0, 1, 2 … inner steps, with intervals over tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import runtime
from helpers.errors import UserError
from helpers.estimators.explicit import inner_step
from helpers.lab import checkpoints
from helpers.lab.experiment import Experiment
from helpers.lab.statistics import Interval, interval
from helpers.learners.descent import GradientDescent
from helpers.learners.feedforward import Amortized
from helpers.learners.minibatch import MinibatchDescent
from helpers.losses import accuracy, cross_entropy
from helpers.models.layers import expanded
from helpers.numerics.tracing import traced
from helpers.progress import progress_bar
from helpers.tasks.batches import minibatches
from helpers.types import Examples, Model, Params, TaskFamily, Tasks
from helpers.validate import whole

ACCURACIES = (("transductive", True), ("inductive", False))  # kinds by name, and whether queries are seen together
DIVERGED = 100.0  # a network with a larger cross-entropy, or with none that is a number, counts with this one
CHUNK = 20  # tasks that a Predictor adapts at once on a CPU


def one_by_one(learner: GradientDescent, phi: Params, support: Examples, query: Examples) -> Tensor:
    """Predictions without transduction: each query example is normalised together with the support set alone.

    Returns:
        Outputs ``[queries, ...]``, as the model gives them for the joint batch.
    """

    def predict(x: Tensor) -> Tensor:
        return learner.outputs(phi, torch.cat([support.x, x[None]]))[-1]

    return vmap(predict)(query.x)


def adaptation_curve(
    learner: GradientDescent,
    theta: Params,
    tasks: Tasks,
    steps: Sequence[int],
    metric: Callable[[Tensor, Tensor], Tensor],
    transductive: bool = True,
    chunk: int | None = 50,
) -> Tensor:
    """A metric on the query set after each of several numbers of inner steps, each on the whole support set.

    Args:
        learner: one that goes step by step; a minibatch learner too sees the whole support set at every step.
        theta: meta-parameters.
        tasks: a batch of T tasks, which also give the start where the learner wants one.
        steps: increasing numbers of inner steps, from 0.
        metric: ``metric(outputs, y) -> scalar``, such as ``losses.accuracy``.
        transductive: predict all query examples as one batch, so that batch normalisation sees them together (as MAML's
            code does), or one by one, each beside the support set.
        chunk: tasks at a time.

    Returns:
        ``[len(steps), T]``.

    Raises:
        UserError: if ``steps`` do not increase or are none, without tasks, for a learner without steps, or where the
            support set has been cut into minibatches.
    """
    if not isinstance(learner, GradientDescent):
        raise UserError(
            f"a curve is over inner steps, such as those of GradientDescent: {type(learner).__name__} has none"
        )
    if not len(steps) or not len(tasks.query.x):
        raise UserError("a curve needs at least one number of inner steps and one task")
    if chunk is not None:
        whole(chunk, "number of tasks at a time")
    if isinstance(learner, MinibatchDescent) and tasks.support.x.dim() > tasks.query.x.dim():
        raise UserError("every step of a curve sees the whole support set: pass it without cutting it into minibatches")
    if any(after < before for before, after in zip((0, *steps), steps, strict=False)):  # else adapted too far
        raise UserError(f"the numbers of inner steps must increase from 0, not be {list(steps)}")

    for count in steps:
        whole(count, "number of inner steps", least=0)

    def curve(task: Tasks) -> Tensor:
        phi, done, values = learner.begin(theta, task), 0, []
        for target in steps:
            for _ in range(target - done):
                phi = learner.step(theta, phi, task.support)
            done = target
            outputs = learner.outputs(phi, task.query.x) if transductive else one_by_one(learner, phi, *task)
            values.append(metric(outputs, task.query.y))
        return torch.stack(values)

    count = len(tasks.query.x)
    size, curves = chunk or count, []
    for begin in progress_bar(
        range(0, count, size), desc="testing", unit="task", unit_scale=size, leave=False, delay=2
    ):
        some = tree_map(lambda t, begin=begin: t[begin : begin + size], tasks)
        curves.append(vmap(curve)(some))
    return torch.cat(curves).T


def curves_of_seeds(
    learner: GradientDescent,
    theta: Params,
    tasks: Tasks,
    steps: Sequence[int],
    metric: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The :func:`adaptation_curve` of several seeds, from θ ``[seeds, ...]`` on tasks ``[seeds, T, ...]``.

    Returns:
        ``[seeds, len(steps), T]``.
    """

    def curve(theta: Params, tasks: Tasks) -> Tensor:
        return adaptation_curve(learner, theta, tasks, steps, metric, chunk=None)

    return vmap(curve)(theta, tasks)


def outcomes(
    learner: GradientDescent | Amortized,
    theta: Params,
    tasks: Tasks,
    steps: Sequence[int],
    metric: Callable[[Tensor, Tensor], Tensor],
    chunk: int = 25,
) -> Tensor:
    """As :func:`adaptation_curve`; of a learner that does not descend, whatever the steps, the one metric ``[1, T]``.

    >>> import helpers
    >>> from helpers.learners.feedforward import AsItIs, Neighbours
    >>> tasks = helpers.Sinusoids().sample(3, helpers.generator(0))
    >>> outcomes(Neighbours(AsItIs()), {}, tasks, (), helpers.mean_squared_error).shape
    torch.Size([1, 3])
    """
    if not isinstance(learner, Amortized):
        return adaptation_curve(learner, theta, tasks, steps, metric, chunk=chunk)

    def one(task: Tasks) -> Tensor:
        return metric(learner.predict(learner.adapt(theta, task.support), task.query.x), task.query.y)

    return vmap(one, chunk_size=chunk)(tasks)[None]


def accuracy_curve(
    learner: GradientDescent, theta: Params, tasks: Tasks, steps: Sequence[int], transductive: bool = True
) -> Tensor:
    """Accuracies ``[steps, tasks]`` after numbers of inner steps, as many tasks at a time as the device is good for."""
    chunk = 25 if tasks.support.x.device.type == "cpu" else 300
    return adaptation_curve(learner, theta, tasks, steps, accuracy, transductive, chunk=chunk)


def accuracies(
    learner: GradientDescent, theta: Params, tasks: Tasks, steps: Sequence[int], headline: int, spot: int | None = None
) -> dict[str, Interval]:
    """``{kind}_accuracy_{steps}``, transductive and not; ``transductive_accuracy``, after ``headline`` steps, is first.

    Args:
        spot: also enter ``spot_{kind}_accuracy_{headline}``, from the first so many tasks.
    """
    measured = {}
    for kind, transductive in ACCURACIES:
        curve = accuracy_curve(learner, theta, tasks, steps, transductive)
        for count, values in zip(steps, curve, strict=True):
            measured[f"{kind}_accuracy_{count}"] = interval(values)
            if count == headline and spot:
                measured[f"spot_{kind}_accuracy_{count}"] = interval(values[:spot])
    return {"transductive_accuracy": measured[f"transductive_accuracy_{headline}"]} | measured


def of_checkpoint(
    experiment: Experiment, path: Path, device: torch.device | str = "cpu", spot: bool = False
) -> dict[str, Interval]:
    """The metrics of an experiment's checkpoint, measured anew; nothing is written.

    Args:
        experiment: the checkpoint's own, or one that is judged in another way and has the same parameters.
        path: the file.
        spot: measure on a part of the tasks only, where the experiment has such a check.

    Raises:
        UserError: if the file is missing or damaged, or holds other parameters than the experiment has.
    """
    theta = checkpoints.load_theta(path.name.removesuffix(checkpoints.SUFFIX), path.parent)
    run = experiment.setup(torch.device(device), False)
    fresh = run.init(runtime.generator(experiment.seed, device))
    if {name: value.shape for name, value in fresh.items()} != {name: value.shape for name, value in theta.items()}:
        raise UserError(
            f"the checkpoint {path} holds other parameters than {experiment.name} has: leave fields that change "
            "the network as they were in training"
        )
    measure = run.spot_check if spot else run.evaluate
    return measure({name: value.to(device) for name, value in theta.items()})


PREDICTED = ("inductive", "transductive")  # what a Predictor gives, in its order


def minibatch_episodes(
    family: TaskFamily, count: int, size: int, steps: int, seed: int, device: torch.device | str, block: int
) -> Iterator[tuple[Tasks, Examples]]:
    """At least ``count`` tasks, and their support sets in minibatches, the same on every device.

    Args:
        size, steps: of the minibatches.
        block: tasks that are drawn at once.
    """
    draws = runtime.generator(seed)
    for _ in progress_bar(range(0, count, block), desc="testing", leave=False, delay=2):
        tasks = family.sample(block, draws)
        batches = minibatches(tasks.support, size, steps, draws)
        yield tree_map(lambda t: t.to(device), (tasks, batches))


class Predictor:
    """Accuracies of a batch of tasks after adaptation; one inner step is recorded, and used as often as needed.

    Args:
        fast: how the inner step is run, such as :func:`~helpers.numerics.tracing.traced`.
    """

    def __init__(self, fast: Callable[[Callable], Callable]) -> None:
        self.step, self.outcome = fast(_one_step), traced(_accuracies)

    def __call__(self, learner: MinibatchDescent, theta: Params, tasks: Tasks, batches: Examples) -> Tensor:
        """``[2, tasks]``: each query classified beside the support set, and all of them as one batch of their own.

        Source: ``reptile.py`` of the authors' code, ``_test_predictions`` without and with its flag ``transductive``.
        """
        found, count = [], len(batches.x)
        size = CHUNK if batches.x.device.type == "cpu" and count % CHUNK == 0 else count
        for begin in range(0, count, size):
            chunk, parts = tree_map(lambda t, begin=begin: t[begin : begin + size], (tasks, batches))
            phi = expanded(learner.start(theta), size)
            for step in range(parts.x.shape[1]):
                phi = self.step(learner, theta, phi, tree_map(lambda t, step=step: t[:, step].contiguous(), parts))
            found.append(self.outcome(learner, phi, chunk))
        return torch.cat(found, 1)


def _accuracies(learner: MinibatchDescent, phi: Params, tasks: Tasks) -> Tensor:
    def one(phi: Params, task: Tasks) -> Tensor:
        apart = one_by_one(learner, phi, *task)
        together = learner.outputs(phi, task.query.x)
        return torch.stack([accuracy(outputs, task.query.y) for outputs in (apart, together)])

    return vmap(one)(phi, tasks).T


def _one_step(learner: MinibatchDescent, theta: Params, phi: Params, support: Examples) -> Params:
    return vmap(learner.step, in_dims=(None, 0, 0))(theta, phi, support)


class Course:
    """How several seeds' networks do in the course of learning; its two pieces are recorded once for each shape."""

    def __init__(self) -> None:
        self.step, self.outcome = traced(_seeds_step), traced(_seeds_outcome)

    def __call__(
        self, learner: GradientDescent, theta: Params, phi: Params, tasks: Tasks, measured: Sequence[int]
    ) -> Tensor:
        """Accuracy and cross-entropy ``[2, len(measured), seeds]``, means over the tasks.

        Args:
            learner: what makes a step.
            theta: its meta-parameters ``[seeds, ...]``.
            phi: where the networks begin, ``[seeds, tasks, ...]``.
            tasks: support sets in minibatches ``[seeds, tasks, steps, shots, ...]``.
            measured: increasing numbers of steps after which to measure.
        """
        done, values = 0, []
        for steps in measured:
            for number in range(done, steps):
                batch = tree_map(lambda t: t[:, :, number].contiguous(), tasks.support)  # noqa: B023
                phi = self.step(learner, theta, phi, batch)
            done = steps
            values.append(self.outcome(learner.model, phi, tasks.query).mean(-1))
        return torch.stack(values, 1)


def _seeds_step(learner: GradientDescent, theta: Params, phi: Params, support: Examples) -> Params:
    """One inner step of every task of every seed."""
    return vmap(partial(inner_step, learner))(theta, phi, support)


def _seeds_outcome(model: Model, phi: Params, query: Examples) -> Tensor:
    """Accuracy and cross-entropy ``[2, seeds, tasks]``."""

    def one(phi: Params, query: Examples) -> Tensor:
        outputs = model(phi, query.x)
        loss = cross_entropy(outputs, query.y).nan_to_num(DIVERGED).clamp(max=DIVERGED)
        return torch.stack([accuracy(outputs, query.y), loss])

    return vmap(vmap(one))(phi, query).movedim(-1, 0)
