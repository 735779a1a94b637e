"""Verbs that only look: ``show`` an experiment, ``verdicts`` of the papers' claims."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

from helpers.cli import listing, places
from helpers.cli.grammar import Commands, folder

if TYPE_CHECKING:
    from helpers.cli import metrics


def show(options: argparse.Namespace) -> None:
    """Print what an experiment is, its fields, and its metrics."""
    from helpers import settings
    from helpers.cli import metrics
    from helpers.lab import records, variants

    experiment, home = places.experiment(options.name, options.out)
    record = records.load(experiment.name, missing_ok=True, where=home / "records")
    print(f"{experiment.name} (paper: {experiment.paper})\n")
    for paragraph in listing.about(experiment):
        _say(paragraph)
    done = f"recorded: {records.progress(record)}" if record else "not recorded yet"
    train = f"`metabook train {experiment.name}` trains it, with --set NAME=VALUE a variant of it."
    _say(f"{done}; the command that began it goes on." if "_" in experiment.name else f"{done}; {train}")

    _say("Fields. A list is set as 1,3,10, a switch as true or false, and what may be none as none.")
    fields = [field for field in variants.described(experiment) if field.name != "own" or experiment.of_images]
    kinds = {"own": "set by --data-folder"}
    _entries(
        [(one.name, settings.written(one.value), f"{one.meaning} ({kinds.get(one.name, one.kind)})") for one in fields]
    )

    if record is None:
        _say("Metrics that its record may have:")
        _entries([(pattern, "", meaning) for pattern, meaning in metrics.known(experiment).items()])
        return
    headline = next(iter(record["metrics"]))
    _say(f"Metrics of its record. The first, {headline}, is the headline.")
    _entries(
        [(one.pattern, _values(record, one), one.meaning) for one in metrics.described(experiment, record["metrics"])]
    )


def _values(record: dict[str, Any], metric: metrics.Metric) -> str:
    """The value, or for what stands for several names their differing parts."""
    if not metric.values:
        entry = record["metrics"][metric.pattern]
        half = "" if entry["ci95"] is None else f" ± {entry['ci95']:.2g}"
        return f"{entry['value']:.4g}{half} (n = {entry['n']:,})"
    return "; ".join(f"{word}: {', '.join(parts)}" for word, parts in metric.values.items())


def _say(text: str) -> None:
    print(textwrap.fill(text, listing.width(), break_on_hyphens=False) + "\n")


def _entries(rows: list[tuple[str, str, str]]) -> None:
    """Names, each with its value and, below it, its meaning."""
    width, longest = listing.width(), max(len(name) for name, _, _ in rows)
    for name, value, meaning in rows:
        print(f"{name:<{longest}}  {textwrap.shorten(value, width - longest - 2, placeholder=' …')}".rstrip())
        print(textwrap.indent(textwrap.fill(meaning, width - longest - 6, break_on_hyphens=False), " " * (longest + 4)))
    print()


def verdicts(options: argparse.Namespace) -> None:
    """Print the claims, each with its verdict."""
    from helpers.lab import claims, records, tables, verdicts

    found, recorded = claims.load_claims(options.paper), records.load_all()
    judged = verdicts.judge(found, recorded)
    rows = tables.claim_rows(found, recorded, judged)
    if options.json:
        entries = [
            verdicts.as_json(judged[claim.id]) | {key: row[key] for key in ("book", "book_ci95", "note")}
            for claim, row in zip(found, rows, strict=True)
        ]
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    names = [f"{claim.paper}/{claim.id}" for claim in found]
    verdict, longest = (max(map(len, texts), default=0) for texts in ([str(row["verdict"]) for row in rows], names))
    for claim, name, row in zip(found, names, rows, strict=True):
        sides = [_side(row, side) for side in ("paper", "book")]
        numbers = f" (paper {sides[0]}, here {sides[1]})" if all(sides) else verdicts.in_words(judged[claim.id])
        print(f"{name:<{longest}}  {row['verdict']:<{verdict}}  {' '.join(row['quantity'].split())}{numbers}")
    counted = verdicts.headline(list(judged.values()))
    print(f"\nClaims of the papers, without those whose data cannot be had: {counted}" if counted else "")


def _side(row: dict, side: str) -> str:
    value, half, scale, unit = row[side], row[f"{side}_ci95"], row.get("scale", 1), row.get("unit", "")
    if value is None:
        return ""
    interval = "" if half is None else f" ± {half * scale:.3g}"
    return f"{value * scale:.4g}{interval}{unit and f' {unit}'}"


def register(commands: Commands) -> None:
    """Add these verbs."""
    command = commands.add(
        "show",
        show,
        "explain an experiment or a variant of yours: what it is, its fields and its metrics",
        """metabook show maml-sinusoid-5
        metabook show maml-sinusoid-5_seed-3              a variant that you have trained
        metabook show maml-sinusoid-5_seed-3 --out mine   one that was trained with --out mine""",
    )
    command.add_argument("name", help="name of an experiment, as `metabook train --list` prints it, or of a variant")
    command.add_argument("--out", type=folder, metavar="FOLDER", help=places.HELP)

    command = commands.add(
        "verdicts",
        verdicts,
        "list the claims of the papers, one a line, and whether the records of this book reproduce them",
        """metabook verdicts --paper maml
        metabook verdicts --json""",
    )
    papers = "such as maml, imaml, reptile, ml3, nos, jets"
    command.add_argument("--paper", metavar="PAPER", help=f"the claims of this paper alone, {papers}")
    command.add_argument("--json", action="store_true", help="print JSON instead of lines")
