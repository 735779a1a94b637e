"""`metabook show` and `metabook verdicts`, on the committed experiments, claims and records."""

from __future__ import annotations

import json
from types import NoneType
from typing import get_args, get_type_hints

import pytest
from commands import call, train

from helpers import experiments, settings
from helpers.cli import metrics
from helpers.lab import claims, records, variants, verdicts
from helpers.lab.experiment import Experiment


def test_show_explains_every_field(capsys):
    status, out, err = call(capsys, "show", "maml-omniglot-5w1s")
    assert (status, err) == (0, "") and max(map(len, out.splitlines())) <= 120
    assert out.startswith("maml-omniglot-5w1s (paper: maml)\n\nFew-shot Omniglot, as in section 5.2 of the paper")
    assert "recorded: 60,000 iterations" in out
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line[:1].isalpha()}
    assert lines["inner_rate"] == "0.4" and lines["test_steps"] == "1,3,10" and lines["network"] == "conv"
    assert "on the *mean* cross-entropy" in out and "(a finite number)" in out and "(set by --data-folder)" in out


def test_show_explains_every_metric(capsys):
    out = call(capsys, "show", "maml-omniglot-5w1s")[1]
    listed = out.partition("Metrics of its record. The first, transductive_accuracy, is the headline.\n\n")[2]
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in listed.splitlines() if line[:1].isalpha()}
    assert lines["transductive_accuracy_STEPS"] == "STEPS: 1, 3, 10" and lines["transductive_accuracy"].startswith(
        "0.9"
    )
    assert "accuracy after so many inner steps, queries seen together" in " ".join(listed.split())
    assert (
        "Metrics that its record may have:\n\ntransductive_accuracy" in call(capsys, "show", "maml-omniglot-20w5s")[1]
    )


@pytest.mark.parametrize("name", sorted(records.load_all().keys() & experiments.catalogue().keys()))
def test_every_metric_has_a_meaning(name):
    found = metrics.described(experiments.find(name), records.load(name)["metrics"])
    assert not [metric.names for metric in found if not metric.meaning], "say it in helpers.cli.metrics"
    assert sorted(name for metric in found for name in metric.names) == sorted(records.load(name)["metrics"])


def test_own_images_are_a_field_only_where_there_are_images(capsys):
    for name, images in (("ways-sinusoid-optimizer", False), ("ways-glyphs-optimizer", True), ("jets-maml", False)):
        assert ("--data-folder" in call(capsys, "show", name)[1]) == images


def test_show_of_what_is_not_recorded(project, capsys):
    assert "not recorded yet; `metabook train first` trains it" in call(capsys, "show", "first")[1]
    train(capsys, "first", "--budget", "0")
    assert "recorded: 1 of 60 iterations" in call(capsys, "show", "first")[1]


@pytest.mark.parametrize("name", experiments.catalogue())
def test_every_field_has_a_meaning(name):
    unexplained = [field.name for field in variants.described(experiments.find(name)) if not field.meaning]
    assert not unexplained, "say it in the docstring of the class, under Attributes"


@pytest.mark.parametrize("name", experiments.catalogue())
def test_every_field_has_a_meaning_of_its_own(name):
    found = variants.described(experiments.find(name))
    assert len({field.meaning for field in found}) == len(found), "each field has a sentence of its own"


@pytest.mark.parametrize("name", experiments.catalogue())
def test_a_value_can_be_set_as_it_is_shown_and_none_where_the_frame_takes_it(name):
    one, frame = experiments.find(name), get_type_hints(Experiment)
    for field in variants.described(one):
        if field.name not in ("name", "own"):
            assert variants.variant(one, {field.name: settings.written(field.value)}) == one
        if NoneType in get_args(frame.get(field.name)):
            assert getattr(variants.variant(one, {field.name: "None"}), field.name) is None and "none" in field.kind


def test_a_variant_is_shown_by_its_name(project, capsys):
    train(capsys, "first", "--set", "hidden=3", "--budget", "0")
    train(capsys, "first", "--set", "hidden=4", "--budget", "0", "--out", str(project / "mine"))
    out = call(capsys, "show", "first_hidden-3")[1]
    assert out.startswith("first_hidden-3 (paper: maml)") and "recorded: 1 of 60 iterations" in out and "mse_0" in out
    status, out, err = call(capsys, "show", "first_hidden-4")
    assert (status, out) == (2, "") and "give the --out of its training" in err
    status, out, _ = call(capsys, "show", "first_hidden-4", "--out", str(project / "mine"))
    assert status == 0 and "recorded: 1 of 60 iterations" in out


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
