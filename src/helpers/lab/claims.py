"""Claims of the papers and the verdicts that records give."""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, get_type_hints

from helpers import settings
from helpers.errors import UserError, nearest
from helpers.lab.records import Record, metric
from helpers.lab.statistics import Interval
from helpers.parsing import from_yaml
from helpers.runtime import root
from helpers.validate import one_of, positive

REPRODUCED = "reproduced"
DIRECTION = "direction holds"
MISSED = "not reproduced"
NOT_RUN = "not run"
SIDES = {"left": str, "right": str | float, "within": float, "label": str}  # of a comparison


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


def papers() -> list[str]:
    """The papers that have a file of claims."""
    return sorted(path.stem for path in (root() / "data" / "claims").glob("*.yaml"))


def load_claims(paper: str | None = None) -> list[Claim]:
    """The claims of one paper, or of all.

    Raises:
        UserError: if a file is missing or does not describe claims.
    """
    where = root() / "data" / "claims"
    paths = [where / f"{name}.yaml" for name in ([paper] if paper is not None else papers())]
    claims = []
    for path in paths:
        try:
            content = from_yaml(path.read_text(encoding="utf-8"))
            if content["paper"] != path.stem:
                raise ValueError(f"its paper is {reprlib.repr(content['paper'])}")
            if not content["claims"]:
                raise ValueError("there are no claims")
            claims += [_claim(path.stem, entry) for entry in content["claims"]]
        except FileNotFoundError:
            raise UserError(
                f"there is no claims file {path}{nearest(path.stem, papers())}; known papers: {', '.join(papers())}"
            ) from None
        except (OSError, UserError, AttributeError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"the claims file {path} cannot be read ({' '.join(str(error).split())[:200]}): "
                "mend it after data/schemas/claims.schema.json"
            ) from None
    ids = [claim.id for claim in claims]
    if twice := next((claim for claim in claims if ids.count(claim.id) > 1), None):
        raise UserError(
            f"two claims are called {twice.id!r}, one of them in {where / f'{twice.paper}.yaml'}: call one otherwise "
            "(an `id` is unique; mend it after data/schemas/claims.schema.json)"
        )
    return claims


def _claim(paper: str, entry: dict[str, Any]) -> Claim:
    """One entry of a claims file, of which each part is what its field declares.

    Raises:
        AttributeError, KeyError, TypeError, UserError, ValueError: if one is not.
    """
    of, kinds = reprlib.repr(entry.get("id")), get_type_hints(Claim)
    for name, value in entry.items():
        if name != "direction" and name in kinds:
            _is(value, kinds[name], f"{name} of {of}")
    comparisons = entry.get("direction", ())
    for comparison in comparisons:
        for side, kind in SIDES.items():
            if side in ("left", "right") or side in comparison:
                _is(comparison[side], kind, f"{side} of {of}")
        if unknown := comparison.keys() - SIDES.keys():
            raise ValueError(f"a comparison of {of} has {', '.join(map(str, unknown))}")
        if any(isinstance(comparison[side], str) and "/" not in comparison[side] for side in ("left", "right")):
            raise ValueError(f"a side of {of} is EXPERIMENT/METRIC")
        positive(comparison.get("within", 1), f"distance within which {of} holds")
    claim = Claim(paper=paper, **entry | {"direction": tuple(comparisons)})
    one_of(claim.better, "direction", ("higher", "lower"))
    positive(claim.ci95 or 0, f"interval of {of}", zero=True)
    if claim.value is None and not claim.direction:
        raise ValueError(f"{of} has neither a value nor a direction")
    return claim


def _is(value: Any, kind: Any, what: str) -> None:
    try:
        settings.conform(value, kind)
    except (OverflowError, ValueError):
        raise ValueError(f"{what} must be {settings.described(kind)}, not {reprlib.repr(value)}") from None
    if isinstance(value, str) and not _is_plain(value):
        raise ValueError(f"{what} must be plain words, not {reprlib.repr(value)}")


def _is_plain(text: str) -> bool:
    """Whether a text says something, to a terminal and on a page alike: no control characters, no HTML."""
    line = " ".join(text.split())
    return bool(line) and line.isprintable() and not re.search(r"<[a-zA-Z/!]", line)


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
