"""Building the site from executed chapters, and checking what was built.

:func:`build` stages the configuration, the prose and the executed chapters in ``_build/site``, builds them with
warnings as errors, checks the pages and only then puts them at ``_build/html``. What has not changed is not built
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from helpers.errors import UserError
from helpers.runtime import only_one, root
from helpers.site.config import config, repository
from helpers.site.notebooks import QUICK_START, chapters, read, select


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
        notebooks: folder of executed chapters; ``_build/book``, where :func:`~helpers.site.runner.run_chapters` leaves
            them, when not given.
        into: folder in which the site is staged and built and gets its place, ``html``; ``_build`` when not given.

    Returns:
        The folder with ``index.html``. Pages of an earlier build are replaced only when the new ones are right, and
        left alone when they were made from the same files.

    Raises:
        UserError: a chapter was not run, a warning, or a page that lacks something (:func:`check_site`).
    """
    notebooks = notebooks or root() / "_build" / "book"
    into = into or root() / "_build"
    with only_one(into, f"building the site in {into}"):
        return _build(notebooks, into)


def _build(notebooks: Path, into: Path) -> Path:
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
    command = [sys.executable, "-c", f"{QUICK_START}; from jupyter_book.cli.main import main; main()"]
    command += ["build", str(site), "--path-output", str(output), "-n", "-W", "--keep-going"]
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
