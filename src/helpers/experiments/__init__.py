"""Named, recorded experiments, one module a paper, and the order in which a queue runs them."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from helpers.errors import UserError

FIRST = ("maml",)  # of the queue; the others follow by their names


def catalogue() -> dict:
    """All experiments by name: what the function ``experiments`` of each module here returns."""
    found = sorted((info.name for info in iter_modules(__path__)), key=lambda name: (name not in FIRST, name))
    modules = (import_module(f"{__name__}.{name}") for name in found)
    return {one.name: one for module in modules if hasattr(module, "experiments") for one in module.experiments()}


def find(name: str):
    """The experiment of that name.

    Raises:
        UserError: if there is none.
    """
    known = catalogue()
    if name not in known:
        raise UserError(f"there is no experiment {name!r}; known: {', '.join(known)}")
    return known[name]
