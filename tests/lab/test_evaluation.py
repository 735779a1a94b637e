"""Evaluation: intervals, adaptation curves, and what transduction is."""

from __future__ import annotations

import math

import pytest
import torch
from families import case
from refusals import refused
from torch.func import vmap
from torch.utils._pytree import tree_map

from helpers import losses
from helpers.errors import UserError
from helpers.lab.evaluation import (
    PREDICTED,
    Predictor,
    accuracies,
    adaptation_curve,
    curves_of_seeds,
    one_by_one,
    outcomes,
)
from helpers.lab.statistics import Interval, auc, background_efficiency, interval, over_seeds, student
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchDescent
from helpers.models.convnet import ConvNet
from helpers.models.layers import stacked
from helpers.models.mlp import MLP
from helpers.runtime import generator
from helpers.tasks.batches import minibatches
from helpers.tasks.episodes import FewShot
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Tasks


def few_shot(n_tasks=5):
    images = torch.randint(0, 256, (12, 6, 8, 8), generator=generator(0), dtype=torch.uint8)
    tasks = FewShot(images, ways=3, shots=2, queries=2).sample(n_tasks, generator(1))
    learner = GradientDescent(ConvNet(3, filters=4, blocks=2), losses.cross_entropy, 0.4, 1)
    return learner, learner.init(generator(2)), tasks


def task(tasks, i):
    return Tasks(*(Examples(part.x[i], part.y[i]) for part in tasks))


def test_curves_of_seeds_are_those_of_each():
    learner = GradientDescent(MLP((1, 4, 1)), losses.mean_squared_error, 0.1, 1)
    each = [learner.init(generator(seed)) for seed in range(2)]
    tasks = tree_map(lambda t: t.unflatten(0, (2, 3)), Sinusoids().sample(6, generator(0)))
    found = curves_of_seeds(learner, stacked(each), tasks, (0, 2), losses.mean_squared_error)
    assert found.shape == (2, 2, 3)
    for s in range(2):
        own = tree_map(lambda t, s=s: t[s], tasks)
        torch.testing.assert_close(found[s], outcomes(learner, each[s], own, (0, 2), losses.mean_squared_error))


def test_interval_by_hand():
    """Mean 2.5; deviations −1.5, −0.5, 0.5, 1.5, so the unbiased variance is 5/3; Student's t of 3 degrees."""
    found = interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found.value == 2.5 and found.n == 4
    assert found.ci95 == pytest.approx(3.182446305284263 * math.sqrt(5 / 3) / 2, rel=1e-12)
    assert str(Interval(0.5, 0.25, 3)) == "0.5000 ± 0.2500 (n = 3)"


def test_interval_of_one_sample_has_no_width():
    found = interval(torch.tensor([3.0]))
    assert found.value == 3 and math.isnan(found.ci95) and found.n == 1


def test_interval_covers_the_mean():
    """About 95 of 100 such intervals hold the true mean: of 1,000 between 930 and 970 (five deviations are 34)."""
    samples = torch.rand(1000, 100, generator=generator(0))
    assert 930 <= sum(abs(i.value - 0.5) <= i.ci95 for i in map(interval, samples)) <= 970


def test_interval_over_seeds_is_students():
    from scipy.stats import t

    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # records were written by it
    for n in (*range(2, 40), 100, 601):
        samples = torch.arange(float(n)) ** 1.5
        expected = t.ppf(0.975, n - 1) * samples.double().std().item() / math.sqrt(n)
        assert over_seeds(samples).ci95 == pytest.approx(expected, rel=1e-12)
        assert student(n - 1) == pytest.approx(t.ppf(0.975, n - 1), rel=1e-12)
    assert [round(student(degrees), 3) for degrees in range(1, 11)] == list(table)
    assert over_seeds(torch.tensor([3.0])).n == 1


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: interval(torch.zeros(0)), "at least one sample"),
        (lambda: over_seeds(torch.zeros(0)), "at least one sample"),
        (lambda: auc(torch.zeros(0), torch.zeros(3)), "scores of the background"),
        (lambda: auc(torch.zeros(3), torch.zeros(0)), "scores of the signal"),
        (lambda: auc(torch.zeros(3), torch.zeros(3, 1)), "not [3, 1]"),
        (lambda: background_efficiency(torch.zeros(0), torch.zeros(3)), "scores of the background"),
        (lambda: background_efficiency(torch.zeros(3), torch.zeros(3), 2), "efficiency of the signal"),
        (lambda: background_efficiency(torch.zeros(3), torch.zeros(3), 0), "efficiency of the signal"),
        (lambda: background_efficiency(torch.zeros(3), torch.zeros(3), math.nan), "efficiency of the signal"),
    ],
)
def test_nonsense_is_refused(action, message):
    assert message in refused(action)


@pytest.mark.parametrize("transductive", [True, False])
@pytest.mark.parametrize("chunk", [2, 50, None])
def test_curve_is_the_metric_after_each_adaptation(transductive, chunk):
    learner, theta, tasks = few_shot()
    steps = (0, 1, 3, 10)
    curve = adaptation_curve(learner, theta, tasks, steps, losses.cross_entropy, transductive, chunk)
    assert curve.shape == (4, 5)
    for row, count in zip(curve, steps, strict=True):
        for i, value in enumerate(row):
            one = task(tasks, i)
            phi = learner.adapt(theta, one.support, steps=count)
            if transductive:
                outputs = learner.model(phi, one.query.x)
            else:  # each query example with the support set and with no other query example
                outputs = torch.stack(
                    [learner.model(phi, torch.cat([one.support.x, x[None]]))[-1] for x in one.query.x]
                )
            torch.testing.assert_close(value, losses.cross_entropy(outputs, one.query.y), rtol=1e-4, atol=1e-5)


def test_transduction_is_the_other_query_examples():
    """Replace one query example: transductively the others' predictions change, one by one they do not."""
    learner, theta, tasks = few_shot()
    one = task(tasks, 0)
    phi, changed = learner.adapt(theta, one.support), one.query.x.clone()
    changed[0] = 1 - changed[0]
    together = learner.model(phi, one.query.x), learner.model(phi, changed)
    apart = (one_by_one(learner, phi, one.support, Examples(x, one.query.y)) for x in (one.query.x, changed))
    assert not torch.allclose(together[0][1:], together[1][1:], atol=1e-4)
    before, after = apart
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[0], after[0], atol=1e-4)


def test_a_query_that_is_seen_alone_is_normalised_beside_the_support_set():
    learner, theta, tasks = case("mlp-norm")
    support, query = (Examples(part.x[0], part.y[0]) for part in tasks)
    found = one_by_one(learner, theta, support, query)
    expected = [learner.model(theta, torch.cat([support.x, x[None]]))[-1] for x in query.x]
    torch.testing.assert_close(found, torch.stack(expected))


def test_without_normalisation_there_is_no_transduction():
    learner = GradientDescent(MLP((1, 8, 1)), losses.mean_squared_error, 0.01)
    tasks = Sinusoids(5, 7).sample(4, generator(0))
    theta = learner.init(generator(0))
    curves = (
        adaptation_curve(learner, theta, tasks, (0, 2), losses.mean_squared_error, kind) for kind in (True, False)
    )
    torch.testing.assert_close(*curves)


@pytest.mark.parametrize("steps", [0, 2])
def test_accuracies_are_named_for_what_they_are(steps):
    """Transductive where the queries are seen together; the headline is that after its number of steps."""
    learner, theta, tasks = few_shot()
    found = accuracies(learner, theta, tasks, (0, 2), steps, spot=3)
    for kind, transductive in (("transductive", True), ("inductive", False)):
        curve = adaptation_curve(learner, theta, tasks, (0, 2), losses.accuracy, transductive)
        for at, row in zip((0, 2), curve, strict=True):
            assert torch.equal(found[f"{kind}_accuracy_{at}"].samples, row.double())
        assert torch.equal(found[f"spot_{kind}_accuracy_{steps}"].samples, curve[(0, 2).index(steps)][:3].double())
    assert next(iter(found)) == "transductive_accuracy"
    assert found["transductive_accuracy"] == found[f"transductive_accuracy_{steps}"]
    assert found["transductive_accuracy_2"] != found["inductive_accuracy_2"], "else this says nothing"


def test_a_predictor_goes_through_all_minibatches_and_names_what_it_gives():
    learner, theta, tasks = few_shot()
    learner = MinibatchDescent(learner.model, learner.loss, 0.4)
    batches = minibatches(tasks.support, 3, 4, generator(3))
    found = dict(zip(PREDICTED, Predictor(lambda step: step)(learner, theta, tasks, batches), strict=True))
    for number in range(len(batches.x)):
        support, query = (Examples(part.x[number], part.y[number]) for part in tasks)
        phi = learner.adapt(theta, Examples(batches.x[number], batches.y[number]))
        together = losses.accuracy(learner.outputs(phi, query.x), query.y)  # batch normalisation sees no support set
        apart = losses.accuracy(one_by_one(learner, phi, support, query), query.y)
        assert (found["transductive"][number], found["inductive"][number]) == (together, apart)
    assert not torch.equal(found["transductive"], found["inductive"]), "else this says nothing"


@pytest.mark.parametrize("steps", [(3, 1), (-1, 2)])
def test_steps_that_do_not_increase_are_refused(steps):
    learner, theta, tasks = few_shot()
    with pytest.raises(UserError, match="inner steps must increase from 0"):
        adaptation_curve(learner, theta, tasks, steps, losses.accuracy)


def test_evaluation_repeats_itself():
    learner, theta, tasks = few_shot()
    first, again = (adaptation_curve(learner, theta, tasks, (0, 1), losses.accuracy) for _ in range(2))
    assert torch.equal(first, again)


# ---------------------------------------- ranking


def scores(ties, seed=0, n=60, m=45):
    """Of background and of signal, which is larger by one deviation; with ties in steps of a half."""
    draws = generator(seed)
    background, signal = (torch.randn(size, generator=draws, dtype=torch.float64) for size in (n, m))
    return tuple((2 * part).round() / 2 if ties else part for part in (background, signal + 1))


def curve_of(background, signal):
    """All points of the ROC curve, as scikit-learn has it."""
    from sklearn.metrics import roc_curve

    labels = [0] * len(background) + [1] * len(signal)
    return roc_curve(labels, torch.cat([background, signal]).numpy(), drop_intermediate=False)


@pytest.mark.parametrize("ties", [False, True])
def test_area_under_the_curve_is_scikit_learns(ties):
    from sklearn.metrics import roc_auc_score

    background, signal = scores(ties)
    labels = [0] * len(background) + [1] * len(signal)
    expected = roc_auc_score(labels, torch.cat([background, signal]).numpy())
    assert auc(background, signal).item() == pytest.approx(expected, rel=1e-12)
    assert auc(signal, background).item() == pytest.approx(1 - expected, rel=1e-12)
    assert auc(background.float(), signal.float()).item() == pytest.approx(expected, rel=1e-5)


def test_area_under_the_curve_by_hand():
    """Of the six pairs 3 > 1, 3 > 2 and 2 > 1 are in order, 2 = 2 counts half, and 0 is below both."""
    assert auc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0, 3.0])).item() == pytest.approx(3.5 / 6)
    assert auc(torch.zeros(4), torch.ones(3)) == 1 and auc(torch.zeros(4), torch.zeros(3)) == 0.5


@pytest.mark.parametrize("efficiency", [0.2, 0.4, 0.6, 1.0])  # of 45: whole numbers
@pytest.mark.parametrize("ties", [False, True])
def test_background_efficiency_is_scikit_learns(ties, efficiency):
    background, signal = scores(ties)
    false, true, _ = curve_of(background, signal)
    expected = false[(true >= efficiency - 1e-9).argmax()]  # the first threshold that lets enough pass
    found = background_efficiency(background, signal, efficiency).item()
    assert found == pytest.approx(max(expected, 1 / len(background)), rel=1e-12)


def test_background_efficiency_is_never_below_one_of_them():
    background, signal = torch.arange(8.0), torch.arange(10.0, 20.0)
    for efficiency in (0.01, 0.3, 0.5, 1.0):
        assert background_efficiency(background, signal, efficiency).item() == 1 / 8
    assert background_efficiency(background, signal - 10, 0.5).item() == 3 / 8  # 5, 6 and 7 pass
    assert background_efficiency(background, torch.full((10,), 7.0)).item() == 1 / 8  # what equals the threshold passes
    assert background_efficiency(background, torch.full((10,), -1.0)) == 1


def test_ranking_of_many_is_that_of_each():
    drawn = [scores(ties, seed) for ties in (False, True) for seed in (1, 2)]
    background, signal = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    for function in (auc, background_efficiency, lambda *pair: background_efficiency(*pair, 0.3)):
        expected = torch.stack([function(*pair) for pair in drawn])
        assert torch.equal(vmap(function)(background, signal), expected) and len(expected.unique()) > 1
