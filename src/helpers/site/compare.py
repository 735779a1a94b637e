"""How fresh outputs of a chapter are compared with the committed ones, by ``make test`` and by ``pytest --nbval``.

The numbers in a text are compared as numbers. One with a point or an exponent may differ by ``rtol`` (1e-6) times the
committed one, plus ``atol`` (0). Integers and all other text must be the same. A cell whose numbers come from training
carries its own, measured, tolerance in its metadata::

    {"nbval": {"rtol": 0.05, "atol": 0.01, "share": 0.5, "widths": 2, "integers": true, "columns": {"s": {"rtol": 1}}}}

``share``: a number printed with its interval, 1.3 ± 0.4, may differ by this share of the committed interval besides.
``widths``: the interval may differ by this much of itself; from three seeds it is known no better. ``integers``: they
too may differ by the tolerance. ``columns``: what is otherwise in the columns of a table, by their heads; ``null`` for
one that is not compared, where another machine may find another text.

Of a picture or an animation only the presence is checked; standard error (progress bars, warnings) is ignored; of what
is measured for a claim (:data:`LIVE`) all but times is compared; the output of a cell tagged ``nbval-ignore-output`` is
not compared, but the cell must run.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
TABLE = "text/markdown"
COMPARED = ("text/plain", "text/html", TABLE, "text/latex")
LIVE = "application/vnd.metabook.live+json"  # what a chapter measures for a claim, see helpers.lab.live
NEVER_RUN = "this cell was committed without being run, so nothing was compared; `make refresh`"


def never_run(cell) -> bool:
    """Whether a code cell was committed without being run."""
    return cell.execution_count is None and bool(cell.source.strip() or cell.outputs)


def compare_cells(committed, executed) -> Iterator[tuple[str, list[str]]]:
    """Compare an executed copy of a notebook with the committed one, code cell by code cell.

    Yields:
        the cell's source and what differs in words, an empty list where nothing does.

    Raises:
        ValueError: the copy has not the same code cells; those that papermill puts in do not count.
    """
    from nbval.plugin import coalesce_streams, find_comment_markers, find_metadata_tags

    old, new = (
        [
            cell
            for cell in notebook.cells
            if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        for notebook in (committed, executed)
    )
    for before, after in zip(old, new, strict=True):
        if before.source != after.source:
            raise ValueError(f"the copy is of another notebook: {after.source!r} stands for {before.source!r}")
        marks = {
            "check": True,
            **dict(find_metadata_tags(before.metadata)),
            **dict(find_comment_markers(before.source)),
        }
        if never_run(before):
            found = [NEVER_RUN]
        elif marks.get("skip") or not marks["check"]:
            found = []
        else:
            outputs = coalesce_streams(before.outputs), coalesce_streams(after.outputs)
            found = differences(*outputs, before.source, **before.metadata.get("nbval", {}))
        yield before.source, found


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from the committed one; the names are those of the metadata."""

    rtol: float = 1e-6
    atol: float = 0.0
    share: float = 0.0
    widths: float = 0.0
    integers: bool = False

    def allows(self, committed: str, computed: str, more: float = 0.0) -> bool:
        """Whether two numbers agree, when they may differ by so much ``more``."""
        exact = all(re.fullmatch(r"[-+−]?[0-9]+\.?", number) for number in (committed, computed))
        if exact and not self.integers:
            return committed == computed
        old, new = (float(number.replace("−", "-")) for number in (committed, computed))
        # isclose's own rule is symmetric; a tolerance is meant relative to the committed number.
        allowed = self.atol + self.rtol * abs(old) + more
        return old == new or (math.isfinite(old) and abs(new - old) <= allowed)


def differences(
    committed, computed, source: str = "", *, columns: Mapping[str, Mapping[str, Any] | None] | None = None, **settings
) -> list[str]:
    """What differs between two lists of outputs of one cell, in words; empty when they agree.

    Args:
        committed: outputs as they stand in a notebook.
        computed: as they came out of a run.
        source: of the cell.
        columns: settings by the head of a table's column, None for one that is not compared.
        settings: of :class:`Tolerance`, for all the rest.
    """
    # nbval runs cells outside the history, where IPython does not see that a trailing semicolon asks for silence.
    silent = source.rstrip().endswith(";")
    old, new = _by_kind(committed, silent), _by_kind(computed, silent)
    tolerance = Tolerance(**settings)
    special = {name: values and replace(tolerance, **values) for name, values in (columns or {}).items()}
    found = [f"no table has a column {name!r}" for name in special if not any(map(_has_column(name), old[TABLE]))]
    for kind in sorted({*old, *new}):
        if len(old[kind]) != len(new[kind]):
            found.append(f"{kind}: {len(old[kind])} committed, {len(new[kind])} computed")
        for before, after in zip(old[kind], new[kind], strict=False):
            tables = special and kind == TABLE
            said = (
                compare_tables(before, after, tolerance, special) if tables else compare_text(before, after, tolerance)
            )
            found += [f"{kind}: {text}" for text in said]
    return found


def _by_kind(outputs, silent: bool) -> dict[str, list[str]]:
    """Texts by stream or MIME type; the order between kinds is left to chance by the kernel, that within one is not."""
    kinds = defaultdict(list)
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stdout":
                kinds["stdout"] = ["".join([*kinds["stdout"], output["text"]])]
        elif output["output_type"] == "error":
            kinds["error"].append(f"{output['ename']}: {output['evalue']}")
        elif not (silent and output["output_type"] == "execute_result"):
            data = output["data"]
            images = [mime for mime in data if mime.startswith("image/") or "data:image/" in str(data[mime])]
            for mime in images:
                kinds[mime].append("")
            if LIVE in data:  # times are this machine's alone
                metrics = {name: entry["value"] for name, entry in data[LIVE]["metrics"].items()}
                kinds[LIVE].append(json.dumps({name: metrics[name] for name in metrics if "seconds" not in name}))
            for mime in COMPARED:  # the text beside an image only names its size, that beside a table is the same
                if mime in data and mime not in images and not (mime == "text/plain" and (images or TABLE in data)):
                    text = data[mime]
                    kinds[mime].append(text if isinstance(text, str) else "".join(text))
    return kinds


def compare_text(committed: str, computed: str, tolerance: Tolerance) -> list[str]:
    """Compare two texts, numbers as numbers; says what differs, at most ten things."""
    words = _words(committed)
    if words != _words(computed):
        return [f"text differs\n  committed: {committed!r}\n  computed:  {computed!r}"]
    numbers = NUMBER.findall(committed), NUMBER.findall(computed)
    found = []
    for place, (old, new) in enumerate(zip(*numbers, strict=True)):
        more = 0.0
        for width, share in ((place, tolerance.widths), (place + 1, tolerance.share)):  # 0.4 of "1.3 ± 0.4", for both
            if width < len(numbers[0]) and words[width].rstrip().endswith("±"):
                more = share * abs(float(numbers[0][width].replace("−", "-")))
                break
        if not tolerance.allows(old, new, more):
            said = f"rtol {tolerance.rtol:g}, atol {tolerance.atol:g}, share {tolerance.share:g}"
            found.append(f"number {place + 1} differs: committed {old}, computed {new} ({said})")
    return found[:10]


def compare_tables(
    committed: str, computed: str, tolerance: Tolerance, columns: Mapping[str, Tolerance | None]
) -> list[str]:
    """Compare two texts with tables in Markdown, some of their columns by a tolerance of their own."""
    pairs = list(zip_longest(committed.splitlines(), computed.splitlines(), fillvalue=""))
    found, heads = [], []
    for number, (before, after) in enumerate(pairs):
        old, new = _row(before), _row(after)
        if number + 1 < len(pairs) and re.match(r"\|\s*:?-+", pairs[number + 1][0]):
            heads = old
        if not old or len(old) != len(new) or len(old) != len(heads):
            found += compare_text(before, after, tolerance)
            continue
        for head, *cells in zip(heads, old, new, strict=True):
            own = columns.get(head, tolerance)
            found += [f"{head}: {text}" for text in compare_text(*cells, own)] if own else []
    return found[:10]


def _row(line: str) -> list[str]:
    """The cells of a line of a table, none for another line."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _has_column(name: str):
    return lambda text: any(name in _row(line) for line in text.splitlines())


def _words(text: str) -> list[str]:
    """The text between the numbers; blanks count once, and not before a number, where they make room for a sign."""
    words = [re.sub(r"[ \t]+", " ", word) for word in NUMBER.split(text.rstrip())]
    return [word.rstrip(" ") for word in words[:-1]] + words[-1:]
