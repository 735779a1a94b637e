"""Processes that know each other, as ``torchrun`` starts them, forked from the test: they hold what it has set up."""

from __future__ import annotations

import multiprocessing
import os
import socket

from helpers.numerics import ranks


def together(count, work, seconds=120):
    """Run ``work()`` in so many ranks; returns for each its result, or the name and text of what it raised.

    A rank that was killed has None.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context, children = multiprocessing.get_context("fork"), []
    for number in range(count):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(number, count, port, work, sender), daemon=True)
        child.start()
        sender.close()
        children.append((child, receiver))
    found = []
    for child, receiver in children:
        try:
            found.append(receiver.recv() if receiver.poll(seconds) else "too slow")
        except EOFError:
            found.append(None)
        child.join(5)
        child.kill()
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
    sender.send(found)
    os._exit(0)
