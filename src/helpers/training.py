"""The outer loop as a resumable, recorded experiment.

One file holds everything that training needs to go on: parameters, optimiser, random generator, iteration and history,
as a ``.safetensors`` file with a JSON header (no pickle), compressed by xz. It is replaced atomically, so a killed run
continues from its last checkpoint, bit for bit as if it had never stopped (on the same machine with the same engine
settings). On another kind of device a run goes on too, with a generator that is seeded anew from seed and iteration.

The file of a finished run holds its parameters alone, in half precision, and the record's metrics are those of the
parameters as stored. Single precision stays where half of it would move a metric by a tenth of its interval.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
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
from helpers.validate import positive, whole

FORMAT = "metabook checkpoint 1"
SUFFIX = ".safetensors.xz"
# Numbers of four bytes, of which the first say least at random: a sixth of a file of parameters goes, none of its bits.
PACKING = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lc": 0, "lp": 2, "pb": 2}]
RETURNS = 6  # at most so often does a watched run go back
LOG_EVERY = 100  # iterations between two entries of the history, and between two looks at the loss


class Run(Protocol):
    """An experiment made ready on one device."""

    def init(self, generator: torch.Generator) -> Params:
        """Fresh meta-parameters θ, drawn by ``generator``, on its device."""
        ...

    def gradient(self, theta: Params, generator: torch.Generator, iteration: int) -> tuple[Params, Tensor]:
        """Draw a meta-batch and return the meta-gradient and the mean query loss (a scalar tensor).

        ``iteration`` counts from 0, for what changes in the course of training, such as an annealed inner rate.
        """
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
    # ``watched``, a metric of the points on the way: a run that loses its footing by the rule of :func:`steady` goes
    # back to its last quiet point, or to where it was last resumed, and on at half the outer rate.

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
        self.returns: list[dict[str, Any]] = []  # where a watched run went back to a quiet point
        self.quiet: dict[str, Any] | None = None  # that point: iteration, θ and the optimiser's state
        self.reseeded = False  # whether the generator was seeded anew, since the run came from another kind of device
        self.precision = "single"

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

    def save(self, path: Path, config: dict[str, Any], over: bool = False) -> None:
        """Write the checkpoint atomically.

        Args:
            over: the run is finished, so that nothing is kept of its optimiser and generator.

        Raises:
            UserError: where that is not possible; the previous one then stands.
        """
        stored = halved(self.values()) if self.precision == "half" else self.values()
        tensors = {f"theta/{name}": value for name, value in stored.items()}
        if not over:
            tensors |= self._moments()
            tensors["generator"] = self.generator.get_state()
        header = {
            "format": FORMAT,
            "config": config,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "generator": self.generator.device.type,
            "precision": self.precision,
            "losses": self.losses,
            "window": [loss.item() for loss in self.window],
            "curve": self.curve,
            "slices": self.slices,
            "returns": self.returns,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        text = json.dumps(header)
        metadata = {"metabook": text, "sha256": digest(text, tensors)}
        runtime.write_atomically(path, lzma.compress(safetensors.torch.save(tensors, metadata), filters=PACKING))

    def restore(self, path: Path, config: dict[str, Any], iterations: int, seed: int) -> None:
        """Continue from a checkpoint.

        Args:
            iterations: of the whole run; a file without optimiser and generator can only be a finished run's.
            seed: of the run, for a generator of another kind than the file's.

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
            self._load(tensors)
            self.returns = header.get("returns", [])
            self.iteration, self.seconds = header["iteration"], header["seconds"]
            self.precision = header.get("precision", "single")
            if self.iteration < iterations and "generator" not in tensors:
                raise UserError(
                    f"the run was given up at iteration {self.iteration:,}, and its checkpoint {path} "
                    "keeps no optimiser to go on with: start over with --fresh"
                )
            if self.iteration < iterations:
                self._restore_generator(tensors["generator"], header, seed)
                if isinstance(self.optimizer, torch.optim.Adam) and self.iteration and not self.optimizer.state:
                    raise KeyError("no state of the optimiser")
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

    def _moments(self) -> Params:
        """What the outer optimiser remembers of each parameter, by the names that a checkpoint has."""
        return {
            f"adam/{slot}/{name}": tensor
            for name, value in self.theta.items()
            for slot, tensor in self.optimizer.state.get(value, {}).items()
        }

    def _load(self, tensors: Params) -> None:
        """Take over θ and what the optimiser remembers."""
        with torch.no_grad():
            for name, value in self.theta.items():
                value.copy_(tensors[f"theta/{name}"])
        for name, value in self.theta.items():
            slots = {slot: tensors.get(f"adam/{slot}/{name}") for slot in ("step", "exp_avg", "exp_avg_sq")}
            kept = {
                # Adam counts its steps on the CPU.
                slot: tensor.clone() if slot == "step" else tensor.to(value.device, copy=True)
                for slot, tensor in slots.items()
                if tensor is not None
            }
            if kept:  # SGD has none
                self.optimizer.state[value] = kept

    def remember(self) -> None:
        """Keep this point, in memory, as one to which a watched run can go back."""
        now = {f"theta/{name}": value for name, value in self.values().items()} | self._moments()
        self.quiet = {"iteration": self.iteration, "tensors": {n: v.detach().clone() for n, v in now.items()}}

    def go_back(self) -> None:
        """Return to the point that was kept; the generator goes on, so that other tasks are drawn from there."""
        assert self.quiet is not None
        back = self.quiet["iteration"]
        self.returns.append({"from": self.iteration, "to": back})
        self._load(self.quiet["tensors"])
        self.iteration, self.window = back, []
        self.losses = self.losses[: back // LOG_EVERY]
        self.curve = [point for point in self.curve if point["iteration"] <= back]

    def _restore_generator(self, state: Tensor, header: dict[str, Any], seed: int) -> None:
        """Go on with the file's generator, or, where that is of another kind of device, with one seeded anew."""
        if header.get("generator", "cpu") == self.generator.device.type:
            self.generator.set_state(state)
        else:
            self.generator.manual_seed(seed_at(seed, self.iteration))
            self.reseeded = True


def seed_at(seed: int, iteration: int) -> int:
    """The seed of a generator that takes over a run at an iteration: no other run or iteration has the same."""
    return int.from_bytes(hashlib.sha256(f"{seed} {iteration}".encode()).digest()[:7])


def steady(values: Sequence[float]) -> bool | None:
    """Whether a watched run stands at a quiet point: a rule that is fixed before any run.

    Args:
        values: the watched metric at all points so far, the present one last.

    Returns:
        True at a quiet point: the metric is at most twice the median of the five points before (or there are not yet
        five). False where the run has lost its footing: the metric has doubled twice, to more than four times that
        median. None in between. A value that is not finite is beyond every bound.
    """
    *before, now = values
    if len(before) < 5:
        return True if math.isfinite(now) else None
    usual = median(before[-5:])
    return True if now <= 2 * usual else None if now <= 4 * usual else False


def halved(theta: Params) -> Params:
    """θ in half precision, but for what is carried along, and tensors that lose more than rounding by it."""

    def half(name: str, value: Tensor) -> Tensor:
        if value.dtype != torch.float32 or name.startswith(CARRIED):
            return value
        short = value.half()
        error, size = (short.to(value.dtype) - value).abs(), value.abs()
        fits = value.numel() and bool((error <= size / 1024 + 1e-6 * size.max()).all())
        return short if fits else value

    return {name: half(name, value) for name, value in theta.items()}


def moved(single: dict[str, Interval], half: dict[str, Interval]) -> list[str]:
    """Metrics that half precision moves by more than a tenth of their interval (or a thousandth, where there is none).

    Metrics of the run itself, ``seconds…``, are no property of the parameters.
    """

    def far(name: str) -> bool:
        before, after = single[name], half[name]
        if math.isnan(before.value) and math.isnan(after.value):
            return False
        allowed = 0.1 * before.ci95 if before.ci95 > 0 else 1e-3 * abs(before.value)
        return not abs(after.value - before.value) <= allowed

    return [name for name in half if not name.startswith("seconds") and far(name)]


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
        content = lzma.decompress(path.read_bytes())
        tensors = safetensors.torch.load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header = json.loads(metadata["metabook"])
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
        if metadata["sha256"] != digest(metadata["metabook"], tensors):  # a KeyError where it is missing
            raise ValueError("its digest is wrong")
        if not isinstance(header["config"], dict):
            raise ValueError("no configuration")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train the experiment first") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, lzma.LZMAError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise UserError(
            f"the checkpoint {path} is damaged or not of this book ({reason}): "
            "restore it from version control, or start over with --fresh"
        ) from None
    return tensors, header


def configuration(experiment: Experiment) -> dict[str, Any]:
    """The configuration as files hold it: tuples become lists."""
    return json.loads(json.dumps(experiment.config()))


def complete(experiment: Experiment, folder: Path | None = None) -> bool:
    """Whether there is a record of the whole run of exactly this experiment.

    Raises:
        UserError: if the record is damaged.
    """
    record = records.load(experiment.name, missing_ok=True, where=folder)
    return record is not None and record["status"] == "complete" and record["config"] == configuration(experiment)


def given_up(experiment: Experiment, folder: Path | None = None) -> bool:
    """Whether the checkpoint of an unfinished run is there but keeps its parameters alone, so that it cannot go on."""
    path = (folder or runtime.root() / "data" / "checkpoints") / f"{experiment.name}{SUFFIX}"
    if not path.exists():
        return False
    tensors, header = read_checkpoint(path)
    ours = header["config"] == configuration(experiment)
    return ours and "generator" not in tensors and header["iteration"] < experiment.iterations


def load_theta(name: str, folder: Path | None = None) -> Params:
    """Meta-parameters θ from the checkpoint of an experiment, on the CPU; what was stored in half comes in single."""
    tensors, _ = read_checkpoint((folder or runtime.root() / "data" / "checkpoints") / f"{name}{SUFFIX}")
    theta = {key.removeprefix("theta/"): value for key, value in tensors.items() if key.startswith("theta/")}
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in theta.items()}


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
    form: str | None = None,
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
        form: how the estimator runs, a name of ``helpers.tracing.FORMS``, where the experiment leaves the choice;
            by default ``"compiled"`` or ``"traced"``. ``"fastest"`` tries them for some seconds each.
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
    path = data / "checkpoints" / f"{experiment.name}{SUFFIX}"
    with runtime.only_one(path, f"training {experiment.name}"):
        how = form or ("compiled" if compiled else "traced")
        return _train(experiment, torch.device(device), budget, fresh, how, data, path, save_every, progress, say)


def _train(
    experiment: Experiment,
    device: torch.device,
    budget: float | None,
    fresh: bool,
    form: str,
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
    run = experiment.setup(device, form == "compiled")
    generator = runtime.generator(experiment.seed, device)
    first = run.init(generator)
    compiled, chosen = form == "compiled", hasattr(run, "use")  # else the experiment itself says how it runs
    if not chosen:
        pass
    elif form == "fastest":
        form = fastest(run, first, device, budget, say)
        compiled = form == "compiled"
    else:
        run.use(form)
    state = State(first, experiment.outer_rate, generator, getattr(experiment, "outer", "adam"))
    look = getattr(run, "spot_check", run.evaluate)
    kept = path.exists() and not fresh
    if kept:
        state.restore(path, config, experiment.iterations, experiment.seed)
    begin, started, already = state.iteration, time.monotonic(), state.seconds
    watched = getattr(experiment, "watched", None)
    if watched:
        state.remember()  # a run that was interrupted goes back no further than here

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
        # A run that went back has fewer iterations than an earlier slice may say.
        state.slices = [s | {"end": min(s["end"], begin)} for s in state.slices if s["begin"] < begin]
        if state.iteration > begin:
            this = {
                "begin": begin, "end": state.iteration, "seconds": round(elapsed, 1), "compiled": compiled,
                **({"form": form} if chosen else {}), "commit": commit, "date": datetime.now(UTC).date().isoformat(),
                **runtime.machine(device),
            }  # fmt: skip
            state.slices.append(this | ({"reseeded": True} if state.reseeded else {}))
        state.save(path, config, over=state.iteration == experiment.iterations)
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
            gradient, loss = run.gradient(state.values(), generator, state.iteration)
            state.apply(gradient, outer_rate(experiment, state.iteration) * 0.5 ** len(state.returns))
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
                quiet = steady([point["metrics"][watched]["value"] for point in state.curve]) if watched else None
                if quiet:
                    state.remember()
                elif quiet is False and len(state.returns) < RETURNS:
                    state.go_back()
                    begin = min(begin, state.iteration)
                    bar.reset()
                    bar.update(state.iteration)
            now = time.monotonic()
            if stop or (budget is not None and now - started > budget):
                break
            if now - saved > save_every:
                save()
                saved = now
        save()
    metrics = run.evaluate(state.values())
    if begin == state.iteration:
        metrics |= _seconds(experiment.name, data / "records")
    if state.iteration == experiment.iterations and state.precision == "single":
        metrics = _settle(run, state, metrics, partial(state.save, path, config, over=True), say)
    record = make_record(experiment, run, state, commit, metrics)
    records.save(record, data / "records" / f"{experiment.name}.json")
    if hasattr(run, "table"):
        records.save_table(run.table(state.values()), data / "records" / f"{experiment.name}.csv.gz")
    headline = ", ".join(f"{name} {records.metric(record, name)}" for name in list(record["metrics"])[:1])
    say(f"{experiment.name}: {records.progress(record)}; {headline}; checkpoint {path}")
    if stop:
        raise KeyboardInterrupt
    return record


def fastest(
    run: Any, theta: Params, device: torch.device, budget: float | None = None, say: Callable[[str], None] = print
) -> str:
    """Try the forms in which a run can be executed, leave it in the fastest, and return that one's name.

    Compiling takes minutes, so that it is tried only where at least a quarter of an hour is to be trained; a CUDA graph
    is tried on a GPU. A form that fails is passed over.
    """
    kinds = ["eager", "traced"] + ["captured"] * (device.type == "cuda")
    kinds += ["compiled"] * ((budget is None or budget >= 900) and runtime.can_compile())
    found: dict[str, float] = {}
    kept: dict[str, dict[str, Any]] = {}
    for form in kinds:
        draws = runtime.generator(0, device)
        try:
            run.use(form)
            run.gradient(theta, draws, 0)[1].item()  # recording, capturing or compiling
            began, calls = time.monotonic(), 0
            while calls < 3 or (time.monotonic() - began < 2 and calls < 200):
                run.gradient(theta, draws, 0)[1].item()  # waits for the device
                calls += 1
            found[form], kept[form] = (time.monotonic() - began) / calls, vars(run).copy()
        except RuntimeError as error:
            say(f"{form}: failed ({' '.join(str(error).split())[:120]})")
    if not found:
        raise UserError("the estimator runs in none of its forms here; the lines above say why")
    best = min(found, key=found.__getitem__)
    vars(run).update(kept[best])  # with what was recorded, so that nothing is recorded again
    say(", ".join(f"{form} {1000 * seconds:.1f} ms" for form, seconds in found.items()) + f" an iteration: {best}")
    return best


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


def _seconds(name: str, folder: Path) -> dict[str, Interval]:
    """What the record of a run says of the time it took, which cannot be measured again once the run is over."""
    with suppress(UserError):  # a damaged record is about to be written anew
        record = records.load(name, missing_ok=True, where=folder)
        kept = record["metrics"] if record else {}
        return {key: records.metric(record, key) for key in kept if key.startswith("seconds")}
    return {}


def _settle(
    run: Run, state: State, single: dict[str, Interval], save: Callable[[], None], say: Callable[[str], None]
) -> dict[str, Interval]:
    """Store a finished run in half precision, unless that moves its metrics; returns those of what is stored.

    θ of ``state`` is then what the file holds.
    """
    before = state.values()
    rounded = {name: value.to(before[name].dtype) for name, value in halved(before).items()}
    half = run.evaluate(rounded)
    if far := moved(single, half):
        say(f"stored in single precision, since half of it would move {', '.join(far[:3])}")
        return single
    with torch.no_grad():
        for name, value in state.theta.items():
            value.copy_(rounded[name])
    state.precision = "half"
    save()
    return single | half  # the time that the run took is in the first alone


def make_record(
    experiment: Experiment, run: Run, state: State, commit: str, metrics: dict[str, Interval]
) -> records.Record:
    """Lay the record out; ``commit`` is that of the code that evaluated ``metrics``."""
    done = state.iteration
    return {
        "experiment": experiment.name,
        "paper": experiment.paper,
        "status": "complete" if done == experiment.iterations else "partial",
        "iterations": {"done": done, "planned": experiment.iterations},
        "metrics": _entries(metrics),
        "config": experiment.config(),
        "curve": [point | {"metrics": _finite(point["metrics"])} for point in state.curve],
        "losses": {"every": LOG_EVERY, "values": [round(loss, 5) for loss in state.losses]},
        "provenance": {
            "data": experiment.data(),
            "seconds": round(state.seconds, 1),
            "slices": state.slices,
            **({"returns": state.returns} if state.returns else {}),
            "evaluated": {"commit": commit, "date": datetime.now(UTC).date().isoformat(), **runtime.machine("cpu")},
        },
    }


def fit(
    gradient: Callable[[Params, int], tuple[Params, Tensor]],
    theta: Params,
    iterations: int,
    outer_rate: float = 1e-3,
    label: str = "meta-training",
    outer: str = "adam",
    final_rate: float | None = None,
) -> tuple[Params, Tensor]:
    """The outer loop for live cells: steps along a meta-gradient, with a progress bar and nothing kept on disk.

    Args:
        gradient: ``gradient(theta, iteration) -> (gradient, losses)``; it draws its own tasks. Iterations count from
            0; what changes with them, such as ``learner.with_(rate=...)``, makes no new recording.
        theta: where to begin; left as it is.
        outer: ``"adam"``, or ``"sgd"`` for Reptile's plain step.
        final_rate: where ``outer_rate`` goes, linearly; by default it stays.

    Returns:
        The trained parameters and the mean query loss of every iteration ``[iterations]``.

    Raises:
        UserError: for a number of iterations below 1, or rates that are negative or not finite.
    """
    whole(iterations, "number of iterations")
    positive(outer_rate, "outer rate", zero=True)
    state = State(theta, outer_rate, torch.Generator(), outer)
    final = outer_rate if final_rate is None else positive(final_rate, "final outer rate", zero=True)
    history = []
    for iteration in tqdm(range(iterations), desc=label, unit="it", mininterval=1, leave=False):
        step, losses = gradient(state.values(), iteration)
        state.apply(step, annealed(outer_rate, final, iteration / iterations))
        history.append(losses.detach().mean())
    return state.values(), torch.stack(history)
