"""The state of a run, its file, and what can be known of a file without going on."""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from helpers import runtime
from helpers.errors import UserError
from helpers.lab import records
from helpers.lab.experiment import Experiment
from helpers.lab.schedules import halved, seed_at
from helpers.lab.statistics import Interval
from helpers.learners.descent import CARRIED
from helpers.parsing import from_json
from helpers.types import Params
from helpers.validate import finite, one_of, positive, whole

FORMAT = "metabook checkpoint 1"
BROKEN = (AttributeError, IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError)  # by what is read
SUFFIX = ".safetensors.xz"
# Numbers of four bytes, of which the first say least at random: a sixth of a file of parameters goes, none of its bits.
PACKING = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lc": 0, "lp": 2, "pb": 2}]
LOG_EVERY = 100  # iterations between two entries of the history, and between two looks at the loss


class State:
    """Everything that changes while an experiment trains."""

    def __init__(self, theta: Params, outer_rate: float, generator: torch.Generator, outer: str = "adam") -> None:
        self.theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        if outer not in kinds:
            raise UserError(f"there is no outer optimiser {outer!r}: use {' or '.join(kinds)}")
        learned = [value for name, value in self.theta.items() if not name.startswith(CARRIED)]
        # An experiment may only measure: then nothing is learned, and an optimiser still wants a tensor.
        self.learns = bool(learned)
        # On a GPU one kernel takes the step, and all that it needs lies there, so that a CUDA graph can hold it.
        self.fused = self.learns and learned[0].is_cuda
        self.optimizer = kinds[outer](learned or [torch.zeros(0)], lr=outer_rate, fused=self.fused or None)
        if outer == "adam":
            for value in learned:  # now, since a graph and whatever is restored write into these
                step = torch.zeros((), dtype=torch.float32, device=value.device if self.fused else "cpu")
                moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
                self.optimizer.state[value] = {"step": step} | moments
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

    def changes(self) -> tuple[list[Tensor], list[torch.Generator]]:
        """The tensors that an iteration writes into, which stay where they are, and what it draws from."""
        return [*self.values().values(), *self._moments().values()], [self.generator]

    def apply(self, gradient: Params, rate: float | Tensor | None = None) -> None:
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
        if self.fused:  # Adam wants to be told
            for group in self.optimizer.param_groups:
                group["capturable"] = torch.cuda.is_current_stream_capturing()
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

    def restore(
        self,
        path: Path,
        config: dict[str, Any],
        iterations: int,
        seed: int,
        read: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    ) -> None:
        """Continue from a checkpoint.

        Args:
            iterations: of the whole run; a file without optimiser and generator can only be a finished run's.
            seed: of the run, for a generator of another kind than the file's.
            read: tensors and header of the file, where they have been read already.

        Raises:
            UserError: if the file is damaged or belongs to another configuration.
        """
        tensors, header = read or read_checkpoint(path)
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
                if self.iteration and not self._moments().keys() <= tensors.keys():
                    raise KeyError("no state of the optimiser")
            self.losses, self.curve, self.slices = header["losses"], header["curve"], header["slices"]
            like = next(iter(self.theta.values()), torch.zeros(0))  # an experiment that only measures has no θ
            device, dtype = like.device, like.dtype
            self.window = [torch.tensor(loss, dtype=dtype, device=device) for loss in header["window"]]
        except (*BROKEN, RuntimeError) as error:
            reason = (str(error).splitlines() or ["unreadable"])[0]
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
                stored = tensors[f"theta/{name}"]
                if stored.dtype not in (value.dtype, torch.float16):
                    raise TypeError(f"{name} is of {stored.dtype}")
                value.copy_(stored)
            for name, mine in self._moments().items():
                stored = tensors.get(name)  # that of a finished run is not kept
                if stored is None:
                    continue
                if stored.shape != mine.shape or (name.startswith("adam/step/") and stored < 0):
                    raise ValueError(f"{name}, the optimiser's memory, is of another shape")
                if not stored.is_floating_point():
                    raise TypeError(f"{name}, the optimiser's memory, is of another kind")
                mine.copy_(stored)

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
        metadata = from_json(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header = from_json(metadata["metabook"], nan=True)
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}")
        if metadata["sha256"] != digest(metadata["metabook"], tensors):  # a KeyError where it is missing
            raise ValueError("its digest is wrong")
        _check_header(header)
        if not all(tensor.isfinite().all() for name, tensor in tensors.items() if name.startswith("theta/")):
            raise ValueError("its parameters are not finite")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train the experiment first") from None
    except (*BROKEN, UserError, OSError, EOFError, lzma.LZMAError, safetensors.SafetensorError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise UserError(
            f"the checkpoint {path} is damaged or not of this book ({reason}): "
            "restore it from version control, or start over with --fresh"
        ) from None
    return tensors, header


def _check_header(header: dict[str, Any]) -> None:
    """Refuse a header of which a part is not what :meth:`State.save` writes.

    Raises:
        UserError: for numbers that make no sense; one of ``BROKEN`` for another structure.
    """
    whole(header["iteration"], "iteration", 0, header["config"].get("iterations"))
    positive(header["seconds"], "time", zero=True)
    one_of(header.get("precision", "single"), "precision", ("single", "half"))
    one_of(header.get("generator", "cpu"), "kind of generator", ("cpu", "cuda"))
    for name in ("losses", "window", "curve", "slices", "returns"):
        if not isinstance(header.get(name, []), list):
            raise TypeError(f"{name} is no list")
    for loss in (*header["losses"], *header["window"]):
        _number(loss, "loss")
    for point in header["curve"]:
        whole(point["iteration"], "iteration", 0)
        records.check_metrics(point["metrics"], _number)
    for part, ends in (("slices", ("begin", "end")), ("returns", ("from", "to"))):
        for stretch in header.get(part, []):
            for end in ends:
                whole(stretch[end], f"{end} of {part}", 0)


def _number(value: Any, what: str) -> None:
    """Refuse what is no number; what diverged is one."""
    if not isinstance(value, float):
        finite(value, what)


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


def files(name: str, data: Path) -> dict[str, Path]:
    """Where the files of a run lie in a data folder, by their endings: its checkpoint, and those of its record."""
    folders = {SUFFIX: "checkpoints"} | dict.fromkeys(records.SUFFIXES, "records")
    return {suffix: data / kind / f"{name}{suffix}" for suffix, kind in folders.items()}


def load_theta(name: str, folder: Path | None = None) -> Params:
    """Meta-parameters θ from the checkpoint of an experiment, on the CPU; what was stored in half comes in single."""
    tensors, _ = read_checkpoint((folder or runtime.root() / "data" / "checkpoints") / f"{name}{SUFFIX}")
    theta = {key.removeprefix("theta/"): value for key, value in tensors.items() if key.startswith("theta/")}
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in theta.items()}


def entries(metrics: dict[str, Interval]) -> dict[str, dict[str, Any]]:
    """Metrics as JSON, with nine digits; an interval that does not exist (one sample) is null."""
    return {
        name: {"value": _nine(m.value), "ci95": None if math.isnan(m.ci95) else _nine(m.ci95), "n": m.n}
        | ({"per": m.per} if m.per and m.n > 1 else {})
        for name, m in metrics.items()
    }


def _nine(value: float) -> float:
    return float(f"{value:.9g}")
