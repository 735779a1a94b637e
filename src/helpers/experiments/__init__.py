"""Named, recorded experiments, one module a paper, and the order in which a queue runs them."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from helpers.errors import UserError, nearest

PAPERS = ("maml", "reptile", "imaml", "ml3", "nos", "jets")  # in the order of the queue, each with all its modules


def _place(module: str) -> tuple[int, str]:
    """Where a module stands in the queue: with its paper, and after all papers if it has none."""
    return next((place for place, paper in enumerate(PAPERS) if module.startswith(paper)), len(PAPERS)), module


def catalogue() -> dict:
    """All experiments by name, in the order of the queue: what ``experiments()`` of each module here returns."""
    found = sorted((info.name for info in iter_modules(__path__)), key=_place)
    modules = (import_module(f"{__name__}.{name}") for name in found)
    return {one.name: one for module in modules if "experiments" in vars(module) for one in module.experiments()}


def find(name: str):
    """The experiment of that name.

    Raises:
        UserError: if there is none.
    """
    known = catalogue()
    if name not in known:
        raise UserError(
            f"there is no experiment {name!r}{nearest(name, known)}; `metabook train --list` names them all"
        )
    return known[name]
