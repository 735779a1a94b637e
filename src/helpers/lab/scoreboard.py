"""Verdicts for readers: one picture of all, one sentence for a finding, one fold of claims for each paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helpers.lab import records
from helpers.lab.tables import Table
from helpers.lab.verdicts import (
    KINDS,
    MISSED,
    NO_DATA,
    NOT_RUN,
    OPEN,
    REFUTED,
    REPRODUCED,
    TOY,
    UNFINISHED,
    Comparison,
    Judgement,
)  # fmt: skip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINTS = {
    REPRODUCED: "#0072B2", MISSED: "#D55E00", REFUTED: "#E69F00", OPEN: "#56B4E9",
    UNFINISHED: "#B8D9EA", TOY: "#C9C9C9", NO_DATA: "#E4E4E4", NOT_RUN: "#F4F4F4",
}  # fmt: skip


def bars(judged: Sequence[Judgement], titles: Mapping[str, str]) -> Figure:
    """A bar a paper, cut by verdict, with the counts.

    Args:
        judged: of all papers.
        titles: what to call each paper, in the order of the bars.
    """
    from helpers.lab import figures

    counted = {paper: Counter(j.verdict for j in judged if j.claim.paper == paper) for paper in titles}
    counted = {paper: counts for paper, counts in counted.items() if counts}
    figure, ax = figures.subplots(height=1.0 + 0.28 * len(counted))
    left = [0.0] * len(counted)
    for kind in KINDS:
        widths = [counts[kind] for counts in counted.values()]
        if any(widths):
            drawn = ax.barh(
                range(len(counted)),
                widths,
                left=left,
                color=TINTS[kind],
                label=kind,
                edgecolor="#6E6E6E",
                linewidth=0.4,
            )
            white = kind in (REPRODUCED, MISSED)
            words = [str(width or "") for width in widths]
            ax.bar_label(drawn, words, label_type="center", color="white" if white else "black", fontsize=8)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    ax.set_yticks(range(len(counted)), [titles[paper] for paper in counted])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlim=(0, 1.02 * max(left, default=1)), ylim=(len(counted) - 0.5, -0.5), xlabel="claims")
    ax.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def measured(judgement: Judgement) -> str:
    """What was measured for a claim: a number with its interval, or the lead of each comparison with its p.

    >>> from helpers.lab.verdicts import judge_all
    >>> measured(judge_all({})["maml-omniglot-5w1s"])
    '–'
    """
    if (number := judgement.number) is not None:
        return _value(judgement, number.left.measured)
    return "; ".join(_lead(judgement, comparison) for comparison in judgement.comparisons) or "–"


def printed(judgement: Judgement) -> str:
    """What the paper prints: a number with its interval, or that the claim is an ordering."""
    claim = judgement.claim
    if claim.value is None:
        return "an ordering"
    factor, unit, digits = _unit(judgement)
    half = "" if claim.ci95 is None else f" ± {factor * claim.ci95:.{digits}f}"
    return f"{factor * claim.value:.{digits}f}{half}{unit}{' (from memory)' * claim.from_memory}"


def scale(judgement: Judgement, recorded: Mapping[str, records.Record]) -> str:
    """How far the run got, over what the interval is, and what is smaller than in the paper."""
    record = recorded.get(judgement.claim.experiment)
    if record is None:
        return "–"
    entry = record["metrics"].get(judgement.claim.metric, {"n": 1})
    kind = "seeds" if entry.get("per", "seed" if entry["n"] < 100 else "task") == "seed" else "test tasks"
    samples = f"{entry['n']:,} {kind}" if entry["n"] > 1 else ""
    run = "" if judgement.live or record["iterations"]["planned"] == 1 else records.progress(record)
    return "; ".join(filter(None, ["measured on the page" * judgement.live, run, samples, judgement.claim.toy])) or "–"


def fold(title: str, judged: Sequence[Judgement], recorded: Mapping[str, records.Record]) -> str:
    """All claims of a paper as Markdown, folded under a line that counts them.

    The columns are claim, printed, measured, verdict, scale and the command that makes the record.
    """
    counted = Counter(j.verdict for j in judged)
    counts = ", ".join(f"{counted[kind]} {kind}" for kind in KINDS if counted[kind])
    rows = []
    for judgement in judged:
        claim = judgement.claim
        origin = {"paper": "", "other": " (another paper)", "own": " (the book's question)"}[claim.origin]
        record = recorded.get(claim.experiment, {})
        command = f"refresh {record['config']['chapter']}" if judgement.live else f"train {claim.experiment}"
        rows.append([
            f"{claim.quantity}{origin}; {claim.where}", printed(judgement), measured(judgement), said(judgement),
            scale(judgement, recorded), "–" if judgement.verdict == NO_DATA else f"`metabook {command}`",
        ])  # fmt: skip
    header = ["claim", "printed", "measured", "verdict", "scale", "made by"]
    return Table(header, rows, fold=f"{title}: {counts}")._repr_markdown_()


def outcome(judged: Sequence[Judgement]) -> str:
    """The claims that were tested, with what was measured and the verdict, as Markdown; of the others their number."""
    there = [judgement for judgement in judged if judgement.verdict not in (NO_DATA, NOT_RUN)]
    rows = [[j.claim.quantity, printed(j), measured(j), said(j)] for j in there]
    table = Table(["claim", "printed", "measured", "verdict"], rows)._repr_markdown_()
    counted = Counter(judgement.verdict for judgement in judged)
    absent = [f"{counted[NOT_RUN]} for want of a record"] * bool(counted[NOT_RUN])
    absent += [f"{counted[NO_DATA]} for want of data"] * bool(counted[NO_DATA])
    return table + (f"\n\nNot tested: {' and '.join(absent)}." if absent else "")


def walk(judgement: Judgement, recorded: Mapping[str, records.Record]) -> list[str]:
    """The way from what a paper says to the verdict, in steps: claim, experiment, samples, test, verdict."""
    claim = judgement.claim
    steps = [f"Claim `{claim.id}`: {claim.quantity} ({claim.where}). Printed: {printed(judgement)}."]
    if judgement.verdict == NO_DATA:
        return [*steps, claim.no_data, f"Verdict: {said(judgement)}."]
    missing = [name for name in claim.experiments if name not in recorded]
    if judgement.verdict == NOT_RUN:
        names = " and ".join(f"`{name}`" for name in missing)
        return [*steps, f"There is no record of {names}.", f"Verdict: {said(judgement)}."]
    runs = [f"`{name}` ({scale(judgement, {claim.experiment: recorded[name]})})" for name in claim.experiments]
    steps.append(f"Records: {' and '.join(runs)}.")
    comparisons = [judgement.number] if judgement.number else judgement.comparisons
    for comparison in comparisons:
        sides = [f"{side.what}, {_value(judgement, side.measured)}" for side in (comparison.left, comparison.right)]
        kind = f"paired over {comparison.paired}s" if comparison.paired else "not paired"
        factor, (lead, error, degrees) = _unit(judgement)[0], comparison.found
        freedom = f"{degrees:.3g} degrees of freedom" if degrees < float("inf") else "the normal distribution"
        test = f"standard error {factor * error:.2g}, {freedom}, p {_p(comparison.p)}" if error > 0 else "no spread"
        steps.append(f"{sides[0]}, against {sides[1]}: lead {factor * lead:+.3g} ({kind}; {test}).")
    if judgement.p is not None and judgement.number is None:
        steps.append(f"Corrected p of the ordering: {_p(judgement.p)}; of its opposite: {_p(judgement.opposite)}.")
    elif judgement.opposite is not None:
        steps.append(f"Corrected p of the shortfall: {_p(judgement.opposite)}.")
    return [*steps, f"Verdict: {said(judgement)}."]


def said(judgement: Judgement) -> str:
    """The verdict in italics, with what a reader has to know beside it."""
    claim = judgement.claim
    beside = [claim.no_data] if judgement.verdict == NO_DATA else []
    beside += ["live"] * judgement.live
    if judgement.verdict == OPEN and claim.value is None and judgement.detectable:
        beside.append(f"a lead of {_unit(judgement)[0] * judgement.detectable:.2g} would have been seen")
    return f"*{judgement.verdict}*" + (f" ({'; '.join(beside)})" if beside else "")


def _unit(judgement: Judgement) -> tuple[float, str, int]:
    """Factor, unit and decimal places of a claim's metric."""
    return (100.0, " %", 2) if "accuracy" in judgement.claim.metric else (1.0, "", 3)


def _value(judgement: Judgement, interval: Any) -> str:
    factor, unit, digits = _unit(judgement)
    half = f" ± {factor * interval.ci95:.{digits}f}" if interval.ci95 > 0 else ""
    return f"{factor * interval.value:.{digits}f}{half}{unit}"


def _p(value: float) -> str:
    """A p-value as pages show it."""
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _lead(judgement: Judgement, comparison: Comparison) -> str:
    factor, unit, _ = _unit(judgement)
    lead = f"{factor * comparison.found.lead:+.3g}{' points' if unit else ''}"
    if comparison.within is not None:
        allowed = factor * comparison.within
        digits = max(0, 2 - math.floor(math.log10(allowed)))  # what is smaller is rounding
        lead = f"apart by {factor * abs(comparison.found.lead):.{digits}f} of {allowed:g} allowed"
    words = f"{comparison.label}: " if comparison.label else ""
    if "seconds" in judgement.claim.metric:  # a time belongs to one machine, and to one minute of it
        return words + ("shorter" if comparison.found.lead > 0 else "not shorter")
    return f"{words}{lead}" if judgement.claim.exact else f"{words}{lead}, p {_p(comparison.p)}"
