"""The navigation study: equal experience, a common start, what its outer steps are, and how it is judged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from miniatures import MINIATURES, unrecorded
from refusals import refused

from helpers.experiments import maml_navigation
from helpers.lab import checkpoints, training
from helpers.models.layers import subtree_of
from helpers.runtime import generator
from helpers.tasks.control import surrogates

CPU = torch.device("cpu")
SMALL = MINIATURES["navigation"]()


@pytest.fixture
def ready(monkeypatch):
    unrecorded(monkeypatch)
    run = SMALL.setup(CPU, False)
    return run, run.init(generator(0))


def test_all_methods_meet_as_many_steps_of_the_environment(ready, monkeypatch):
    run, theta = ready
    met, draw = {}, torch.randn

    def counted(*shape, **settings):
        if len(shape[0]) == 4:  # the noise of tasks, trajectories, steps, actions
            met[kind] = met.get(kind, 0) + torch.Size(shape[0])[:3].numel()
        return draw(*shape, **settings)

    monkeypatch.setattr(surrogates.torch, "randn", counted)
    goals = run.experiment.env().goals(2, generator(1))
    for kind, search in run.searches.items():
        search(subtree_of(theta, f"0/{kind}"), goals, generator(2))
    assert met == dict.fromkeys(("maml", "pretrained", "oracle"), 2 * 2 * SMALL.trajectories * SMALL.horizon)


def test_methods_share_a_start_with_the_random_policy(ready):
    run, theta = ready
    for number in range(SMALL.seeds):
        start = run.policies(theta, "random")[number]
        for kind in ("maml", "pretrained"):
            assert all(torch.equal(value, start[name]) for name, value in run.policies(theta, kind)[number].items())
        assert not start["log_std"].any()
        assert run.policies(theta, "oracle")[number]["linear1.weight"].shape == (4, 4)
    weights = theta["0/maml/linear1.weight"]
    assert not torch.equal(weights, theta["1/maml/linear1.weight"])
    assert weights.abs().max() <= 1, "Glorot's limit is √(6/(2+4)) here"


def test_an_outer_step_is_a_step_in_the_trust_region(ready):
    """Taken over by SGD at a rate of 1, and counted."""
    run, theta = ready
    gradient, loss = run.gradient(theta, generator(3), 0)
    state = training.State(theta, SMALL.outer_rate, generator(0), SMALL.outer)
    state.apply(gradient, SMALL.outer_rate)
    draws = maml_navigation.seeds.draws_of(generator(3))
    goals = run.experiment.env().goals(SMALL.meta_batch, draws)
    moved, returns = run.searches["maml"](subtree_of(theta, "0/maml"), goals, draws)
    torch.testing.assert_close(subtree_of(state.values(), "0/maml"), moved.theta)
    assert loss > 0 and returns.shape == (2, 3)
    for kind in run.searches:
        tried, taken = state.values()[f"carried:steps/{kind}"].unbind(-1)
        assert tried.tolist() == [1, 1] and all(value in (0, 1) for value in taken.tolist())
        still = torch.equal(state.values()[f"0/{kind}/log_std"], theta[f"0/{kind}/log_std"])
        assert still == (taken[0] == 0)


def test_metrics_and_the_way_there(tmp_path, monkeypatch):
    unrecorded(monkeypatch)
    record = training.train(replace(SMALL, iterations=2), data=tmp_path, progress=False, say=lambda _: None)
    metrics = record["metrics"]
    assert list(metrics)[0] == "maml_return_1"
    wanted = {f"{kind}_return_{k}" for kind in ("maml", "constant", "pretrained", "random") for k in (0, 1, 2)}
    wanted |= {"oracle_return_0", "pretrained_rate", "random_rate", "maml_taken", "oracle_taken", "spot_maml_return_2"}
    assert wanted | {"maml_return_1_by_goal"} <= metrics.keys() and "oracle_return_1" not in metrics
    assert metrics["maml_return_1"]["n"] == SMALL.seeds and metrics["maml_return_1"]["per"] == "seed"
    assert metrics["maml_return_1_by_goal"]["n"] == SMALL.test_tasks
    assert metrics["maml_return_0"] == metrics["constant_return_0"], "the same noise for all"
    run = SMALL.setup(CPU, False)
    theta = checkpoints.load_theta("mini", tmp_path / "checkpoints")
    assert theta["carried:steps/maml"][:, 0].tolist() == [2, 2]
    spot = run.spot_check(theta)
    assert spot.keys() == {name for name in metrics if name.startswith("spot_")}
    assert all(value.value == pytest.approx(metrics[name]["value"], rel=1e-5) for name, value in spot.items())


def test_rates_are_halved_after_the_first_step(ready, monkeypatch):
    run, theta = ready
    assert run.rates(0.4) == (0.4, 0.2)
    seen = []
    monkeypatch.setattr(run, "returns", lambda *args: seen.append(args[-1]) or torch.zeros(len(args[-1]) + 1, 2, 3))
    run.evaluate(theta)
    assert seen[:2] == [(0.5, 0.25), [0.5, 0.5]] and () in seen


def test_the_best_rate_is_that_of_the_best_returns(ready, monkeypatch):
    run, _ = ready
    scores = {(0.1, 0.05): (9.0, 1.0, 1.0), (0.5, 0.25): (0.0, 1.0, 2.0)}  # before the steps they say nothing
    monkeypatch.setattr(run, "returns", lambda *args: torch.tensor(scores[args[-1]]).view(3, 1, 1))
    assert run.tuned([]) == 0.5


def test_going_on_from_another_run(ready, tmp_path, monkeypatch):
    run, theta = ready
    load = {"maml-navigation": theta}.__getitem__
    monkeypatch.setattr(maml_navigation.checkpoints, "load_theta", load)
    later = replace(SMALL, start="maml-navigation")
    first = later.setup(CPU, False).init(generator(9))
    assert first.keys() == theta.keys() and all(torch.equal(first[name], theta[name]) for name in theta)
    assert later.config()["start"] == later.data()["start"] == "maml-navigation" and "start" not in SMALL.config()


def test_what_is_unknown_is_refused():
    assert "must be one of pretrained, random, oracle" in refused(lambda: replace(SMALL, compared=("teacher",)))
    assert "must be one of score, ratio, trajectory" in refused(lambda: replace(SMALL, surrogate="dice"))


def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    unrecorded(monkeypatch)
    short = replace(SMALL, iterations=2, compared=("oracle",))
    quiet = {"progress": False, "say": lambda _: None}
    for _ in range(short.iterations):
        training.train(short, data=tmp_path / "parts", budget=0.0, **quiet)
    training.train(short, data=tmp_path / "whole", **quiet)
    parts, whole = (checkpoints.load_theta("mini", tmp_path / kind / "checkpoints") for kind in ("parts", "whole"))
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
