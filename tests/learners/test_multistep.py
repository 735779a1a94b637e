"""The multi-step loss: its value by hand, the annealing of its weights, one recording for all of them.

Its meta-gradients are held against differences in ``tests/estimators/test_matrix.py``.
"""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.estimators.explicit import chunked, maml
from helpers.estimators.nested import evaluations
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchDescent
from helpers.learners.multistep import MultiStepDescent, annealed
from helpers.models.convnet import ConvNet
from helpers.models.mlp import MLP
from helpers.numerics.tracing import traced
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks

PLAIN = (MLP((1, 6, 1), scale=0.5), losses.mean_squared_error, 0.05, 3)
LEARNER = MultiStepDescent(*PLAIN)
TASKS = tree_map(torch.Tensor.double, Sinusoids(4, 5).sample(3, generator(1)))
TASK = Tasks(*(Examples(e.x[0], e.y[0]) for e in TASKS))
THETA = LEARNER.init(generator(0), torch.float64)


def test_the_loss_by_hand():
    plain, weights = GradientDescent(*PLAIN), torch.tensor([0.5, -2.0, 3.0])
    values = torch.stack([plain.replace(steps=steps).task_loss(THETA, TASK) for steps in (1, 2, 3)])
    torch.testing.assert_close(LEARNER.task_loss(THETA, TASK), values.mean())
    weighted = LEARNER.replace(weights=weights)
    torch.testing.assert_close(weighted.task_loss(THETA, TASK), (weights.double() * values).sum())
    assert all(
        torch.equal(v, plain.adapt(THETA, TASK.support)[n]) for n, v in LEARNER.adapt(THETA, TASK.support).items()
    )


def test_with_the_last_step_alone_it_is_maml():
    learner = LEARNER.replace(weights=annealed(3, 10, over=10))
    found, expected = maml(learner, THETA, TASKS), maml(GradientDescent(*PLAIN), THETA, TASKS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_weights_go_from_alike_to_the_last_alone():
    ways = [annealed(4, iteration, over=100).tolist() for iteration in (0, 50, 100, 1000)]
    assert ways[0] == [0.25] * 4 and ways[1] == [0.125] * 3 + [0.625] and ways[2] == ways[3] == [0.0] * 3 + [1.0]
    assert all(abs(sum(annealed(5, iteration, over=7).tolist()) - 1) < 1e-6 for iteration in range(9))
    assert annealed(1, 3, over=7).tolist() == [1.0]
    for steps, iteration, over in ((0, 1, 7), (3, -1, 7), (3, 1, 0), (3, 0.5, 7)):
        refused(lambda given=(steps, iteration, over): annealed(*given))


def images():
    x = torch.rand(2, 4, 3, 1, 5, 6, generator=generator(1)).double()
    learner = MultiStepDescent(ConvNet(ways=3, filters=2, blocks=2), losses.cross_entropy, 0.4, 3)
    tasks = Tasks(*(Examples(part, torch.arange(3).repeat(4, 1)) for part in x))
    return learner, learner.init(generator(0), torch.float64), tasks


@pytest.mark.parametrize("case", [lambda: (LEARNER, THETA, TASKS), images], ids=["mlp", "conv"])
def test_new_weights_need_no_new_recording(case):
    learner, theta, tasks = case()
    calls = []

    def counted(*arguments):
        calls.append(1)
        return maml(*arguments)

    run = traced(counted)
    for iteration in (0, 1, 5, 20):
        now = learner.replace(weights=annealed(3, iteration, over=10))
        torch.testing.assert_close(run(now, theta, tasks), maml(now, theta, tasks), rtol=1e-11, atol=1e-14)
    assert len(calls) == 1


def test_the_losses_keep_their_precision():
    theta, tasks = tree_map(torch.Tensor.float, (THETA, TASKS))
    gradient, values = chunked(maml, 2)(LEARNER.replace(weights=torch.ones(3, dtype=torch.float64)), theta, tasks)
    assert values.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradient.values())


def test_it_goes_together_with_minibatches():
    class Both(MultiStepDescent, MinibatchDescent):
        pass

    cut = Tasks(minibatches(TASKS.support, 2, 3, generator(2)), TASKS.query)
    task = Tasks(*(Examples(e.x[0], e.y[0]) for e in cut))
    sgd = MinibatchDescent(*PLAIN[:3])
    values = [sgd.replace(steps=steps).task_loss(THETA, task) for steps in (1, 2, 3)]
    both = Both(*PLAIN[:3], steps=None)
    torch.testing.assert_close(both.task_loss(THETA, task), sum(values) / 3)
    assert "[3]" in refused(lambda: both.replace(weights=torch.ones(2)).task_loss(THETA, task))


def test_nonsense_is_refused():
    assert "inner steps" in refused(lambda: LEARNER.replace(steps=0))
    assert "inner steps" in refused(lambda: LEARNER.replace(steps=None))
    for weights in (torch.ones(2), torch.ones(3, 1), torch.tensor(1.0), (1.0, 1.0, 1.0), 1.0):
        assert "tensor of shape [3]" in refused(lambda weights=weights: LEARNER.replace(weights=weights))
    assert "task_loss" in refused(lambda: evaluations(LEARNER))
