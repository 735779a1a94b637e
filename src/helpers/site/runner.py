"""Running the chapters headless.

Copies are executed with papermill, so the working tree stays as it is: ``_build/book/NAME.ipynb``, beside it
``NAME.digest``, which says from what it was made and how many seconds it took. What has not changed is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

import yaml

from helpers.errors import UserError
from helpers.progress import progress_bar, redraws
from helpers.runtime import ONE_THREAD, cores, only_one, root
from helpers.site.config import repository
from helpers.site.notebooks import QUICK_START, check_parameters, check_profile, read, select, tidy, write

# Seconds of processor time that a chapter may take, its kernel's start included: shown, since machines differ.
BUDGETS = {"quick": 30, "book": 120}


def workers() -> int:
    """How many processes with one thread each may run at a time: one a core, at least two."""
    return min(max(2, cores()), 16)


# ---------------------------------------- running
def _surroundings() -> str:
    """Digest of all that a chapter's result depends on beside its own notebook: helpers, data, lock and Python."""
    base = root()
    digest = hashlib.sha256(sys.version.encode())
    files = [base / "requirements.lock", *(base / "src" / "helpers").rglob("*"), *(base / "data").rglob("*")]
    for path in sorted(files):
        clutter = "__pycache__" in path.parts or path.name.startswith(".")
        if path.is_file() and not clutter and not path.is_relative_to(base / "data" / "raw"):
            with contextlib.suppress(FileNotFoundError):  # a training run may replace its checkpoint meanwhile
                content = hashlib.sha256(path.read_bytes()).digest()
                digest.update(f"{path.relative_to(base)}\0".encode() + content)
    return digest.hexdigest()


def _digest(chapter: str, parameters: Mapping[str, Any], surroundings: str) -> str:
    """Digest of a run of ``chapter``; its outputs and execution counts do not count, its cells and their tags do."""
    cells = [
        (cell.cell_type, cell.source, cell.metadata) for cell in read(root() / "notebooks" / f"{chapter}.ipynb").cells
    ]
    return hashlib.sha256(json.dumps([surroundings, cells, dict(parameters)], sort_keys=True).encode()).hexdigest()


def run_chapters(
    names: Sequence[str] | None = None,
    profile: str = "book",
    parameters: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    force: bool = False,
    jobs: int | None = None,
) -> dict[str, Path]:
    """Execute copies of chapters with papermill, side by side, and return where they are.

    A chapter is left alone when its notebook, helpers, data, lock and parameters are those of its last run.

    Args:
        names: chapters (see :func:`~helpers.site.notebooks.select`); all when empty.
        profile: ``quick``, ``book`` (the notebooks' own defaults) or ``paper``.
        parameters: values for names in the cell tagged ``parameters``.
        out: folder for the executed copies; ``_build/<profile>`` when not given.
        force: run also what has not changed.
        jobs: kernels at a time; one a core with one thread each, but one with all threads in the profile ``paper``.

    Raises:
        UserError: unknown chapter, profile or parameter, or another process at the same folder, before anything runs;
            or a chapter that failed, after all others were finished and the traceback was printed.
    """
    check_profile(profile)
    names = select(names)
    values = dict(parameters or {})
    if profile != "book":  # "book" is what the notebooks say themselves
        values = {"profile": profile} | values
    for name in names:  # papermill only logs an unknown parameter and runs on with the default
        check_parameters(name, values)
    out = Path(out) if out else root() / "_build" / profile
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out, f"running chapters into {out}"):
        return _run_changed(names, profile, values, out, force, jobs)


def _run_changed(
    names: Sequence[str], profile: str, values: Mapping[str, Any], out: Path, force: bool, jobs: int | None
) -> dict[str, Path]:
    """Run those of the chapters that are not as they were in their last run, and say what came of it."""
    surroundings = _surroundings()
    digests = {name: _digest(name, values, surroundings) for name in names}
    todo = [name for name in names if force or _stamp(out, name)[0] != digests[name]]
    for name in names:
        if name not in todo:
            print(f"{name}: unchanged, not run again", flush=True)
    # The longest first, or it would run alone at the end: by the last run's seconds, else by the length of the code.
    todo.sort(key=lambda name: _stamp(out, name)[1] or _length(name) / 500, reverse=True)
    jobs = jobs or (1 if profile == "paper" else workers())
    failures = _run_side_by_side(todo, values, out, digests, jobs, one_thread=profile != "paper")
    budget = BUDGETS.get(profile)
    for name, seconds in times(out, names).items():
        if budget and name in todo:
            over = ": over its budget" if seconds > budget else ""
            print(f"{name}: {seconds:.0f} s of processor time, budget {budget} s{over}", flush=True)
    if failures:
        for name, (_, traceback) in failures.items():
            print(f"\n{name}:\n{traceback}\n", file=sys.stderr)
        what = "; ".join(reason for reason, _ in failures.values())
        done = len(names) - len(failures)
        rest = f" The other {done} chapters are done and kept." if done > 1 else ""
        raise UserError(f"{len(failures)} of {len(names)} chapters failed: {what}.{rest}")
    return {name: out / f"{name}.ipynb" for name in names}


def _stamp(out: Path, name: str) -> tuple[str | None, float | None]:
    """Digest and seconds of the last run of a chapter; None for what is not known."""
    stamp = out / f"{name}.digest"
    if not (stamp.exists() and (out / f"{name}.ipynb").exists()):
        return None, None
    digest, *seconds = stamp.read_text().split() or [""]
    return digest, float(seconds[0]) if seconds else None


def _length(name: str) -> int:
    cells = read(root() / "notebooks" / f"{name}.ipynb").cells
    return sum(len(cell.source) for cell in cells if cell.cell_type == "code")


def times(out: Path, names: Sequence[str] | None = None) -> dict[str, float]:
    """Seconds of processor time of the last run of chapters into the folder ``out``, where there was one."""
    known = {name: _stamp(out, name)[1] for name in select(names)}
    return {name: seconds for name, seconds in known.items() if seconds is not None}


def _run_side_by_side(
    names: Sequence[str], values: Mapping[str, Any], out: Path, digests: Mapping[str, str], jobs: int, one_thread: bool
) -> dict[str, tuple[str, str]]:
    """Run chapters, ``jobs`` at a time; returns (reason, traceback) of those that failed."""
    failures: dict[str, tuple[str, str]] = {}
    children: list[subprocess.Popen] = []
    bars = {name: _bar(name, position) for position, name in enumerate(names)}
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        runs = {}
        for name in names:
            runs[pool.submit(_run_one, name, values, out, digests[name], one_thread, bars[name], children)] = name
        try:
            for run in as_completed(runs):
                failure = run.result()
                if failure:
                    failures[runs[run]] = failure
        except BaseException:  # Ctrl-C: stop what runs, keep what is done
            pool.shutdown(wait=False, cancel_futures=True)
            _end(children, runs)
            raise
        finally:
            for bar in bars.values():
                bar.close()
    return failures


def _end(children: Sequence[subprocess.Popen], runs: Mapping[Future, str]) -> None:
    """Ask papermill's processes to end, which then shut their kernels down; a second Ctrl-C does not wait for that."""
    alive = [child for child in children if child.poll() is None]
    for child in alive:
        child.terminate()
    try:
        wait(runs)
    except KeyboardInterrupt:
        for child in alive:
            child.kill()  # a kernel ends where its parent has gone
        raise


def _bar(name: str, position: int):
    return progress_bar(
        desc=f"{name:<28}",
        total=len(read(root() / "notebooks" / f"{name}.ipynb").cells),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells [{elapsed}]",
        ncols=100,
        position=position,
        mininterval=0.1,
        delay=0 if redraws() else 1e-9,  # a log gets its first line when the chapter starts
    )


def _run_one(
    name: str,
    values: Mapping[str, Any],
    out: Path,
    digest: str,
    one_thread: bool,
    bar,
    children: list[subprocess.Popen],
) -> tuple[str, str] | None:
    """Run one chapter in a process of its own, so that Ctrl-C or a dying kernel harms no other."""
    stamp, target, failed = (out / f"{name}.{end}" for end in ("digest", "ipynb", "failed.ipynb"))
    partial = out / f".{name}.running.ipynb"
    for path in (stamp, failed, partial):
        path.unlink(missing_ok=True)
    source = root() / "notebooks" / f"{name}.ipynb"
    command = [sys.executable, "-c", f"{QUICK_START}; from papermill.cli import papermill; papermill()"]
    command += [str(source), str(partial), "--kernel", "python3"]
    command += ["--cwd", str(source.parent), "--language", "python", "--log-level", "ERROR", "--progress-bar"]
    command += ["--start-timeout", "300", "--parameters_yaml", yaml.safe_dump(dict(values))]
    # The kernel called python3 must be this environment's, whatever kernels a user has installed.
    environment = {**os.environ, "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"), "PYTHONUTF8": "1"}
    environment |= ONE_THREAD if one_thread else {}
    bar.reset()
    child = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    children.append(child)
    log = ""
    assert child.stderr is not None
    while chunk := child.stderr.read1(4096):
        log = (log + chunk.decode(errors="replace"))[-100_000:]
        counts = re.findall(r"\b(\d+)/(\d+) \[", log[-400:])
        if counts:
            bar.total = int(counts[-1][1])
            bar.update(int(counts[-1][0]) - bar.n)
    code, seconds = _wait(child)
    bar.bar_format = bar.bar_format.replace("{elapsed}", bar.format_interval(time.time() - bar.start_t))
    bar.refresh() if redraws() else bar.close()
    if code == 0:
        notebook = read(partial)
        tidy(notebook)
        write(notebook, target)
        partial.unlink()
        stamp.write_text(f"{digest}\n{seconds:.1f}\n")
        return None
    return _failure(name, partial, failed, log)


def _wait(child: subprocess.Popen) -> tuple[int, float]:
    """The exit status of a process, and the seconds of processor time that it took together with its kernel."""
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except ChildProcessError:  # whoever handles an interrupt has asked first
        return child.wait(), 0.0
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_utime + usage.ru_stime


def _failure(name: str, partial: Path, failed: Path, log: str) -> tuple[str, str]:
    """Say where a chapter stopped: one clause, and the traceback."""
    log = re.sub(r".*\r", "", log).strip()
    if not partial.exists():
        return f"{name} could not be started ({log.splitlines()[-1] if log else 'no message'})", log
    os.replace(partial, failed)
    where = f"the copy with the error is {failed}"
    cells = [cell for cell in read(failed).cells if cell.cell_type == "code"]
    cells = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    begun = [cell for cell in cells if cell.metadata.get("papermill", {}).get("status") != "pending"]
    if not begun:
        return f"{name} ({log.splitlines()[-1] if log else 'interrupted'}); {where}", log
    cell = begun[-1]
    line = next((line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")), "")
    problem, traceback = "the kernel died", log
    for output in cell.outputs:
        if output.output_type == "error":
            problem = f"{output.ename}: {output.evalue}".splitlines()[0][:200]
            traceback = "\n".join(output.traceback)
    if not redraws():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    return f"{name} in code cell {len(begun)} (`{line}`): {problem}; {where}", traceback


def refresh(names: Sequence[str] | None = None) -> None:
    """Execute chapters at their defaults and put the outputs into the committed notebooks.

    The bootstrap cell gets the repository's address from ``_config.yml``, the one place where it is set.

    Raises:
        UserError: a chapter failed; that one stays as it was, the others are refreshed.
    """
    folder, names = root() / "notebooks", select(names)
    with only_one(folder, "refreshing chapters"):
        _refresh(names, folder, root() / "_build" / "refresh", repository()["url"])


def _refresh(names: Sequence[str], folder: Path, out: Path, url: str) -> None:
    for name in names:
        (out / f"{name}.digest").unlink(missing_ok=True)  # whatever happens, only what this call runs is taken over
        notebook = read(folder / f"{name}.ipynb")
        for cell in notebook.cells:
            if "bootstrap" in cell.metadata.get("tags", []):
                stamped = re.sub(r"https://github\.com/[\w.-]+/[\w-]+", url, cell.source)
                if stamped != cell.source:
                    cell.source = stamped
                    write(notebook, folder / f"{name}.ipynb")
    try:
        run_chapters(names, "book", out=out, force=True)
    finally:
        for name in names:
            if (out / f"{name}.digest").exists():
                notebook = read(out / f"{name}.ipynb")
                tidy(notebook, effort=4)
                write(notebook, folder / f"{name}.ipynb")
