"""Verdicts: what the records say about the claims, by one rule for all of them.

*reproduced*
    An ordering: every comparison holds at one-sided 5 %, after Holm's correction. A number: the 95 % interval of the
    record reaches that of the paper, or lies on its better side; a baseline has to be met from both sides.
*missed*
    A number is not reached, significantly so; the interval that the paper prints counts as an error of the number.
*refuted*
    The opposite of an ordering is significant.
*open*
    None of these: the data could have shown a lead of the size that is printed beside it, with a power of 80 %.
*unfinished*
    A run is not complete, and it is not on the winning side already.
*toy scale*
    What was compared is of another scale than the claim, so that it decides nothing.
*no data*, *not run*
    The data cannot be had; a record is missing.

Two sides are compared by a paired t-test over seeds where they share them, over tasks where they are two evaluations of
the same networks, and otherwise by Welch's. "As good as", within a distance, is two one-sided tests. One family of
Holm's correction is all tested claims of one paper and one origin; the opposites are another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from helpers.lab import records
from helpers.lab.claims import Claim, load_claims
from helpers.lab.records import Record
from helpers.lab.statistics import Difference, Interval, difference, holm, of_interval

REPRODUCED, MISSED, REFUTED, OPEN = "reproduced", "missed", "refuted", "open"
UNFINISHED, TOY, NO_DATA, NOT_RUN = "unfinished", "toy scale", "no data", "not run"
KINDS = (REPRODUCED, MISSED, REFUTED, OPEN, UNFINISHED, TOY, NO_DATA, NOT_RUN)
LEVEL = 0.05  # one-sided, after Holm's correction


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        what: ``EXPERIMENT/METRIC``, or the number in words.
        measured: mean and interval, with the samples where they are kept.
        complete: whether the run behind it is.
        seeds: what the seeds behind it are, equal for two sides that share them; None where nobody can tell.
    """

    what: str
    measured: Interval
    complete: bool = True
    seeds: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Comparison:
    """Whether ``left`` is better than ``right``, or, with ``within``, as good.

    Attributes:
        label: in words, as the claim has it.
        found: the lead of ``left`` in the claimed direction, with its standard error.
        paired: ``"seed"`` or ``"task"`` for a paired test, empty for Welch's.
        p: of the claim's being false; the smaller, the surer it holds.
        opposite: of the opposite's being false.
    """

    left: Side
    right: Side
    label: str
    within: float | None
    found: Difference
    paired: str
    p: float
    opposite: float


@dataclass(frozen=True)
class Judgement:
    """What the records say about one claim.

    Attributes:
        verdict: one of :data:`KINDS`.
        number: our measurement against the printed value; None for an ordering.
        comparisons: of the claim's direction, as far as there are records.
        p, opposite: of the claim and of its opposite, after Holm's correction; None where nothing is tested.
        live: the chapter itself measures it, each time it runs.
    """

    claim: Claim
    verdict: str
    number: Comparison | None = None
    comparisons: tuple[Comparison, ...] = ()
    p: float | None = None
    opposite: float | None = None
    live: bool = False
    alone: tuple[float | None, float | None] = field(default=(None, None), repr=False)  # before the correction

    @property
    def detectable(self) -> float | None:
        """The smallest lead that the data would have shown with a power of 80 %: the largest of its comparisons.

        None where nothing has a spread.
        """
        leads = [c.found.detectable for c in ([self.number] if self.number else self.comparisons)]
        return max((lead for lead in leads if lead > 0), default=None)


def judge(claims: Sequence[Claim], recorded: Mapping[str, Record]) -> dict[str, Judgement]:
    """Hold claims against the records; the claims of a paper belong together, since their tests are corrected together.

    Args:
        claims: all of one or several papers.
        recorded: by experiment, as :func:`helpers.lab.records.load_all` gives them.

    Returns:
        By the claim's id.

    Raises:
        UserError: if a record has no metric of that name.

    >>> claims = load_claims("maml")
    >>> judge(claims, {})["maml-omniglot-5w1s"].verdict
    'not run'
    """
    sides = _Sides(recorded)
    found = {claim.id: _tested(claim, sides) for claim in claims}
    for paper, origin in dict.fromkeys((claim.paper, claim.origin) for claim in claims):
        family = [claim.id for claim in claims if (claim.paper, claim.origin) == (paper, origin)]
        for which in (0, 1):
            tested = {name: p for name in family if (p := found[name].alone[which]) is not None}
            for name, p in zip(tested, holm(list(tested.values())), strict=True):
                found[name] = replace(found[name], **{("p", "opposite")[which]: p})
    return {name: replace(judgement, verdict=_verdict(judgement)) for name, judgement in found.items()}


def judge_all(recorded: Mapping[str, Record] | None = None) -> dict[str, Judgement]:
    """All claims of the book against its records."""
    return judge(load_claims(), records.load_all() if recorded is None else recorded)


def in_words(judgement: Judgement) -> str:
    """What is known about an ordering: the lead of each comparison, its p, and what lead would have been seen."""
    parts = []
    for comparison in judgement.comparisons if judgement.number is None else ():
        found, near = comparison.found, comparison.within
        lead = f"lead {found.lead:+.3g}" if near is None else f"difference {found.lead:+.3g}, allowed {near:g}"
        seen = f", detectable {found.detectable:.2g}" if found.detectable > 0 else ""
        parts.append(f"{lead}{seen}, p {comparison.p:.2g}")
    return f" ({'; '.join(parts)})" if parts else ""


def headline(judged: Sequence[Judgement]) -> str:
    """How many claims of the papers got which verdict; those whose data cannot be had, and the book's own, not counted.

    >>> headline([])
    ''
    """
    counted = Counter(j.verdict for j in judged if j.claim.origin == "paper" and j.verdict != NO_DATA)
    if not counted:
        return ""
    kinds = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind] and kind != REPRODUCED)
    return f"{counted[REPRODUCED]} of {counted.total()} reproduced" + f"; {kinds}" * bool(kinds)


def as_json(judgement: Judgement) -> dict[str, Any]:
    """Everything behind a verdict, fit for JSON: the claim, the comparisons, their p-values, the samples' names."""
    claim = judgement.claim

    def side(of: Side) -> dict[str, Any]:
        measured = of.measured
        return {
            "what": of.what,
            "value": measured.value,
            "ci95": None if math.isnan(measured.ci95) else measured.ci95,
            "n": measured.n,
            "per": measured.per or None,
            "complete": of.complete,
        }

    def comparison(of: Comparison) -> dict[str, Any]:
        detectable = of.found.detectable
        return {
            "label": of.label or None,
            "left": side(of.left),
            "right": side(of.right),
            "within": of.within,
            "lead": of.found.lead,
            "standard_error": None if math.isnan(of.found.error) else of.found.error,
            "degrees": of.found.degrees if math.isfinite(of.found.degrees) else None,
            "smallest_detectable_lead": None if math.isnan(detectable) else detectable,
            "test": f"paired by {of.paired}" if of.paired else "Welch",
            "p": of.p,
            "p_opposite": of.opposite,
        }

    return {
        "id": claim.id,
        "of": claim.paper,
        "origin": claim.origin,
        "quantity": claim.quantity,
        "where": claim.where,
        "experiment": claim.experiment,
        "metric": claim.metric,
        "paper": claim.value,
        "paper_ci95": claim.ci95,
        "verdict": judgement.verdict,
        "live": judgement.live,
        "p": judgement.p,
        "p_opposite": judgement.opposite,
        "number": judgement.number and comparison(judgement.number),
        "comparisons": [comparison(each) for each in judgement.comparisons],
    }


class _Sides:
    """Looks up sides of comparisons, each record's samples once."""

    def __init__(self, recorded: Mapping[str, Record]) -> None:
        self.recorded, self.samples = recorded, {}

    def of(self, what: str | float, ci95: float | None = None) -> Side | None:
        """A number, or ``EXPERIMENT/METRIC``; None without that record."""
        if not isinstance(what, str):
            return Side("the printed number" if ci95 is not None else f"{what:g}", Interval(float(what), ci95 or 0, 0))
        name, _, metric = what.partition("/")
        if name not in self.recorded:
            return None
        record = self.recorded[name]
        measured = records.metric(record, metric)
        if name not in self.samples:
            kept = records.load_samples(name) if records.known_digest(record) else {}
            self.samples[name] = record.get("samples", kept)
        if (values := self.samples[name].get(metric)) is not None:
            measured = Interval(*measured, samples=values, per=measured.per)
        config = record["config"]
        shared = (record["paper"], config.get("seed"), measured.n) if measured.per == "seed" else None
        return Side(what, measured, record["status"] == "complete", shared)


def _tested(claim: Claim, sides: _Sides) -> Judgement:
    """The comparisons of a claim with their p-values; the verdict is only whether anything can be said."""
    own = sides.recorded.get(claim.experiment)
    if claim.no_data:
        return Judgement(claim, NO_DATA)
    missing = [name for name in claim.experiments if name not in sides.recorded]
    if own is None or (claim.value is None and missing):
        return Judgement(claim, NOT_RUN)
    comparisons = []
    for entry in claim.direction:
        left, right = sides.of(entry["left"]), sides.of(entry["right"])
        if left is not None and right is not None:
            comparisons.append(_compared(claim, left, right, entry.get("label", ""), entry.get("within")))
    live = own.get("kind") == "live"
    if claim.value is None:
        exact = claim.exact
        p = max(c.p for c in comparisons)
        opposite = min(1.0, len(comparisons) * min(c.opposite for c in comparisons))
        alone = (None, None) if claim.toy or exact else (p, opposite)
        judgement = Judgement(claim, OPEN, None, tuple(comparisons), p, opposite, live, alone)
    else:
        ours = sides.of(f"{claim.experiment}/{claim.metric}")
        printed = sides.of(claim.value, claim.ci95 or 0.0)
        assert ours is not None and printed is not None
        number = _compared(claim, ours, printed, "", None)
        missed = min(1.0, 2 * min(number.p, number.opposite)) if claim.baseline else number.opposite
        alone = (None, None if claim.toy else missed)
        judgement = Judgement(claim, OPEN, number, tuple(comparisons), None, missed, live, alone)
    return replace(judgement, verdict=TOY) if claim.toy else judgement


def _compared(claim: Claim, left: Side, right: Side, label: str, within: float | None) -> Comparison:
    sign = -1 if claim.better == "lower" else 1
    one, other = left.what.partition("/")[0], right.what.partition("/")[0]
    alike = left.measured.per if (left.measured.per, left.measured.n) == (right.measured.per, right.measured.n) else ""
    paired = alike if one == other or (left.seeds is not None and left.seeds == right.seeds) else ""
    kept = left.measured.samples is not None and right.measured.samples is not None
    paired = paired if kept else ""
    sides = [of_interval(side.measured, exact=claim.exact) for side in (left, right)]
    found = difference(*sides, paired=bool(paired)).times(sign)
    if within is None:
        return Comparison(left, right, label, None, found, paired, found.p_above(0.0), found.p_below(0.0))
    p = max(found.p_above(-within), found.p_below(within))
    opposite = min(1.0, 2 * min(found.p_above(within), found.p_below(-within)))
    return Comparison(left, right, label, within, found, paired, p, opposite)


def _verdict(judgement: Judgement) -> str:
    """The rule, once the p-values are corrected."""
    claim, verdict = judgement.claim, judgement.verdict
    if verdict != OPEN:
        return verdict
    if (number := judgement.number) is not None:
        ours, printed = number.left.measured, number.right.measured
        lead, reach = number.found.lead, _known(ours.ci95) + _known(printed.ci95)
        met = abs(lead) <= reach if claim.baseline else lead + reach >= 0
        if met:
            return REPRODUCED
        if not number.left.complete:
            return UNFINISHED
        return MISSED if (judgement.opposite or 0.0) <= LEVEL else OPEN
    comparisons = judgement.comparisons
    assert judgement.p is not None and judgement.opposite is not None
    if judgement.p <= LEVEL:
        losers = [c.right for c in comparisons] + [c.left for c in comparisons if c.within is not None]
        return REPRODUCED if all(side.complete for side in losers) else UNFINISHED
    if judgement.opposite <= LEVEL:
        reversed_ = min(comparisons, key=lambda c: c.opposite)
        losers = [reversed_.left] + ([reversed_.right] if reversed_.within is not None else [])
        return REFUTED if all(side.complete for side in losers) else UNFINISHED
    return OPEN if all(side.complete for c in comparisons for side in (c.left, c.right)) else UNFINISHED


def _known(ci95: float) -> float:
    """A half-width for comparisons: an interval that was not given has width 0, which is the strict reading."""
    return 0.0 if math.isnan(ci95) else ci95
