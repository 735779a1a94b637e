"""What chapters set up alike."""

from __future__ import annotations

import pytest
from refusals import refused

from helpers import experiments
from helpers.lab import chapter, records, tables, verdicts
from helpers.lab.claims import load_claims
from helpers.site import notebooks


def test_profile_and_device():
    assert "did you mean quick" in refused(lambda: chapter.begin("quik"))
    assert "no device called" in refused(lambda: chapter.begin("book", "gpu"))
    assert all(chapter.begin(profile).type == "cpu" for profile in notebooks.PROFILES)


@pytest.mark.parametrize("paper", ["maml", "reptile", "imaml", "ml3"])
def test_claims_as_printed(paper):
    claims = load_claims(paper)
    for claim, (quantity, printed, where) in zip(claims, chapter.claimed(claims).rows, strict=True):
        assert (quantity, where) == (claim.quantity, claim.where)
        assert printed.startswith("an ordering") == (claim.value is None)
        assert printed.endswith("(from memory)") == claim.from_memory


def test_every_run_of_a_paper_is_listed_once():
    catalogue = experiments.catalogue()
    listed = chapter.runs("maml", catalogue).rows
    names = [row[0].strip("`") for row in listed]
    assert sorted(names) == sorted(name for name, experiment in catalogue.items() if experiment.paper == "maml")
    known = records.load_all()
    assert all((row[1] == "not run") == (name not in known) for name, row in zip(names, listed, strict=True))


def test_claims_of_one_reason_stand_together():
    rows = [{"quantity": name, "verdict": "v", "note": note} for name, note in zip("abc", ("x", "", "x"), strict=True)]
    assert chapter.reasons(rows).data == "- a (*v*); c (*v*): x"


def test_training_is_that_of_the_paper_alone(monkeypatch):
    trained = []
    monkeypatch.setattr(
        chapter.training, "train", lambda experiment, budget, **_: trained.append((experiment.paper, budget))
    )
    chapter.train("reptile", experiments.catalogue(), chapter.begin("paper"), hours=0.5)
    assert trained and set(trained) == {("reptile", 1800.0)}


def test_a_value_and_its_interval_do_not_break():
    table = tables.Table(["error"], [["0.5 ± 0.1"]])
    assert "0.5\u00a0±\u00a00.1" in table._repr_markdown_() and "0.5 ± 0.1" in repr(table)


def test_the_outcome_has_the_tested_claims_and_counts_the_others():
    text = chapter.outcome(load_claims("maml"), records.load_all()).data
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    judged = verdicts.judge(load_claims("maml"), records.load_all()).values()
    tested = [j for j in judged if j.verdict not in (verdicts.NOT_RUN, verdicts.NO_DATA)]
    assert len(rows) == len(tested)
    assert all(row.startswith(f"| {j.claim.quantity} |") for row, j in zip(rows, tested, strict=True))
    assert text.rstrip().splitlines()[-1].startswith("Not tested: ")
