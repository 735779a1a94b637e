"""The list of mutants is up to date, and one of them is made and dies."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from helpers.runtime import root


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("mutants", root() / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # where a process of its own finds what it is to run
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


def test_every_mutant_can_be_made(program):
    """Its text is in the source once, what comes of it is Python, and its tests are there."""
    found, sources = program.mutants(), {}
    assert len(found) >= 60
    assert [what for what, count in Counter(one.what for one in found).items() if count > 1] == []
    for one in found:
        source = sources.setdefault(one.file, (root() / one.file).read_text(encoding="utf-8"))
        changed = one.of(source)
        assert changed is not None, f"{one.what}: its text is {source.count(one.text)} times in {one.file}"
        assert ast.parse(changed) and changed != source, one.what
        assert one.tests, one.what
        for test in one.tests:
            file, _, name = test.partition("::")
            assert (root() / file).is_file(), test
            content = (root() / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}(" in content or not name, test


def test_a_text_that_is_gone_is_stale(program, tmp_path):
    (tmp_path / "gone.py").write_text("right = 1\n")
    one = program.Mutant("it is gone", "gone.py", "wrong", "right", ("tests/test_floors.py",))
    assert one.of("right") is None and one.of("wrong wrong") is None and one.of("wrong") == "right"
    copy = object.__new__(program.Copy)
    copy.place = tmp_path
    assert [copy.fate(each).word for each in (one, replace(one, file="nowhere.py"))] == [program.STALE] * 2


@pytest.mark.slow
def test_mutants_die_live_or_are_stale(tmp_path):
    """As a program: one of each, and the checkout stays as it is."""
    entry = '[[mutant]]\nwhat = "{}"\nfile = "src/helpers/lab/statistics.py"\ntext = "{}"\nput = "{}"\ntests = ["{}"]\n'
    holm = "tests/lab/test_verdicts.py::test_holm"
    rows = (
        ("all ranks alike", "(len(values) - rank)", "len(values)", holm),
        ("only a remark", "def holm(", "# the same\\ndef holm(", holm),
        ("long gone", "no such text", "x", holm),
    )
    (tmp_path / "list.toml").write_text("".join(entry.format(*row) for row in rows))
    path = root() / "src" / "helpers" / "lab" / "statistics.py"
    before = path.read_bytes()
    command = [sys.executable, str(root() / "benchmarks" / "mutants.py"), "--of", str(tmp_path / "list.toml")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    lines = [line.split(None, 2) for line in found.stdout.splitlines()]
    assert [(line[0], line[2].split("  ")[0]) for line in lines[1:4]] == [
        ("died", "all ranks alike"), ("lived", "only a remark"), ("stale", "long gone")
    ]  # fmt: skip
    assert "test_verdicts.py::test_holm" in found.stdout and "1 of 3 mutants died" in found.stdout
    assert path.read_bytes() == before
