"""Chapters as files: finding, reading, tidying and writing them."""

from __future__ import annotations

import ast
import base64
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from helpers import settings
from helpers.errors import UserError, nearest
from helpers.runtime import root

PROFILES = ("quick", "book", "paper")
# In front of a program that handles notebooks: jsonschema would take two seconds to import this one, for a kind of
# address that no notebook holds.
QUICK_START = "import sys; sys.modules['rfc3987_syntax'] = None"


def check_profile(name: str) -> None:
    """Refuse a profile that there is not.

    Raises:
        UserError: then.
    """
    if name not in PROFILES:
        raise UserError(
            f"there is no profile {name!r}{nearest(name, PROFILES)}; the profiles are {', '.join(PROFILES)}."
        )


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
            names_of_all = [*known, *(part for chapter in known for part in chapter.split("_", 1))]
            raise UserError(
                f"there is no chapter {name!r}{nearest(stem, names_of_all)}; the chapters are {', '.join(known)}."
            )
        chosen += match
    return list(dict.fromkeys(chosen))


def parameters_of(chapter: str) -> dict[str, Any]:
    """What the cell of a chapter that is tagged ``parameters`` assigns; empty when there is no such cell.

    Returns:
        The kind of each name (:mod:`helpers.settings`), that of its default.

    Raises:
        UserError: if that cell is no Python.
    """
    path = root() / "notebooks" / f"{chapter}.ipynb"
    for cell in read(path).cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            try:
                statements = ast.parse(cell.source).body
            except SyntaxError as error:
                raise UserError(f"the cell of parameters of {path} cannot be read ({error}); mend it.") from None
            return {
                target.id: _kind(statement.value)
                for statement in statements
                if isinstance(statement, (ast.Assign, ast.AnnAssign))
                for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
                if isinstance(target, ast.Name)
            }
    return {}


def _kind(default: ast.expr | None) -> Any:
    try:
        return settings.kind_of(ast.literal_eval(default)) if default else str
    except (ValueError, TypeError):  # computed, so the text itself is handed on
        return str


def check_parameters(chapter: str, names: Iterable[str]) -> dict[str, Any]:
    """What :func:`parameters_of` gives.

    Raises:
        UserError: if one of the names is not among them.
    """
    known = parameters_of(chapter)
    for name in names:
        if name not in known:
            raise UserError(
                f"chapter {chapter} has no parameter {name!r}{nearest(name, known)}; "
                f"its parameters are: {', '.join(known) or 'none'}."
            )
    return known


def read_parameters(names: Sequence[str], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Values for the parameters of chapters, from texts.

    Raises:
        UserError: a parameter that one of the chapters does not have, or a text that is not of its kind.
    """
    values: dict[str, Any] = {}
    for name, text in pairs:
        for chapter in names:
            kind = check_parameters(chapter, [name])[name]
            values[name] = settings.read(text, kind, f"{name} of chapter {chapter}")
    return values


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


def write(notebook, path: Path) -> None:
    """Write a notebook so that a reader of ``path`` never sees half of it."""
    import nbformat

    partial = path.with_name(f".{path.name}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def tidy(notebook, effort: int = 0) -> None:
    """Take out of an executed notebook what differs from run to run without meaning anything, and make pictures small.

    The pictures keep every pixel.

    Args:
        notebook: changed in place.
        effort: how hard to look for fewer bytes, 0 to 6. At 0 a sixth of them goes in no time; at 4 another tenth, for
            fifty times the work, which pays for what is committed.
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
                    data["image/png"] = _smaller(data["image/png"], effort)
                if "text/html" in data:  # an animation's frames
                    data["text/html"] = _FRAME.sub(lambda f: f[1] + _smaller(f[2], effort), data["text/html"])


# Base64 in a page; matplotlib's animations are JavaScript, where a backslash goes on to the next line.
_FRAME = re.compile(r"(data:image/png;base64,)((?:[A-Za-z0-9+/=]|\\\n)+)")


def _smaller(encoded: str, effort: int) -> str:
    """A PNG image in base64 in fewer bytes, every pixel as before; as it is where that does not help."""
    import oxipng

    png = base64.b64decode(encoded.replace("\\\n", ""))
    packed = oxipng.optimize_from_memory(png, level=effort, strip=oxipng.StripChunks.safe())
    return base64.b64encode(packed).decode() if len(packed) < len(png) else encoded


def _is_progress_bar(output) -> bool:
    return output.get("name") == "stderr" and "\r" in output.get("text", "")
