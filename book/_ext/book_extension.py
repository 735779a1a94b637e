"""What the book needs beyond Sphinx's own extensions: the helper reference, and formulas that need no network."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

# The floors of the package, lowest first (book/architecture.md); a module that is on none of them is listed last.
FLOORS = [
    (
        "Floor 0: foundations",
        (
            "runtime",
            "validate",
            "types",
            "operations",
            "tracing",
            "models",
            "architectures",
            "sequence",
            "solvers",
            "tasks",
        ),
    ),
    (
        "Floor 1: the boxes of the machine",
        (
            "losses",
            "learners",
            "amortized",
            "levels",
            "metagradients",
            "optimizers",
            "populations",
            "search",
            "differences",
        ),
    ),
    ("Floor 2: training and reporting", ("training", "evaluation", "records", "figures")),
    ("Floor 3: experiments", ("experiments",)),
    ("Floor 4: command line and book", ("cli", "campaign", "book", "compare", "checks")),
]


def modules() -> list[str]:
    """The full names of all modules of ``helpers`` that there are."""
    package = importlib.import_module("helpers")
    found = pkgutil.walk_packages(package.__path__, prefix="helpers.")
    return sorted(info.name for info in found if not info.name.rpartition(".")[2].startswith("_"))


class HelperReference(SphinxDirective):
    """Sections with the documented members of every module of ``helpers``, in the order of the floors."""

    def run(self) -> list[nodes.Node]:
        names = modules()
        sections, placed = [], set()
        for title, heads in FLOORS:
            here = [name for head in heads for name in names if name.split(".")[1] == head]
            placed.update(here)
            sections.append((title, here))
        sections.append(("Further modules", [name for name in names if name not in placed]))
        return [self.floor(title, here) for title, here in sections if here]

    def floor(self, title: str, names: list[str]) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(title)], names=[nodes.fully_normalize_name(title)])
        section += nodes.title(title, title)
        self.state.document.note_implicit_target(section)
        for name in names:
            inner = nodes.section(ids=[nodes.make_id(f"reference-{name}")], names=[name])
            inner += nodes.title(name, "", nodes.literal(name, name))
            source = self.get_source_info()[0]
            self.state.nested_parse(StringList([f".. automodule:: {name}", ""], source=source), 0, inner)
            section += inner
        return section


def skip_member(app, what, name, member, skip, options):
    """Leave out what Python itself says about the fields of a named tuple: "Alias for field number 0"."""
    return True if str(getattr(member, "__doc__", "")).startswith("Alias for field number") else None


def setup(app):
    app.add_directive("helper-reference", HelperReference)
    app.connect("autodoc-skip-member", skip_member)
    # MathJax from an installed package, so that formulas show without a network; without the package, from its CDN.
    if importlib.util.find_spec("sphinx-mathjax-offline"):
        app.setup_extension("sphinx-mathjax-offline")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
