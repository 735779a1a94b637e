"""The recorded experiments of Neural Optimizer Search: the search, its log and its cache; transfer of rules."""

from __future__ import annotations

import gzip
from dataclasses import replace

import pytest
import torch

from helpers import experiments
from helpers.errors import UserError
from helpers.experiments import nos, nos_transfer
from helpers.lab import checkpoints, records, training
from helpers.models.layers import subtree
from helpers.optimizers import children, entries, search
from helpers.optimizers.child_training import Outcome
from helpers.optimizers.language import grammar, parse
from helpers.optimizers.rules import BASELINES, PAPER_RULES
from helpers.runtime import generator
from helpers.tasks import cifar10, small_images

TINY = children.Children(train=200, valid=100, test=100, filters=4, epochs=2, chunk=7)
SEARCH = nos.Search(
    "nos-test",
    TINY,
    searches=2,
    proposals=3,
    rounds=4,
    ppo_steps=2,
    iterations=8,
    population=4,
    tournament=2,
    recheck=2,
)


class Judge:
    """In place of a population: rules with a running average get 1, others 0; counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list = []

    def rewards(self, rules, epochs, hopeless, label=None):
        self.asked += rules
        return [Outcome(float("m" in rule.leaves), 0.1, (), "complete", 0.5) for rule in rules]


def searched(search: nos.Search, theta=None, iterations: int | None = None, judge: Judge | None = None):
    """θ after so many iterations with the judge, the judge, and the generator."""
    judge, draw = judge or Judge(), generator(search.seed)
    run = nos.SearchRun(search, judge)
    state = checkpoints.State(run.init(draw), search.outer_rate, draw)
    for iteration in range(search.iterations if iterations is None else iterations):
        gradient, _ = run.gradient(state.values(), draw, iteration)
        state.apply(gradient)
    return state.values(), judge, draw


# ---------------------------------------- the search


def rows_of(theta):
    return search.table(SEARCH, subtree(theta, nos.LOG))


def test_log_holds_every_proposal_and_no_rule_is_trained_twice():
    theta, judge, _ = searched(SEARCH)
    rows = rows_of(theta)
    assert len(rows) == SEARCH.rounds * len(search.METHODS) * SEARCH.searches * SEARCH.proposals
    assert len(judge.asked) == len(set(judge.asked)) == len({row["rule"] for row in rows})
    assert {parse(row["rule"]) for row in rows} == set(judge.asked)
    assert sum(row["seconds"] > 0 for row in rows) == len(judge.asked), "a rule costs time once"
    assert all(row["reward"] == float("m" in parse(row["rule"]).leaves) for row in rows)
    assert {row["method"] for row in rows} == set(search.METHODS)
    assert {row["round"] for row in rows} == set(range(SEARCH.rounds))


def test_new_proposals_come_once_a_round():
    theta, _, _ = searched(SEARCH, iterations=SEARCH.ppo_steps)
    assert {row["round"] for row in rows_of(theta)} == {0}
    theta, _, _ = searched(SEARCH, iterations=SEARCH.ppo_steps + 1)
    assert {row["round"] for row in rows_of(theta)} == {0, 1}


def test_controllers_move_and_random_search_does_not_know_them():
    """The same seed with another outer rate: random proposals of the first rounds agree, the controllers' part."""
    slow, fast = (searched(replace(SEARCH, outer_rate=rate))[0] for rate in (0.0, 0.1))
    rows = [rows_of(theta) for theta in (slow, fast)]
    first = [[row["rule"] for row in r if row["round"] == 0] for r in rows]
    assert first[0] == first[1]
    name = nos.CONTROLLER + "head.weight"
    assert not slow[name].any() and fast[name].any()


def test_baseline_is_the_moving_average_of_earlier_rounds():
    theta, _, _ = searched(SEARCH)
    log = subtree(theta, nos.LOG)
    expected = log["reward"][0].mean(-1)
    for number in range(SEARCH.rounds):
        if number:
            expected = SEARCH.baseline * expected + (1 - SEARCH.baseline) * log["reward"][number - 1].mean(-1)
        assert torch.allclose(log["baseline"][number], expected[:, None].expand(-1, SEARCH.proposals))


def test_search_learns_what_is_rewarded():
    search = replace(SEARCH, searches=2, proposals=16, rounds=20, ppo_steps=4, iterations=80)
    theta, _, _ = searched(search)
    rewards = subtree(theta, nos.LOG)["reward"].view(20, 3, 2, 16).mean(-1)  # [rounds, methods, searches]
    late = rewards[-4:].mean((0, 2))
    assert late[0] > late[1] + 0.3 and late[0] > 0.6, late


def test_killed_search_goes_on_as_if_never_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"progress": False, "say": lambda _: None}
    few = children.Children(train=100, valid=50, test=50, batch=50, filters=2, epochs=1, chunk=7)
    search = replace(SEARCH, children=few, rounds=3, iterations=6, population=2, tournament=1, recheck=1)
    training.train(search, data=whole, **settings)
    for _ in range(search.iterations):
        training.train(search, data=parts, budget=0.0, **settings)
    ends = [checkpoints.load_theta("nos-test", folder / "checkpoints") for folder in (whole, parts)]
    seconds = nos.LOG + "seconds"  # a clock's
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0] if name != seconds)
    assert torch.equal(ends[0][seconds] > 0, ends[1][seconds] > 0), "the cache is the same too"


def test_record_and_table_of_a_search(tmp_path, monkeypatch):
    record = training.train(SEARCH, data=tmp_path, progress=False, say=lambda _: None)
    metrics = record["metrics"]
    monkeypatch.setattr(records, "folder", lambda: tmp_path / "records")
    rows = records.load_table("nos-test")
    assert rows == rows_of(checkpoints.load_theta("nos-test", tmp_path / "checkpoints"))
    assert metrics["proposals"]["value"] == len(rows)
    assert metrics["children"]["value"] == len({row["rule"] for row in rows})
    for method in search.METHODS:
        every = [[r["reward"] for r in rows if (r["method"], r["search"]) == (method, s)] for s in range(2)]
        means = [sum(values) / len(values) for values in every]
        assert metrics[f"{method}_reward"]["value"] == pytest.approx(sum(means) / 2, abs=1e-6)
        assert metrics[f"{method}_reward"]["n"] == 2
    assert metrics["again_reward"]["value"] == pytest.approx(
        sum(row["reward"] for row in search.best(rows, 2)) / 2, abs=0.05
    ), "the best rules, trained again in other company, are as good"


def test_best_rows_are_different_rules_in_order():
    rows = [{"rule": r, "reward": v} for r, v in (("g", 0.5), ("m", 0.9), ("g", 0.5), ("adam", 0.9), ("v", 0.1))]
    assert [row["rule"] for row in search.best(rows, 3)] == ["m", "adam", "g"]


def test_wrong_number_of_iterations_is_refused():
    with pytest.raises(UserError, match="are not 9 iterations"):
        replace(SEARCH, iterations=9)


# ---------------------------------------- images


def test_digits_are_split_and_standardised():
    train, valid, test = small_images.images("digits", 8, 300, 200, 100)
    assert [tuple(part.x.shape) for part in (train, valid, test)] == [(n, 1, 8, 8) for n in (300, 200, 100)]
    assert abs(train.x.mean()) < 1e-5 and abs(train.x.std() - 1) < 1e-5
    images = {tuple(image.flatten().tolist()) for part in (train, valid, test) for image in part.x}
    assert len(images) == 600, "no image twice"


def test_coloured_images_are_split_and_the_official_ones_are_the_test(monkeypatch):
    """Every image is of a level of its own; those of the official test set are the larger half of the levels."""

    def load(split, size):
        levels = torch.arange(100, dtype=torch.uint8) + 100 * (split == "test")
        images = levels[:, None, None, None].expand(-1, 3, size, size)
        return cifar10.Labelled(images, torch.arange(100) % 10, {"split": split})

    monkeypatch.setattr(cifar10, "load", load)
    parts = small_images.images("cifar10", 8, 40, 30, 50)
    train, valid, test = ({round(level, 4) for level in part.x[:, 0, 0, 0].tolist()} for part in parts)
    assert [len(part) for part in (train, valid, test)] == [40, 30, 50], "no image twice"
    assert not train & valid and max(train | valid) < min(test)


@pytest.mark.parametrize(("data", "train"), [("letters", 100), ("digits", 5_000)])
def test_impossible_images_are_refused(data, train):
    with pytest.raises(UserError):
        small_images.images(data, 8, train, 100, 100)


# ---------------------------------------- tables


def test_tables_are_the_same_bytes_and_come_back(tmp_path, monkeypatch):
    rows = [{"rule": "drop(g, 0.3)*m", "reward": 0.5, "round": 3}, {"rule": '"', "reward": 1e-5, "round": 4}]
    rows += [{"rule": "1", "reward": 1.0, "round": 0}]  # a rule that looks like a number
    for name in ("a", "b"):
        records.save_table(rows, tmp_path / f"{name}.csv.gz")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    assert records.load_table("a") == rows


def test_missing_and_damaged_tables_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "folder", lambda: tmp_path)
    with pytest.raises(UserError, match="metabook train nothing"):
        records.load_table("nothing")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n")[:-6])
    (tmp_path / "no.csv.gz").write_bytes(b"a,b\n1,2\n")
    for name in ("cut", "no"):
        with pytest.raises(UserError, match="damaged"):
            records.load_table(name)


# ---------------------------------------- transfer


def tiny_transfer(monkeypatch, **changes) -> nos_transfer.Transfer:
    """A transfer on the small digits instead of CIFAR-10."""
    images = small_images.images
    monkeypatch.setattr(small_images, "images", lambda data, *rest: images("digits", *rest))
    monkeypatch.setattr(small_images, "provenance", lambda data: {"data": "digits"})
    monkeypatch.setattr(nos_transfer, "child", lambda size, channels: children.child(size, 1, 4))
    settings = {
        "size": 8,
        "train": 300,
        "valid": 100,
        "test": 200,
        "epochs": 2,
        "seeds": 2,
        "iterations": 3,
        "found": 0,
    }
    return nos_transfer.Transfer("nos-try", **settings | {"chunk": 5, "rates": (1e-2, 1e-1)} | changes)


def test_transfer_sweeps_then_trains_from_other_starts(tmp_path, monkeypatch):
    rules = (*entries.TABLE[:3], ("rule04", PAPER_RULES[3], None), ("linear", PAPER_RULES[3], "linear"))
    transfer = tiny_transfer(monkeypatch, rules=rules)
    record = training.train(transfer, data=tmp_path, progress=False, say=lambda _: None)
    monkeypatch.setattr(records, "folder", lambda: tmp_path / "records")
    rows, metrics = records.load_table("nos-try"), record["metrics"]
    assert [(row["label"], row["seed"]) for row in rows] == [(label, seed) for label, _, _ in rules for seed in (1, 2)]
    assert next(iter(metrics)) == "rule04_test", "the headline"
    for label in ("sgd", "rule04"):
        own = [row["test"] for row in rows if row["label"] == label]
        assert metrics[f"{label}_test"]["value"] == pytest.approx(sum(own) / 2, abs=1e-6)
    differences = [a["test"] - b["test"] for a, b in zip(rows[6:8], rows[4:6], strict=True)]
    assert metrics["rule04_over_adam"]["value"] == pytest.approx(sum(differences) / 2, abs=1e-5)
    assert all(row["best_test"] >= row["test"] and row["best_valid"] >= row["valid"] for row in rows)
    assert metrics["adam_bytes"]["value"] == 2 * metrics["rule04_bytes"]["value"] == 8
    assert metrics["sgd_bytes"]["value"] == 0
    for label in ("sgd", "adam"):
        assert any(metrics[f"{label}_rate"]["value"] == pytest.approx(rate) for rate in transfer.rates)
    assert metrics["rule04_test"]["value"] > 0.1 and metrics["linear_test"]["value"] > 0.1


def test_found_rules_are_the_controllers_best_that_are_new(monkeypatch):
    names = ["m*exp(v)", "adam", "sign(g)*m", "2*g", "gamma", "v"]
    rows = [{"rule": str(parse(r)), "reward": 0.9 - i / 10, "method": "controller"} for i, r in enumerate(names)]
    rows.append({"rule": "noise", "reward": 1.0, "method": "random"})
    monkeypatch.setattr(records, "load_table", lambda name: rows)
    transfer = nos_transfer.Transfer("nos-try", found=2)
    new = transfer.entries[len(transfer.rules) :]
    assert [(label, parse(rule)) for label, rule, _ in new] == [
        ("found1", parse("sign(g)*m")),
        ("found2", parse("2*g")),
    ]


def test_every_rule_of_the_table_is_trained():
    transfer = next(e for e in nos_transfer.experiments() if e.name == "nos-child")
    trained = {parse(rule) for _, rule, _ in transfer.rules}
    assert {parse(rule) for rule in (*PAPER_RULES, *BASELINES.values())} <= trained
    assert len(PAPER_RULES) == 16
    labels = [label for label, _, _ in transfer.rules]
    assert len(labels) == len(set(labels)) and labels[7] == entries.POWERSIGN_LABEL == "rule04"


def test_experiments_are_in_the_catalogue():
    names = set(experiments.catalogue())
    assert {"nos-cifar10", "nos-digits", "nos-child", "nos-wide-resnet", "nos-translation"} <= names
    for experiment in nos.experiments():
        assert experiment.iterations == experiment.rounds * experiment.ppo_steps
        assert len(grammar(experiment.depth)) == experiment.controller().tokens
