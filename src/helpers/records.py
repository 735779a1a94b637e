"""Records (what we measured), claims (what a paper says) and the verdict between them.

A record is one JSON file, ``data/records/NAME.json``, written by :mod:`helpers.training` and never by hand. A paper's
claims are one YAML file, ``data/claims/PAPER.yaml``. Their schemas stand in ``data/schemas``. Verdicts are computed
here and typed nowhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers.evaluation import Interval
from helpers.runtime import UserError, root, write_atomically

Record = dict[str, Any]
KEYS = ("experiment", "paper", "status", "iterations", "metrics", "config", "provenance")

REPRODUCED = "reproduced"
DIRECTION = "direction holds"
MISSED = "not reproduced"
NOT_RUN = "not run"


def folder() -> Path:
    """Where records live."""
    return root() / "data" / "records"


def save(record: Record, path: Path | None = None) -> Path:
    """Write a record atomically and return its path.

    Raises:
        UserError: if it cannot be written, or holds a number that JSON does not know (NaN or infinity).
    """
    path = path or folder() / f"{record['experiment']}.json"
    try:
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        wrong = [name for name, entry in record["metrics"].items() if not math.isfinite(entry["value"])]
        what = f"its metrics {', '.join(wrong)} are" if wrong else "one of its numbers is"
        raise UserError(
            f"the record of {record['experiment']} is not written, since {what} not finite: "
            "the checkpoint is kept; lower the rates and start with --fresh"
        ) from None
    write_atomically(path, (text + "\n").encode())
    return path


def load(name: str, missing_ok: bool = False, where: Path | None = None) -> Record | None:
    """The record of an experiment.

    Returns:
        The record, or None where there is none and ``missing_ok`` is set.

    Raises:
        UserError: if there is no such record, or the file is not a whole record of that experiment.
    """
    path = (where or folder()) / f"{name}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return None
        raise UserError(f"there is no record {path}: make it with `metabook train {name}`") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the record {path} is damaged ({error}): "
            f"restore it from version control or run `metabook train {name}` again"
        ) from None
    if not is_record(record, name):
        raise UserError(
            f"{path} is not a record of {name}: restore it from version control or run `metabook train {name}` again"
        )
    return record


def is_record(content: Any, name: str) -> bool:
    """Whether all that the code relies on is there; the schema in ``data/schemas`` says more, and a test asks it."""
    return (
        isinstance(content, dict)
        and set(KEYS) <= set(content)
        and content["experiment"] == name
        and all(isinstance(content[key], dict) for key in ("iterations", "metrics", "config", "provenance"))
        and all(isinstance(content["iterations"].get(key), int) for key in ("done", "planned"))
        and all(isinstance(m, dict) and {"value", "ci95", "n"} <= set(m) for m in content["metrics"].values())
    )


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of texts and numbers as compressed comma-separated values, the same bytes for the same rows."""
    text = io.StringIO()
    # A text is quoted and a number is not: the rule "1" comes back as a text.
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, gzip.compress(text.getvalue().encode(), mtime=0))


def load_table(name: str) -> list[dict[str, Any]]:
    """What a recorded experiment wrote down row by row, ``data/records/NAME.csv.gz``; numbers come back as numbers.

    Raises:
        UserError: if there is no such table, or it is damaged.
    """
    path = folder() / f"{name}.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, quoting=csv.QUOTE_NONNUMERIC))
    except FileNotFoundError:
        raise UserError(f"there is no table {path}: make it with `metabook train {name}`") from None
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(
            f"the table {path} is damaged ({error}): "
            f"restore it from version control or run `metabook train {name}` again"
        ) from None
    return [{key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in row.items()} for row in rows]


def load_all() -> dict[str, Record]:
    """All records by experiment name, sorted."""
    return {path.stem: load(path.stem) for path in sorted(folder().glob("*.json"))}


def metric(record: Record, name: str = "test_accuracy") -> Interval:
    """One metric of a record.

    Raises:
        UserError: if the record has no such metric.
    """
    try:
        entry = record["metrics"][name]
    except KeyError:
        raise UserError(
            f"the record {record['experiment']} has no metric {name!r}; it has: {', '.join(record['metrics'])}"
        ) from None
    return Interval(entry["value"], math.nan if entry["ci95"] is None else entry["ci95"], entry["n"])


def progress(record: Record) -> str:
    """How far a record's run got, such as ``20,000 of 60,000 iterations``."""
    done, planned = record["iterations"]["done"], record["iterations"]["planned"]
    many = "iteration" if planned == 1 else "iterations"
    return f"{done:,} {many}" if done == planned else f"{done:,} of {planned:,} {many}"


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
    metric: str = "test_accuracy"
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
            known = ", ".join(p.stem for p in sorted(where.glob("*.yaml")))
            raise UserError(f"there is no claims file {path}; known papers: {known}") from None
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
    return metric(records[experiment], name or "test_accuracy") if experiment in records else None


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
