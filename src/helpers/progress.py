"""Progress bars: redrawn in a terminal and in a notebook, now and then a line anywhere else."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

EVERY = 20.0  # seconds between two lines of a log


def redraws() -> bool:
    """Whether standard error may be drawn over, which ``NO_COLOR`` forbids (https://no-color.org)."""
    notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return not os.environ.get("NO_COLOR") and (notebook or sys.stderr.isatty())


class _Lines:
    """Stands for standard error where nothing is drawn over: each update of a bar is a line."""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip("\r\n ")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A bar of tqdm, with its settings.

    Where nothing is drawn over, what is done within ``EVERY`` seconds leaves no trace, and the rest a line so often.
    """
    if not redraws():
        settings = {"delay": EVERY} | settings | {"mininterval": EVERY, "position": 0, "file": _Lines()}
    return tqdm(iterable, **({"mininterval": 1} | settings))


@contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    """A bar that says for how long something has been going on, where nothing else can be counted.

    It appears after two seconds, stands above bars that are drawn within, and leaves no trace.
    """
    over = threading.Event()
    settings = {"bar_format": "{desc}: {elapsed}", "delay": 2, "miniters": 1, "leave": False, "disable": not shown}
    with progress_bar(desc=what, **settings) as bar:

        def tick() -> None:
            while not over.wait(1.0):
                bar.update()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
