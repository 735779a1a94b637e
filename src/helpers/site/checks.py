"""The checks of the book, cheapest first: ``metabook check [TIER ...]``, all of them when none is named.

unit      pytest on the helpers, and the examples in their docstrings
chapters  every chapter once at its defaults, its outputs compared with the committed ones (:mod:`helpers.site.compare`)
smoke     every chapter in the profile ``quick``, on a stand-in for a GPU
book      the site from the chapters that ``chapters`` ran, warnings as errors, every page looked at
records   committed checkpoints evaluated again, on the real data where they need it; some a run, by rotation

The site is built while ``smoke`` runs. A tier in which nothing was tested fails. Of ``chapters`` and ``book`` the
results stay in ``_build``, so that ``make book`` has nothing left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from helpers import runtime
from helpers.errors import Busy, UserError, nearest
from helpers.runtime import commit, only_one, root
from helpers.site import builder, compare, notebooks, runner

STAND_IN = "tests/site/test_standin_chapters.py"
COUNTS = ("passed", "failed", "errors", "skipped")
# What evaluating records may take, in seconds of two workers together, and what one counts whose time nobody measured.
RECORDS_BUDGET = 60
RECORD_SECONDS = 45


@dataclass
class Result:
    """What came of a tier: how many tests passed, failed and so on, and what else its line should say."""

    counts: Counter[str] = field(default_factory=Counter)
    note: str = ""
    # By the parameter of tests that passed: processor time where they say it, else by the clock.
    seconds: Counter[str] = field(default_factory=Counter)


def _pytest(tier: str, *arguments: str) -> Result:
    """Run pytest in a process of its own."""
    report = _folder() / f"{tier}.xml"
    report.unlink(missing_ok=True)
    # Tests take from milliseconds to many seconds, so whoever is free takes the next.
    parallel = ["-n", str(runner.workers()), "--dist", "worksteal"]
    # No test here is a notebook, and each worker would spend two seconds on importing nbval.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:nbval", *arguments, *parallel, f"--junitxml={report}"]
    code = subprocess.run(command, cwd=root(), env={**os.environ, **runtime.ONE_THREAD}).returncode
    if code == 130 or code < 0:
        raise KeyboardInterrupt
    if not report.exists():
        raise UserError(f"pytest could not run (exit status {code}); its message stands above.")
    result = Result()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {part.tag for part in case} & {"failure", "error", "skipped"}
        state = {"failure": "failed", "error": "errors", "skipped": "skipped"}[min(kinds)] if kinds else "passed"
        result.counts[state] += 1
        if state == "passed":
            said = {part.get("name"): part.get("value") for part in case.iter("property")}
            parameter = case.get("name", "").partition("[")[2].rstrip("]")
            result.seconds[parameter] += float(said.get("processor_seconds") or case.get("time", 0))
    if code not in (0, 5) and not result.counts["failed"] + result.counts["errors"]:  # 5: nothing was selected
        raise UserError(f"pytest ended with exit status {code}; its message stands above.")
    return result


def _unit() -> Result:
    return _pytest("unit", "tests", "src/helpers", "--doctest-modules", "-m", "not records", f"--ignore={STAND_IN}")


def _over_budget(profile: str, times: Mapping[str, float]) -> str:
    """The chapters that took more processor time than the profile allows."""
    budget = runner.BUDGETS[profile]
    over = [f"{name} {seconds:.0f} s" for name, seconds in times.items() if seconds > budget]
    return f"over {budget} s of processor time: {', '.join(over)}" if over else ""


def _chapters() -> Result:
    out, result, problem = root() / "_build" / "book", Result(), ""
    try:
        runner.run_chapters(out=out)
    except Busy:  # what lies there now is another run's
        raise
    except UserError as error:  # what did run is compared all the same
        problem = str(error)
    for name in notebooks.select():
        if not (out / f"{name}.digest").exists():
            result.counts["errors"] += 1
            continue
        copies = (notebooks.read(folder / f"{name}.ipynb") for folder in (root() / "notebooks", out))
        for number, (source, found) in enumerate(compare.compare_cells(*copies), 1):
            result.counts["failed" if found else "passed"] += 1
            if found:
                print(f"\n{name}, code cell {number}:\n{source}\n\n" + "\n".join(found), flush=True)
    result.note = "; ".join(filter(None, (problem, _over_budget("book", runner.times(out)))))
    return result


def _smoke() -> Result:
    result = _pytest("smoke", STAND_IN)
    result.note = _over_budget("quick", result.seconds)
    return result


def _book() -> Result:
    runner.run_chapters()
    return Result(Counter(passed=builder.check_site(builder.build())))


# ---------------------------------------- records
def rotation(seconds: Mapping[str, float], budget: float, seed: str) -> list[str]:
    """The records whose turn it is: in an order that ``seed`` shuffles, those that fit into the budget.

    The first one is taken whatever it costs, so that each has its turn some time.

    Args:
        seconds: what evaluating each record takes.
        budget: seconds for all.
        seed: decides the order; the commit, so that the same commit asks the same records.
    """
    chosen: list[str] = []
    for name in sorted(seconds, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
        if not chosen or seconds[name] <= budget:
            chosen.append(name)
            budget -= seconds[name]
    return sorted(chosen)


def _record_seconds() -> dict[str, float]:
    """What evaluating each committed record took when somebody last asked for all, or what is supposed."""
    path = root() / "tests" / "record-seconds.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    paths = sorted((root() / "data" / "records").glob("*.json"))
    names = [path.stem for path in paths if "kind" not in json.loads(path.read_text(encoding="utf-8"))]
    return {name: known.get(name, RECORD_SECONDS) for name in names}


def _records(everything: bool = False) -> Result:
    seconds = _record_seconds()
    chosen = list(seconds) if everything else rotation(seconds, RECORDS_BUDGET, commit().rstrip("+"))
    arguments = ["-m", "records", "-rs", f"--only-records={','.join(chosen)}"]
    # The others are thousands, and reading them would take longer than measuring some of the records.
    files = [str(path) for path in sorted((root() / "tests").rglob("test_*.py")) if "mark.records" in path.read_text()]
    result = _pytest("records", *files, *arguments)
    measured = {name: taken for name, taken in result.seconds.items() if name in seconds}
    if everything:
        seconds |= {name: round(taken, 1) for name, taken in measured.items()}
        text = json.dumps(seconds, indent=1) + "\n"
        (root() / "tests" / "record-seconds.json").write_text(text, encoding="utf-8")
    result.note = f"{len(measured)} of {len(seconds)} records"
    return result


TIERS = {"unit": _unit, "chapters": _chapters, "smoke": _smoke, "book": _book, "records": _records}


# ---------------------------------------- all of them
def _folder() -> Path:
    folder = root() / "_build" / "check"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(names: Sequence[str] | None = None, *, all_records: bool = False) -> int:
    """Run tiers, all of them to their end, and print one line for each.

    Args:
        names: the tiers; all when empty.
        all_records: evaluate every committed record instead of those whose turn it is, and note how long each takes.

    Returns:
        The exit status: 0 when every tier passed.

    Raises:
        UserError: a tier that does not exist, or another process runs the checks.
    """
    for name in names or ():
        if name not in TIERS:
            raise UserError(f"there is no tier {name!r}{nearest(name, TIERS)}; the tiers are {', '.join(TIERS)}.")
    with only_one(_folder(), "running the checks"):
        return _run(names or list(TIERS), all_records)


def _timed(name: str, all_records: bool) -> tuple[Result, float]:
    """What came of a tier, errors included, and the seconds that it took."""
    begin = time.monotonic()
    try:
        result = _records(True) if name == "records" and all_records else TIERS[name]()
    except UserError as error:
        result = Result(Counter(errors=1), str(error))
    except OSError as error:
        result = Result(Counter(errors=1), f"{error.strerror or error} ({error.filename})")
    return result, time.monotonic() - begin


def _run(names: Sequence[str], all_records: bool) -> int:
    with ThreadPoolExecutor(max_workers=1) as beside:
        return _one_after_the_other(names, all_records, beside)


def _one_after_the_other(names: Sequence[str], all_records: bool, beside: ThreadPoolExecutor) -> int:
    lines, failed, totals, absent, start = [], [], Counter(), 0, time.monotonic()
    begun: dict[str, Future[tuple[Result, float]]] = {}
    for place, name in enumerate(names):
        print(f"\n--- {name}", flush=True)
        if name == "smoke" and "book" in names[place:]:  # the site takes one core, and waits for the chapters alone
            begun["book"] = beside.submit(_timed, "book", False)
        result, seconds = begun[name].result() if name in begun else _timed(name, all_records)
        counts, notes = result.counts, [result.note] if result.note else []
        # Only raw data, which a checkout need not have, may be absent, and only the records ask for them.
        absent += counts["skipped"] if name == "records" else 0
        nothing = not counts.total() - counts["skipped"] and not (name == "records" and counts["skipped"])
        if nothing:
            notes.append("nothing was tested")
        if bad := nothing or bool(counts["failed"] + counts["errors"]):
            failed.append(name)
        state = "FAILED" if bad else "passed" if counts["passed"] else "skipped"
        totals += counts
        tests = ", ".join(f"{counts[key]} {key}" for key in COUNTS if counts[key])
        detail = "; ".join(filter(None, [tests, *notes]))
        lines.append(f"{name:<9} {state:<8} {seconds:5.0f} s  {detail}")
        print(lines[-1], flush=True)
    verdict = f"failed: {', '.join(failed)}" if failed else "all tiers passed"
    tests = ", ".join(f"{totals[key]} {key}" for key in COUNTS if totals[key] or key == "passed")
    tests += f" ({absent} records for want of raw data)" if absent else ""
    summary = "\n".join([*lines, verdict, f"===== {tests} in {time.monotonic() - start:.2f}s ====="])
    print(f"\n{summary}", flush=True)
    (_folder() / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    return 1 if failed else 0
