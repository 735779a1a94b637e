"""The ways to learn a learner and the parts combined: every method trains and is judged; splits, shifts, choices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from miniatures import three_parts
from refusals import refused
from torch.utils._pytree import tree_map

from helpers import experiments
from helpers.estimators.explicit import maml
from helpers.experiments import ablation, paradigms, ways
from helpers.experiments.ablation import PARTS, Combined
from helpers.lab import checkpoints, training
from helpers.models.layers import subtree_of
from helpers.runtime import generator
from helpers.tasks import glyphs

CPU = torch.device("cpu")
SMALL = {
    "seeds": 2, "test_tasks": 4, "validation_tasks": 3, "spot_tasks": 2, "queries": 3, "meta_batch": 2,
    "rates": (0.01, 0.1), "steps": (1, 2), "inner_steps": 1, "filters": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """The glyphs are read from the disk once."""
    monkeypatch.setattr(glyphs, "three_parts", three_parts)


def small(name: str, **changes):
    """An experiment that takes a second, and its run without recordings."""
    e = experiments.find(name)
    keep = {"inner_steps": e.inner_steps} if e.inner_steps == 0 else {}
    e = replace(e, **SMALL | keep | changes)
    run = e.setup(CPU, compiled=False)
    run.estimator = maml
    return e, run


NAMES = [e.name for e in ways.experiments()]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_and_is_judged(name, tmp_path, monkeypatch):
    e, run = small(name, iterations=2, rates=(0.1,))
    draws = generator(0)
    theta = run.init(draws)
    gradient, loss = run.gradient(theta, draws, 0)
    assert gradient.keys() == theta.keys() and loss.isfinite()
    if theta:
        assert {key.split("/")[0] for key in theta} == {"0", "1"}
        assert any(g.abs().max() > 0 for key, g in gradient.items() if key.startswith("1/"))
    metrics, kind = run.evaluate(theta), "accuracy" if e.ways else "mse"
    assert next(iter(metrics)) == f"{kind}_{e.shots}"
    assert {f"{kind}_{k}" for k in e.test_shots} < metrics.keys()
    assert {f"{kind}_{shift}" for shift in e.shifts()} < metrics.keys()
    assert all(math.isfinite(m.value) for m in metrics.values())
    descends = e.method in paradigms.DESCENDING
    assert (f"{kind}_before" in metrics) == descends
    assert metrics[f"gradients_{e.shots}"].value == metrics[f"steps_{e.shots}"].value * e.shots * max(1, e.ways)
    assert (metrics[f"steps_{e.shots}"].value > 0) == descends
    spot = run.spot_check(theta)
    assert spot.keys() < metrics.keys()
    for key, value in spot.items():
        assert math.isclose(value.value, metrics[key].value, rel_tol=1e-5, abs_tol=1e-6)


def test_a_way_is_recorded_and_read_again(tmp_path):
    e, _ = small("ways-sinusoid-recurrence", iterations=3)
    e = replace(e, name="small")
    record = training.train(e, data=tmp_path, progress=False, say=lambda _: None)
    assert record["status"] == "complete" and record["paper"] == "ways"
    theta = checkpoints.load_theta("small", tmp_path / "checkpoints")
    run = e.setup(CPU, compiled=False)
    spot = run.spot_check(theta)
    assert spot["spot_mse_10"].value == pytest.approx(record["metrics"]["spot_mse_10"]["value"], rel=1e-6)


def test_all_methods_of_a_family_see_the_same_test_tasks():
    tasks = [
        small(f"ways-{kind}-{method}")[1].judged("test", 5, 3)
        for kind in ("sinusoid", "glyphs")
        for method in ("recurrence", "scratch")
    ]
    for one, other in (tasks[:2], tasks[2:]):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    for kind in ("sinusoid", "glyphs"):  # the recorded ones, too
        same = {(e.test_tasks, e.queries, e.ways, e.shots) for e in ways.experiments() if e.family == kind}
        assert len(same) == 1


def test_scripts_of_training_validation_and_test_are_disjoint():
    train, valid, test = glyphs.three_parts()
    scripts = [set(pool.groups) for pool in (train, valid, test)]
    assert scripts[1] == set(glyphs.VALIDATION_SCRIPTS)
    assert not scripts[0] & scripts[1] and not scripts[0] & scripts[2] and not scripts[1] & scripts[2]
    assert min(len(pool) for pool in (train, valid, test)) >= 50


def test_shifted_families():
    _, run = small("ways-sinusoid-scratch")
    larger, later, elsewhere = (run.judged("test", 10, 50, shift) for shift in ("larger", "later", "elsewhere"))
    assert larger.query.y.abs().max() > 5 and run.judged("test", 10, 50).query.y.abs().max() <= 5
    assert elsewhere.support.x.min() >= 5 and later.support.x.min() < 0
    _, run = small("ways-glyphs-scratch")
    plain = run.judged("test", 1, 2).support.x
    turned, negative, smaller = (run.judged("test", 1, 2, s).support.x for s in ("turned", "negative", "smaller"))
    assert torch.equal(turned.rot90(-1, (-2, -1)), plain) and torch.allclose(negative, 1 - plain)
    assert smaller.shape == plain.shape and smaller[..., :7, :].abs().max() == 0
    assert torch.allclose(smaller.sum((-1, -2)), plain.sum((-1, -2)) / 4, rtol=1e-4)


def test_sources_of_transfer():
    _, one = small("ways-glyphs-transfer")
    _, many = small("ways-glyphs-multisource")
    scripts = glyphs.three_parts()[0].groups
    assert one.sources[0].outputs == max(scripts.count(s) for s in set(scripts)) != one.sources[1].outputs
    assert many.sources[0].outputs == many.sources[1].outputs == len(scripts)
    theta = many.init(generator(0))
    start = many.start(theta, 1)
    assert start["head.weight"].shape[1] == 5 and not start["head.weight"].any()
    _, curves = small("ways-sinusoid-multisource")
    theta = curves.init(generator(0))
    assert theta["0/linear3.weight"].shape == (40, 64) and curves.start(theta, 0)["linear3.weight"].shape == (40, 1)


def test_the_grid_is_searched_on_validation_tasks_only(monkeypatch):
    _, run = small("ways-sinusoid-joint")
    asked = []
    judged = run.judged
    monkeypatch.setattr(run, "judged", lambda split, *rest: asked.append(split) or judged(split, *rest))
    steps, rate = run.settings(run.init(generator(0)), 10)
    assert asked == ["valid"] and steps in SMALL["steps"] and rate in SMALL["rates"]


def test_an_unknown_method_is_refused():
    assert "alchemy" in refused(lambda: replace(experiments.find("ways-sinusoid-scratch"), method="alchemy"))


# ---------------------------------------- parts combined


def test_all_subsets_of_the_parts():
    found = {e.learned for e in ablation.experiments()}
    assert len(found) == 8 and () in found and PARTS in found


@pytest.mark.parametrize("name", [e.name for e in ablation.experiments()])
def test_what_is_learned_is_in_theta(name):
    e, run = small(name)
    assert isinstance(e, Combined)
    theta = run.init(generator(0))
    kinds = {key.removeprefix("0/").split(":")[0] for key in theta if key.startswith("0/")}
    learned = {kind if kind in ("loss", "rule") else "start" for kind in kinds}
    assert learned == set(e.learned)
    gradient, loss = run.gradient(theta, generator(1), 0)
    assert gradient.keys() == theta.keys() and loss.isfinite()
    rates = run.settings(theta, 10)[1]
    assert (rates == 0.0) == ("rule" in e.learned)  # a learned rule has no rate to choose


def test_the_reader_is_trained_on_as_many_examples_as_it_is_tested_on(monkeypatch):
    seen = set()
    for name, shots in (("ways-glyphs-recurrence", {1, 2, 3, 4, 5}), ("ways-sinusoid-recurrence", {5, 10, 20})):
        e, run = small(name, train_shots=experiments.find(name).train_shots)
        assert set(experiments.find(name).train_shots) == shots
        draw = run.tasks
        monkeypatch.setattr(run, "tasks", lambda *a, draw=draw: (seen.add(a[2]), draw(*a))[1])
        draws, theta = generator(0), run.init(generator(0))
        for iteration in range(12):
            run.gradient(theta, draws, iteration)
        assert len(seen & shots) > 1 and seen <= shots, "the lengths vary"
        seen.clear()


def test_the_rule_is_trained_by_the_training_losses_on_its_way():
    """Its outer loss is the mean of the support losses after each step, and the query set plays no part."""
    e, run = small("ways-sinusoid-optimizer", inner_steps=3)
    draws, theta = generator(0), run.init(generator(0))
    own = subtree_of(theta, "0")
    tasks = run._begun(run.tasks("train", 2, e.shots, draws), draws)
    learner = run.learner
    phi = [learner.begin(own, tree_map(lambda t: t[0], tasks))]
    support = tree_map(lambda t: t[0], tasks.support)
    losses = []
    for _ in range(3):
        phi.append(learner.step(own, phi[-1], support))
        losses.append(learner.query_loss(phi[-1], support))
    first = learner.task_loss(own, tree_map(lambda t: t[0], e.outer_tasks(tasks)))
    torch.testing.assert_close(first, torch.stack(losses).mean())
    other = tasks._replace(query=tree_map(torch.zeros_like, tasks.query))
    torch.testing.assert_close(maml(learner, own, e.outer_tasks(tasks))[1], maml(learner, own, e.outer_tasks(other))[1])
