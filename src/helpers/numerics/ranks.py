"""Processes that train one experiment together, as ``torchrun`` starts them; a process alone is the only rank.

All ranks do the same and so hold the same: they draw the same tasks, by the same generator, and take the same outer
step. What differs is who computes it. Each takes a part of the meta-batch
(:func:`helpers.estimators.explicit.divided`); the first one measures, writes and talks, and tells the others what it
found (:func:`told`).

The transport is ``torch.distributed``: gloo between processors, NCCL between GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from helpers.errors import UserError

PATIENCE = timedelta(hours=12)  # how long the others wait while the first rank measures


class Lost(UserError):
    """Another rank is gone, so that nothing can be computed together any more."""


def expected() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    """How many ranks there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Which of them this process is, from 0."""
    return distributed.get_rank() if count() > 1 else 0


def own_device(device: torch.device) -> torch.device:
    """The device of this process: where GPUs are asked for and none is named, each process of a machine has its own."""
    if expected() > 1 and device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def joined() -> Iterator[None]:
    """Within this, the processes that ``torchrun`` started know each other, and only the first one prints.

    Of a loss the second one tells as well, since the first may be what was lost.

    Raises:
        UserError: where they cannot meet.
    """
    if expected() == 1 or count() > 1:  # alone, or joined already
        yield
        return
    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(kinds, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes cannot meet ({reason}): start them by torchrun, all with one address") from None
    with ExitStack() as silence:
        if mine := number():
            silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except UserError as error:
            speakers = 2 if isinstance(error, Lost) else 1
            if mine >= speakers:
                raise SystemExit(2) from None
            raise
        except KeyboardInterrupt:
            if mine:
                raise SystemExit(130) from None
            raise
        finally:
            distributed.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of the transport
        raise Lost(
            "another process of this run is gone: run the same command again, with any number of processes; it goes on "
            "from the last checkpoint"
        ) from error


def any_of(flag: bool) -> bool:
    """Whether any rank says so."""
    if count() == 1:
        return flag
    said = torch.tensor(float(flag))
    with _together():
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
    return bool(said)


def told(compute: Callable[[], Any]) -> Any:
    """What the first rank computes, for all of them.

    Raises:
        UserError: on every rank, if it does on the first.
    """
    if count() == 1:
        return compute()
    box: list[Any] = [None, None]
    failed: BaseException | None = None
    if number() == 0:
        try:
            box[0] = compute()
        except BaseException as error:  # the others wait for a word
            failed, box[1] = error, str(error) or type(error).__name__
    with _together():
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if failed is not None:
        raise failed
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def summed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sums of tensors over all ranks, in one message for each type of number."""
    if count() == 1:
        return tensors
    found: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].reshape(-1) for place in places])
        with _together():
            distributed.all_reduce(flat)
        parts = flat.split([tensors[place].numel() for place in places])
        found |= {place: part.view_as(tensors[place]) for place, part in zip(places, parts, strict=True)}
    return [found[place] for place in range(len(tensors))]
