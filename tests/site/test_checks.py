"""helpers.site.checks: what a tier counts, what makes it fail, and which records have their turn."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.errors import UserError
from helpers.runtime import root
from helpers.site import checks, compare, runner


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with nothing in it."""
    for name in ("notebooks", "tests", "data/records"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def alone(monkeypatch):
    """Pytest runs the tests itself; that workers do is seen by the other tests."""
    monkeypatch.setattr(runner, "workers", lambda: 0)


def chapter(project, name, *cells):
    """A committed chapter: pairs of source and what it printed."""
    cells = [
        new_code_cell(source, execution_count=1, outputs=[new_output("stream", name="stdout", text=t)] if t else [])
        for source, t in cells
    ]
    nbformat.write(new_notebook(cells=cells), project / "notebooks" / f"{name}.ipynb")


def result(note="", **counts):
    return lambda: checks.Result(Counter(counts), note)


# ---------------------------------------- tiers


def test_tiers_all_run_and_the_summary_names_the_failed(project, monkeypatch, capsys):
    def bad():
        raise UserError("a page is missing.")

    def unreadable():
        (project / "nothing").read_text()

    tiers = {"one": bad, "two": result(passed=3, failed=1), "three": result("4 s", passed=1), "four": unreadable}
    monkeypatch.setattr(checks, "TIERS", tiers)
    assert checks.run() == 1
    out = capsys.readouterr().out
    assert "a page is missing." in out and "No such file" in out and "1 passed; 4 s" in out
    assert "failed: one, two, four" in out and "===== 4 passed, 1 failed, 2 errors in" in out
    assert (project / "_build/check/summary.txt").read_text() in out
    assert checks.run(["three"]) == 0
    with pytest.raises(UserError, match="there is no tier 'five'; the tiers are one, two"):
        checks.run(["five"])


def test_the_site_is_built_beside_the_stand_in_and_reported_in_its_place(monkeypatch, project, capsys):
    both = threading.Barrier(2, timeout=20)

    def meets(seconds):
        both.wait()
        time.sleep(seconds)
        return checks.Result(Counter(passed=1))

    tiers = {name: result(passed=1) for name in checks.TIERS}
    monkeypatch.setattr(checks, "TIERS", tiers | {"smoke": lambda: meets(0.3), "book": lambda: meets(0)})
    assert checks.run() == 0
    summary = (project / "_build/check/summary.txt").read_text()
    assert re.findall(r"^(\w+) +passed", summary, re.MULTILINE) == list(checks.TIERS)
    monkeypatch.setitem(checks.TIERS, "book", result(failed=1))
    assert checks.run(["book"]) == 1


STAND_IN = """
import pytest

@pytest.mark.parametrize("chapter", ["01_one", "02_two"])
def test_a_chapter(chapter, record_property):
    record_property("processor_seconds", 29.0 if chapter == "01_one" else 31.0)
"""


def test_chapters_over_the_quick_budget_are_named_by_their_processor_time(project, alone, monkeypatch):
    (project / "tests/test_chapters.py").write_text(STAND_IN)
    monkeypatch.setattr(checks, "STAND_IN", "tests/test_chapters.py")
    found = checks._smoke()
    assert found.counts == Counter(passed=2) and found.note == "over 30 s of processor time: 02_two 31 s"


@pytest.mark.parametrize("counts", [{}, {"skipped": 5}])
@pytest.mark.parametrize("tier", ["unit", "chapters", "smoke", "book"])
def test_a_tier_in_which_nothing_was_tested_fails(project, monkeypatch, capsys, tier, counts):
    monkeypatch.setitem(checks.TIERS, tier, result(**counts))
    assert checks.run([tier]) == 1
    out = capsys.readouterr().out
    assert "nothing was tested" in out and f"failed: {tier}" in out


def test_records_alone_may_be_skipped_and_the_last_line_says_so(project, monkeypatch, capsys):
    monkeypatch.setitem(checks.TIERS, "unit", result(passed=7, skipped=2))
    monkeypatch.setitem(checks.TIERS, "records", result(skipped=5))
    assert checks.run(["unit", "records"]) == 0
    out = capsys.readouterr().out.strip().splitlines()
    assert out[-1].startswith("===== 7 passed, 7 skipped (5 records for want of raw data) in ")
    assert any(line.startswith("records   skipped") for line in out)
    monkeypatch.setitem(checks.TIERS, "records", result())
    assert checks.run(["records"]) == 1


@pytest.mark.parametrize("tier", checks.TIERS)
def test_an_empty_checkout_passes_nothing(project, alone, tier, capsys):
    assert checks.run([tier]) == 1


def test_examples_in_docstrings_are_tests(project):
    (project / "src/helpers").mkdir(parents=True)
    (project / "src/helpers/__init__.py").write_text('""">>> 1 + 1\n2\n"""')
    (project / "src/helpers/wrong.py").write_text('""">>> 1 + 1\n3\n"""')
    (project / "tests/test_one.py").write_text("def test_one(): pass")
    assert checks._unit().counts == Counter(passed=2, failed=1)


# ---------------------------------------- chapters


def test_each_chapter_runs_once_and_is_compared(project, monkeypatch, capsys):
    run_one, runs = runner._run_one, []
    monkeypatch.setattr(runner, "_run_one", lambda name, *rest: [runs.append(name), run_one(name, *rest)][1])
    monkeypatch.setattr(runner, "BUDGETS", {"book": 0.1})
    chapter(project, "01_one", ("print(0.5)", "0.5\n"), ("print(2)", "3\n"), ("# no output\nx = 1", ""))
    chapter(project, "02_two", ("print(6 * 7)", "42\n"), ("1 / 0", "never\n"))
    found = checks._chapters()
    assert found.counts == Counter(passed=2, failed=1, errors=1)
    assert "1 of 2 chapters failed: 02_two in code cell 2 (`1 / 0`)" in found.note
    assert "over 0.1 s of processor time: 01_one" in found.note
    out = capsys.readouterr().out
    assert "01_one, code cell 2:\nprint(2)\n" in out and "committed 3, computed 2" in out

    # The numbers of a chapter that did not change are compared all the same, with the copy that there is.
    chapter(project, "01_one", ("print(0.5)", "0.6\n"), ("print(2)", "2\n"), ("# no output\nx = 1", ""))
    chapter(project, "02_two", ("print(6 * 7)", "42\n"))
    assert checks._chapters().counts == Counter(passed=3, failed=1)
    assert sorted(runs) == ["01_one", "02_two", "02_two"]


def test_a_cell_that_was_never_run_fails(project, monkeypatch):
    def run(name, values, out, digest, *_):  # a kernel would take long, and finds nothing in this cell
        shutil.copy(project / "notebooks" / f"{name}.ipynb", out)
        (out / f"{name}.digest").write_text(f"{digest}\n0.1\n")

    monkeypatch.setattr(runner, "_run_one", run)
    nbformat.write(new_notebook(cells=[new_code_cell("1;")]), project / "notebooks" / "01_one.ipynb")
    assert checks._chapters().counts == Counter(failed=1)
    assert compare.never_run(new_code_cell("1")) and not compare.never_run(new_code_cell(""))


# ---------------------------------------- records


def test_records_take_turns_within_the_budget():
    seconds = {f"record-{i}": float(1 + i % 7) for i in range(60)} | {"long": 500.0}
    turns = [checks.rotation(seconds, 50, f"commit {i}") for i in range(400)]
    assert turns[0] == checks.rotation(seconds, 50, "commit 0") != turns[1]
    assert set().union(*turns) == set(seconds), "each has its turn some time"
    for chosen in turns:
        assert chosen == ["long"] or (45 <= sum(seconds[name] for name in chosen) <= 50 and "long" not in chosen)
    assert checks.rotation({}, 50, "") == []


RECORDS = """
import pytest

pytestmark = pytest.mark.records

@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_evaluates(name):
    if name == "third":
        pytest.skip("no data")

@pytest.mark.parametrize("name", ["second"])
def test_table(name):
    pass

def test_whole_data_set():
    pass
"""


def test_what_is_not_selected_is_not_skipped_either(project, alone, monkeypatch, capsys):
    (project / "tests/test_records.py").write_text(RECORDS)
    (project / "pytest.ini").write_text("[pytest]\nmarkers = records\n")
    shutil.copy(Path(__file__).parents[1] / "conftest.py", project / "tests")
    for name in ("first", "second", "third"):
        (project / f"data/records/{name}.json").write_text("{}")
    seconds = project / "tests/record-seconds.json"
    monkeypatch.setattr(
        checks, "rotation", lambda known, *_: [name for name in known if known[name] == checks.RECORD_SECONDS][1:2]
    )
    found = checks._records()
    assert (found.counts, found.note) == (Counter(passed=3), "1 of 3 records")
    assert not seconds.exists()
    assert checks.run(["records"], all_records=True) == 0
    assert "2 of 3 records" in capsys.readouterr().out
    written = json.loads(seconds.read_text())
    assert list(written) == ["first", "second", "third"] and written["third"] == checks.RECORD_SECONDS
    assert written["first"] < 5


def test_committed_seconds_are_of_committed_records():
    known = json.loads((root() / "tests" / "record-seconds.json").read_text(encoding="utf-8"))
    assert known and known.keys() <= {path.stem for path in (root() / "data" / "records").glob("*.json")}
