"""What all chapters set up alike, so that the open code of a chapter is what the chapter teaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from helpers import runtime
from helpers.lab import figures, records, scoreboard, training, verdicts
from helpers.lab.claims import Claim
from helpers.lab.tables import Table, claim_rows, claims_table
from helpers.site.notebooks import check_profile

if TYPE_CHECKING:  # a notebook brings it; training does not need it
    from IPython.display import Markdown


def begin(profile: str, device: str = "cpu") -> torch.device:
    """Choose the device and the look of the figures; one thread on a processor, so that the numbers are the same.

    Args:
        profile: ``quick``, ``book`` or ``paper``.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        UserError: for a profile or a device that there is not.

    >>> begin("quick")
    device(type='cpu')
    """
    check_profile(profile)
    chosen = runtime.pick_device(device)
    runtime.allow_tf32(False)
    if chosen.type == "cpu":
        torch.set_num_threads(1)
        runtime.keep_memory()
    figures.use()
    return chosen


def claimed(claims: Sequence[Claim], digits: int = 2) -> Table:
    """What a paper claims, before anything is measured, folded: claim, printed number, place in the paper.

    Args:
        claims: as :func:`helpers.lab.claims.load_claims` gives them.
        digits: decimal places.
    """
    rows = claims_table(claim_rows(claims, {}), digits=digits).rows
    cells = []
    for claim, (quantity, printed, *_) in zip(claims, rows, strict=True):
        printed = "an ordering" if claim.value is None else printed
        cells.append([quantity, printed + " (from memory)" * claim.from_memory, claim.where])
    many = f"{len(cells)} claims, as printed"
    return Table(["claim", "printed", "where"], cells, fold=many)


def outcome(claims: Sequence[Claim], recorded: Mapping[str, records.Record]) -> Markdown:
    """Claims against records: of each that was tested what is printed, what was measured, and the verdict.

    Args:
        claims: all of a paper, since their tests are corrected together.
        recorded: by experiment, what was measured on the page among them.
    """
    from IPython.display import Markdown

    return Markdown(scoreboard.outcome(list(verdicts.judge(claims, recorded).values())))


def recorded(paper: str) -> dict[str, records.Record]:
    """The committed records of the experiments that answer a paper's claims, by name."""
    found = records.load_all().items()
    return {name: record for name, record in found if record["paper"] == paper and record.get("kind") != "live"}


def runs(paper: str, catalogue: Mapping[str, Any]) -> Table:
    """How far each experiment of a paper got, how many hours it took and on what it ran; *not run* without a record.

    Args:
        paper: such as ``maml``.
        catalogue: all experiments by name (:func:`helpers.experiments.catalogue`).
    """
    rows = []
    for name, record in recorded(paper).items():
        made = record["provenance"]
        devices = "; ".join(sorted({piece["device"] for piece in made["slices"]}))
        rows.append([f"`{name}`", records.progress(record), f"{made['seconds'] / 3600:.2f}", devices])
    named = {row[0] for row in rows}
    missing = (f"`{name}`" for name, experiment in catalogue.items() if experiment.paper == paper)
    rows += [[name, "not run", "–", "–"] for name in missing if name not in named]
    return Table(["experiment", "iterations", "hours", "device"], rows, align="lrrl")


def train(paper: str, catalogue: Mapping[str, Any], device: torch.device, hours: float = 0.0) -> None:
    """Train every experiment of a paper from its checkpoint, and write its record: the profile ``paper``.

    Args:
        paper: such as ``maml``.
        catalogue: all experiments by name (:func:`helpers.experiments.catalogue`).
        device: where.
        hours: for each experiment; 0 for no limit.
    """
    for experiment in catalogue.values():
        if experiment.paper == paper:
            compiled = runtime.can_compile()
            training.train(experiment, device=device, budget=hours * 3600 or None, compiled=compiled)


def reasons(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """What differs from the paper, and the likely reason where a number falls short; claims of one reason together.

    Args:
        rows: as :func:`helpers.lab.tables.claim_rows` gives them.
    """
    from IPython.display import Markdown

    about: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note") and row["verdict"] not in (verdicts.NO_DATA, verdicts.NOT_RUN):
            about.setdefault(row["note"], []).append(f"{row['quantity']} (*{row['verdict']}*)")
    return Markdown("\n".join(f"- {'; '.join(claims)}: {note}" for note, claims in about.items()))
