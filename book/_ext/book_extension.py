"""What the book needs beyond Sphinx's own extensions: the helper reference, and formulas that need no network."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from helpers.site.floors import FLOORS

def modules() -> list[str]:
    """The full names of all modules of ``helpers`` that there are."""
    package = importlib.import_module("helpers")
    found = pkgutil.walk_packages(package.__path__, prefix="helpers.")
    return sorted(info.name for info in found if not info.name.rpartition(".")[2].startswith("_"))


class HelperReference(SphinxDirective):
    """Sections with the documented members of every module of ``helpers``, in the order of the floors."""

    def run(self) -> list[nodes.Node]:
        names = modules()
        sections = []
        for number, floor in enumerate(FLOORS):
            here = [name for room in floor.rooms for name in names if name.split(".")[1] == room]
            sections.append((f"Floor {number}: {', '.join(floor.rooms)}", here))
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


class HelperFloors(SphinxDirective):
    """The table of the floors, the highest first."""

    def run(self) -> list[nodes.Node]:
        rows = ["| floor | folders and modules | what stands there |", "|:---:|:---|:---|"]
        for number, floor in reversed(list(enumerate(FLOORS))):
            rooms = ", ".join(f"`{room}`" for room in floor.rooms)
            rows.append(f"| {number} | {rooms} | {floor.purpose.replace('``', '`').replace(' | ', '; ')} |")
        lines = [":::{table} Floors of the package", ":name: tab-floors", "", *rows, ":::"]
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.get_source_info()[0]), 0, holder)
        return holder.children


def skip_member(app, what, name, member, skip, options):
    """Leave out what Python itself says about the fields of a named tuple: "Alias for field number 0"."""
    return True if str(getattr(member, "__doc__", "")).startswith("Alias for field number") else None


def setup(app):
    app.add_directive("helper-reference", HelperReference)
    app.add_directive("helper-floors", HelperFloors)
    app.connect("autodoc-skip-member", skip_member)
    # MathJax from an installed package, so that formulas show without a network; without the package, from its CDN.
    if importlib.util.find_spec("sphinx-mathjax-offline"):
        app.setup_extension("sphinx-mathjax-offline")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
