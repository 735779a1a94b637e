"""Chapters as files: finding, reading, tidying and writing them."""

from __future__ import annotations

import ast
import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path

from helpers.errors import UserError
from helpers.runtime import root

PROFILES = ("quick", "book", "paper")


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


def write(notebook, path: Path) -> None:
    """Write a notebook so that a reader of ``path`` never sees half of it."""
    import nbformat

    partial = path.with_name(f".{path.name}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


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
