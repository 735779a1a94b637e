"""Run the chapters headless and build the site from them.

    python -m helpers.book run [CHAPTER ...] [--profile quick|book|paper] [-p NAME VALUE] [--out FOLDER] [--force]
    python -m helpers.book build | check | refresh [CHAPTER ...]

``run`` executes copies with papermill, so the working tree stays as it is: ``_build/book/NAME.ipynb``, beside it
``NAME.digest``, which says from what it was made and how many seconds it took. ``build`` stages the configuration, the
prose and the executed chapters in ``_build/site``, builds them with warnings as errors, checks the pages and only then
puts them at ``_build/html``. What has not changed is neither run nor built again.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from helpers.runtime import ONE_THREAD, UserError, cores, root

PROFILES = ("quick", "book", "paper")

# Seconds of processor time that a chapter may take, its kernel's start included: shown, since machines differ.
BUDGETS = {"quick": 30, "book": 120}


def workers() -> int:
    """How many processes with one thread each may run at a time: one a core, at least two."""
    return min(max(2, cores()), 16)


# ---------------------------------------- chapters


def chapters() -> list[str]:
    """Names of all chapters, in the order of their numbers: the notebooks in ``notebooks/`` without ``.ipynb``."""
    return sorted(path.stem for path in (root() / "notebooks").glob("*.ipynb"))


def select(names: Sequence[str] | None = None) -> list[str]:
    """The chapters meant by ``names`` (all when empty): ``02_maml`` may also be called ``02``, ``maml`` or by its path.

    Raises:
        UserError: a name that no chapter has, or no chapters at all.
    """
    known = chapters()
    if not known:
        raise UserError(f"there are no chapters in {root() / 'notebooks'}; run this from a complete checkout.")
    chosen = []
    for name in names or known:
        stem = Path(name).stem
        match = [chapter for chapter in known if stem in (chapter, *chapter.split("_", 1))]
        if not match:
            raise UserError(f"there is no chapter {name!r}; the chapters are {', '.join(known)}.")
        chosen += match
    return list(dict.fromkeys(chosen))


def parameters_of(chapter: str) -> list[str]:
    """Names assigned in the cell of a chapter that is tagged ``parameters``; empty when there is no such cell."""
    for cell in read(root() / "notebooks" / f"{chapter}.ipynb").cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            targets = [
                target
                for statement in ast.parse(cell.source).body
                if isinstance(statement, (ast.Assign, ast.AnnAssign))
                for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
            ]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def read(path: Path):
    """A notebook from a file.

    Raises:
        UserError: the file is missing or no notebook.
    """
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the chapter first.") from None
    except Exception as error:  # nbformat raises its own errors, JSON's and jsonschema's
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable notebook ({reason}); restore it from git.") from error


def _write(notebook, path: Path) -> None:
    """Write a notebook so that a reader of ``path`` never sees half of it."""
    import nbformat

    partial = path.with_name(f".{path.name}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


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
        names: chapters (see :func:`select`); all when empty.
        profile: ``quick``, ``book`` (the notebooks' own defaults) or ``paper``.
        parameters: values for names in the cell tagged ``parameters``.
        out: folder for the executed copies; ``_build/<profile>`` when not given.
        force: run also what has not changed.
        jobs: kernels at a time; one a core with one thread each, but one with all threads in the profile ``paper``.

    Raises:
        UserError: unknown chapter, profile or parameter, before anything runs; or a chapter that failed, after all
            others were finished and the traceback was printed.
    """
    if profile not in PROFILES:
        raise UserError(f"there is no profile {profile!r}; the profiles are {', '.join(PROFILES)}.")
    names = select(names)
    values = dict(parameters or {})
    if profile != "book":  # "book" is what the notebooks say themselves
        values = {"profile": profile} | values
    for name in names:  # papermill only logs an unknown parameter and runs on with the default
        unknown = [value for value in values if value not in parameters_of(name)]
        if unknown:
            known = ", ".join(parameters_of(name)) or "none"
            raise UserError(f"chapter {name} has no parameter {unknown[0]!r}; its parameters are: {known}.")
    out = Path(out) if out else root() / "_build" / profile
    out.mkdir(parents=True, exist_ok=True)
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
            for child in children:
                if child.poll() is None:
                    child.terminate()  # nbclient then shuts its kernel down
            raise
        finally:
            for bar in bars.values():
                bar.close()
    return failures


class _Lines:
    """Stands for standard error where that is no terminal: a progress bar's updates become lines of a log."""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip("\r\n ")
        if text:
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()


def _bar(name: str, position: int):
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        desc=f"{name:<28}",
        total=len(read(root() / "notebooks" / f"{name}.ipynb").cells),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} cells [{elapsed}]",
        ncols=100,
        position=position if terminal else 0,
        mininterval=0.1 if terminal else 20,
        delay=0 if terminal else 1e-9,  # a log gets its first line when the chapter starts
        file=None if terminal else _Lines(),
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
    command = [sys.executable, "-m", "papermill", str(source), str(partial), "--kernel", "python3"]
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
    bar.refresh() if sys.stderr.isatty() else bar.close()
    if code == 0:
        notebook = read(partial)
        tidy(notebook)
        _write(notebook, target)
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
    if not sys.stderr.isatty():
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    return f"{name} in code cell {len(begun)} (`{line}`): {problem}; {where}", traceback


def tidy(notebook) -> None:
    """Take out of an executed notebook what differs from run to run without meaning anything, and make pictures small.

    The pictures keep every pixel.
    """
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output)]
            for output in cell.outputs:
                data = output.get("data", {})
                if "image/png" in data:
                    data["image/png"] = _smaller(data["image/png"])
                if "text/html" in data:  # an animation's frames
                    data["text/html"] = _FRAME.sub(lambda frame: frame[1] + _smaller(frame[2]), data["text/html"])


# Base64 in a page; matplotlib's animations are JavaScript, where a backslash goes on to the next line.
_FRAME = re.compile(r"(data:image/png;base64,)((?:[A-Za-z0-9+/=]|\\\n)+)")


def _smaller(encoded: str) -> str:
    """A PNG image in base64 in fewer bytes, every pixel as before; as it is where that does not help."""
    import oxipng

    png = base64.b64decode(encoded.replace("\\\n", ""))
    packed = oxipng.optimize_from_memory(png, level=2, strip=oxipng.StripChunks.safe())
    return base64.b64encode(packed).decode() if len(packed) < len(png) else encoded


def _is_progress_bar(output) -> bool:
    return output.get("name") == "stderr" and "\r" in output.get("text", "")


def refresh(names: Sequence[str] | None = None) -> None:
    """Execute chapters at their defaults and put the outputs into the committed notebooks.

    The bootstrap cell gets the repository's address from ``_config.yml``, the one place where it is set.

    Raises:
        UserError: a chapter failed; that one stays as it was, the others are refreshed.
    """
    folder, out, url = root() / "notebooks", root() / "_build" / "refresh", repository()["url"]
    names = select(names)
    for name in names:
        notebook = read(folder / f"{name}.ipynb")
        for cell in notebook.cells:
            if "bootstrap" in cell.metadata.get("tags", []):
                stamped = re.sub(r"https://github\.com/[\w.-]+/[\w-]+", url, cell.source)
                if stamped != cell.source:
                    cell.source = stamped
                    _write(notebook, folder / f"{name}.ipynb")
    try:
        run_chapters(names, "book", out=out, force=True)
    finally:
        for name in names:
            if (out / f"{name}.digest").exists():
                _write(read(out / f"{name}.ipynb"), folder / f"{name}.ipynb")


# ---------------------------------------- site


def config() -> dict[str, Any]:
    """The content of ``_config.yml``."""
    path = root() / "_config.yml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it from git.") from error


def repository() -> dict[str, str]:
    """``url``, ``branch`` and ``path_to_book`` of the repository, from ``_config.yml``, which alone has them."""
    entry = {"branch": "main", "path_to_book": ""} | (config().get("repository") or {})
    if not entry.get("url"):
        raise UserError("_config.yml has no repository.url; set it to the address of the public repository.")
    return entry | {"url": entry["url"].rstrip("/").removesuffix(".git")}


def check_executed(folder: Path) -> None:
    """Raise :class:`UserError` unless all code cells of the chapters in ``folder`` were run, none with an error."""
    for name in select():
        path = folder / f"{name}.ipynb"
        cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
        for number, cell in enumerate(cells, 1):
            if cell.source.strip() and cell.execution_count is None:
                raise UserError(f"code cell {number} of {path} was never run; run `make refresh`.")
            failed = any(output.output_type == "error" for output in cell.outputs)
            if failed and "raises-exception" not in cell.metadata.get("tags", []):
                raise UserError(f"code cell {number} of {path} holds an error; mend it, then run `make refresh`.")


def build(notebooks: Path | None = None, into: Path | None = None) -> Path:
    """Build the site from executed chapters, warnings as errors, and check it.

    Args:
        notebooks: folder of executed chapters; ``_build/book``, where :func:`run_chapters` leaves them, when not given.
        into: folder in which the site is staged and built and gets its place, ``html``; ``_build`` when not given.

    Returns:
        The folder with ``index.html``. Pages of an earlier build are replaced only when the new ones are right, and
        left alone when they were made from the same files.

    Raises:
        UserError: a chapter was not run, a warning, or a page that lacks something (:func:`check_site`).
    """
    notebooks = notebooks or root() / "_build" / "book"
    into = into or root() / "_build"
    if (config().get("execute") or {}).get("execute_notebooks") != "off":
        raise UserError(
            '_config.yml must say `execute_notebooks: "off"` under `execute`; `make book` runs the chapters.'
        )
    check_executed(notebooks)
    site, output, html, stamp = into / "site", into / "pages", into / "html", into / "html.digest"
    for folder in (site, output):
        shutil.rmtree(folder, ignore_errors=True)
    _stage(notebooks, site)
    digest = _staged(site)
    if stamp.exists() and stamp.read_text() == digest:
        with contextlib.suppress(UserError):  # somebody has spoilt the pages since
            check_site(html)
            print("the site: unchanged, not built again", flush=True)
            return html
    stamp.unlink(missing_ok=True)
    # From nothing each time: Sphinx repeats no warning about a page that it read before, so a second try would pass.
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(site)]
    command += ["--path-output", str(output), "-n", "-W", "--keep-going"]
    log = into / "site.log"
    with log.open("w", encoding="utf-8") as stream:
        environment = {**os.environ, "PYTHONUTF8": "1", "NO_COLOR": "1"}
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    built = output / "_build" / "html"
    if code or not (built / "index.html").exists():  # jupyter-book can exit 0 with nothing built
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        warnings = [line for line in lines if re.search("WARNING|ERROR|Error", line)] or lines[-40:]
        print("\n".join(warnings).replace(f"{site}{os.sep}", ""), file=sys.stderr)
        raise UserError(f"jupyter-book found {len(warnings)} things to mend, listed above; its whole output is {log}.")
    check_site(built)
    shutil.rmtree(html, ignore_errors=True)
    os.replace(built, html)
    shutil.rmtree(output, ignore_errors=True)
    stamp.write_text(digest)
    return html


def _stage(notebooks: Path, site: Path) -> None:
    """Lay out in ``site`` what jupyter-book reads: prose as it is in the checkout, and executed chapters."""
    base, clutter = root(), shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints", "*.egg-info")
    site.mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(base / name, site)
    # Beside the prose, what its pages may include: code and records.
    for name in ("book", "src", "data/claims", "data/records"):
        if (base / name).is_dir():
            shutil.copytree(base / name, site / name, ignore=clutter)
    others = shutil.ignore_patterns("*.ipynb", "*.py", "__pycache__", ".*")
    shutil.copytree(base / "notebooks", site / "notebooks", ignore=others)
    for name in chapters():
        shutil.copy(notebooks / f"{name}.ipynb", site / "notebooks")


def _staged(site: Path) -> str:
    """Digest of all that the pages depend on: what is staged, the lock and Python."""
    digest = hashlib.sha256(sys.version.encode())
    for path in [root() / "requirements.lock", *sorted(path for path in site.rglob("*") if path.is_file())]:
        digest.update(f"{os.path.relpath(path, site)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class _Page(HTMLParser):
    """Collects the targets of links and images of a page, and whether docutils marked an error on it."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.images: list[str] = []
        self.broken = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        if tag == "img" and values.get("src"):
            self.images.append(values["src"] or "")
        self.broken |= bool({"problematic", "system-message"} & set((values.get("class") or "").split()))


def check_site(html: Path | None = None) -> int:
    """Check a built site: front page, a page a chapter with its Colab link, and every local link and image.

    Returns:
        The number of pages.

    Raises:
        UserError: one sentence that lists all that is missing.
    """
    html = html or root() / "_build" / "html"
    if not (html / "index.html").exists():
        raise UserError(f"{html / 'index.html'} does not exist; build the book with `make book`.")
    entry = repository()
    prefix = "/".join(part for part in (entry["branch"], entry["path_to_book"].strip("/")) if part)
    owner_and_name = "/".join(entry["url"].split("/")[-2:])
    colab = f"https://colab.research.google.com/github/{owner_and_name}/blob/{prefix}/notebooks"
    names = chapters()
    missing = [name for name in names if not (html / "notebooks" / f"{name}.html").exists()]
    problems = [f"no page for chapter {name} (is it in _toc.yml?)" for name in missing]
    pages = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]
    for path in pages:
        page, name = _Page(path), path.relative_to(html).as_posix()
        if page.broken:
            problems.append(f"{name} shows an error of the page builder")
        for kind, targets in (("image", page.images), ("link", page.links)):
            dead = [target for target in targets if not _resolves(target, path, html)]
            problems += [f"{name} has a dead {kind} {target}" for target in dead]
        if path.parent == html / "notebooks" and path.stem in names and f"{colab}/{path.stem}.ipynb" not in page.links:
            problems.append(f"{name} has no link to {colab}/{path.stem}.ipynb")
    if problems:
        more = f" (and {len(problems) - 20} more)" if len(problems) > 20 else ""
        raise UserError(f"the site in {html} is not complete: {'; '.join(dict.fromkeys(problems[:20]))}{more}.")
    return len(pages)


def _resolves(target: str, page: Path, html: Path) -> bool:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not parts.path:
        return True
    base = html if parts.path.startswith("/") else page.parent
    file = base / unquote(parts.path).lstrip("/")
    return file.exists() and (file.is_dir() or file.stat().st_size > 0)


# ---------------------------------------- command line


def report(action, *arguments, **options) -> int:
    """Call ``action`` and return an exit status: what it returns, or 2 and one sentence for what a reader can mend."""
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = action(*arguments, **options)
    except UserError as error:
        print(f"metabook: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metabook: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"metabook: {error.strerror or error} ({error.filename or 'no file named'}).", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.book", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute copies of chapters")
    run.add_argument("chapter", nargs="*")
    run.add_argument("--profile", default="book")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--out", type=Path)
    run.add_argument("--force", action="store_true", help="also what has not changed")
    commands.add_parser("build", help="build the site from the executed chapters")
    commands.add_parser("check", help="check the built site")
    renew = commands.add_parser("refresh", help="put fresh outputs into the committed notebooks")
    renew.add_argument("chapter", nargs="*")
    given = parser.parse_args(None if argv is None else list(argv))
    if given.command == "run":
        values = {name: yaml.safe_load(value) for name, value in given.parameter}
        return report(run_chapters, given.chapter, given.profile, values, given.out, force=given.force)
    if given.command == "build":
        return report(lambda: print(f"The book is at {build() / 'index.html'}"))
    if given.command == "check":
        return report(lambda: print(f"{check_site()} pages are as they should be"))
    return report(refresh, given.chapter)


if __name__ == "__main__":
    sys.exit(main())
