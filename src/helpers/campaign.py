"""Train by priority where time is short: a GPU for some minutes, or the cores of this machine.

:func:`run` takes the long runs in the order of ``data/campaign.yaml``, several side by side, each in a process of its
own with one thread, and goes on from the committed checkpoints. What comes of it is packed into a few files, which
:func:`merge` puts into ``data/``. A campaign that was killed goes on with the same command.

It needs torch, numpy, PyYAML, safetensors and tqdm, and the images where the experiments have some.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from helpers import estimators, experiments, runtime
from helpers.errors import UserError
from helpers.lab import checkpoints, records, training
from helpers.parsing import from_json, from_yaml
from helpers.progress import progress_bar
from helpers.settings import conform

PACKS, PACK_BYTES = 6, 14_000_000  # at most so many files, each at most so large
# Of the files of a run, the longest endings first.
SUFFIXES = {checkpoints.SUFFIX: "checkpoints"} | dict.fromkeys(
    sorted(records.SUFFIXES, key=len, reverse=True), "records"
)
GRACE = {"cuda": 90.0, "cpu": 240.0}  # at most so many seconds at the end are for the evaluations
STOP = 20.0  # seconds in which a process that is asked to stop must have written its checkpoint


def plan(path: Path | None = None, device: str = "cpu") -> list[str]:
    """Names of the long runs, the most important first; on a GPU those that are marked for one come first.

    Raises:
        UserError: if the file is missing or is not a list of runs.
    """
    path = path or runtime.root() / "data" / "campaign.yaml"
    try:
        entries = from_yaml(path.read_text(encoding="utf-8"))["runs"]
        names = [(conform(entry["run"], str), conform(entry.get("gpu", False), bool)) for entry in entries]
    except FileNotFoundError:
        raise UserError(f"there is no plan {path}: restore it from version control or name the runs") from None
    except (OSError, AttributeError, TypeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the plan {path} cannot be read ({reason}): it is a list `runs` of entries `run`") from None
    if device == "cuda":
        names.sort(key=lambda entry: not entry[1])  # a stable sort: otherwise the order stays
    return list(dict.fromkeys(name for name, _ in names))


def check_gradient(device: torch.device) -> float:
    """Hold one meta-gradient of MAML, on tasks drawn at random, against the same on the CPU; returns the difference.

    Raises:
        UserError: if they differ by more than rounding, relative to the gradient's norm.
    """
    from helpers import losses
    from helpers.learners.descent import GradientDescent
    from helpers.models.convnet import ConvNet
    from helpers.types import Examples, Tasks

    draws = runtime.generator(0)
    learner = GradientDescent(ConvNet(5), losses.cross_entropy, 0.4, 1)
    labels = torch.arange(5).expand(4, 5)
    images = [Examples(torch.rand(4, 5, 1, 28, 28, generator=draws), labels) for _ in range(2)]
    theta, tasks = learner.init(draws), Tasks(*images)
    here, _ = estimators.maml(learner, theta, tasks)
    there, _ = estimators.maml(
        learner,
        {name: value.to(device) for name, value in theta.items()},
        Tasks(*(Examples(*(t.to(device) for t in part)) for part in tasks)),
    )
    total = sum(float(value.double().square().sum()) for value in here.values()) ** 0.5
    apart = sum(float((there[n].cpu().double() - value).square().sum()) for n, value in here.items()) ** 0.5
    if not apart <= 1e-3 * total:
        raise UserError(
            f"a meta-gradient on {device} differs from the CPU's by {apart / total:.1e} of its norm: "
            "do not train there; check the driver and the build of torch"
        )
    return apart / total


def run(
    out: Path,
    *,
    minutes: float,
    device: str = "auto",
    names: Sequence[str] = (),
    jobs: int | None = None,
    cluster: str | None = None,
    tf32: bool = False,
    data: Path | None = None,
    save_every: float = 60.0,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Train what the plan says until the time is over, and pack what came of it.

    Args:
        out: a folder; ``out/work`` holds the running checkpoints, the packs lie in ``out`` itself.
        minutes: of wall time in all, the evaluations and the packing included.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        names: experiments instead of the plan's, in their order.
        jobs: side by side; by default one a core, on a GPU at most six.
        cluster: train on the workers of this Dask cluster instead (:func:`helpers.cluster.connected`).
        tf32: let a GPU round products to TF32 (:func:`helpers.runtime.allow_tf32`).
        data: where checkpoints and records are; by default ``data/`` of the checkout. It stays as it is.
        save_every: seconds between checkpoints.
        say: receives a line about everything that begins or ends.

    Returns:
        The packs.

    Raises:
        UserError: for an unknown experiment, a device that is not here or computes something else, or a folder that
            cannot be written.
        KeyboardInterrupt: after Ctrl-C, once the runs are stopped and the packs written.
    """
    started = time.monotonic()
    where = runtime.pick_device(device) if cluster is None else torch.device(device.replace("auto", "cpu"))
    runtime.allow_tf32(False)  # for the comparison
    data, known = data or runtime.root() / "data", experiments.catalogue()
    for name in names:
        experiments.find(name)
    if out.resolve() == data.resolve():
        raise UserError(f"{out} is for the recorded experiments alone: name another folder with --out")
    work = out / "work"
    for kind in ("checkpoints", "records"):
        runtime.ensure_writable(work / kind)
    with runtime.only_one(work, f"running a campaign in {out}"):
        if cluster is None:  # of the workers' device this machine knows nothing
            say(f"{where.type}: one meta-gradient differs from the CPU's by {check_gradient(where):.1e} of its norm")
        queue = []
        for name in dict.fromkeys(names or plan(device=where.type)):
            if name not in known:
                say(f"{name}: not an experiment yet")
            elif _done(known[name], data) or _done(known[name], work):
                say(f"{name}: complete, nothing to do")
            else:
                queue.append(name)
        jobs = jobs or (min(6, max(1, runtime.cores() - 1)) if where.type == "cuda" else runtime.cores())
        end = started + 60 * minutes - min(STOP, 6 * minutes)  # what is late is stopped by then, and packed
        try:
            for name in queue:
                _bring(name, data, work)
            if cluster is not None:
                from helpers import cluster as many  # Dask

                many.train_until(end, GRACE[where.type], cluster, [known[n] for n in queue], work, where.type, say)
            else:
                begin = partial(_start, device=where.type, work=work, save_every=save_every, tf32=tf32)
                _side_by_side(queue, begin, work, jobs, end, GRACE[where.type], say)
        finally:
            packs = pack(out, data, say)
    return packs


def _done(experiment, data: Path) -> bool:
    """Whether a folder holds the whole run of exactly this experiment; a damaged record is made anew."""
    try:
        return checkpoints.complete(experiment, data / "records")
    except UserError:
        return False


def _side_by_side(
    queue: list[str],
    begin: Callable[..., subprocess.Popen],
    work: Path,
    jobs: int,
    end: float,
    grace: float,
    say: Callable[[str], None],
) -> None:
    """Keep ``jobs`` processes busy until the queue is empty or the time is over; every one of them is stopped."""
    running: dict[str, subprocess.Popen] = {}
    grace = min(grace, 0.25 * max(0.0, end - time.monotonic()))
    bar = progress_bar(total=round(max(0.0, end - time.monotonic())), unit="s", desc="campaign")
    begun = time.monotonic()
    try:
        while queue or running:
            left = end - grace - time.monotonic()
            while queue and len(running) < jobs and left > grace / 2:
                name = queue.pop(0)
                running[name] = begin(name, budget=left)
                say(f"{name}: begun")
            for name, child in list(running.items()):
                if child.poll() is not None:
                    del running[name]
                    last = _last_line(work / f"{name}.log")
                    say(last if child.returncode == 0 else f"{name}: stopped, status {child.returncode}: {last}")
            if time.monotonic() > end or (queue and not running and left <= grace / 2):
                break
            time.sleep(0.2)
            bar.update(min(bar.total, round(time.monotonic() - begun)) - bar.n)
    finally:
        bar.close()
        _stop(running, say)


def _bring(name: str, data: Path, work: Path) -> None:
    """The committed checkpoint is where a run begins."""
    for source, target in zip(*(checkpoints.files(name, place).values() for place in (data, work)), strict=True):
        if source.exists() and not target.exists():
            shutil.copyfile(source, target)


def _start(name: str, budget: float, device: str, work: Path, save_every: float, tf32: bool) -> subprocess.Popen:
    """Train one experiment in a process of its own."""
    command = [sys.executable, "-c", "import sys; from helpers.campaign import work; sys.exit(work(*sys.argv[1:]))"]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (work / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, name, device, str(work), f"{budget:.1f}", str(save_every), "tf32" * tf32],
            env={**os.environ, **runtime.ONE_THREAD, "PYTHONPATH": path},
            stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C comes to this process alone, which then stops the others
        )  # fmt: skip


def work(name: str, device: str, data: str, budget: str, save_every: str, tf32: str = "") -> int:
    """What a process of the campaign does: train one experiment in the fastest form, then evaluate it."""
    runtime.make_worker(device, bool(tf32))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        training.train(
            experiments.find(name), device=device, budget=float(budget), form="fastest", data=Path(data),
            save_every=float(save_every), progress=False,
        )  # fmt: skip
    except UserError as error:
        print(f"metabook: {error}")
        return 2
    except KeyboardInterrupt:  # the line about the run, if there is one, stands above
        return 130
    except (RuntimeError, OSError) as error:  # such as a full GPU: the other runs go on
        print(f"metabook: {name} failed ({' '.join(str(error).split())[:200]})")
        return 2
    return 0


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _stop(running: dict[str, subprocess.Popen], say: Callable[[str], None]) -> None:
    """Ask all processes to write their checkpoints and end; those that are still there after a while are killed."""
    for child in running.values():
        child.send_signal(signal.SIGINT)
    late = time.monotonic() + STOP / 2
    for name, child in running.items():
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.1, late - time.monotonic()))
        if child.poll() is None:
            child.kill()
            child.wait()
        if child.returncode:
            say(f"{name}: stopped before its evaluation was over; its checkpoint is kept, its record is not written")


# ---------------------------------------- packing and merging
def pack(out: Path, data: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Put the checkpoints and records of a campaign into at most six files of at most 14 MB.

    What is still as it is in ``data`` is left out, and so is, with a line about it, what does not fit.
    """
    for old in out.glob("campaign-*.tar"):
        old.unlink()
    bins: list[tuple[int, list[Path]]] = []
    for name in sorted(
        path.name.removesuffix(checkpoints.SUFFIX)
        for path in (out / "work" / "checkpoints").glob(f"*{checkpoints.SUFFIX}")
    ):
        files = [path for path in checkpoints.files(name, out / "work").values() if path.exists()]
        before = data / "checkpoints" / files[0].name
        if before.exists() and before.read_bytes() == files[0].read_bytes():
            continue
        size = sum(path.stat().st_size + 2048 for path in files)  # a header and padding each
        for index, (used, members) in enumerate(bins):
            if used + size <= PACK_BYTES:
                bins[index] = (used + size, members + files)
                break
        else:
            if len(bins) < PACKS and size <= PACK_BYTES:
                bins.append((size, files))
            else:
                say(f"{name}: not packed, since it does not fit")
    packs = []
    for number, (_, members) in enumerate(bins, 1):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in members:
                archive.add(path, arcname=f"{path.parent.name}/{path.name}", recursive=False)
        packs.append(out / f"campaign-{number}.tar")
        runtime.write_atomically(packs[-1], buffer.getvalue())
    say(f"packed: {', '.join(path.name for path in packs) or 'nothing'} in {out}")
    return packs


def merge(out: Path, data: Path | None = None, say: Callable[[str], None] = print) -> list[str]:
    """Put what a campaign brought into ``data/``.

    A run whose file is damaged, of another configuration, or no further than what is there is refused with a line; the
    others are taken.

    Returns:
        Names of the runs that were taken.

    Raises:
        UserError: if there are no packs, or at least one run was refused.
    """
    data = data or runtime.root() / "data"
    packs = sorted(out.glob("campaign-*.tar"))
    if not packs:
        raise UserError(f"there are no files campaign-*.tar in {out}: name the folder that `metabook campaign` wrote")
    found: dict[str, dict[str, bytes]] = {}
    for path in packs:
        for member, content in _members(path):
            name, suffix = member
            found.setdefault(name, {})[suffix] = content
    if not found:
        raise UserError(f"the files campaign-*.tar in {out} hold no runs: bring them anew")
    taken, refused = [], []
    for name, files in found.items():
        try:
            say(f"{name}: {_take(name, files, data)}")
            taken.append(name)
        except UserError as error:
            refused.append(name)
            say(f"{name}: refused, {error}")
    if refused:
        raise UserError(
            f"{len(refused)} of {len(found)} runs were refused: {', '.join(refused)}; the lines above say why"
        )
    return taken


def _members(pack: Path) -> list[tuple[tuple[str, str], bytes]]:
    """The files of a pack as ((name of the run, suffix), content); what is not one of a run is no part of it."""
    members = []
    try:
        with tarfile.open(pack) as archive:
            for member in archive.getmembers():
                folder, _, file = member.name.partition("/")
                suffix = next((s for s in SUFFIXES if file.endswith(s)), "")
                content = archive.extractfile(member) if member.isfile() else None
                if content is None or SUFFIXES.get(suffix) != folder or "/" in file or file.startswith("."):
                    raise UserError(f"{pack} holds {member.name!r}, which is no file of a campaign: it is not used")
                members.append(((file.removesuffix(suffix), suffix), content.read()))
    except (OSError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{pack} is damaged ({reason}): copy it again from where the campaign ran") from None
    return members


def _take(name: str, files: dict[str, bytes], data: Path) -> str:
    """Write one run into ``data`` if it may replace what is there; says how far it got."""
    experiment = experiments.find(name)
    if checkpoints.SUFFIX not in files:
        raise UserError("it has no checkpoint")
    incoming = data / "checkpoints" / f".{name}.incoming{checkpoints.SUFFIX}"
    runtime.write_atomically(incoming, files[checkpoints.SUFFIX])
    try:
        _, header = checkpoints.read_checkpoint(incoming)
    finally:
        incoming.unlink()
    if header["config"] != checkpoints.configuration(experiment):
        raise UserError("it is of another configuration than the experiment")
    target = data / "checkpoints" / f"{name}{checkpoints.SUFFIX}"
    if target.exists():
        _, present = checkpoints.read_checkpoint(target)
        if present["config"] == header["config"] and present["iteration"] >= header["iteration"]:
            raise UserError(f"it is no further than what is there, iteration {present['iteration']:,}")
    record: dict[str, Any] | None = None
    try:
        record = from_json(files[".json"]) if ".json" in files else None
        samples = files.get(records.SAMPLES, b"")
        if ".json" in files and (records.fault(record, name) or not records.measured_together(record, samples)):
            raise ValueError
    except ValueError:
        raise UserError("its record is damaged") from None
    runtime.write_atomically(target, files[checkpoints.SUFFIX])
    progress = f"{header['iteration']:,} of {experiment.iterations:,} iterations"
    if record is None or record["iterations"]["done"] != header["iteration"] or record["config"] != header["config"]:
        return f"{progress}, without a record: `metabook record {name}` measures it and writes one"
    for suffix in set(records.SUFFIXES) & files.keys():
        runtime.write_atomically(data / "records" / f"{name}{suffix}", files[suffix])
    return progress
