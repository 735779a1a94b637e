"""Verbs that only look: ``show`` an experiment, ``verdicts`` of the papers' claims."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import textwrap

from helpers.cli.grammar import Commands


def show(options: argparse.Namespace) -> None:
    """Print what an experiment is, and its fields."""
    from helpers import experiments
    from helpers.lab import records, variants

    experiment = experiments.find(options.name)
    width = max(60, min(100, shutil.get_terminal_size().columns))
    record = records.load(experiment.name, missing_ok=True)
    about, *_ = (inspect.cleandoc(type(experiment).__doc__ or "")).partition("\n\nAttributes:")
    print(f"{experiment.name} (paper: {experiment.paper})\n")
    for paragraph in about.split("\n\n"):
        print(textwrap.fill(variants.plain(paragraph), width) + "\n")
    done = f"recorded: {records.progress(record)}" if record else "not recorded yet"
    print(f"{done}; `metabook train {experiment.name}` trains it, with --set NAME=VALUE a variant of it.\n")
    fields = variants.described(experiment)
    longest = max(len(field.name) for field in fields)
    for field in fields:
        value = field.value if isinstance(field.value, str) else repr(field.value)
        print(f"{field.name:<{longest}}  {textwrap.shorten(value, width - longest - 2, placeholder=' …')}")
        print(
            textwrap.indent(textwrap.fill(f"{field.meaning} ({field.kind})", width - longest - 6), " " * (longest + 4))
        )


def verdicts(options: argparse.Namespace) -> None:
    """Print the claims, each with its verdict."""
    from helpers.lab import claims, records, tables, verdicts

    found, recorded = claims.load_claims(options.paper), records.load_all()
    rows, judged = tables.claim_rows(found, recorded), verdicts.judge(found, recorded)
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
        "explain an experiment: what it is, its fields, their values and meanings",
        "metabook show maml-sinusoid-5",
    )
    command.add_argument("name", help="name of an experiment; `metabook train --list` prints them")

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
