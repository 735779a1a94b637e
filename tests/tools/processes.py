"""Processes forked from the test, which hold what it has set up: one, or some that know each other as torchrun's do."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket

from helpers.numerics import ranks


@contextlib.contextmanager
def beside(work):
    """A process that does ``work()`` and is killed at the end of the block; ``gone()`` is its exit status, if any."""
    if not (child := os.fork()):
        try:
            work()
        finally:
            os._exit(0)
    status = []

    def gone(wait=os.WNOHANG):
        if not status and (found := os.waitpid(child, wait))[0]:
            status.append(os.waitstatus_to_exitcode(found[1]))
        return status[0] if status else None

    try:
        yield gone
    finally:
        if gone() is None:
            os.kill(child, signal.SIGKILL)
            gone(0)


def together(count, work, seconds=120):
    """Run ``work()`` in so many ranks; returns for each its result, or the name and text of what it raised.

    A rank that was killed has None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(count):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        # Not multiprocessing.Process, which a test that runs in such a process may not start.
        if not (child := os.fork()):
            _child(number, count, port, work, sender)
        sender.close()
        children.append((child, receiver))
    found = []
    for _, receiver in children:
        try:
            found.append(receiver.recv() if receiver.poll(seconds) else "too slow")
        except EOFError:
            found.append(None)
    for child, _ in children:
        os.kill(child, signal.SIGKILL)  # what is over by itself waits for us, so the number is still its own
        os.waitpid(child, 0)
    return found


def _child(number, count, port, work, sender):
    os.environ |= {
        "RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        with ranks.joined():
            found = work()
    except BaseException as error:
        found = type(error).__name__, str(error)
    try:
        sender.send(found)
    finally:
        os._exit(0)
