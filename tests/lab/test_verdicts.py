"""The rule of the verdicts: each kind by hand, its tests against SciPy's, its error rates by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from evidence import claim, ordering, record
from refusals import refused
from scipy import stats

from helpers.lab import records, verdicts
from helpers.lab.claims import load_claims
from helpers.lab.statistics import Interval, difference, holm, of_interval
from helpers.lab.verdicts import MISSED, NO_DATA, NOT_RUN, OPEN, REFUTED, REPRODUCED, TOY, UNFINISHED, judge


def said(one, *found):
    return judge([one], {entry["experiment"]: entry for entry in found})[one.id].verdict


# ---------------------------------------- numbers


@pytest.mark.parametrize(
    "ours, better, expected",
    [
        ((0.98, 0.005), "higher", REPRODUCED),  # the intervals overlap
        ((0.99, 0.001), "higher", REPRODUCED),  # better
        ((0.970, 0.005), "higher", MISSED),
        ((0.99, None), "higher", REPRODUCED),
        ((0.90, None), "higher", OPEN),  # one measurement without a spread decides nothing
        ((0.999, 0.001), "lower", MISSED),
        ((0.97, 0.001), "lower", REPRODUCED),
    ],
)
def test_numbers(ours, better, expected):
    assert said(claim(better=better, value=0.987, ci95=0.004), record("x", score=ours)) == expected


def test_a_baseline_has_to_be_met_from_both_sides():
    better = record("x", score=(3.29, 0.05))
    assert said(claim(better="lower", value=3.6), better) == REPRODUCED
    assert said(claim(better="lower", value=3.6, baseline=True), better) == MISSED
    assert said(claim(better="lower", value=3.3, baseline=True), better) == REPRODUCED


def test_an_unfinished_run_decides_only_on_the_winning_side():
    number = claim(value=0.987, ci95=0.004)
    assert said(number, record("x", complete=False, score=0.98)) == REPRODUCED
    assert said(number, record("x", complete=False, score=0.9)) == UNFINISHED
    ahead, behind = dict(score=0.9), dict(score=0.8)
    one = claim(direction=[ordering()])
    assert said(one, record("x", **ahead), record("y", **behind)) == REPRODUCED
    assert said(one, record("x", complete=False, **ahead), record("y", **behind)) == REPRODUCED
    assert said(one, record("x", **ahead), record("y", complete=False, **behind)) == UNFINISHED
    assert said(one, record("x", **behind), record("y", **ahead)) == REFUTED
    assert said(one, record("x", **behind), record("y", complete=False, **ahead)) == REFUTED
    assert said(one, record("x", complete=False, **behind), record("y", **ahead)) == UNFINISHED
    near = claim(direction=[ordering(within=0.2)])
    assert said(near, record("x", **ahead), record("y", **ahead)) == REPRODUCED
    for unfinished in "xy":
        sides = [record(name, complete=name != unfinished, **ahead) for name in "xy"]
        assert said(near, *sides) == UNFINISHED


@pytest.mark.parametrize(("other", "whole"), [(0.96, REFUTED), (0.9199, OPEN)])
def test_as_good_as_is_refuted_or_open_by_complete_runs_alone(other, whole):
    near = claim(direction=[ordering(within=0.02)])
    assert said(near, record("x", score=0.9), record("y", score=other)) == whole
    for unfinished in "xy":
        sides = [record(name, complete=name != unfinished, score=0.9 if name == "x" else other) for name in "xy"]
        assert said(near, *sides) == UNFINISHED


# ---------------------------------------- orderings


def test_orderings():
    measured = [record("x", score=(0.50, 0.05)), record("y", score=(0.70, 0.05))]
    assert said(claim(better="lower", direction=[ordering()]), *measured) == REPRODUCED
    assert said(claim(better="higher", direction=[ordering()]), *measured) == REFUTED
    measured[1] = record("y", score=(0.52, 0.05))
    assert said(claim(better="lower", direction=[ordering()]), *measured) == OPEN


@pytest.mark.parametrize(
    "other, expected", [(0.905, REPRODUCED), (0.895, REPRODUCED), (0.9199, OPEN), (0.96, REFUTED), (0.84, REFUTED)]
)
def test_as_good_as(other, expected):
    measured = [record("x", score=0.9), record("y", score=other)]
    assert said(claim(direction=[ordering(within=0.02)]), *measured) == expected


def test_all_comparisons_have_to_hold_and_one_reversed_refutes():
    measured = [record("x", score=0.9), record("y", score=0.8), record("z", score=0.95), record("w", score=0.9)]
    assert said(claim(direction=[ordering(), ordering("w/score")]), *measured) == OPEN
    assert said(claim(direction=[ordering(), ordering("z/score")]), *measured) == REFUTED
    assert said(claim(direction=[ordering(), ordering(0.85)]), *measured) == REPRODUCED


def test_without_a_record_nothing_is_said():
    assert said(claim(value=0.9), record("y", score=1.0)) == NOT_RUN
    assert said(claim(direction=[ordering()]), record("x", score=1.0)) == NOT_RUN
    assert said(claim(value=0.9, no_data="there are no images"), record("x", score=1.0)) == NO_DATA
    # A number is judged though what it is set beside is missing.
    assert said(claim(value=0.9, direction=[ordering()]), record("x", score=1.0)) == REPRODUCED


def test_toy_scale_decides_nothing_and_is_shown():
    one = claim(direction=[ordering()], toy="five epochs")
    found = judge([one], {"x": record("x", score=0.9), "y": record("y", score=0.1)})["c"]
    assert found.verdict == TOY and found.p < 0.001
    assert said(claim(value=0.1, toy="five epochs"), record("x", score=0.9)) == TOY


def test_what_is_counted_is_decided_by_its_values():
    measured = [record("x", score=(4, None)), record("y", score=(8, None))]
    assert said(claim(better="lower", direction=[ordering()]), *measured) == OPEN
    assert said(claim(better="lower", direction=[ordering()], exact=True), *measured) == REPRODUCED
    assert said(claim(better="higher", direction=[ordering()], exact=True), *measured) == REFUTED


def test_a_metric_that_a_record_lacks_is_one_sentence():
    assert "the record x has no metric 'mse'; it has: score" in refused(
        lambda: judge([claim(value=0.5, metric="mse")], {"x": record("x", score=0.9)})
    )


# ---------------------------------------- families


def test_holm():
    assert holm([]) == [] and holm([0.3]) == [0.3]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_family_is_one_paper_and_one_origin():
    """p of 0.03 alone: significant by itself, not beside another of the same origin that is not."""
    half = 0.1 * stats.t.ppf(0.975, 4) / stats.t.ppf(0.97, 4)
    measured = {"x": record("x", score=(0.1, half)), "y": record("y", score=(0.0, half))}
    one = claim("one", direction=[ordering(0)])
    assert judge([one], measured)["one"].p == pytest.approx(0.03, rel=0.01)
    open_ = claim("two", direction=[ordering(0, left="y/score")])
    both = judge([one, open_], measured)
    assert both["one"].verdict == OPEN and both["one"].p == pytest.approx(0.06, rel=0.01)
    for alone in (
        claim("two", direction=[ordering(0, left="y/score")], origin="own"),
        claim("two", toy="t", value=1.0),
        claim("two", direction=[ordering(0, left="y/score")], toy="t"),
    ):
        assert judge([one, alone], measured)["one"].verdict == REPRODUCED


def test_one_of_several_orderings_that_is_reversed_by_chance_does_not_refute():
    """p of 0.03 for the opposite of one: of two it is 0.06."""
    half = 0.1 * stats.t.ppf(0.975, 4) / stats.t.ppf(0.97, 4)
    measured = {"x": record("x", score=(-0.1, half)), "y": record("y", score=(0.0, half))}
    alone = judge([claim(direction=[ordering(0)])], measured)["c"]
    both = judge([claim(direction=[ordering(0), ordering(0, left="y/score")])], measured)["c"]
    assert (alone.verdict, both.verdict) == (REFUTED, OPEN)
    assert alone.opposite == pytest.approx(0.03, rel=0.01) and both.opposite == pytest.approx(0.06, rel=0.01)


def test_only_runs_of_the_same_seed_are_paired():
    samples = {"samples": {"score": [0.1, 0.2, 0.3, 0.4, 0.5]}}
    one, other = (record(name, score=0.3) | samples for name in "xy")
    compared = [claim(direction=[ordering()])]
    assert judge(compared, {"x": one, "y": other})["c"].comparisons[0].paired == "seed"
    other["config"] = other["config"] | {"seed": 1}
    assert judge(compared, {"x": one, "y": other})["c"].comparisons[0].paired == ""


# ---------------------------------------- the tests themselves


def spread(values):
    return of_interval(Interval(float(np.mean(values)), 0.0, len(values), samples=values, per="seed"))


def test_welch_and_the_paired_test_are_scipys():
    draws = np.random.default_rng(0)
    one, other = draws.normal(0.2, 1.0, 7), draws.normal(0.0, 3.0, 4)
    assert difference(spread(one), spread(other)).p_above(0.0) == pytest.approx(
        stats.ttest_ind(one, other, equal_var=False, alternative="greater").pvalue
    )
    third = one + draws.normal(0.1, 0.2, 7)
    assert difference(spread(one), spread(third), paired=True).p_below(0.0) == pytest.approx(
        stats.ttest_rel(one, third, alternative="less").pvalue
    )
    # Without the samples the half-width gives the same.
    half = stats.t.ppf(0.975, 6) * one.std(ddof=1) / 7**0.5
    by_width = of_interval(Interval(float(one.mean()), half, 7, per="seed"))
    assert difference(by_width, spread(other)).p_above(0.0) == pytest.approx(
        difference(spread(one), spread(other)).p_above(0.0)
    )


def test_a_printed_number_brings_its_interval_as_an_error():
    ours, printed = Interval(0.97, 0.01, 600, per="task"), Interval(0.98, 0.02, 0)
    found = difference(of_interval(ours), of_interval(printed))
    assert found.error == pytest.approx(math.hypot(0.01 / stats.t.ppf(0.975, 599), 0.02 / 1.96))


@pytest.mark.parametrize("seeds", [3, 5, 8, 20])
def test_error_rate_and_power(seeds):
    """Without a lead 5 % are called significant; the lead that is printed as detectable is found in 80 %."""
    draws, trials = np.random.default_rng(seeds), 4_000
    noise = draws.normal(size=(2, trials, seeds))
    for lead, expected in ((0.0, 0.05), (math.nan, 0.80)):
        error = (2 / seeds) ** 0.5  # as known, so that the lead is the same in every trial
        degrees = 2 * (seeds - 1)
        if math.isnan(lead):
            lead = (stats.t.ppf(0.95, degrees) + stats.t.ppf(0.80, degrees)) * error
        left, right = noise[0] + lead, noise[1]
        apart = left.mean(1) - right.mean(1)
        parts = left.var(1, ddof=1) / seeds, right.var(1, ddof=1) / seeds
        df = (parts[0] + parts[1]) ** 2 / ((parts[0] ** 2 + parts[1] ** 2) / (seeds - 1))
        p = stats.t.sf(apart / (parts[0] + parts[1]) ** 0.5, df)
        for trial in range(20):  # the vectorised formula is the rule's
            ours = difference(spread(left[trial]), spread(right[trial])).p_above(0.0)
            assert ours == pytest.approx(p[trial], rel=1e-9)
        allowed = 0.012 if expected == 0.05 else 0.06  # Welch with three seeds is a little conservative
        assert abs((p <= verdicts.LEVEL).mean() - expected) < allowed


@pytest.mark.parametrize("seeds", [3, 8])
def test_error_rate_of_a_whole_family(seeds):
    """Ten claims of which none is true: in at most about 5 % of the books one is called reproduced."""
    draws, books = np.random.default_rng(0), 400
    wrong = 0
    for _ in range(books):
        values = [spread(draws.normal(size=seeds)) for _ in range(20)]
        p = [difference(values[2 * k], values[2 * k + 1]).p_above(0.0) for k in range(10)]
        wrong += min(holm(p)) <= verdicts.LEVEL
    assert wrong / books < 0.085  # 0.05 and three standard errors


# ---------------------------------------- the committed claims


def test_verdicts_of_the_book_follow_from_the_samples_alone():
    """Every comparison of every claim, computed again from the files of samples with SciPy."""
    recorded, compared = records.load_all(), 0
    for paper in {one.paper for one in load_claims()}:
        claims = load_claims(paper)
        for name, judgement in judge(claims, recorded).items():
            for comparison in judgement.comparisons:
                sides = [comparison.left, comparison.right]
                if judgement.claim.exact or not all(side.measured.samples or side.measured.n == 0 for side in sides):
                    continue
                sign = -1 if judgement.claim.better == "lower" else 1
                values = [
                    np.array(records.load_samples(side.what.split("/")[0])[side.what.split("/")[1]]) if "/" in side.what
                    else side.measured.value for side in sides
                ]  # fmt: skip
                compared += 1

                def p(shift, alternative, values=values, paired=comparison.paired, sign=sign):
                    left, right = sign * values[0] - shift, sign * values[1]
                    if isinstance(right, float) or paired:
                        found = stats.ttest_1samp(left - right, 0.0, alternative=alternative)
                    else:
                        found = stats.ttest_ind(left, right, equal_var=False, alternative=alternative)
                    return found.pvalue

                bound = comparison.within or 0.0
                expected = max(p(-bound, "greater"), p(bound, "less")) if bound else p(0.0, "greater")
                if math.isnan(expected):  # neither side varies: SciPy says nothing, the values decide
                    assert comparison.found.error == 0 and comparison.p in (0.0, 0.5, 1.0), name
                    continue
                assert comparison.p == pytest.approx(expected, rel=1e-3, abs=1e-9), name
    assert compared or not any(records.known_digest(entry) for entry in recorded.values())
