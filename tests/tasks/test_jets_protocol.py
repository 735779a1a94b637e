"""What taggers of jets are trained, tuned and judged on."""

from __future__ import annotations

import re

import pytest
import torch
from toy_jets import everywhere

from helpers.runtime import generator
from helpers.tasks import jets
from helpers.tasks.jets import protocol
from helpers.tasks.jets.detector import View
from helpers.tasks.jets.protocol import JudgedJets, Supervision
from helpers.tasks.jets.tasks import JetTasks

WINDOWS = ("250", "300", "400", "500", "600")
EVERY = protocol.LABELS + protocol.PROPORTIONS + protocol.MIXTURES + protocol.WRONG + protocol.DRIFTED


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    with everywhere(tmp_path_factory.mktemp("checkout")) as found:
        yield found


# ---------------------------------------- supervision


def test_names_of_supervision_are_names_of_metrics():
    assert [one.name for one in EVERY] == [
        "labels5", "labels20", "labels100", "proportions64", "proportions256", "mixture64", "mixture256",
        "proportions64_under10", "proportions64_under5", "proportions64_over5", "proportions64_over10",
        "proportions64_drift10_40", "proportions64_drift30_50", "proportions64_drift40_60",
    ]  # fmt: skip
    assert Supervision("proportions", 8, (0.1, 0.4), -0.05).name == "proportions8_under5_drift10_40"
    assert all(re.fullmatch("[a-z][a-z0-9_]*", one.name) for one in EVERY)


def test_supervision_makes_tasks_of_its_size(samples):
    family = JetTasks(samples, protocol.test_domains()["400"], "test", 1, 6, View("particles"))
    labels = Supervision("labels", 3).tasks(family, [0, 0], generator(0))
    assert labels.support.y.tolist() == [[0] * 3 + [1] * 3] * 2 and labels.query.y.tolist() == [[0] * 6 + [1] * 6] * 2
    for kind in ("proportions", "mixture"):
        bags = Supervision(kind, 10).tasks(family, [0, 0], generator(0))
        torch.testing.assert_close(bags.support.y, torch.tensor([[0.2] * 10 + [0.8] * 10] * 2))
        assert bags.support.x.shape == (2, 20, 40, 3) and bags.query.y.tolist() == labels.query.y.tolist()


def test_wrong_shares_are_said_of_the_same_jets(samples):
    family = JetTasks(samples, protocol.test_domains()["400"], "test", 1, 6, View("particles"))
    right = Supervision("proportions", 10).tasks(family, [0], generator(0))
    for offset, stated in ((0.1, (0.3, 0.9)), (-0.05, (0.15, 0.75)), (0.4, (0.6, 1.0)), (-0.4, (0.0, 0.4))):
        wrong = Supervision("proportions", 10, offset=offset).tasks(family, [0], generator(0))
        assert torch.equal(wrong.support.x, right.support.x) and torch.equal(wrong.query.x, right.query.x)
        torch.testing.assert_close(wrong.support.y[0, ::10], torch.tensor(stated))
    drifted = Supervision("proportions", 10, (0.3, 0.5)).tasks(family, [0], generator(0))
    torch.testing.assert_close(drifted.support.y[0, ::10], torch.tensor([0.3, 0.5]))


# ---------------------------------------- domains


def test_the_test_is_elsewhere():
    train, tuning, test = protocol.training_domains(), protocol.tuning_domains(), protocol.test_domains()
    assert len(set(train)) == len(train) == 27 and len(set(tuning)) == len(tuning) == 9
    known = train + tuning
    for where in ("400", "600"):
        (domain,) = test[where]
        assert jets.WINDOWS[domain.window] == int(where)
        for part in ("window", "shower", "detector"):
            assert getattr(domain, part) not in {getattr(one, part) for one in known}, part
    every = [domain for some in test.values() for domain in some]
    assert {domain.detector for domain in every}.isdisjoint(domain.detector for domain in known)
    assert {one.detector for one in tuning}.isdisjoint(one.detector for one in train)
    assert {one.signal for one in known} == {"W"}


def test_groups_of_the_test():
    test = protocol.test_domains()
    assert list(test) == [*WINDOWS, "wt", "z", "top", "train", "vincia"]
    assert {name: (some[0].signal, some[0].shower, len(some)) for name, some in test.items()} == {
        name: ("W", "monash", 1) for name in WINDOWS
    } | {
        "wt": ("WT", "monash", 5), "z": ("Z", "monash", 5), "top": ("top", "monash", 3),
        "train": ("W", "fsr-one", 5), "vincia": ("W", "vincia", 5),
    }  # fmt: skip
    assert [domain.window for domain in test["top"]] == [2, 3, 4]


def test_test_tasks_are_the_same_every_time_and_come_from_every_domain(samples):
    test = JudgedJets(samples, 20, View("particles"))
    tasks, groups = test.given(Supervision("labels", 5), 3, 1)
    again, _ = test.given(Supervision("labels", 5), 3, 1)
    assert torch.equal(tasks.query.x, again.query.x) and len(tasks.query.y) == 5 * 3 + 23
    assert [len(rows) for rows in groups.values()] == [3] * 5 + [5, 5, 3, 5, 5]
    assert [row for rows in groups.values() for row in rows] == list(range(38))
    assert [test.family.domains[at] for at in test.groups["top"]] == list(protocol.test_domains()["top"])
    _, windows = test.given(Supervision("labels", 5), 1, 0)
    assert windows == {window: [at] for at, window in enumerate(WINDOWS)}
    _, most = test.given(Supervision("proportions", 10), 1, 1)
    assert [*most] == [*test.groups][:-1]  # of 28 jets with the other shower 20 are queries: too few are left


def test_a_task_is_of_its_groups_domain(samples, monkeypatch):
    test, asked = JudgedJets(samples, 20, View("particles")), []
    monkeypatch.setattr(JetTasks, "of", lambda family, chosen, *_: asked.extend(chosen))
    _, groups = test.given(Supervision("labels", 5), 2, 1)
    for name, rows in groups.items():
        assert {asked[row] for row in rows} == set(test.groups[name])
