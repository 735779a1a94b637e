"""The outer loop as a resumable, recorded experiment.

One file holds everything that training needs to go on: parameters, optimiser, random generator, iteration and history,
as a ``.safetensors`` file with a JSON header (no pickle). It is replaced atomically, so a killed run continues from its
last checkpoint, bit for bit as if it had never stopped (on the same machine with the same engine settings).
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from helpers import records, runtime
from helpers.evaluation import Interval
from helpers.learners import CARRIED
from helpers.models import Params
from helpers.runtime import UserError

FORMAT = "metabook checkpoint 1"
LOG_EVERY = 100  # iterations between two entries of the history, and between two looks at the loss


class Run(Protocol):
    """An experiment made ready on one device."""

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters."""
        ...

    def gradient(self, theta: Params, generator: torch.Generator) -> tuple[Params, Tensor]:
        """Draw a meta-batch and return the meta-gradient and the mean query loss (a scalar tensor)."""
        ...

    def evaluate(self, theta: Params) -> dict[str, Interval]:
        """All metrics of the record, on tasks that are the same on every call.

        Where that takes long, a run also has ``spot_check(theta)``: metrics from part of the tasks, for the points on
        the way and for checking a record; those named ``spot_…`` are the same in both.

        What a run wrote down row by row, ``table(theta)`` returns as dictionaries of texts and numbers; it is kept
        beside the record.
        """
        ...


class Experiment(Protocol):
    """A named, recorded experiment. Its attributes are the configuration; see ``helpers.experiments.maml`` for one."""

    name: str
    paper: str
    iterations: int
    outer_rate: float
    seed: int
    evaluate_every: int
    # Optional: ``outer``, "adam" (the default) or "sgd"; ``outer_rate_final``, to which the outer rate goes linearly,
    # ``outer_rate_hold``, the iterations before it begins to, and ``outer_rate_restarts``: see :func:`outer_rate`.
    # ``light``: once the run is complete its checkpoint keeps no state of the optimiser, two thirds of the file.

    def config(self) -> dict[str, Any]:
        """The whole configuration as JSON. A checkpoint of another configuration is refused."""
        ...

    def data(self) -> dict[str, Any]:
        """Provenance of the data: names and digests."""
        ...

    def setup(self, device: torch.device, compiled: bool) -> Run:
        """Load the data and build the estimator."""
        ...


class State:
    """Everything that changes while an experiment trains."""

    def __init__(self, theta: Params, outer_rate: float, generator: torch.Generator, outer: str = "adam") -> None:
        self.theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        if outer not in kinds:
            raise UserError(f"there is no outer optimiser {outer!r}: use {' or '.join(kinds)}")
        learned = [value for name, value in self.theta.items() if not name.startswith(CARRIED)]
        # An experiment may only measure: then nothing is learned, and an optimiser still wants a tensor.
        self.optimizer = kinds[outer](learned or [torch.zeros(0)], lr=outer_rate)
        self.generator = generator
        self.iteration = 0
        self.seconds = 0.0
        self.losses: list[float] = []  # mean query loss of each LOG_EVERY iterations
        self.window: list[Tensor] = []  # query losses since the last entry
        self.curve: list[dict[str, Any]] = []  # metrics along the way
        self.slices: list[dict[str, Any]] = []  # where and by what each stretch of iterations was computed

    def values(self) -> Params:
        """θ without its link to the optimiser."""
        return {name: value.detach() for name, value in self.theta.items()}

    def apply(self, gradient: Params, rate: float | None = None) -> None:
        """One outer step, at ``rate`` if given; what an inner optimiser carries takes its new value, at no rate."""
        for name, value in self.theta.items():
            if name.startswith(CARRIED):
                with torch.no_grad():
                    value -= gradient[name]
            else:
                value.grad = gradient[name].detach()
        if rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.optimizer.step()

    def save(self, path: Path, config: dict[str, Any], light: bool = False) -> None:
        """Write the checkpoint atomically; a ``light`` one without the optimiser's state, for a run that is over.

        Raises:
            UserError: where that is not possible; the previous one then stands.
        """
        tensors = {f"theta/{name}": value for name, value in self.values().items()}
        for name, value in self.theta.items() if not light else ():
            for slot, tensor in self.optimizer.state.get(value, {}).items():
                tensors[f"adam/{slot}/{name}"] = tensor
        tensors["generator"] = self.generator.get_state()
        header = {
            "format": FORMAT,
            "config": config,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "losses": self.losses,
            "window": [loss.item() for loss in self.window],
            "curve": self.curve,
            "slices": self.slices,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        text = json.dumps(header)
        metadata = {"metabook": text, "sha256": digest(text, tensors)}
        runtime.write_atomically(path, safetensors.torch.save(tensors, metadata))

    def restore(self, path: Path, config: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: if the file is damaged or belongs to another configuration.
        """
        tensors, header = read_checkpoint(path)
        if (theirs := header["config"]) != (ours := json.loads(json.dumps(config))):
            different = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
            raise UserError(
                f"the checkpoint {path} is from another configuration (it differs in {', '.join(different)}): "
                "start over with --fresh, or move it away"
            )
        fits = {f"theta/{name}": value.shape for name, value in self.theta.items()}
        if fits != {name: value.shape for name, value in tensors.items() if name.startswith("theta/")}:
            # The same configuration, so the network itself was changed in the code since.
            raise UserError(
                f"the checkpoint {path} holds other parameters than this experiment's network: "
                "start over with --fresh, or move it away"
            )
        try:
            with torch.no_grad():
                for name, value in self.theta.items():
                    value.copy_(tensors[f"theta/{name}"])
            for name, value in self.theta.items():
                slots = {slot: tensors.get(f"adam/{slot}/{name}") for slot in ("step", "exp_avg", "exp_avg_sq")}
                kept = {
                    slot: tensor if slot == "step" else tensor.to(value.device)  # Adam counts its steps on the CPU
                    for slot, tensor in slots.items()
                    if tensor is not None
                }
                if kept:  # SGD has none
                    self.optimizer.state[value] = kept
            self.generator.set_state(tensors["generator"])
            self.iteration, self.seconds = header["iteration"], header["seconds"]
            self.losses, self.curve, self.slices = header["losses"], header["curve"], header["slices"]
            like = next(iter(self.theta.values()), torch.zeros(0))  # an experiment that only measures has no θ
            device, dtype = like.device, like.dtype
            self.window = [torch.tensor(loss, dtype=dtype, device=device) for loss in header["window"]]
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"the checkpoint {path} does not fit this experiment ({reason}): "
                "start over with --fresh, or move it away"
            ) from None


def digest(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint holds: the format itself notices a missing end, but not a changed byte."""
    hashed = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a checkpoint.

    Raises:
        UserError: if it is missing, damaged, or not a checkpoint of this book.
    """
    try:
        # Read in one go: `safe_open` opens the file twice, and a training run may replace it in between.
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header = json.loads(metadata["metabook"])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
        if "sha256" in metadata and metadata["sha256"] != digest(metadata["metabook"], tensors):
            raise ValueError("its digest is wrong")
        if not isinstance(header["config"], dict):
            raise ValueError("no configuration")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train the experiment first") from None
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise UserError(
            f"the checkpoint {path} is damaged or not of this book ({reason}): "
            "restore it from version control, or start over with --fresh"
        ) from None
    return tensors, header


def load_theta(name: str, folder: Path | None = None) -> Params:
    """Meta-parameters θ from the checkpoint of an experiment, on the CPU."""
    tensors, _ = read_checkpoint((folder or runtime.root() / "data" / "checkpoints") / f"{name}.safetensors")
    return {key.removeprefix("theta/"): value for key, value in tensors.items() if key.startswith("theta/")}


@contextmanager
def _stop_requests():
    """Yield a list that is no longer empty once Ctrl-C or a termination request came; nothing is interrupted by it."""
    received: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, lambda got, _: received.append(got))
        except ValueError:  # not in the main thread
            pass
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    experiment: Experiment,
    *,
    device: torch.device | str = "cpu",
    budget: float | None = None,
    fresh: bool = False,
    compiled: bool = False,
    data: Path | None = None,
    save_every: float = 60.0,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> records.Record:
    """Train an experiment, from its checkpoint where there is one, and write its record.

    Args:
        budget: seconds of training in this call; the run then stops cleanly and its record is partial.
        fresh: ignore an existing checkpoint.
        compiled: use ``torch.compile``; other rounding, so part of what bit-identical resumption presumes.
        data: folder with ``checkpoints/`` and ``records/``; by default ``data/`` of the checkout.
        save_every: seconds between checkpoints.
        progress: show a progress bar.
        say: receives one line about how the run ended.

    Returns:
        The record, as written to ``records/NAME.json``.

    Raises:
        UserError: if the loss stops being finite (naming the iteration and the last good checkpoint), a file cannot be
            written, the checkpoint is damaged or of another configuration, or another process trains the same.
        KeyboardInterrupt: after Ctrl-C, once checkpoint and record are written.
    """
    data = data or runtime.root() / "data"
    path = data / "checkpoints" / f"{experiment.name}.safetensors"
    with runtime.only_one(path, f"training {experiment.name}"):
        return _train(experiment, torch.device(device), budget, fresh, compiled, data, path, save_every, progress, say)


def _train(
    experiment: Experiment,
    device: torch.device,
    budget: float | None,
    fresh: bool,
    compiled: bool,
    data: Path,
    path: Path,
    save_every: float,
    progress: bool,
    say: Callable[[str], None],
) -> records.Record:
    # Found out now, not after a minute of training that could then not be kept.
    for kind in ("checkpoints", "records"):
        runtime.ensure_writable(data / kind)
    config = experiment.config()
    # Asked once, at the start: what runs is the code as it was loaded, whatever is committed meanwhile.
    commit = runtime.commit()
    run = experiment.setup(device, compiled)
    generator = runtime.generator(experiment.seed, device)
    state = State(run.init(generator), experiment.outer_rate, generator, getattr(experiment, "outer", "adam"))
    look = getattr(run, "spot_check", run.evaluate)
    kept = path.exists() and not fresh
    if kept:
        state.restore(path, config)
    begin, started, already = state.iteration, time.monotonic(), state.seconds

    def check() -> None:
        """Look at the losses since the last look: nothing that is not finite may reach a checkpoint."""
        if not state.window:
            return
        finite = torch.stack(state.window).isfinite().cpu()
        if not finite.all() or not all(value.isfinite().all() for value in state.values().values()):
            at = state.iteration - len(finite) + (int((~finite).nonzero()[0]) if not finite.all() else len(finite) - 1)
            good = f"the last good checkpoint is {path}" if kept else "no checkpoint of this run had been written yet"
            raise UserError(
                f"the loss of {experiment.name} is no longer finite at iteration {at}; {good}: "
                "lower the rates and start with --fresh"
            )

    def save() -> None:
        nonlocal kept
        check()
        elapsed = time.monotonic() - started
        state.seconds = already + elapsed
        if state.iteration > begin:
            this = {
                "begin": begin, "end": state.iteration, "seconds": round(elapsed, 1), "compiled": compiled,
                "commit": commit, "date": datetime.now(UTC).date().isoformat(), **runtime.machine(device),
            }  # fmt: skip
            state.slices = [s for s in state.slices if s["end"] <= begin] + [this]
        over = state.iteration == experiment.iterations
        state.save(path, config, light=over and getattr(experiment, "light", False))
        kept = True

    bar = tqdm(
        total=experiment.iterations,
        initial=begin,
        desc=experiment.name,
        unit="it",
        disable=not progress,
        mininterval=1,
    )
    saved = started
    with _stop_requests() as stop, bar:
        while state.iteration < experiment.iterations:
            gradient, loss = run.gradient(state.values(), generator)
            state.apply(gradient, outer_rate(experiment, state.iteration))
            state.iteration += 1
            state.window.append(loss.detach())
            bar.update()
            if state.iteration % LOG_EVERY == 0:
                check()
                state.losses.append(torch.stack(state.window).mean().item())
                state.window = []
                bar.set_postfix(loss=f"{state.losses[-1]:.4f}", refresh=False)
            if state.iteration % experiment.evaluate_every == 0 and state.iteration < experiment.iterations:
                state.curve.append({"iteration": state.iteration, "metrics": _entries(look(state.values()))})
            now = time.monotonic()
            if stop or (budget is not None and now - started > budget):
                break
            if now - saved > save_every:
                save()
                saved = now
        save()
    record = make_record(experiment, run, state, commit)
    records.save(record, data / "records" / f"{experiment.name}.json")
    if hasattr(run, "table"):
        records.save_table(run.table(state.values()), data / "records" / f"{experiment.name}.csv.gz")
    headline = ", ".join(f"{name} {records.metric(record, name)}" for name in list(record["metrics"])[:1])
    say(f"{experiment.name}: {records.progress(record)}; {headline}; checkpoint {path}")
    if stop:
        raise KeyboardInterrupt
    return record


def outer_rate(experiment: Experiment, iteration: int) -> float:
    """The outer rate of an iteration, counted from 0: held for ``outer_rate_hold`` iterations, then annealed to
    ``outer_rate_final`` at the end; without these attributes always ``outer_rate``. At each of ``outer_rate_restarts``
    an annealing ends and the next begins (warm restarts, Loshchilov and Hutter 2017)."""
    final = getattr(experiment, "outer_rate_final", experiment.outer_rate)
    begin, *ends = getattr(experiment, "outer_rate_hold", 0), *getattr(experiment, "outer_rate_restarts", ())
    for end in (*ends, experiment.iterations):
        if iteration < end:
            break
        begin = end
    return annealed(experiment.outer_rate, final, (iteration - begin) / max(1, end - begin))


def annealed(rate: float, final: float, part: float) -> float:
    """The outer rate when ``part`` of the way is done: ``rate`` up to 0, then a straight line to ``final`` at 1."""
    return rate + (final - rate) * max(0.0, part)


def _entries(metrics: dict[str, Interval]) -> dict[str, dict[str, float]]:
    """Metrics as JSON; an interval that does not exist (one sample) is null."""
    return {
        name: {"value": m.value, "ci95": None if math.isnan(m.ci95) else m.ci95, "n": m.n}
        for name, m in metrics.items()
    }


def _finite(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Without what diverged at a point on the way: JSON has no word for it, and a curve may have a gap."""
    return {name: entry for name, entry in metrics.items() if math.isfinite(entry["value"])}


def make_record(experiment: Experiment, run: Run, state: State, commit: str) -> records.Record:
    """Evaluate the present parameters and lay the record out; ``commit`` is that of the code that evaluates."""
    done = state.iteration
    return {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "status": "complete" if done == experiment.iterations else "partial",
        "iterations": {"done": done, "planned": experiment.iterations},
        "metrics": _entries(run.evaluate(state.values())),
        "config": experiment.config(),
        "curve": [point | {"metrics": _finite(point["metrics"])} for point in state.curve],
        "losses": {"every": LOG_EVERY, "values": [round(loss, 5) for loss in state.losses]},
        "provenance": {
            "data": experiment.data(),
            "seconds": round(state.seconds, 1),
            "slices": state.slices,
            "evaluated": {"commit": commit, "date": datetime.now(UTC).date().isoformat(), **runtime.machine("cpu")},
        },
    }


def fit(
    gradient: Callable[[Params], tuple[Params, Tensor]],
    theta: Params,
    iterations: int,
    outer_rate: float = 1e-3,
    label: str = "meta-training",
    outer: str = "adam",
    final_rate: float | None = None,
) -> tuple[Params, Tensor]:
    """The outer loop for live cells: steps along a meta-gradient, with a progress bar and nothing kept on disk.

    Args:
        gradient: ``gradient(theta) -> (gradient, losses)``; it draws its own tasks.
        theta: where to begin; left as it is.
        outer: ``"adam"``, or ``"sgd"`` for Reptile's plain step.
        final_rate: where ``outer_rate`` goes, linearly; by default it stays.

    Returns:
        The trained parameters and the mean query loss of every iteration ``[iterations]``.
    """
    state = State(theta, outer_rate, torch.Generator(), outer)
    final = outer_rate if final_rate is None else final_rate
    history = []
    for iteration in tqdm(range(iterations), desc=label, unit="it", mininterval=1, leave=False):
        step, losses = gradient(state.values())
        state.apply(step, annealed(outer_rate, final, iteration / iterations))
        history.append(losses.detach().mean())
    return state.values(), torch.stack(history)
