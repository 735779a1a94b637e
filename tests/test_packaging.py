"""pyproject.toml, requirements.lock, environment.yml and the Makefile agree."""

import itertools
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

from helpers.runtime import root

PROJECT = tomllib.loads((root() / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
UNLOCKED = [Requirement(text) for text in EXTRAS["jets"]]  # what only simulates: no reader needs it
DIRECT = [
    Requirement(text)
    for text in itertools.chain(PROJECT["dependencies"], *(EXTRAS[name] for name in EXTRAS if name != "jets"))
]
LOCK = [
    Requirement(line.split("#")[0])
    for line in (root() / "requirements.lock").read_text().splitlines()
    if line.split("#")[0].strip()
]
CUDA = re.compile("nvidia-|cuda-|triton")
PLATFORMS = list(itertools.product(("3.11", "3.12", "3.13"), (("linux", "Linux"), ("darwin", "Darwin"))))


def locked(python="3.12", system=("linux", "Linux")):
    """Name and version of everything that the lock installs there."""
    machine = "x86_64" if system[0] == "linux" else "arm64"
    surroundings = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system[0],
        "platform_system": system[1],
        "platform_machine": machine,
        "os_name": "posix",
        "implementation_name": "cpython",
    }
    chosen = [entry for entry in LOCK if entry.marker is None or entry.marker.evaluate(surroundings)]
    names = [canonical(entry.name) for entry in chosen]
    assert len(names) == len(set(names)), "a package is locked twice"
    return {canonical(entry.name): str(entry.specifier).removeprefix("==") for entry in chosen}


def test_package_asks_for_lower_bounds_only():
    for requirement in DIRECT + UNLOCKED:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert ">=" in operators and operators <= {">=", "<"}, requirement
        assert "<" not in operators or requirement.name in ("jupyter-book", "nbval", "pythia8mc"), requirement


def test_simulators_are_optional():
    assert not {canonical(requirement.name) for requirement in UNLOCKED} & {canonical(entry.name) for entry in LOCK}


def test_lock_is_exact():
    for entry in LOCK:
        assert re.fullmatch(r"==[0-9][\w.]*", str(entry.specifier)), entry


@pytest.mark.parametrize("python, system", PLATFORMS)
def test_lock_satisfies_every_direct_dependency(python, system):
    versions = locked(python, system)
    for requirement in DIRECT:
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), requirement


def test_lock_brings_no_cuda():
    assert not [entry.name for entry in LOCK if CUDA.match(entry.name)]


def test_lock_is_complete():
    """Whatever the direct dependencies need, here and now, is in the lock: pip must choose no version by itself."""
    seen, todo = set(), [canonical(requirement.name) for requirement in DIRECT]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo += [] if CUDA.match(need.name) else [canonical(need.name)]
    assert seen <= {canonical(entry.name) for entry in LOCK}


def test_conda_users_get_the_same_versions():
    entries = yaml.safe_load((root() / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in entries if str(entry).startswith("python=")).removeprefix("python=")
    assert python in {version for version, _ in PLATFORMS}
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    pinned = {canonical(Requirement(line).name): line.split("==")[1] for line in pip if not line.startswith("-")}
    assert set(pinned) == {canonical(requirement.name) for requirement in DIRECT}
    versions = locked(python)
    assert pinned == {name: versions[name] for name in pinned}
    assert "--requirement requirements.lock" in pip


def test_command_line_is_installed_under_its_name():
    assert PROJECT["scripts"] == {"metabook": "helpers.cli:main"}


def make(*arguments, **environment):
    program = shutil.which("make")
    if program is None:
        pytest.skip("no make")
    return subprocess.run(
        [program, *arguments], cwd=root(), env=os.environ | environment, capture_output=True, text=True
    )


def test_make_alone_prints_every_target():
    targets = re.findall(r"^([a-z]+):", (root() / "Makefile").read_text(), re.M)
    assert {"help", "book", "test", "lab", "bench", "clean", "refresh"} <= set(targets)
    ran = make()
    assert ran.returncode == 0
    assert re.findall(r"^make ([a-z]+)  +\S", ran.stdout, re.M) == targets


def test_missing_python_is_one_clear_sentence(tmp_path):
    for name in ("sh", "test", "touch"):
        if shutil.which(name):
            (tmp_path / name).symlink_to(shutil.which(name))
    ran = make("book", f"VENV={tmp_path}/environment", "PYTHON=", PATH=str(tmp_path))
    assert ran.returncode != 0
    assert "metabook: no Python 3.11 or newer (with its venv module) was found; install one" in ran.stderr
    assert not (tmp_path / "environment").exists()


def test_continuous_integration_script_is_valid_shell():
    script = root() / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_the_repository_is_light():
    """A reader on Colab clones all of it, and a short-lived GPU machine takes no more than 64 MiB, data included."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root(), capture_output=True, text=True)
    if listed.returncode == 0:
        files = [root() / name for name in listed.stdout.split("\0") if name]
    else:  # an unpacked archive: what it brought, and nothing that was made since
        made = {".venv", "_build", "raw", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
        files = [
            path for path in root().rglob("*") if path.is_file() and not made & set(path.relative_to(root()).parts)
        ]
    sizes = {path.relative_to(root()): path.stat().st_size for path in files if path.is_file()}
    assert len(sizes) > 300, "most of the repository is missing"
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    total = sum(sizes.values())
    assert total <= 45_000_000, f"{total:,} bytes; the largest are {', '.join(map(str, largest))}"
