"""What ``metabook train --list`` prints: every experiment with its state, its paper and what it is."""

from __future__ import annotations

import inspect
import itertools
import json
import shutil
import textwrap
from typing import Any

from helpers import settings
from helpers.errors import UserError

INDENT = 2


def width() -> int:
    """Columns of a line: those of the terminal, from 60 to 100."""
    return max(60, min(100, shutil.get_terminal_size().columns))


def about(experiment) -> list[str]:
    """The paragraphs of an experiment's description, as plain text on a line each."""
    from helpers.lab import variants

    text, *_ = (inspect.cleandoc(type(experiment).__doc__ or "")).partition("\n\nAttributes:")
    return [variants.plain(paragraph) for paragraph in text.split("\n\n")]


def state(experiment) -> str:
    """How far an experiment got: ``complete``, ``12,000 of 60,000``, ``no record``, ``no run``."""
    from helpers.lab import checkpoints, records

    try:
        record = records.load(experiment.name, missing_ok=True)
        if record is None:
            begun = (records.folder().parent / "checkpoints" / f"{experiment.name}{checkpoints.SUFFIX}").exists()
            return "no record" if begun else "no run"
        if record["config"] != checkpoints.configuration(experiment):
            return "other settings"
    except UserError:
        return "damaged"
    return "complete" if record["status"] == "complete" else records.progress(record).removesuffix(" iterations")


def entries() -> list[dict[str, Any]]:
    """All experiments in the order of the queue; ``differs`` is from the first of its kind."""
    from helpers import experiments
    from helpers.lab import variants

    first: dict[type, Any] = {}
    found = []
    for one in experiments.catalogue().values():
        differs = variants.differences(first.setdefault(type(one), one), one)
        differs = {name: value for name, value in differs.items() if name not in ("name", "paper")}
        found.append({"name": one.name, "paper": one.paper, "state": state(one)})
        found[-1] |= {"about": about(one)[0], "differs": differs}
    return found


def show(as_json: bool = False) -> None:
    """Print the experiments, those of one kind together."""
    found = entries()
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    columns = width()
    names, states = (max(len(one[key]) for one in found) for key in ("name", "state"))
    place = {text: i for i, text in reversed(list(enumerate(one["about"] for one in found)))}
    for text, group in itertools.groupby(sorted(found, key=lambda one: place[one["about"]]), lambda one: one["about"]):
        group = list(group)
        print(textwrap.fill(f"{group[0]['paper']}: {text}", columns, break_on_hyphens=False))
        for one in group:
            line = f"{' ' * INDENT}{one['name']:<{names}}  {one['state']:<{states}}  "
            changes = ", ".join(f"{name} {settings.written(value)}" for name, value in one["differs"].items())
            print((line + textwrap.shorten(changes, columns - len(line), placeholder=" …")).rstrip())
        print()
    end = "After its state stands in what an experiment differs from the first of its kind. `metabook show NAME` "
    print(textwrap.fill(end + "explains one, and `metabook train NAME` trains it or goes on.", columns))
