"""Running the command line within the process, and a miniature checkout for it."""

from __future__ import annotations

import signal
from pathlib import Path

import nbformat
import tiny

from helpers import cli, experiments


def call(capsys, *words: str) -> tuple[int, str, str]:
    """Run a command; returns exit status, standard output and standard error."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        status = cli.main(list(words))
    except SystemExit as stop:  # argparse
        status = stop.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def train(capsys, *words: str) -> tuple[int, str, str]:
    """``metabook train`` on the processor, compiling nothing."""
    return call(capsys, "train", "--device", "cpu", "--no-compile", *words)


def checkout(folder: Path, monkeypatch) -> Path:
    """A checkout with one chapter and two tiny experiments."""
    monkeypatch.setenv("METABOOK_ROOT", str(folder))
    (folder / "notebooks").mkdir()
    source = "profile = 'book'\nseed = 0\ndevice = 'cpu'\nrate = 0.5\npapers = []"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "notebooks" / "01_one.ipynb")
    known = {name: tiny.Tiny(name=name, iterations=60) for name in ("first", "second")}
    monkeypatch.setattr(experiments, "catalogue", lambda: known)
    return folder
