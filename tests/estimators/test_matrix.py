"""Every estimator with every learner, plain, chunked and traced: right, or refused in one sentence: see the table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, partial

import pytest
import torch
from refusals import refused
from torch.func import grad, jacrev
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.estimators.explicit import chunked, combination, fomaml, maml, reptile, stepwise
from helpers.estimators.implicit import ImplicitGradient
from helpers.estimators.nested import MetaLearner
from helpers.learners.descent import GradientDescent, detached
from helpers.learners.feedforward import Neighbours, Prototypes, Recurrent
from helpers.learners.learned import LearnedDescent, LossDescent, started
from helpers.learners.minibatch import MinibatchAdam, MinibatchDescent
from helpers.learners.multistep import MultiStepDescent, SummedDescent
from helpers.learners.paths import MinibatchLossDescent
from helpers.learners.proximal import HessianFree, Proximal
from helpers.losses import LearnedLoss
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics.differences import central_differences, error, objective
from helpers.numerics.solvers import conjugate_gradient
from helpers.numerics.tracing import traced
from helpers.optimizers.recurrent import RecurrentRule
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks

NETWORK = MLP((1, 3, 1), activation="tanh", scale=0.5)
LOSS = LearnedLoss(MLP((2, 3, 1), activation="tanh", scale=0.5))
TASKS, STEPS, WEIGHTS = 2, 2, (0.7, -0.4)
PLAIN = (NETWORK, losses.mean_squared_error, 0.05, STEPS)
HEAD = {"adapted": (NETWORK.head,)}  # ANIL
CONV = (ConvNet(2, filters=2, blocks=2), losses.cross_entropy, 0.2, STEPS)


@dataclass(frozen=True)
class Doubled(GradientDescent):
    """A learner of a reader's: twice the query loss."""

    def task_loss(self, theta, task):
        return 2 * super().task_loss(theta, task)


@dataclass(frozen=True)
class Signs(MinibatchDescent):
    """A learner of a reader's with a step of its own."""

    def step(self, theta, phi, support):
        gradient = self.inner_gradient(theta, detached(phi) if self.first_order else phi, support)
        return phi | {name: phi[name] - self.rate * g.tanh() for name, g in gradient.items()}


def proximal(**settings):
    return Proximal(*PLAIN, strength=10.0, **settings)


def minibatched(kind, **settings):
    return kind(NETWORK, losses.mean_squared_error, 0.05, **settings)


# Learner: what makes it, the form of its tasks, and which of the estimators below are right with it; others refuse it.
SOLVER = partial(conjugate_gradient, steps=20)
ESTIMATORS = {
    "maml": maml, "fomaml": fomaml, "reptile": reptile, "combination": combination(WEIGHTS),
    "imaml": ImplicitGradient(SOLVER), "stepwise": lambda *given: stepwise()(*given),  # keeps no recordings
}  # fmt: skip
DESCENT = "maml fomaml reptile combination stepwise"
TABLE = {
    "descent": (lambda: GradientDescent(*PLAIN), "whole", DESCENT),
    "descent-rates": (lambda: GradientDescent(*PLAIN, learn_rates=True), "whole", "maml fomaml stepwise"),
    "descent-head": (lambda: GradientDescent(*PLAIN, **HEAD), "whole", DESCENT),
    "descent-head-images": (lambda: GradientDescent(*CONV, adapted=("head.",)), "images", DESCENT),
    "descent-shifts-images": (lambda: GradientDescent(*CONV, adapted=("norm", "head.bias")), "images", DESCENT),
    "descent-nothing": (lambda: GradientDescent(*PLAIN, adapted=("linear2.", "head.")), "whole", ""),
    "descent-query-sets": (lambda: GradientDescent(*PLAIN, query_sets=2), "whole", DESCENT),
    "minibatch": (lambda: minibatched(MinibatchDescent), "minibatches", DESCENT),
    "minibatch-first": (lambda: minibatched(MinibatchDescent, steps=2), "more minibatches", DESCENT),
    "minibatch-too-few": (lambda: minibatched(MinibatchDescent, steps=3), "minibatches", ""),
    "minibatch-rates": (
        lambda: minibatched(MinibatchDescent, learn_rates=True), "minibatches", "maml fomaml stepwise",
    ),
    "adam": (lambda: minibatched(MinibatchAdam, carry=False), "minibatches", DESCENT),
    "adam-carried": (lambda: minibatched(MinibatchAdam), "minibatches", "reptile"),
    "adam-head": (lambda: minibatched(MinibatchAdam, carry=False, **HEAD), "minibatches", DESCENT),
    "adam-carried-head": (lambda: minibatched(MinibatchAdam, **HEAD), "minibatches", "reptile"),
    "multistep": (lambda: MultiStepDescent(*PLAIN), "whole", "maml fomaml reptile combination"),
    "multistep-weights": (
        lambda: MultiStepDescent(*PLAIN, weights=torch.tensor(WEIGHTS)), "whole", "maml fomaml reptile combination",
    ),
    "multistep-rates-head": (
        lambda: MultiStepDescent(*PLAIN, **HEAD, learn_rates=True), "whole", "maml fomaml",
    ),
    "multistep-images": (
        lambda: MultiStepDescent(*CONV, weights=torch.tensor(WEIGHTS)), "images", "maml fomaml reptile combination",
    ),
    "proximal": (proximal, "whole", DESCENT + " imaml"),
    "proximal-head": (lambda: proximal(**HEAD), "whole", DESCENT + " imaml"),
    "proximal-matrix-head": (
        lambda: proximal(learn_strength="matrix", **HEAD), "whole", "maml fomaml imaml stepwise",
    ),
    "proximal-rates": (lambda: proximal(learn_rates=True), "whole", "maml fomaml stepwise"),
    "proximal-scalar": (lambda: proximal(learn_strength="scalar"), "whole", "maml fomaml imaml stepwise"),
    "proximal-layer": (lambda: proximal(learn_strength="layer"), "whole", "maml fomaml imaml stepwise"),
    "proximal-diagonal": (lambda: proximal(learn_strength="diagonal"), "whole", "maml fomaml imaml stepwise"),
    "proximal-matrix": (lambda: proximal(learn_strength="matrix"), "whole", "maml fomaml imaml stepwise"),
    "newton": (
        lambda: HessianFree(*PLAIN, strength=10.0, solver_steps=2, lengths=(1.0, 0.5)),
        "whole", "maml reptile imaml stepwise",
    ),
    "newton-head": (
        lambda: HessianFree(*PLAIN, strength=10.0, solver_steps=2, lengths=(1.0, 0.5), **HEAD),
        "whole", "maml reptile imaml stepwise",
    ),
    "learned-start": (
        lambda: LearnedDescent(*PLAIN, transform=partial(tree_map, torch.tanh), learn_start=True), "whole", DESCENT,
    ),
    "learned-all": (
        lambda: LearnedDescent(*PLAIN, learned=LOSS, rule=RecurrentRule(hidden=2), learn_start=True),
        "whole", "maml fomaml stepwise",
    ),
    "learned-all-head": (
        lambda: LearnedDescent(*PLAIN, **HEAD, learned=LOSS, rule=RecurrentRule(hidden=2), learn_start=True),
        "whole", "maml fomaml stepwise",
    ),
    "summed-all": (
        lambda: SummedDescent(*PLAIN, learned=LOSS, rule=RecurrentRule(hidden=2), learn_start=True),
        "whole", "maml fomaml",
    ),
    "summed-weights-head": (
        lambda: SummedDescent(
            *PLAIN, **HEAD, rule=RecurrentRule(hidden=2), learn_frozen=True, weights=torch.tensor(WEIGHTS)
        ),
        "started", "maml fomaml",
    ),
    "learned-frozen-head": (
        lambda: LearnedDescent(*PLAIN, **HEAD, learn_frozen=True), "started", "maml fomaml stepwise",
    ),
    "loss-head": (lambda: LossDescent(*PLAIN, **HEAD, learned=LOSS), "started", "maml fomaml stepwise"),
    "loss": (lambda: LossDescent(*PLAIN, learned=LOSS), "started", "maml fomaml stepwise"),
    "loss-without-start": (lambda: LossDescent(*PLAIN, learned=LOSS), "whole", ""),
    "loss-minibatch": (
        lambda: minibatched(MinibatchLossDescent, learned=LOSS), "started minibatches", "maml fomaml stepwise",
    ),
    "recurrent": (lambda: Recurrent(MLP((1, 3), scale=0.5), width=3, hidden=2), "whole", "maml"),
    "neighbours": (lambda: Neighbours(MLP((1, 3, 2), activation="tanh", scale=0.5, bias=False)), "whole", "maml"),
    "prototypes": (lambda: Prototypes(MLP((1, 3, 2), bias=False, scale=0.5), 2), "classes", "maml"),
    "meta": (lambda: MetaLearner(GradientDescent(*PLAIN[:3]), 0.1, 2, 2), "families", "maml fomaml reptile stepwise"),
    "meta-head-multistep": (
        lambda: MetaLearner(MultiStepDescent(*PLAIN, **HEAD), 0.1, 2, 2), "families", "maml fomaml reptile stepwise",
    ),
    "own-task-loss": (lambda: Doubled(*PLAIN), "whole", "maml fomaml reptile combination"),
    "own-step": (lambda: minibatched(Signs), "minibatches", "maml fomaml reptile stepwise"),
}  # fmt: skip


def drawn(form):
    """Tasks of a form, in double precision."""
    count = 2 * 2 * TASKS if form == "families" else TASKS
    tasks = tree_map(torch.Tensor.double, Sinusoids(4, 4).sample(count, generator(1)))
    tasks = Tasks(*(Examples(e.x, e.y / 3) for e in tasks))  # with small errors the inner problems are convex
    if form == "images":
        x, y = torch.rand(2, TASKS, 4, 1, 5, 6, generator=generator(4)).double(), torch.arange(4).expand(TASKS, 4) % 2
        return Tasks(*(Examples(part, y) for part in x))
    if "minibatches" in form:
        number = 3 if "more" in form else STEPS
        tasks = Tasks(minibatches(tasks.support, 3, number, generator(2)), tasks.query)
    if "started" in form:
        tasks = started(NETWORK, tasks, generator(3))
    if form == "classes":
        tasks = Tasks(*(Examples(e.x, torch.arange(4).expand(TASKS, 4) % 2) for e in tasks))
    if form == "families":
        tasks = tree_map(lambda t: t.unflatten(0, (2, TASKS, 2)), tasks)
        tasks = Tasks(*(tree_map(lambda t, half=half: t[half], tasks) for half in (0, 1)))
    return tasks


@cache
def case(name):
    """Learner, θ and tasks; every entry of θ is random."""
    make, form, _ = TABLE[name]
    learner, draws = make(), generator(5)
    theta = learner.init(draws, torch.float64)
    theta = {n: v + 0.1 * torch.randn(v.shape, generator=draws, dtype=v.dtype).abs() for n, v in theta.items()}
    return learner, theta, drawn(form)


# ---------------------------------------- what is right, written without estimators and vmap


def each(tasks):
    return [tree_map(lambda t, i=i: t[i], tasks) for i in range(TASKS)]


def mean(parts):
    return {name: sum(part[name] for part in parts) / TASKS for name in parts[0]}


def differences(learner, theta, tasks):
    """The gradient of the mean query loss after adaptation."""
    return central_differences(lambda t: objective(learner, t, tasks), theta)


def held_constant(learner, theta, tasks):
    """The same by plain autograd, with the inner gradients cut off from the φ at which they are taken."""

    class Cut(type(learner)):
        def inner_gradient(self, theta, phi, support):
            return super().inner_gradient(theta, detached(phi), support)

    cut = Cut(**{field.name: getattr(learner, field.name) for field in fields(learner)})
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    value = sum(cut.task_loss(leaves, task) for task in each(tasks)) / TASKS
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def way_back(learner, theta, tasks):
    """θ − φ, where φ is found step by step."""
    found = []
    for task in each(tasks):
        phi = learner.start(theta)
        for seen in learner.per_step(task.support):
            phi = learner.step(theta, phi, seen)
        found.append({name: theta[name] - phi[name] for name in theta})
    return mean(found)


def weighted(learner, theta, tasks):
    """Σ wᵢ gᵢ on the learner's own path."""
    found = []
    for task in each(tasks):
        phi, total = learner.start(theta), {name: torch.zeros_like(value) for name, value in theta.items()}
        for weight, seen in zip(WEIGHTS, learner.per_step(task.support), strict=True):
            gradient = learner.inner_gradient(theta, phi, seen)
            total = total | {name: total[name] + weight * g for name, g in gradient.items()}
            phi = learner.step(theta, phi, seen)
        found.append(total)
    return mean(found)


def implicit(learner, theta, tasks):
    """−(∂F/∂θ)ᵀ (∂F/∂φ)⁻¹ ∇L with whole matrices, F being the inner gradient where the path ends."""
    found = []
    for task in each(tasks):
        phi = learner.adapt(theta, task.support)
        adapted, frozen = learner.split(phi)  # what is frozen is θ's own

        def inner(theta, adapted, support=task.support):
            phi = learner.start(theta) | adapted
            return torch.cat([g.flatten() for g in learner.inner_gradient(theta, phi, support).values()])

        by_theta, by_phi = jacrev(inner, argnums=(0, 1))(theta, adapted)
        direct = grad(learner.query_loss)(phi, task.query)
        matrix = torch.cat([by_phi[name].flatten(1) for name in adapted], 1)
        u = torch.linalg.solve(matrix, torch.cat([direct[name].flatten() for name in adapted]))
        moved = {name: -torch.tensordot(u, jacobian, 1) for name, jacobian in by_theta.items()}
        found.append(moved | {name: moved[name] + direct[name] for name in frozen})
    return mean(found)


REFERENCES = {
    "maml": differences, "fomaml": held_constant, "reptile": way_back, "combination": weighted, "imaml": implicit,
    "stepwise": differences,
}  # fmt: skip
reference = cache(lambda of, name: of(*case(name)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", TABLE)
def test_right_or_refused(name, estimator):
    learner, theta, tasks = case(name)
    forms = {"plain": ESTIMATORS[estimator], "chunked": chunked(ESTIMATORS[estimator], 1)}
    if estimator == "imaml":
        forms["traced"] = ImplicitGradient(SOLVER, by=traced)
    elif (estimator == "maml" and "proximal-" not in name) or (estimator != "stepwise" and name == "adam-carried"):
        forms["traced"] = traced(ESTIMATORS[estimator])
    elif estimator == "stepwise" and name != "descent":
        del forms["chunked"]  # one more recording
    for form, run in forms.items():
        if estimator not in TABLE[name][2].split():
            refused(lambda run=run: run(learner, theta, tasks))
            continue
        gradient, values = run(learner, theta, tasks)
        right = reference(REFERENCES[estimator], name)
        zero = {n for n, value in right.items() if not value.any()}
        assert error(gradient, right, zero) <= (1e-6 if REFERENCES[estimator] is differences else 1e-8), form
        assert values.shape == (TASKS,) and values.isfinite().all()


def test_every_learner_and_estimator_is_in_the_table():
    def classes(base):
        return {base}.union(*(classes(kind) for kind in base.__subclasses__()))

    there = {
        kind for base in (GradientDescent, Recurrent, Neighbours, Prototypes, MetaLearner) for kind in classes(base)
    }
    there = {kind for kind in there if kind.__module__.startswith("helpers.")}
    assert there <= {type(make()) for make, _, _ in TABLE.values()}
    assert all(set(right.split()) <= ESTIMATORS.keys() == REFERENCES.keys() for _, _, right in TABLE.values())
