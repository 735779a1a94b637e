"""How fresh outputs of a chapter are compared with the committed ones, by ``make test`` and by ``pytest --nbval``.

The numbers in a text are compared as numbers. One with a point or an exponent may differ by ``rtol`` (1e-6) times the
committed one, plus ``atol`` (0). Integers and all other text must be the same. A cell whose numbers come from training
carries its own, measured, tolerance in its metadata::

    {"nbval": {"rtol": 0.05, "atol": 0.01, "integers": true}}

(``integers``: they too may differ by the tolerance.) Of an image only the presence is checked; standard error (progress
bars, warnings) is ignored; of what is measured for a claim (:data:`LIVE`) all but times is compared; the output of a
cell tagged ``nbval-ignore-output`` is not compared, but the cell must run.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator

NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
COMPARED = ("text/plain", "text/html", "text/markdown", "text/latex")
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


def differences(
    committed, computed, source: str = "", *, rtol: float = 1e-6, atol: float = 0.0, integers: bool = False
) -> list[str]:
    """What differs between two lists of outputs of one cell, in words; empty when they agree."""
    # nbval runs cells outside the history, where IPython does not see that a trailing semicolon asks for silence.
    silent = source.rstrip().endswith(";")
    old, new = _by_kind(committed, silent), _by_kind(computed, silent)
    found = []
    for kind in sorted({*old, *new}):
        if len(old[kind]) != len(new[kind]):
            found.append(f"{kind}: {len(old[kind])} committed, {len(new[kind])} computed")
        for before, after in zip(old[kind], new[kind], strict=False):
            found += [f"{kind}: {text}" for text in compare_text(before, after, rtol, atol, integers)]
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
            images = [mime for mime in data if mime.startswith("image/")]
            for mime in images:
                kinds[mime].append("")
            if LIVE in data:  # times are this machine's alone
                metrics = {name: entry["value"] for name, entry in data[LIVE]["metrics"].items()}
                kinds[LIVE].append(json.dumps({name: metrics[name] for name in metrics if "seconds" not in name}))
            for mime in COMPARED:  # the text beside an image only names its size
                if mime in data and not (images and mime == "text/plain"):
                    text = data[mime]
                    kinds[mime].append(text if isinstance(text, str) else "".join(text))
    return kinds


def compare_text(committed: str, computed: str, rtol: float, atol: float, integers: bool) -> list[str]:
    """Compare two texts, numbers as numbers; says what differs, at most ten things."""
    if _words(committed) != _words(computed):
        return [f"text differs\n  committed: {committed!r}\n  computed:  {computed!r}"]
    pairs = zip(NUMBER.findall(committed), NUMBER.findall(computed), strict=True)
    found = [
        f"number {position} differs: committed {old}, computed {new} (rtol {rtol:g}, atol {atol:g})"
        for position, (old, new) in enumerate(pairs, 1)
        if not _close(old, new, rtol, atol, integers)
    ]
    return found[:10]


def _words(text: str) -> list[str]:
    """The text between the numbers; blanks count once, and not before a number, where they make room for a sign."""
    words = [re.sub(r"[ \t]+", " ", word) for word in NUMBER.split(text.rstrip())]
    return [word.rstrip(" ") for word in words[:-1]] + words[-1:]


def _close(committed: str, computed: str, rtol: float, atol: float, integers: bool) -> bool:
    exact = any(re.fullmatch(r"[-+−]?[0-9]+\.?", number) for number in (committed, computed))
    if exact and not integers:
        return committed == computed
    old, new = (float(number.replace("−", "-")) for number in (committed, computed))
    # isclose's own rule is symmetric; a tolerance is meant relative to the committed number.
    return old == new or (math.isfinite(old) and abs(new - old) <= atol + rtol * abs(old))
