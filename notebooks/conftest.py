"""How `pytest --nbval notebooks` compares a chapter's fresh outputs with the committed ones.

nbval compares texts; here the numbers in a text are compared as numbers. One with a point or an exponent may differ
by `rtol` (1e-6) times the committed one, plus `atol` (0). Integers and all other text must be the same. A cell whose
numbers come from training carries its own, measured, tolerance in its metadata:

    {"nbval": {"rtol": 0.05, "atol": 0.01, "integers": true}}

(`integers`: they too may differ by the tolerance.) Of an image only the presence is checked; standard error (progress
bars, warnings) is ignored; the output of a cell tagged `nbval-ignore-output` is not compared, but the cell must run.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from types import MethodType

import pytest

# As in `make book`: one thread each, because the order of a sum, and so its rounding, depends on the number of threads.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", VECLIB_MAXIMUM_THREADS="1")

NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
COMPARED = ("text/plain", "text/html", "text/markdown", "text/latex")


def pytest_configure(config) -> None:
    config.option.nbval_current_env = True  # the kernel of this Python, whichever the notebook names
    config.option.nbval_kernel_startup_timeout = 300  # a busy machine


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if hasattr(item, "cell") and hasattr(item, "compare_outputs"):
            item.compare_outputs = MethodType(_compare_outputs, item)
            item.output_timeout = 60  # likewise; nbval waits five seconds


def pytest_runtest_setup(item) -> None:
    cell = getattr(item, "cell", None)
    if cell is not None and cell.source.strip() and cell.execution_count is None:
        pytest.fail("this cell was committed without being run, so nothing was compared; `make refresh`", pytrace=False)


def _compare_outputs(item, test, ref, skip_compare=None) -> bool:
    item.comparison_traceback = differences(ref, test, item.cell.source, **item.cell.metadata.get("nbval", {}))
    return not item.comparison_traceback


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
