"""How wrong written names are: edit distance, character error rate, and the share that is right in every letter."""

from __future__ import annotations

from collections.abc import Sequence

from helpers.errors import UserError

__all__ = ["edit_distance", "errors"]


def edit_distance(one: str, other: str) -> int:
    """The fewest letters to insert, delete or replace that turn one text into the other.

    Source: Levenshtein (1966), by the recurrence of Wagner and Fischer (1974).
    """
    above = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, against in enumerate(other, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != against)))
        above = row
    return above[-1]


def errors(written: Sequence[str], right: Sequence[str]) -> tuple[float, float]:
    """How wrong translations are.

    Returns:
        The character error rate, all edits over all letters of the right names, which can exceed 1; and the share of
        names that are right in every letter.

    Raises:
        UserError: if there are no right names, or not as many as were written.
    """
    if len(written) != len(right) or not sum(map(len, right)):
        raise UserError(f"{len(written)} translations cannot be held against {len(right)} names: give as many")
    edits = sum(map(edit_distance, written, right))
    exact = sum(a == b for a, b in zip(written, right, strict=True))
    return edits / sum(map(len, right)), exact / len(right)
