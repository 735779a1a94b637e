"""The scoreboard for readers: counts agree with the verdicts, and every kind of verdict can be walked to."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from evidence import claim, ordering, record
from matplotlib import pyplot as plt

from helpers.lab import scoreboard, verdicts

RECORDS = {
    "x": record("x", score=0.9, accuracy=(0.912, 0.01)),
    "y": record("y", score=0.5),
    "z": record("z", score=(0.9, 0.05)),
    "w": record("w", complete=False, score=0.1),
}
CLAIMS = [
    claim("right", direction=[ordering(label="than y")]),
    claim("short", metric="accuracy", value=0.98, ci95=0.01),
    claim("wrong", better="lower", direction=[ordering()], origin="own"),
    claim("tie", direction=[ordering("z/score")]),
    claim("early", direction=[ordering(left="w/score", right="y/score")]),
    claim("toy", direction=[ordering()], toy="five images"),
    claim("none", value=1.0, no_data="There are no images."),
    claim("later", direction=[ordering("v/score")]),
]


@pytest.fixture(scope="module")
def judged():
    return verdicts.judge(CLAIMS, RECORDS)


def test_there_is_one_claim_of_each_kind(judged):
    assert [judgement.verdict for judgement in judged.values()] == list(verdicts.KINDS)


def test_bars_show_the_counts(judged):
    figure = scoreboard.bars(list(judged.values()), {"p": "The paper", "q": "without claims"})
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["The paper"]
    assert sum(bar.get_width() for bar in ax.patches) == len(CLAIMS)
    assert figure.get_figheight() * figure.dpi < 900
    plt.close(figure)


def test_a_fold_has_every_claim_once(judged):
    text = scoreboard.fold("A & B", list(judged.values()), RECORDS)
    assert "<summary>A &amp; B: 1 reproduced, 1 missed, 1 refuted, 1 open" in text
    rows = [line for line in text.splitlines() if line.startswith("| q")]
    assert len(rows) == len(CLAIMS)
    assert "than y: +0.4, p " in rows[0] and "5 seeds" in rows[0] and "`metabook train x`" in rows[0]
    assert "98.00\u00a0±\u00a01.00 %" in rows[1] and "91.20\u00a0±\u00a01.00 %" in rows[1]
    assert "a lead of" in rows[3] and "five images" in rows[5] and "no images" in rows[6]


def test_every_kind_is_walked_from_the_claim_to_the_verdict(judged):
    for judgement in judged.values():
        steps = scoreboard.walk(judgement, RECORDS)
        assert steps[0].startswith(f"Claim `{judgement.claim.id}`: q (Table 1).")
        assert re.fullmatch(rf"Verdict: \*{judgement.verdict}\*.*\.", steps[-1])
        tested = judgement.verdict not in (verdicts.NO_DATA, verdicts.NOT_RUN)
        assert any("lead" in step for step in steps) == tested


def test_the_headline_counts_the_papers_claims_alone(judged):
    kinds = Counter(j.verdict for j in judged.values() if j.claim.origin == "paper")
    assert kinds.total() == 7
    assert verdicts.headline(list(judged.values())) == (
        "1 of 6 reproduced; 1 missed, 1 open, 1 unfinished, 1 toy scale, 1 not run"
    )


def test_a_live_claim_names_the_chapter_that_measures_it():
    measured = record("x", score=0.9) | {"kind": "live", "config": {"name": "x", "chapter": "02_maml"}}
    one = claim(value=0.5)
    found = verdicts.judge([one], {"x": measured})
    text = scoreboard.fold("A", list(found.values()), {"x": measured})
    assert "| *reproduced* (live) | measured on the page; 5 seeds | `metabook refresh 02_maml` |" in text
