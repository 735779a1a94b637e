"""Runs and the children of a search on many workers, through Dask (the extra ``cluster``).

A run travels: a worker gets its checkpoint, goes on for some minutes in a folder of its own, and what it brought comes
home with the answer. No disk is shared, and the piece of a worker that died is done again by another one, from the
same checkpoint. In a search it is the children that travel: the search thinks here, and what it finds does not depend
on how many workers there are.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from helpers import runtime
from helpers.errors import UserError
from helpers.experiments.nos import SearchRun
from helpers.lab import checkpoints, training
from helpers.lab.experiment import Experiment, Run
from helpers.optimizers.child_training import Outcome, Population
from helpers.optimizers.children import Children
from helpers.optimizers.language import Expression
from helpers.progress import progress_bar

PIECE = 120.0  # seconds of training that a worker does at a time, and that are lost with it


@contextlib.contextmanager
def connected(where: str) -> Iterator[Any]:
    """A client of a Dask cluster; within, tasks can be sent to it.

    Args:
        where: ``"local:2"`` starts two workers here, with one thread each; otherwise the address of a scheduler, such
            as ``"tcp://host:8786"``, whose workers have this package and the same data.

    Raises:
        UserError: without Dask, for another text, or where nobody answers.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise UserError("--cluster needs Dask: `pip install 'metabook[cluster]'` brings it") from None
    kind, _, count = where.partition(":")
    if kind == "local" and not (count.isdecimal() and int(count)):
        raise UserError(f"{where!r} is no cluster: say local:2 for two workers here, or a scheduler's tcp://host:8786")
    with contextlib.ExitStack() as held:
        if kind == "local":
            settings = {"n_workers": int(count), "threads_per_worker": 1, "dashboard_address": None}
            address = held.enter_context(LocalCluster(**settings, resources={"GPU": 1}, silence_logs=50))
        else:
            address = where
        try:
            client = held.enter_context(Client(address, timeout=30, set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"no scheduler of Dask answers at {where} ({reason}): start it by `dask scheduler`"
            ) from None
        yield client


def _needs(device: torch.device | str) -> dict[str, Any]:
    """What Dask is told of a task's device: one at a time on a GPU."""
    return {"resources": {"GPU": 1}} if torch.device(device).type == "cuda" else {}


# ---------------------------------------- runs
@dataclass(frozen=True)
class Piece:
    """What a worker brings back.

    Attributes:
        files: contents by suffix, the checkpoint's and, once the run was measured, those of the record.
        iteration: how far the run is.
        said: the last line about it.
    """

    files: dict[str, bytes]
    iteration: int
    said: str


def go_on(
    experiment: Experiment, files: dict[str, bytes], budget: float | None, judged: bool, settings: dict[str, Any]
) -> Piece:
    """Go on with a run for ``budget`` seconds from the given files: what a worker does.

    Args:
        judged: measure what was trained even where the run is not over.
        settings: of :func:`helpers.lab.training.train`.
    """
    runtime.make_worker(settings.get("device", "cpu"))
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = checkpoints.files(experiment.name, Path(folder))
        for suffix, content in files.items():
            runtime.write_atomically(paths[suffix], content)
        training.train(
            experiment, data=Path(folder), budget=budget, judged=judged, progress=False, say=said.append, **settings
        )
        _, header = checkpoints.read_checkpoint(paths[checkpoints.SUFFIX])
        files = {suffix: path.read_bytes() for suffix, path in paths.items() if path.exists()}
    return Piece(files, header["iteration"], said[-1] if said else "")


def train(
    chosen: Sequence[Experiment],
    client: Any,
    *,
    data: Path | None = None,
    budget: float | None = None,
    grace: float | None = None,
    piece: float = PIECE,
    settings: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Train experiments, each on one worker at a time, the first ones first.

    Args:
        client: of :func:`connected`.
        data: folder with ``checkpoints/`` and ``records/``, from where runs go on and where they come home to; by
            default ``data/`` of the checkout.
        budget: seconds; what is not over by then is measured as it is.
        grace: seconds beyond the budget, after which a run that is still measured is left as it last came home.
        piece: seconds of training for which a worker keeps a run.
        settings: of :func:`helpers.lab.training.train`, such as the device.
        say: receives a line about every run.

    Returns:
        Names of the experiments that could not be trained; a line said why.

    Raises:
        KeyboardInterrupt: after Ctrl-C; what had come home is kept.
    """
    from distributed import TimeoutError, as_completed

    data, settings, started = data or runtime.root() / "data", settings or {}, time.monotonic()
    needs = _needs(settings.get("device", "cpu"))
    places = {e.name: checkpoints.files(e.name, data) for e in chosen}
    running: dict[Any, tuple[Experiment, bool]] = {}
    failed: list[str] = []
    bars = {
        e.name: progress_bar(total=e.iterations, desc=e.name, position=position, leave=False)
        for position, e in enumerate(chosen)
    }

    def send(experiment: Experiment) -> Any:
        left = piece if budget is None else budget - (time.monotonic() - started)
        files = {s: path.read_bytes() for s, path in places[experiment.name].items() if path.exists()}
        last = left <= 0  # what came home is measured, after one more iteration
        future = client.submit(
            go_on, experiment, files, max(0.0, min(left, piece)), last, settings,
            key=f"{experiment.name}-{time.monotonic_ns()}", priority=-list(places).index(experiment.name), **needs,
        )  # fmt: skip
        running[future] = (experiment, last)
        return future

    with contextlib.ExitStack() as held:
        for experiment in chosen:
            held.enter_context(bars[experiment.name])
            path = places[experiment.name][checkpoints.SUFFIX]
            held.enter_context(runtime.only_one(path, f"training {experiment.name}"))
        try:
            late = None if budget is None or grace is None else budget + grace
            answers = as_completed([send(e) for e in chosen], raise_errors=False, timeout=late, loop=client.loop)
            for future in answers:
                experiment, last = running.pop(future)
                bar = bars[experiment.name]
                if (error := future.exception()) is not None:
                    failed.append(experiment.name)
                    say(f"metabook: {error if isinstance(error, UserError) else _failure(experiment, error)}")
                    continue
                brought: Piece = future.result()
                future.release()
                for suffix, content in brought.files.items():
                    runtime.write_atomically(places[experiment.name][suffix], content)
                bar.update(brought.iteration - bar.n)
                if brought.iteration < experiment.iterations and not last:
                    answers.add(send(experiment))
                else:
                    path = places[experiment.name][checkpoints.SUFFIX]
                    say(f"{brought.said.rpartition('; checkpoint ')[0]}; checkpoint {path}")
        except TimeoutError:
            for experiment, _ in running.values():
                say(f"{experiment.name}: stopped before its evaluation was over; what had come home is kept")
        finally:
            client.cancel(list(running), force=True)
    return failed


def train_until(
    end: float,
    grace: float,
    where: str,
    chosen: Sequence[Experiment],
    data: Path,
    device: str,
    say: Callable[[str], None],
) -> None:
    """:func:`train` until a time by ``time.monotonic``, at most ``grace`` seconds of which are for measuring."""
    with connected(where) as client:
        left = max(0.0, end - time.monotonic())
        grace = min(grace, 0.25 * left)
        train(chosen, client, data=data, budget=left - grace, grace=grace, settings={"device": device}, say=say)


def _failure(experiment: Experiment, error: BaseException) -> str:
    return f"{experiment.name} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


# ---------------------------------------- children of a search
@lru_cache(maxsize=1)
def _population(children: Children, fused: bool, device: str) -> Population:
    """A worker's own data and first weights, made once."""
    return children.population(fused=fused, device=device)


def _tried(children: Children, fused: bool, device: str, rules: Sequence[Expression], settings: dict) -> list[Outcome]:
    runtime.make_worker(device)
    return _population(children, fused, device).rewards(rules, **settings)


@dataclass(eq=False)
class Spread:
    """Stands for a search's :class:`~helpers.optimizers.child_training.Population`; its children are tried elsewhere.

    Attributes:
        children: what a rule is tried on.
        client: of :func:`connected`.
        fused: compile the children's program.
        device: of the workers.
        check_clock: called while answers are waited for.
    """

    children: Children
    client: Any
    fused: bool = False
    device: str = "cpu"
    check_clock: Callable[[], None] = field(default=lambda: None, repr=False)

    def rewards(self, rules: Sequence[Expression], epochs: int = 5, **settings: Any) -> list[Outcome]:
        """As :meth:`helpers.optimizers.child_training.Population.rewards`, which does not mind a rule's company."""
        workers = max(1, len(self.client.scheduler_info()["workers"]))
        size = max(1, min(self.children.chunk, -(-len(rules) // workers)))
        settings |= {"epochs": epochs}
        needs = _needs(self.device)
        parts = [
            self.client.submit(
                _tried, self.children, self.fused, self.device, list(rules[i : i + size]), settings, pure=False, **needs
            )
            for i in range(0, len(rules), size)
        ]
        try:
            while not all(part.done() for part in parts):
                time.sleep(0.05)
                self.check_clock()
            return [outcome for part in self.client.gather(parts) for outcome in part]
        finally:
            self.client.cancel(parts, force=True)


def spread(client: Any, device: str = "cpu") -> Callable[[Run], None]:
    """What makes a search send its children to a cluster: ``arrange`` of :func:`helpers.lab.training.train`."""

    def arrange(run: Run) -> None:
        if isinstance(run, SearchRun):
            fused, check = run.population.fused, run.population.check_clock
            run.population = Spread(run.search.children, client, fused, device, check)

    return arrange
