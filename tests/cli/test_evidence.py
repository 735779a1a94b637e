"""`metabook show` and `metabook verdicts`, on the committed experiments, claims and records."""

from __future__ import annotations

import json

import pytest
from commands import call, train

from helpers import experiments
from helpers.lab import claims, records, variants, verdicts


def test_show_explains_every_field(capsys):
    status, out, err = call(capsys, "show", "maml-omniglot-5w1s")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 120
    assert out.startswith("maml-omniglot-5w1s (paper: maml)\n\nFew-shot Omniglot, as in section 5.2 of the paper")
    assert "recorded: 60,000 iterations" in out
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line[:1].isalpha()}
    assert lines["inner_rate"] == "0.4" and lines["test_steps"] == "(1, 3, 10)" and lines["network"] == "conv"
    assert "on the *mean* cross-entropy" in out and "(a finite number)" in out


def test_show_of_what_is_not_recorded(project, capsys):
    assert "not recorded yet; `metabook train first` trains it" in call(capsys, "show", "first")[1]
    train(capsys, "first", "--budget", "0")
    assert "recorded: 1 of 60 iterations" in call(capsys, "show", "first")[1]


@pytest.mark.parametrize("name", experiments.catalogue())
def test_every_field_has_a_meaning(name):
    unexplained = [field.name for field in variants.described(experiments.find(name)) if not field.meaning]
    assert not unexplained, "say it in the docstring of the class, under Attributes"


def test_verdicts_are_one_line_each(capsys):
    status, out, err = call(capsys, "verdicts", "--paper", "maml")
    found, recorded = claims.load_claims("maml"), records.load_all()
    *lines, empty, headline = out.splitlines()
    assert (status, err, empty) == (0, "", "") and len(lines) == len(found)
    judged = verdicts.judge(found, recorded)
    for claim, line in zip(found, lines, strict=True):
        assert line.startswith(f"maml/{claim.id} ") and f"  {judged[claim.id].verdict} " in line
    assert "(paper 98.7 ± 0.4 %, here " in out and "(lead +" in out
    assert headline.endswith(verdicts.headline(list(judged.values())))


def test_verdicts_for_programs(capsys):
    entries = json.loads(call(capsys, "verdicts", "--json")[1])
    assert [entry["id"] for entry in entries] == [claim.id for claim in claims.load_claims()]
    assert {"of", "verdict", "quantity", "paper", "book", "experiment", "metric"} <= entries[0].keys()
    judged = verdicts.judge_all()
    for entry in entries:
        assert entry["verdict"] == judged[entry["id"]].verdict
        for comparison in entry["comparisons"]:
            assert comparison["test"] in ("Welch", "paired by seed", "paired by task")
            assert 0 <= comparison["p"] <= 1 and comparison["lead"] == comparison["lead"]


def test_an_unknown_paper_is_one_sentence_with_the_nearest(capsys):
    status, out, err = call(capsys, "verdicts", "--paper", "reptil")
    assert (status, out) == (2, "") and "(did you mean reptile?)" in err and err.count("\n") == 1
