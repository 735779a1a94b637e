"""The floors of the package: the one list that the architecture page, the helper reference and the tests read.

A module imports from floors below its own, or from its own floor where that makes no cycle.
"""

from __future__ import annotations

from typing import NamedTuple


class Floor(NamedTuple):
    """One floor of ``src/helpers``.

    Attributes:
        rooms: its folders and modules.
        purpose: what stands there, in one phrase.
    """

    rooms: tuple[str, ...]
    purpose: str


FLOORS = (  # lowest first
    Floor(
        ("types", "runtime", "validate", "settings", "fields", "parsing", "progress", "errors"),
        "the nouns (parameters, networks, tasks, learners, estimators); paths, devices, files; values, settings",
    ),
    Floor(
        ("numerics", "site"),
        "recorded programs, solvers, convolution, finite differences, processes that share work | running, comparing, "
        "building the pages",
    ),
    Floor(("models",), "networks as functions of their parameters, one family a module"),
    Floor(
        ("losses", "tasks"),
        "losses, given and learned | task distributions and data sets; control and jets are folders of their own",
    ),
    Floor(
        ("optimizers",),
        "update rules, written and learned; networks trained by many of them at once; the search for them",
    ),
    Floor(("learners",), "how θ and a support set become φ"),
    Floor(
        ("estimators", "lab"),
        "from a batch of tasks to a meta-gradient | training, checkpoints, records, claims, statistics, figures",
    ),
    Floor(("experiments",), "the named, recorded experiments, one module a family"),
    Floor(("cli", "campaign", "cluster"), "the command ``metabook``; long runs by priority; runs on many machines"),
)
