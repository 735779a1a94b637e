"""The experiments with jet taggers, on jets that nobody simulated: prongs of QCD are half as far apart."""

from __future__ import annotations

import math
import re

import pytest
import torch
from refusals import refused
from toy_jets import everywhere

from helpers import estimators, losses
from helpers.experiments import jets as taggers
from helpers.experiments.jets import Tagging, TaggingTraining
from helpers.experiments.jets_cuts import Cuts, CutsMeasured
from helpers.experiments.jets_matrix import Matrix, MatrixTraining
from helpers.lab import seeds, statistics
from helpers.lab.ranking import Judge
from helpers.lab.training import train
from helpers.learners.descent import GradientDescent
from helpers.learners.minibatch import MinibatchDescent
from helpers.learners.proximal import Proximal
from helpers.models.deep_sets import DeepSets
from helpers.models.layers import stacked
from helpers.models.mlp import MLP
from helpers.models.taggers import tagger
from helpers.runtime import generator
from helpers.tasks import jets
from helpers.tasks.jets import protocol as jets_protocol
from helpers.tasks.jets.detector import View
from helpers.tasks.jets.protocol import Supervision
from helpers.types import Examples, Tasks

CPU = torch.device("cpu")
WINDOWS = ("250", "300", "400", "500", "600")
SMALL = {
    "tagger": "particles", "shots": 2, "queries": 4, "bag": 5, "meta_batch": 3, "inner_steps": 2, "seeds": 2,
    "test_rates": (0.3,), "test_steps": (1, 3), "test_draws": 2, "test_queries": 20, "tuning_queries": 10,
}  # fmt: skip
METHODS = {
    "pooled": estimators.maml, "maml": estimators.maml, "fomaml": estimators.fomaml,
    "reptile": estimators.reptile, "imaml": estimators.ImplicitGradient(),
}  # fmt: skip


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    with everywhere(tmp_path_factory.mktemp("checkout")) as found:
        yield found


@pytest.fixture
def few(monkeypatch):
    """Less supervision than there is for real."""
    proportions = tuple(Supervision("proportions", size) for size in (8, 10))
    fewer = {
        "LABELS": (Supervision("labels", 2), Supervision("labels", 5)),
        "PROPORTIONS": proportions,
        "MIXTURES": (Supervision("mixture", 10),),
        "WRONG": (proportions[0]._replace(offset=0.05),),
        "DRIFTED": (proportions[0]._replace(shares=(0.3, 0.5)),),
    }
    for name, value in fewer.items():
        for module in (taggers, jets_protocol):
            monkeypatch.setattr(module, name, value, raising=False)


@pytest.fixture
def eager(monkeypatch):
    """Nothing is traced: once, that takes longer than it saves."""
    monkeypatch.setattr(estimators, "traced", lambda function: function)


def training(samples, method="maml", **changes):
    return TaggingTraining(Tagging("tiny", method, **SMALL | changes), samples, CPU)


def seed(theta, s):
    return {name: value[s] for name, value in theta.items()}


def task(tasks, *at):
    return Tasks(*(Examples(part.x[at], part.y[at]) for part in tasks))


def gradient_of(loss, theta):
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


def equal(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in found)


# ---------------------------------------- networks and methods


def test_every_split_has_jets_of_its_own(samples):
    found = training(samples)
    assert [family.split for family in (found.family, found.tuning, found.test.family)] == [
        "train",
        "validation",
        "test",
    ]
    for name, some in jets_protocol.test_domains().items():
        assert tuple(found.test.family.domains[at] for at in found.test.groups[name]) == some
    matrix = MatrixTraining(Matrix("tiny", batch=5, shots=2, test_queries=20, tuning_queries=10), samples, CPU)
    assert {family.split for family in matrix.families} == {"train"}
    assert (matrix.tuning.split, matrix.test.split) == ("validation", "test")


def test_taggers_judge_jets_one_by_one():
    for kind, x in (("images", torch.rand(4, 1, 25, 25)), ("particles", torch.rand(4, 40, 3))):
        model = tagger(kind)
        params = model.init(generator(0))
        assert model(params, x).shape == (4, 2) and all(model.is_adapted(name) for name in params)
        torch.testing.assert_close(model(params, x), torch.cat([model(params, one[None]) for one in x]))
    assert Tagging("x", "maml").view == View("image") and Tagging("x", "maml", zoom=True).view == View(zoom=80.4)
    assert Tagging("x", "maml", tagger="particles").view == View("particles")


def test_what_does_not_exist_is_refused():
    assert "no tagger of 'graphs'" in refused(lambda: tagger("graphs"))
    assert "not 'anil'" in refused(lambda: Tagging("x", "anil").learner())
    assert "the inner of x must be one of labels, proportions, mixture, not 'guess'" in refused(
        lambda: Tagging("x", "maml", inner="guess").learner()
    )
    assert "no inner loss 'guess'" in refused(lambda: Tagging("x", "maml").tested("guess", 0.1))
    assert "images, particles, not 'graphs'" in refused(lambda: Tagging("x", "maml", tagger="graphs"))


def test_every_method_has_its_learner():
    for method, kind in (("maml", GradientDescent), ("reptile", MinibatchDescent), ("imaml", Proximal)):
        learner = Tagging("x", method, inner_rate=0.2, inner_steps=4, strength=3.0).learner()
        assert type(learner) is kind and (learner.rate, learner.steps) == (0.2, 4)
        assert (learner.loss, learner.outer_loss) == (losses.cross_entropy, losses.cross_entropy)
    assert learner.strength == 3.0 and Tagging("x", "pooled").learner().steps == 0
    learner = Tagging("x", "maml", inner="mixture").learner()
    assert (learner.loss, learner.outer_loss) == (losses.mixture, losses.cross_entropy)


def test_at_test_the_whole_support_set_is_descended():
    for method, kind in (("maml", GradientDescent), ("reptile", GradientDescent), ("imaml", Proximal)):
        learner = Tagging("x", method, strength=3.0).tested("proportions", 0.7)
        assert type(learner) is kind and (learner.loss, learner.rate) == (losses.label_proportions, 0.7)
    assert learner.strength == 3.0


# ---------------------------------------- training


def test_every_method_begins_at_the_same_parameters(samples):
    expected = stacked([DeepSets().init(generator(seeds.of_run(3, s))) for s in range(2)])
    for method in ("scratch", *METHODS):
        assert equal(training(samples, method, seed=3).init(generator(99)), expected)
    assert all(not torch.equal(value[0], value[1]) for value in expected.values())


WITH_BAGS = [(method, inner) for method in ("maml", "fomaml", "imaml") for inner in ("proportions", "mixture")]


@pytest.mark.parametrize("method, inner", [(method, "labels") for method in METHODS] + WITH_BAGS)
def test_the_gradient_is_each_seeds_own(samples, eager, method, inner):
    """As the estimator gives it for one seed after another; of the same θ it differs, for the tasks do."""
    found = training(samples, method, inner=inner)
    theta = stacked([DeepSets().init(generator(0))] * 2)
    gradient, value = found.gradient(theta, generator(1), 0)
    assert value.shape == () and value.isfinite()
    tasks, apart = found.draw(generator(1)), []
    for s in range(2):
        part = Tasks(*(Examples(examples.x[s], examples.y[s]) for examples in tasks))
        apart.append(METHODS[method](found.learner, seed(theta, s), part))
        assert_same(seed(gradient, s), apart[-1][0], rtol=1e-3, atol=1e-6)
    assert value.item() == pytest.approx(sum(values.mean().item() for _, values in apart) / 2, rel=1e-5)
    for name, g in gradient.items():
        assert g.shape == theta[name].shape and g.isfinite().all() and g.any()
    weight = gradient["each.linear1.weight"]
    assert (weight[0] - weight[1]).norm() > 1e-3 * weight[0].norm()


def test_a_recorded_gradient_is_the_same(samples, monkeypatch):
    found = training(samples)
    theta = found.init(generator(0))
    gradient, value = found.gradient(theta, generator(1), 0)
    monkeypatch.setattr(estimators, "traced", lambda function: function)
    expected, loss = training(samples).gradient(theta, generator(1), 0)
    assert_same(gradient, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(value, loss)


def test_pooled_training_is_the_cross_entropy_of_all_jets(samples, eager):
    found = training(samples, "pooled")
    theta = found.init(generator(0))
    gradient, value = found.gradient(theta, generator(1), 0)
    drawn, each = found.family.sample(6, generator(1)), []
    for s in range(2):
        parts = [(part.x[3 * s + t], part.y[3 * s + t]) for t in range(3) for part in drawn]
        x, y = (torch.cat(values) for values in zip(*parts, strict=True))
        assert len(x) == 3 * 2 * (2 + 4)  # all that other methods see in an iteration

        def loss(params, x=x, y=y):
            return torch.nn.functional.cross_entropy(found.learner.model(params, x), y)

        assert_same(seed(gradient, s), gradient_of(loss, seed(theta, s)), rtol=1e-4, atol=1e-7)
        each.append(loss(seed(theta, s)).item())
    assert value.item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_nothing_is_learned_from_scratch(samples):
    found = training(samples, "scratch")
    theta = found.init(generator(0))
    gradient, value = found.gradient(theta, generator(1), 0)
    assert value == 0 and gradient.keys() == theta.keys()
    assert all(torch.equal(g, torch.zeros_like(theta[name])) for name, g in gradient.items())


def test_reptile_sees_all_jets_of_a_task_in_minibatches(samples):
    found = training(samples, "reptile", reptile_batch=4, inner_steps=3)
    tasks = found.draw(generator(1))
    assert tasks.support.x.shape == (2, 3, 3, 4, 40, 3) and tasks.query.x.shape == (2, 3, 12, 40, 3)
    drawn = found.family.sample(6, generator(1))
    for s, t in ((s, t) for s in range(2) for t in range(3)):
        one, other = task(tasks, s, t), task(drawn, 3 * s + t)
        assert torch.equal(one.query.x, torch.cat([other.support.x, other.query.x]))
        assert torch.equal(one.query.y, torch.cat([other.support.y, other.query.y]))
        dealt = torch.cat([one.support.x.flatten(2), one.support.y.unsqueeze(-1).float()], -1).flatten(0, 1)
        whole = torch.cat([one.query.x.flatten(1), one.query.y.unsqueeze(-1).float()], -1)
        assert {tuple(jet.tolist()) for jet in dealt} == {tuple(jet.tolist()) for jet in whole}  # each once, its label
    assert not torch.equal(tasks.support.y[0, 0], tasks.support.y[0, 1])


def test_bags_of_training_have_their_shares(samples):
    tasks = training(samples, inner="proportions").draw(generator(0))
    assert tasks.support.y.shape == (2, 3, 10) and tasks.query.y.shape == (2, 3, 8)
    torch.testing.assert_close(tasks.support.y[1, 2], torch.tensor([0.2] * 5 + [0.8] * 5))


# ---------------------------------------- measuring


def judged(samples, kind="labels"):
    """Two taggers and three tasks in float64, so that no rounding puts one jet before another."""
    tasks = Supervision(kind, 5).tasks(training(samples).test.family, [0, 2, 4], generator(0))
    tasks = Tasks(*(Examples(x.double(), y.double() if y.is_floating_point() else y) for x, y in tasks))
    return stacked([DeepSets(hidden=6).init(generator(s), torch.float64) for s in range(2)]), tasks


@pytest.mark.parametrize("kind, pull", [("labels", 0.0), ("proportions", 0.0), ("labels", 0.2)])
def test_the_judge_is_a_plain_loop(samples, eager, kind, pull):
    theta, tasks = judged(samples, kind)
    learner = GradientDescent(DeepSets(hidden=6), jets_protocol.LOSSES[kind], 2.0)
    if pull:
        learner = Proximal(learner.model, learner.loss, 2.0, strength=pull)
    values = Judge(chunk=2)(learner, theta, tasks, (0, 1, 4))
    assert values.shape == (2, 3, 3, 3)
    for s, t in ((s, t) for s in range(2) for t in range(3)):
        phi, (support, query) = seed(theta, s), task(tasks, t)
        for step in range(5):
            if step in (0, 1, 4):
                score = learner.model(phi, query.x).diff(dim=1)[:, 0]
                background, signal = (score[query.y == label] for label in (0, 1))
                expected = [statistics.auc(background, signal)]
                expected += [statistics.background_efficiency(background, signal, part) for part in (0.5, 0.3)]
                torch.testing.assert_close(values[s, t, (0, 1, 4).index(step)], torch.stack(expected))
            gradient = gradient_of(lambda p: learner.loss(learner.model(p, support.x), support.y), phi)  # noqa: B023
            start = seed(theta, s)
            phi = {name: phi[name] - 2.0 * (g + pull * (phi[name] - start[name])) for name, g in gradient.items()}
    assert len(values[..., 0].unique()) > 12  # so nothing can be mixed up


def test_neither_chunks_nor_earlier_steps_nor_recordings_matter(samples, monkeypatch):
    """A recorded judge serves every rate."""
    theta, tasks = judged(samples)
    learner, judge = GradientDescent(DeepSets(hidden=6), losses.cross_entropy, 2.0), Judge()
    recorded = [judge(learner.replace(rate=rate), theta, tasks, (0, 2, 5)) for rate in (2.0, 0.5)]
    monkeypatch.setattr(estimators, "traced", lambda function: function)
    for chunk in (1, 3, 5):
        judge = Judge(chunk)
        for rate, expected in zip((2.0, 0.5), recorded, strict=True):
            torch.testing.assert_close(judge(learner.replace(rate=rate), theta, tasks, (0, 2, 5)), expected)
    for i, steps in enumerate((0, 2, 5)):
        torch.testing.assert_close(judge(learner, theta, tasks, [steps])[:, :, 0], recorded[0][:, :, i])
    assert torch.equal(recorded[0][:, :, 0], recorded[1][:, :, 0]) and not torch.equal(*recorded)


def test_a_diverged_tagger_cannot_tell_anything(samples, eager):
    theta, tasks = judged(samples)
    learner = GradientDescent(DeepSets(hidden=6), losses.cross_entropy, 1e30)
    assert (Judge()(learner, theta, tasks, (1, 9))[:, :, 1] == torch.tensor([0.5, 1, 1])).all()
    theta["all.linear2.bias"][1] = math.nan
    values = Judge()(learner, theta, tasks, (0,))
    assert (values[1] == torch.tensor([0.5, 1, 1])).all() and (values[0, ..., 0] != 0.5).all()


def test_a_trained_tagger_ranks_the_signal_above_qcd(samples, eager):
    """With the right sign, and before adaptation: the fakes differ enough."""
    found = training(samples, "pooled", seeds=1)
    theta = found.init(generator(0))
    draws = generator(1)
    for _ in range(60):
        gradient, _ = found.gradient(theta, draws, 0)
        theta = {name: value - 3 * gradient[name] for name, value in theta.items()}
    tasks, _ = found.test.given(Supervision("labels", 3), 1, 0)
    area, half, third = found.judge(found.learner, theta, tasks, (0,)).mean((0, 1, 2))
    assert area > 0.9 and third <= half < 0.1


# ---------------------------------------- evaluation


def test_rate_and_steps_are_the_best_of_the_grid(samples):
    """The best on the mean over seeds and validation tasks, by the area."""
    found = training(samples, test_rates=(0.1, 0.2, 0.4), test_steps=(1, 3))
    areas = {0.1: [[0.6, 0.7], [0.6, 0.7]], 0.2: [[0.99, 0.8], [0.3, 0.8]], 0.4: [[0.1, 0.9], [0.99, 0.6]]}
    asked = []

    def judge(learner, theta, tasks, steps):
        asked.append((learner.loss, learner.rate, tuple(steps), tasks.query.y.shape))
        table = torch.tensor(areas[learner.rate])[:, None, :, None].expand(2, 9, 2, 3).clone()
        table[..., 1:] = torch.tensor([1.0, 0.0])[:, None]  # the efficiencies are best elsewhere
        return table

    found.judge = judge
    theta = found.init(generator(0))
    assert found.tuned(theta, Supervision("mixture", 8)) == (0.2, 3)
    assert asked == [(losses.mixture, rate, (1, 3), (9, 20)) for rate in (0.1, 0.2, 0.4)]
    areas[0.1][1] = [1.0, 0.95]
    assert found.tuned(theta, Supervision("labels", 3)) == (0.1, 3)


def wanted(how, where):
    names = {f"{what}_{one}_{how}" for what in ("auc", "rejection", "rejection30") for one in where}
    return names | {f"auc_mean_{how}"}


def test_evaluation_gives_what_it_says(samples, few, eager):
    found = training(samples, given=("labels", "proportions", "mixture"), stress=True)
    theta = found.init(generator(0))
    metrics = found.evaluate(theta)
    groups = [*WINDOWS, "wt", "z", "top", "train", "vincia"]
    expected = {"spot_auc_mean_none", "spot_auc_mean_trained"} | wanted("none", groups) | wanted("trained", WINDOWS)
    for how in ("labels2", "labels5", "proportions8", "proportions10", "mixture10"):
        enough = groups if how in ("labels2", "labels5", "proportions8") else groups[:-1]
        expected |= wanted(how, enough) | {f"rate_{how}", f"steps_{how}"}
    for how in ("proportions8_over5", "proportions8_drift30_50"):
        expected |= wanted(how, WINDOWS)
    assert metrics.keys() == expected | {"generous_auc_labels2", "generous_auc_labels5"}
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in metrics)
    assert list(metrics)[0] == "auc_mean_trained"

    for name, (value, _, n) in metrics.items():
        kind = name.removeprefix("spot_").removeprefix("generous_").split("_")[0]
        assert n == (1 if kind in ("rate", "steps") else 2), name
        low, high = {"auc": (0, 1), "rate": (0.3, 0.3), "steps": (1, 3)}.get(kind, (1, 20))
        assert low - 1e-5 <= value <= high + 1e-5, name
    for how in ("none", "trained", "labels5", "proportions8_over5"):
        mean = sum(metrics[f"auc_{where}_{how}"].value for where in WINDOWS) / 5
        assert metrics[f"auc_mean_{how}"].value == pytest.approx(mean, rel=1e-5)
    for how in ("labels2", "labels5"):  # the same tasks, two of each window
        assert metrics[f"generous_auc_{how}"].value >= metrics[f"auc_mean_{how}"].value
    means = {metrics[f"auc_mean_{how}"].value for how in ("none", "trained", "labels2", "labels5", "mixture10")}
    assert len(means) == 5
    assert all(metrics[name] == value for name, value in found.spot_check(theta).items())


def test_generosity_is_the_best_of_the_grid_for_each_seed(samples, few):
    found = training(samples, test_rates=(0.1, 0.2))
    table = {0.1: [[0.5, 0.9], [0.6, 0.5]], 0.2: [[0.7, 0.6], [0.1, 0.7]]}

    def judge(learner, theta, tasks, steps):
        values = torch.tensor(table[learner.rate])[:, None, : len(steps), None]
        return values.expand(2, len(tasks.query.y), len(steps), 3)

    found.judge = judge
    metrics = found.evaluate(found.init(generator(0)))
    assert metrics["generous_auc_labels2"] == pytest.approx(statistics.over_seeds(torch.tensor([0.9, 0.7])))
    assert (metrics["rate_labels2"].value, metrics["steps_labels2"].value) == (0.1, 3)


@pytest.mark.parametrize("inner", ["proportions", "mixture"])
def test_a_tagger_is_tested_on_what_it_is_given(samples, few, eager, inner):
    found = training(samples, inner=inner, given=(inner,), test_draws=1, test_steps=(1,))
    metrics = found.evaluate(found.init(generator(0)))
    how = {name.rsplit("_", 1)[1] for name in metrics}
    given = jets_protocol.PROPORTIONS if inner == "proportions" else jets_protocol.MIXTURES
    assert how == {"none", "trained"} | {one.name for one in given}
    assert found.trained == Supervision(inner, 5) and training(samples).trained == Supervision("labels", 2)


# ---------------------------------------- one window at a time


@pytest.fixture
def matrix(samples, eager, monkeypatch):
    """A network that takes images and is quick."""
    monkeypatch.setattr(taggers, "tagger", lambda kind: MLP((625, 3, 2), scale=None))
    settings = {"batch": 5, "shots": 2, "seeds": 2, "test_draws": 2, "test_queries": 20, "tuning_queries": 10}
    return MatrixTraining(Matrix("tiny", test_rates=(0.1, 0.2), test_steps=(1, 3), **settings), samples, CPU)


def test_taggers_of_all_windows_begin_alike(matrix):
    theta = matrix.init(generator(5))
    one = stacked([matrix.learner.init(generator(s)) for s in range(2)])
    assert equal(theta, {name: torch.cat([value] * 5) for name, value in one.items()})


def test_every_tagger_learns_from_jets_of_its_window(matrix):
    theta = matrix.init(generator(0))
    gradient, value = matrix.gradient(theta, generator(1), 0)
    draws, each = generator(1), []
    for window in range(5):
        assert {domain.window for domain in matrix.families[window].domains} == {window}
        drawn = matrix.families[window].sample(2, draws)
        for s in range(2):
            one = task(drawn, s)
            x, y = torch.cat([one.support.x, one.query.x]), torch.cat([one.support.y, one.query.y])
            assert len(y) == 10 == 2 * y.sum()

            def loss(params, x=x, y=y):
                return torch.nn.functional.cross_entropy(matrix.learner.model(params, x), y)

            mine = seed(theta, 2 * window + s)
            assert_same(seed(gradient, 2 * window + s), gradient_of(loss, mine), rtol=1e-4, atol=1e-7)
            each.append(loss(mine).item())
    assert value.item() == pytest.approx(sum(each) / 10, rel=1e-5)


def rigged(matrix, area):
    """Let the judge find ``area(rate, steps, trained in, judged in, seed)``."""

    def judge(learner, theta, tasks, steps):
        assert len(tasks.query.y) == 10  # two of each window
        rows = ((trained, s) for trained in range(5) for s in range(2))
        values = [[[area(learner.rate, n, a, t // 2, s) for n in steps] for t in range(10)] for a, s in rows]
        return torch.tensor(values).unsqueeze(-1).repeat(1, 1, 1, 3)

    matrix.judge = judge
    return matrix


def test_areas_are_in_the_places_they_should_be(matrix):
    rigged(matrix, lambda rate, n, a, b, s: 1000.0 * a + 100 * b + 10 * s + n)
    found = matrix.areas(matrix.test, matrix.init(generator(0)), 0.1, (0, 3), 2, seed=0)
    assert found.shape == (5, 5, 2, 2)
    for a, b, s, n in ((4, 1, 0, 0), (0, 3, 1, 1), (2, 2, 1, 0)):
        assert found[a, b, s, n] == 1000 * a + 100 * b + 10 * s + (0, 3)[n]


def test_rates_of_the_matrix_are_best_elsewhere(matrix):
    """Rate 0.2 and one step are worst at home and best elsewhere."""

    def area(rate, steps, trained, tested, s):
        best = (rate == 0.2 and steps == 1) != (trained == tested)
        return 0.5 + 0.01 * trained + 0.001 * s + 0.1 * (steps > 0) + 0.2 * best

    metrics = rigged(matrix, area).evaluate(matrix.init(generator(0)))
    assert (metrics["rate_labels"].value, metrics["steps_labels"].value) == (0.2, 1)
    assert metrics["auc_elsewhere_labels"].value == pytest.approx(0.8205) and metrics["auc_home_labels"].n == 2
    assert metrics["auc_home_labels"].value == pytest.approx(0.6205)
    assert metrics["auc_250_600_labels"].value == pytest.approx(0.8005)
    assert metrics["auc_600_250_labels"].value == pytest.approx(0.8405)
    assert metrics["auc_600_250_none"].value == pytest.approx(0.5405)


def test_evaluation_of_the_matrix(matrix):
    metrics = matrix.evaluate(matrix.init(generator(0)))
    cells = {f"auc_{a}_{b}_{how}" for a in WINDOWS for b in WINDOWS for how in ("none", "labels")}
    means = {f"auc_{where}_{how}" for where in ("home", "elsewhere") for how in ("none", "labels")}
    assert metrics.keys() == cells | means | {"rate_labels", "steps_labels"}
    assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name in metrics)
    assert all(0 <= metrics[name].value <= 1 and metrics[name].n == 2 for name in cells | means)
    assert metrics["auc_250_400_none"] == metrics["auc_600_400_none"] != metrics["auc_250_400_labels"]
    assert {metrics["rate_labels"].value, metrics["steps_labels"].value} <= {0.1, 0.2, 1, 3}


# ---------------------------------------- cuts


def test_cuts_on_the_fakes(samples):
    cuts = CutsMeasured(Cuts("x", parts=4), samples, CPU)
    assert cuts.init(generator(0)) == {} and cuts.gradient({}, generator(0), 0)[0] == {}
    metrics = cuts.evaluate({})
    groups = [*WINDOWS, "wt", "z", "top", "train", "vincia"]
    assert metrics.keys() == wanted("window", groups) | wanted("likelihood", groups)
    assert all(value.n == 4 for value in metrics.values())
    for cut in ("window", "likelihood"):
        assert all(metrics[f"auc_{where}_{cut}"].value > 0.9 for where in groups), cut
        mean = sum(metrics[f"auc_{where}_{cut}"].value for where in WINDOWS) / 5
        assert metrics[f"auc_mean_{cut}"].value == pytest.approx(mean)
        assert metrics[f"rejection_vincia_{cut}"].value == pytest.approx(7)  # none of a part's seven passes
    assert list(metrics)[0] == "auc_mean_window" and metrics == cuts.evaluate({})


# ---------------------------------------- all together


def test_experiments_read_the_file_of_jets(samples):
    for experiment, kind in (
        (Tagging("x", "maml", **SMALL), TaggingTraining),
        (Matrix("x", batch=5, shots=2, test_queries=20, tuning_queries=10), MatrixTraining),
        (Cuts("x"), CutsMeasured),
    ):
        assert experiment.data() == {"data": "jets", "sha256": samples.header["sha256"]}
        assert isinstance(experiment.setup(CPU, False), kind)


def test_all_experiments_differ():
    known = taggers.experiments()
    assert len({one.name for one in known}) == len(known) and all(one.name.startswith("jets-") for one in known)
    settings = [{name: value for name, value in one.config().items() if name != "name"} for one in known]
    assert all(one not in settings[:i] for i, one in enumerate(settings))
    for one in known:
        if isinstance(one, Tagging):
            assert one.learner().model == tagger(one.tagger)


def test_an_experiment_that_only_measures_can_be_asked_again(samples, monkeypatch, tmp_path):
    monkeypatch.setattr(jets, "load", lambda: samples)
    again = [train(Cuts("measured", parts=2), device=CPU, data=tmp_path, progress=False) for _ in range(2)]
    assert again[0]["metrics"] == again[1]["metrics"]


@pytest.mark.parametrize("method", ["pooled", "reptile"])
def test_joint_training_has_no_weak_loss(method):
    assert "labels" in refused(lambda: Tagging("x", method, inner="mixture").learner())
