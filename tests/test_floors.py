"""The house stands as its plan says: every import goes down, no floor has a cycle, no room is too large."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from helpers.runtime import root
from helpers.site.floors import FLOORS

SOURCE = root() / "src" / "helpers"
LEVEL = {room: number for number, floor in enumerate(FLOORS) for room in floor.rooms}
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path != SOURCE / "__init__.py"
}


def imported(tree):
    """The modules of ``helpers`` that a module imports, wherever in it, but not for type checkers alone."""
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and id(node) not in unseen
            and (node.module or "").split(".")[0] == "helpers"
        ):
            inner = node.module.removeprefix("helpers").lstrip(".")
            for alias in node.names:
                whole = f"{inner}.{alias.name}".lstrip(".")
                yield whole if whole in FILES else inner


GRAPH = {
    name: {other for other in imported(ast.parse(path.read_text(encoding="utf-8"))) if other != name}
    for name, path in FILES.items()
}


def test_every_room_stands_on_a_floor():
    assert {name.split(".")[0] for name in FILES} == set(LEVEL)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    own = LEVEL[name.split(".")[0]]
    upward = {other for other in GRAPH[name] if LEVEL[other.split(".")[0]] > own}
    assert not upward, f"{name} imports {sorted(upward)} from a floor above"


def test_tests_share_by_their_tools_alone():
    """A test module that imported another one would fail with it, and run its fixtures twice."""
    for path in (root() / "tests").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) test_", path.read_text(encoding="utf-8"), re.M), path


@pytest.mark.parametrize("name", FILES)
def test_any_module_can_be_imported_without_the_optional_packages(name):
    """As is done where the examples in docstrings are run; what needs such a package imports it there."""
    optional = {
        "awkward",
        "babel",
        "distributed",
        "fastjet",
        "gymnasium",
        "higher",
        "mujoco",
        "pythia8",
        "stable_baselines3",
        "torchopt",
    }
    for node in ast.parse(FILES[name].read_text(encoding="utf-8")).body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not optional & {module.split(".")[0] for module in modules}


def test_importing_brings_no_library_that_only_some_use():
    """Imports inside functions stay there; training needs no figures, no data no reader of images."""
    heavy = "matplotlib scipy sklearn torchvision PIL pooch pandas IPython fastjet awkward pythia8mc gymnasium mujoco"
    names = sorted(f"helpers.{name}" for name in FILES if name.split(".")[0] not in ("site", "cli", "campaign"))
    program = f"import sys, {', '.join(names)}; print(sorted(set({heavy.split()}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_no_cycles():
    list(TopologicalSorter(GRAPH).static_order())
    rooms = {room: set() for room in LEVEL}
    for name, others in GRAPH.items():
        rooms[name.split(".")[0]] |= {other.split(".")[0] for other in others} - {name.split(".")[0]}
    list(TopologicalSorter(rooms).static_order())


@pytest.mark.parametrize("name", FILES)
def test_no_module_is_too_long(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


def test_the_architecture_page_draws_its_table_from_the_same_list():
    text = (root() / "book" / "architecture.md").read_text(encoding="utf-8")
    assert "```{helper-floors}" in text
    assert not re.search(r"^\| \d \| `", text, re.M), "a second list of floors, written by hand"
