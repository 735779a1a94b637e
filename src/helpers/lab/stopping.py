"""How a run is asked to stop: by Ctrl-C or a request to terminate, in training and while it measures."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from helpers.errors import stop_at_once


class CutOff(BaseException):
    """What was begun is dropped: an iteration that went on for too long, or a measurement that Ctrl-C came into."""


class Requests:
    """What was asked for so far.

    Attributes:
        first: time of the first request, by ``time.monotonic``; None as long as there is none.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self._measuring = False

    def __bool__(self) -> bool:
        return self.first is not None

    def handle(self, number: int, _: Any = None) -> None:
        """A handler of signals. The first one interrupts measurements alone; a second one does not want to wait.

        Raises:
            CutOff: at the first request, within :meth:`measuring`.
            KeyboardInterrupt: at any further one.
        """
        if self:
            stop_at_once(number)
        self.first = time.monotonic()
        # Not by print, which may be what was interrupted.
        os.write(2, b"\nmetabook: stopping soon; once more stops at once, at the last checkpoint\n")
        if self._measuring:
            raise CutOff

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within this, the first request raises a :class:`CutOff`."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False


@contextmanager
def requests() -> Iterator[Requests]:
    """Collect requests to stop; outside the main thread there are none."""
    found, previous = Requests(), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, found.handle)
        except ValueError:  # not in the main thread
            pass
    try:
        yield found
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
