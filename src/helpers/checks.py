"""The checks of the book, cheapest first: ``python -m helpers.checks [TIER ...]``, all of them when none is named.

unit        pytest on the helpers
smoke       every chapter in the profile ``quick``
regression  every chapter at its defaults, its outputs compared with the committed ones (``notebooks/conftest.py``)
book        the site from the committed notebooks, warnings as errors, every page looked at
records     committed checkpoints evaluated again on the real data, where that is present
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from helpers import book
from helpers.runtime import UserError, root

COUNTS = ("passed", "failed", "errors", "skipped")


def _pytest(tier: str, *arguments: str) -> dict[str, int]:
    """Run pytest in a process of its own; returns how many tests passed, failed and so on."""
    report = _folder() / f"{tier}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={report}"]
    code = subprocess.run(command, cwd=root(), env={**os.environ, **book.ONE_THREAD}).returncode
    if code == 130 or code < 0:
        raise KeyboardInterrupt
    if not report.exists():
        raise UserError(f"pytest could not run (exit status {code}); its message stands above.")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counted = (
        {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} if suite is not None else {}
    )
    counts = {"failed": counted["failures"], "errors": counted["errors"], "skipped": counted["skipped"]}
    counts["passed"] = counted["tests"] - sum(counts.values())
    if code not in (0, 5) and not counts["failed"] + counts["errors"]:  # 5: nothing was selected
        raise UserError(f"pytest ended with exit status {code}; its message stands above.")
    return counts


def _unit() -> dict[str, int]:
    return _pytest("unit", "tests", "-m", "not records", "-n", "2")


def _smoke() -> None:
    book.run_chapters(None, "quick", out=root() / "_build" / "quick", force=True)


def _regression() -> dict[str, int]:
    book.check_executed(root() / "notebooks")
    return _pytest("regression", "notebooks", "--nbval", "-n", "2", "--dist", "loadfile")


def _book() -> None:
    into = _folder() / "book"
    book.build(root() / "notebooks", into)
    shutil.rmtree(into / "site")


def _records() -> dict[str, int]:
    # Some records take minutes and most take seconds, so whoever is free takes the next.
    return _pytest("records", "tests", "-m", "records", "-rs", "-n", "2", "--dist", "worksteal")


TIERS = {"unit": _unit, "smoke": _smoke, "regression": _regression, "book": _book, "records": _records}


def _folder() -> Path:
    folder = root() / "_build" / "check"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(names: Sequence[str] | None = None) -> int:
    """Run tiers, all of them to their end, and print one line for each.

    Returns:
        The exit status: 0 when every tier passed.

    Raises:
        UserError: a tier that does not exist.
    """
    for name in names or ():
        if name not in TIERS:
            raise UserError(f"there is no tier {name!r}; the tiers are {', '.join(TIERS)}.")
    lines, totals, start = [], dict.fromkeys(COUNTS, 0), time.monotonic()
    failed = []
    for name in names or TIERS:
        print(f"\n--- {name}", flush=True)
        begin = time.monotonic()
        counts, problem = None, ""
        try:
            counts = TIERS[name]()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.strerror or error} ({error.filename})"
        bad = bool(problem) or bool(counts and counts["failed"] + counts["errors"])
        state = "FAILED" if bad else "skipped" if counts and not counts["passed"] else "passed"
        for key, value in (counts or {}).items():
            totals[key] += value
        detail = (
            problem or ", ".join(f"{counts[key]} {key}" for key in COUNTS if counts[key]) if counts or problem else ""
        )
        lines.append(f"{name:<11} {state:<8} {time.monotonic() - begin:5.0f} s  {detail}".rstrip())
        print(lines[-1], flush=True)
        failed += [name] * bad
    verdict = f"failed: {', '.join(failed)}" if failed else "all tiers passed"
    tests = ", ".join(f"{totals[key]} {key}" for key in COUNTS if totals[key] or key == "passed")
    summary = "\n".join([*lines, verdict, f"===== {tests} in {time.monotonic() - start:.2f}s ====="])
    print(f"\n{summary}", flush=True)
    (_folder() / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    return book.report(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
