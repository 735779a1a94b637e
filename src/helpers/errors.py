"""Errors that reach the reader as one sentence."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any


class UserError(Exception):
    """A mistake that the reader can mend: one sentence that says what is wrong and what to do about it."""


class DataAbsent(UserError):
    """A raw data set, which is no part of the repository, is not on this machine and could not be downloaded."""


class Busy(UserError):
    """Another process is at the same files at this moment."""


class Terminated(KeyboardInterrupt):
    """A request to terminate, which stops what runs as Ctrl-C does and ends with a status of its own."""


def stop_at_once(number: int, _: Any = None) -> None:
    """A handler of signals: raise what the signal means.

    Raises:
        Terminated: for SIGTERM.
        KeyboardInterrupt: for any other.
    """
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def nearest(name: str, known: Iterable[str]) -> str:
    """What a message about an unknown name suggests: a clause in brackets, or nothing where no name is near.

    >>> nearest("Sede", ["profile", "seed", "device"])
    ' (did you mean seed?)'
    """
    by_letters = {one.lower(): one for one in known}
    close = [by_letters[one] for one in difflib.get_close_matches(name.lower(), by_letters, n=2, cutoff=0.6)]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def exit_status(action: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """Call what a command does, and say in one sentence on standard error what the reader can mend.

    From here on a request to terminate is treated as Ctrl-C is.

    Returns:
        What ``action`` returns where that is a whole number, else 0; 2 after a :class:`UserError` or an error of the
        system, 130 after Ctrl-C, 143 after a request to terminate.
    """
    with suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, stop_at_once)
    try:
        result = action(*arguments, **options)
    except UserError as error:
        message, status = str(error), 2
    except KeyboardInterrupt as error:
        message = str(error) or "stopped; what was finished is kept, run the same command to go on"
        status = 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:  # the reader of our output has gone, as in `metabook train --list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message, status = f"{error.strerror or error} ({error.filename or 'no file named'})", 2
    else:
        return result if isinstance(result, int) else 0
    print(f"metabook: {message}", file=sys.stderr)
    return status
