"""Claims of the papers and the verdicts that records give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import yaml

from helpers.errors import UserError, nearest
from helpers.lab.records import Record, metric
from helpers.lab.statistics import Interval
from helpers.runtime import root

REPRODUCED = "reproduced"
DIRECTION = "direction holds"
MISSED = "not reproduced"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Claim:
    """One quantity that a paper states.

    Attributes:
        id: short unique name.
        quantity: what is measured, in words.
        value, ci95: as printed in the paper; fractions for accuracies. None for a claim without a number.
        where: table, figure or section of the paper.
        experiment, metric: the record and its metric that answer the claim.
        better: ``"higher"`` or ``"lower"`` is better.
        direction: comparisons ``{"left": EXPERIMENT/METRIC, "right": EXPERIMENT/METRIC or a number, "label": words}``;
            each must hold, left being better, for the verdict *direction holds*. With ``"within": d`` it is that the
            two differ by at most d.
        from_memory: the number was not checked against the paper itself.
        note: what differs between the paper's set-up and ours.
    """

    paper: str
    id: str
    quantity: str
    where: str
    experiment: str
    metric: str
    value: float | None = None
    ci95: float | None = None
    better: str = "higher"
    direction: tuple[dict[str, Any], ...] = ()
    from_memory: bool = False
    note: str = ""


def load_claims(paper: str | None = None) -> list[Claim]:
    """The claims of one paper, or of all.

    Raises:
        UserError: if a file is missing or does not describe claims.
    """
    where = root() / "data" / "claims"
    paths = sorted(where.glob("*.yaml")) if paper is None else [where / f"{paper}.yaml"]
    claims = []
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            for entry in content["claims"]:
                claims.append(Claim(paper=content["paper"], **entry | {"direction": tuple(entry.get("direction", ()))}))
        except FileNotFoundError:
            known = [p.stem for p in sorted(where.glob("*.yaml"))]
            raise UserError(
                f"there is no claims file {path}{nearest(path.stem, known)}; known papers: {', '.join(known)}"
            ) from None
        except (OSError, yaml.YAMLError, AttributeError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"the claims file {path} cannot be read ({' '.join(str(error).split())}): "
                "mend it after data/schemas/claims.schema.json"
            ) from None
    return claims


def operand(what: str | float, records: dict[str, Record]) -> Interval | None:
    """A direction's operand: a number, or ``EXPERIMENT/METRIC`` looked up in the records; None without that record.

    Raises:
        UserError: if the record has no such metric.
    """
    if isinstance(what, (int, float)):
        return Interval(float(what), 0.0, 0)
    experiment, _, name = what.partition("/")
    return metric(records[experiment], name) if experiment in records else None


def _known(ci95: float | None) -> float:
    """A half-width for comparisons: an interval that was not given has width 0, which is the strict reading."""
    return 0.0 if ci95 is None or math.isnan(ci95) else ci95


def holds(comparison: dict[str, Any], better: str, records: dict[str, Record]) -> bool | None:
    """Whether one comparison of a claim's ``direction`` holds; None where a record that it needs is missing."""
    left, right = operand(comparison["left"], records), operand(comparison["right"], records)
    if left is None or right is None:
        return None
    ahead = (left.value - right.value) * (-1 if better == "lower" else 1)
    if "within" in comparison:
        return abs(ahead) <= comparison["within"]
    return ahead > _known(left.ci95) + _known(right.ci95)


def verdict(claim: Claim, records: dict[str, Record]) -> str:
    """Hold a claim against the records.

    *Reproduced*: the record's 95 % interval reaches the claim's, or lies on its better side. *Direction holds*: it does
    not, but every comparison under ``direction`` holds with the two intervals apart. A claim without a number consists
    of its comparisons alone, so it is reproduced where they hold. *Not run*: a record that is needed is missing.

    >>> claim = load_claims("maml")[0]
    >>> claim.paper, verdict(claim, {})
    ('maml', 'not run')
    """
    record = records.get(claim.experiment)
    if record is None:
        return NOT_RUN
    sign = -1 if claim.better == "lower" else 1
    if claim.value is not None:
        ours = metric(record, claim.metric)
        if sign * (ours.value - claim.value) + _known(ours.ci95) + _known(claim.ci95) >= 0:
            return REPRODUCED
    if not claim.direction:
        return MISSED
    answers = [holds(comparison, claim.better, records) for comparison in claim.direction]
    if None in answers:
        return NOT_RUN if claim.value is None else MISSED
    if claim.value is None:
        return REPRODUCED if all(answers) else MISSED
    return DIRECTION if all(answers) else MISSED
