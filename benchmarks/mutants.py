"""Do the tests bite? Make the source wrong in one place after another, and see that a test fails each time.

    python benchmarks/mutants.py [--only PATTERN] [--limit SECONDS] [--list] [--of FILE]

The mutants stand in ``benchmarks/mutants.toml``: a file, a text that occurs in it once, what is put in its place, and
the tests that must fail. They are applied to a temporary copy of the checkout, one at a time, and never to the checkout
itself. First the tests must pass on the copy as it is. The exit status is 1 if a mutant lives, or if its text is no
longer in the source (*stale*), and 2 if the tests fail without any.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".toml")
DIED, LIVED, STALE, LATE, BROKEN = "died", "lived", "stale", "late", "broken"
# What takes long to import and is no part of the book: loaded once, by the process that every run is forked from.
HEAVY = ("pytest", "torch", "torch.func", "scipy.stats", "safetensors.torch", "sklearn.datasets", "matplotlib.pyplot")


@dataclass(frozen=True)
class Mutant:
    """One wrong place.

    Attributes:
        what: what is wrong then, in words; no two have the same.
        file: where, from the root of the checkout.
        text: what stands there, once.
        put: what is put in its place.
        tests: those that must notice, as pytest wants them.
    """

    what: str
    file: str
    text: str
    put: str
    tests: tuple[str, ...]

    def of(self, source: str) -> str | None:
        """The source with the mistake; None where the text is not in it exactly once."""
        return source.replace(self.text, self.put) if source.count(self.text) == 1 else None


@dataclass(frozen=True)
class Fate:
    """What became of a mutant: one of the five words, after how long, and the first test that failed."""

    mutant: Mutant
    word: str
    seconds: float = 0.0
    test: str = ""


def mutants(path: Path = LIST) -> list[Mutant]:
    """All of the list."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def copied(place: Path) -> Path:
    """A copy of the checkout's files, tracked and new; of the data in ``data/raw`` only the drawn glyphs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    drawn = [str(path.relative_to(ROOT)) for path in (ROOT / "data" / "raw").glob("glyphs-*.npz")]
    for name in dict.fromkeys([*listed.split("\0"), *drawn]):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


class Copy:
    """A copy of the checkout in which tests are run.

    Args:
        place: where it is.
        limit: seconds for the tests of one mutant.
    """

    def __init__(self, place: Path, limit: float) -> None:
        self.place, self.limit = copied(place), limit
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(HEAVY))

    def run(self, tests: Sequence[str], limit: float | None = None) -> tuple[int | None, str]:
        """The status that pytest gives, None where it took too long, and the first test that failed."""
        ours, theirs = self.context.Pipe(duplex=False)
        process = self.context.Process(target=_tested, args=(str(self.place), list(tests), theirs), daemon=True)
        process.start()
        theirs.close()
        answered = ours.poll(limit or self.limit)
        try:
            answer = ours.recv() if answered else (None, "")
        except EOFError:  # the process died of it
            answer = (1, "")
        with suppress(ProcessLookupError):  # with what the tests have started, or it would be waited for
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return answer

    def fate(self, mutant: Mutant) -> Fate:
        """Apply a mutant, run its tests, and put the source back."""
        path, began = self.place / mutant.file, time.monotonic()
        changed = mutant.of(path.read_text(encoding="utf-8")) if path.is_file() else None
        if changed is None:
            return Fate(mutant, STALE)
        path.write_text(changed, encoding="utf-8")
        try:
            status, test = self.run(mutant.tests)
        finally:
            shutil.copy2(ROOT / mutant.file, path)
        word = {None: LATE, 0: LIVED, 1: DIED}.get(status, BROKEN)
        return Fate(mutant, word, time.monotonic() - began, test)


class _First:
    """A plugin of pytest's that remembers the first test that failed."""

    failed = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def _tested(place: str, tests: list[str], answer: Connection) -> None:
    """Run tests of a copy, in a process of their own."""
    os.setsid()
    os.chdir(place)
    os.environ |= {"METABOOK_ROOT": place, "PYTHONPATH": f"{place}/src", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ.pop("METABOOK_DATA", None)
    sys.path[:0] = [f"{place}/src"]
    sys.dont_write_bytecode = True  # so that no mutant is met again
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    import pytest

    assert "helpers" not in sys.modules, "the copy is what is tested"
    first = _First()
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[first])
    answer.send((int(status), first.failed))


def table(fates: Sequence[Fate]) -> str:
    """The fates as a table, those that failed last."""
    rows = [("fate", "s", "what is wrong then", "first test that fails")]
    for one in sorted(fates, key=lambda one: one.word != DIED):
        rows.append((one.word, f"{one.seconds:.0f}", one.mutant.what, one.test.removeprefix("tests/")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main(words: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression for words or file")
    parser.add_argument("--limit", metavar="SECONDS", type=float, default=300.0, help="for the tests of one mutant")
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    parser.add_argument("--of", metavar="FILE", type=Path, default=LIST, help="another list")
    asked = parser.parse_args(words)
    chosen = [one for one in mutants(asked.of) if re.search(asked.only, f"{one.what} {one.file}")]
    if asked.list or not chosen:
        print("\n".join(one.what for one in chosen) or "no mutant is called so")
        return 0 if asked.list else 2
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copy = Copy(Path(place), asked.limit)
        bar = tqdm(total=len(chosen) + 1, desc="tests without a mutant", leave=False)
        every = sorted({test for one in chosen for test in one.tests})
        status, test = copy.run(every, asked.limit * len(chosen))
        if status != 0:
            bar.close()
            print(f"the tests fail without any mutant ({test or f'status {status}'}): mend them first")
            return 2
        fates = []
        for one in chosen:
            bar.update()
            bar.set_description(one.what[:40])
            fates.append(copy.fate(one))
            if fates[-1].word != DIED:  # at once: the whole list takes a quarter of an hour
                bar.write(f"{fates[-1].word}: {one.what}", file=sys.stderr)
        bar.close()
    print(table(fates))
    failed = [one for one in fates if one.word != DIED]
    print(f"\n{len(fates) - len(failed)} of {len(fates)} mutants died")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
