"""Named, recorded experiments, one module a paper, and the order in which a queue runs them."""

from __future__ import annotations

from helpers.runtime import UserError


def catalogue() -> dict:
    """All experiments by name, in the order of the ``paper`` queue."""
    from helpers.experiments import imaml, maml, reptile

    papers = (maml, reptile, imaml)
    return {experiment.name: experiment for paper in papers for experiment in paper.experiments()}


def find(name: str):
    """The experiment of that name.

    Raises:
        UserError: if there is none.
    """
    known = catalogue()
    if name not in known:
        raise UserError(f"there is no experiment {name!r}; known: {', '.join(known)}")
    return known[name]
