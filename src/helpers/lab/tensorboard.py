"""What a run measures on the way, as TensorBoard shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from helpers.errors import UserError
from helpers.runtime import ensure_writable

Watch = Callable[[int, Mapping[str, float]], None]


@contextmanager
def watching(folder: Path | None, name: str) -> Iterator[Watch | None]:
    """What :func:`helpers.lab.training.train` tells its iterations and numbers to, so that ``folder/name`` has them.

    Args:
        folder: where TensorBoard looks (``tensorboard --logdir FOLDER``); None for no watching.
        name: of the run.

    Raises:
        UserError: without the package tensorboard, or where nothing can be written.
    """
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package that is not here: `pip install tensorboard`") from None
    ensure_writable(folder / name)
    writer = SummaryWriter(str(folder / name))

    def watch(iteration: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, iteration)

    try:
        yield watch
    finally:
        writer.close()
