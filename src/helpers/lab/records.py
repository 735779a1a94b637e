"""Records: what an experiment measured, and the values behind it.

A record is one JSON file, ``data/records/NAME.json``, written by :mod:`helpers.lab.reports` and never by hand; its
schema stands in ``data/schemas``. Beside it stand ``NAME.samples.csv.gz``, a column a metric with the values by seed
or by task, and, where an experiment writes down rows of its own, ``NAME.csv.gz``.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from helpers.errors import UserError
from helpers.lab.statistics import Interval
from helpers.parsing import from_json
from helpers.runtime import root, write_atomically
from helpers.validate import finite, one_of, positive, whole

Record = dict[str, Any]
SAMPLES = ".samples.csv.gz"
SUFFIXES = (".json", ".csv.gz", SAMPLES)  # of the files that belong to one record


def folder() -> Path:
    """Where records live: ``data/records`` under the root of the checkout."""
    return root() / "data" / "records"


def save(record: Record, path: Path | None = None) -> Path:
    """Write a record atomically and return its path.

    Raises:
        UserError: if it cannot be written, or holds a number that JSON does not know (NaN or infinity).
    """
    path = path or folder() / f"{record['experiment']}.json"
    write_atomically(path, (checked(record) + "\n").encode())
    return path


def checked(record: Record) -> str:
    """A record as its file holds it.

    Raises:
        UserError: if it holds a number that JSON does not know (NaN or infinity).
    """
    try:
        return laid_out(record)
    except ValueError:
        wrong = [name for name, entry in record["metrics"].items() if not math.isfinite(entry["value"])]
        what = f"its metrics {', '.join(wrong)} are" if wrong else "one of its numbers is"
        raise UserError(
            f"the record of {record['experiment']} is not written, since {what} not finite: "
            "the checkpoint is kept; lower the rates and start with --fresh"
        ) from None


def laid_out(record: Record) -> str:
    """A record as JSON, where what holds nothing but values (a metric, the losses) stands in one line.

    Raises:
        ValueError: for a number that JSON does not know.

    >>> print(laid_out({"metrics": {"error": {"value": 0.5, "n": 3}}}))
    {
     "metrics": {
      "error": {"value": 0.5, "n": 3}
     }
    }
    """
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    innermost = r"([\[{])\n\s*([^][{}]*?)\n\s*([]}])"  # no text holds a line break: JSON writes it as two characters
    return re.sub(innermost, lambda found: found[1] + re.sub(r"\n\s*", " ", found[2]) + found[3], text)


def load(name: str, missing_ok: bool = False, where: Path | None = None) -> Record | None:
    """The record of an experiment.

    Returns:
        The record, or None where there is none and ``missing_ok`` is set.

    Raises:
        UserError: if there is no such record, or the file is not a whole record of that experiment.
    """
    path = (where or folder()) / f"{name}.json"
    try:
        record = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return None
        raise UserError(f"there is no record {path}: make it with `metabook train {name}`") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"the record {path} is damaged ({error}): "
            f"restore it from version control or run `metabook train {name}` again"
        ) from None
    if wrong := fault(record, name) or _tampered(record, path):
        raise UserError(
            f"{path} is not a record of {name} ({wrong}): "
            f"restore it from version control or run `metabook record {name}`, which measures its checkpoint again"
        )
    return record


def digest(record: Record, samples: bytes) -> str:
    """What ties an evaluation's numbers together: a hash of all metrics and of the samples as stored."""
    text = json.dumps(record["metrics"], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode() + samples).hexdigest()[:32]


def known_digest(record: Record) -> str | None:
    """The digest that a record carries; None for one that was written without its samples."""
    evaluated = record.get("provenance", {}).get("evaluated")
    return evaluated.get("digest") if isinstance(evaluated, dict) else None


def measured_together(record: Record, samples: bytes) -> bool:
    """Whether metrics and stored samples are of one evaluation, as far as the record has a digest to tell by."""
    known = known_digest(record)
    return known is None or known == digest(record, samples)


def _tampered(record: Record, path: Path) -> str:
    """Why a record is not what was measured; empty where it is, or where it has no digest to tell by."""
    beside = path.with_name(f"{record['experiment']}{SAMPLES}")
    try:
        samples = beside.read_bytes()
    except OSError:
        samples = b""
    if not measured_together(record, samples):
        return f"its metrics and {beside.name} are not those that were measured together"
    return ""


def fault(content: Any, name: str) -> str:
    """Why this is no record of that experiment on which the code may rely; empty where it is one.

    The schema in ``data/schemas`` says more, and a test asks it.
    """
    try:
        if content["experiment"] != name:
            return "it is of another experiment"
        planned = whole(content["iterations"]["planned"], "number of iterations")
        done = whole(content["iterations"]["done"], "number of iterations done", 0, planned)
        one_of(content["status"], "status of such a run", ("complete" if done == planned else "partial",))
        curve = content.get("curve", [])
        parts = {"paper": (content["paper"], str), "curve": (curve, list)}
        parts |= {key: (content[key], dict) for key in ("config", "provenance")}
        if wrong := [key for key, (part, kind) in parts.items() if not isinstance(part, kind)]:
            return f"its {wrong[0]} is of another kind"
        if content["config"]["name"] != name or not content["metrics"]:
            return "its configuration is another experiment's" if content["metrics"] else "it has no metrics"
        for metrics in (content["metrics"], *(point["metrics"] for point in curve)):
            check_metrics(metrics)
        for point in curve:
            whole(point["iteration"], "iteration", 0)
        losses = content.get("losses", {"every": 1, "values": []})
        whole(losses["every"], "iterations between losses")
        for loss in losses["values"]:
            finite(loss, "loss")
    except UserError as error:
        return str(error)
    except (AttributeError, IndexError, KeyError, TypeError):
        return "a part of it is missing or of another kind"
    return ""


def check_metrics(metrics: dict[str, dict[str, Any]], check: Callable[[Any, str], Any] = finite) -> None:
    """Refuse what are no metrics as files hold them.

    Args:
        check: of values; a run that is not over may have a metric that diverged.

    Raises:
        UserError: for numbers that make no sense.
        AttributeError, KeyError, TypeError: for another structure.
    """
    for name, entry in metrics.items():
        check(entry["value"], f"metric {name}")
        if entry["ci95"] is not None:
            positive(entry["ci95"], f"interval of {name}", zero=True)
        whole(entry["n"], f"number of samples of {name}")


def save_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of texts and numbers as compressed comma-separated values, the same bytes for the same rows."""
    text = io.StringIO()
    # A text is quoted and a number is not: the rule "1" comes back as a text.
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, gzip.compress(text.getvalue().encode(), mtime=0))


def save_samples(metrics: Mapping[str, Interval], path: Path) -> bytes:
    """Write the values behind the metrics, a column a metric, seven digits each; returns the bytes of the file.

    Metrics of one value, or whose values were not kept, have no column; without any column there is no file.
    """
    columns = {name: m.samples.tolist() for name, m in metrics.items() if m.samples is not None and m.n > 1}
    if not columns:
        path.unlink(missing_ok=True)
        return b""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in itertools.zip_longest(*columns.values()):
        writer.writerow("" if value is None else f"{value:.7g}" for value in row)
    content = gzip.compress(text.getvalue().encode(), mtime=0)
    write_atomically(path, content)
    return content


def load_samples(name: str, where: Path | None = None) -> dict[str, list[float]]:
    """The values behind each metric of a record, by seed or by task (the metric's ``per`` says which).

    Metrics without a spread have none, and a record without a file has none at all.

    Raises:
        UserError: if the file is damaged.
    """
    path = (where or folder()) / f"{name}{SAMPLES}"
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            names, *rows = csv.reader(file)
        columns = zip(*rows, strict=True)
        return {name: [float(cell) for cell in column if cell] for name, column in zip(names, columns, strict=True)}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise UserError(
            f"the samples {path} are damaged ({error}): "
            f"restore them from version control or run `metabook record {name}`, which measures the checkpoint again"
        ) from None


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


def metric(record: Record, name: str) -> Interval:
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
    ci95 = math.nan if entry["ci95"] is None else entry["ci95"]
    return Interval(entry["value"], ci95, entry["n"], per=entry.get("per", ""))


def progress(record: Record) -> str:
    """How far a record's run got, such as ``20,000 of 60,000 iterations``."""
    done, planned = record["iterations"]["done"], record["iterations"]["planned"]
    many = "iteration" if planned == 1 else "iterations"
    return f"{done:,} {many}" if done == planned else f"{done:,} of {planned:,} {many}"
