"""Tables of results and of claims, as pages show them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from helpers.errors import UserError
from helpers.lab import records, verdicts
from helpers.lab.claims import Claim


class Table:
    """A table that Jupyter and the book show as Markdown, and a terminal as plain text.

    Args:
        header: Names of the columns.
        rows: Cells, row after row; shown with ``str``.
        align: One letter a column, ``l``, ``r`` or ``c``; left without it.
        fold: A line under which a page folds the table; empty for an open one.

    Raises:
        UserError: A row has not as many cells as the header.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[Any]], align: str = "", fold: str = "") -> None:
        self.fold = fold
        self.header = [str(cell) for cell in header]
        self.rows = [[str(cell) for cell in row] for row in rows]
        self.align = (align + "l" * len(self.header))[: len(self.header)]
        for row in self.rows:
            if len(row) != len(self.header):
                raise UserError(f"Table: a row has {len(row)} cells where the header has {len(self.header)}: {row}.")

    def _repr_markdown_(self) -> str:
        marks = {"l": ":---", "r": "---:", "c": ":---:"}
        lines = [self.header, [marks[letter] for letter in self.align]]
        # A bar inside a cell would end it; a value and its interval stay on one line, also on a narrow page.
        swaps = {"|": "\\|", "\n": " ", " ± ": "\u00a0±\u00a0"}
        for row in self.rows:
            for old, new in swaps.items():
                row = [cell.replace(old, new) for cell in row]
            lines.append(row)
        text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"<details>\n<summary>{html.escape(self.fold)}</summary>\n\n{text}\n\n</details>" if self.fold else text

    def __repr__(self) -> str:
        widths = [max(len(line[k]) for line in [self.header, *self.rows]) for k in range(len(self.header))]
        lines = [self.header, ["-" * width for width in widths], *self.rows]
        pads = {"l": str.ljust, "r": str.rjust, "c": str.center}
        return "\n".join(
            "  ".join(
                pads[letter](cell, width) for cell, width, letter in zip(line, widths, self.align, strict=True)
            ).rstrip()
            for line in lines
        )


def claim_rows(
    claims: Sequence[Claim], recorded: Mapping[str, Any], judged: Mapping[str, verdicts.Judgement] | None = None
) -> list[dict[str, Any]]:
    """Claims and their records as rows for :func:`~helpers.lab.figures.paper_vs_book` and :func:`claims_table`.

    Args:
        claims: Claims as :func:`helpers.lab.claims.load_claims` gives them: all of a paper, since their tests are
            corrected together.
        recorded: Records by experiment name, as :func:`helpers.lab.records.load_all` gives them.
        judged: What :func:`helpers.lab.verdicts.judge` says about them, where that is known already.

    Returns:
        One row a claim, with its computed verdict; accuracies are set to be shown in per cent. The note says how far
        an unfinished run got and whether the claimed number is quoted from memory.
    """
    rows, judged = [], judged or verdicts.judge(claims, recorded)
    for claim in claims:
        record, row = recorded.get(claim.experiment), {"quantity": claim.quantity, "where": claim.where}
        row |= {"paper": claim.value, "paper_ci95": claim.ci95, "book": None, "book_ci95": None}
        row |= {"scale": 100, "unit": "%"} if "accuracy" in claim.metric else {}
        notes = [text.strip() for text in (claim.toy, claim.no_data, claim.note) if text.strip()]
        if record is not None and claim.metric in record["metrics"]:
            ours = records.metric(record, claim.metric)
            row |= {"book": ours.value, "book_ci95": None if math.isnan(ours.ci95) else ours.ci95}
            if record["status"] != "complete":
                notes.append(f"unfinished: {records.progress(record)}")
        if claim.from_memory:
            notes.append("paper's number quoted from memory")
        said = judged[claim.id].verdict + " (live)" * judged[claim.id].live
        rows.append(row | {"verdict": said, "note": "; ".join(notes)})
    return rows


def claims_table(rows: Sequence[Mapping[str, Any]], scale: float = 1.0, digits: int = 2) -> Table:
    """Claims and records as a table.

    Args:
        rows: As for :func:`~helpers.lab.figures.paper_vs_book`; ``unit`` follows the values; ``where`` (place in the
            paper) and ``note`` get a column if any row has one.
        scale: Factor on all values, 100 for fractions shown in per cent.
        digits: Decimal places.

    Returns:
        A table with the columns claim, paper, this book, verdict.
    """

    def figure(row: Mapping[str, Any], side: str) -> str:
        value, half = row.get(side), row.get(f"{side}_ci95")
        if value is None:
            return "–"
        if isinstance(value, str):
            return value
        factor, unit = row.get("scale", scale), row.get("unit") or ""
        text = f"{float(value) * factor:.{digits}f}"
        if half is not None:
            text += f" ± {abs(float(half)) * factor:.{digits}f}"
        return f"{text} {unit}".strip().replace(" ", "\u00a0")  # on one line, also of a narrow page

    extra = [key for key in ("where", "note") if any(row.get(key) for row in rows)]
    names = {"where": "in the paper at", "note": "note"}
    header = ["claim", "paper", "this book", "verdict", *(names[key] for key in extra)]
    cells = [
        [row["quantity"], figure(row, "paper"), figure(row, "book"), row.get("verdict") or "not run"]
        + [row.get(key) or "" for key in extra]
        for row in rows
    ]
    return Table(header, cells, align="lrrl")


def numbers(values: Sequence[float] | Tensor) -> list[float]:
    """The values as a list of Python floats, from a tensor, an array or a sequence."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    return [float(value) for value in values]
