"""The workflows are valid, and what they name exists."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers.runtime import root
from helpers.site import checks

FOLDER = root() / ".github" / "workflows"
WORKFLOWS = sorted(path.name for path in FOLDER.glob("*.yml"))


def steps(name):
    """The shell commands of a workflow."""
    jobs = yaml.safe_load((FOLDER / name).read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_four_workflows_exist():
    assert WORKFLOWS == ["checks.yml", "colab.yml", "gpu.yml", "pages.yml"]


def validate(*paths):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    return subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)


def test_workflows_follow_githubs_schema():
    ran = validate(*FOLDER.glob("*.yml"))
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_wrong_workflow_would_be_noticed(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text((FOLDER / "checks.yml").read_text().replace("runs-on:", "run-on:"))
    assert validate(wrong).returncode == 1


@pytest.mark.parametrize("name", WORKFLOWS)
def test_commands_are_valid_shell(name):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    for command in steps(name):
        plain = re.sub(r"\$\{\{.*?\}\}", "x", command)
        ran = subprocess.run([bash, "-n"], input=plain, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_make_targets_exist(name):
    targets = set(re.findall(r"^([a-z]+):", (root() / "Makefile").read_text(), re.M)) | {".venv/.installed"}
    for command in steps(name):
        assert set(re.findall(r"\bmake ([\w./]+)", command)) <= targets


def test_tiers_exist_and_one_machine_runs_all_of_them():
    jobs = yaml.safe_load((FOLDER / "checks.yml").read_text())["jobs"]
    tiers = [entry["tiers"].split() for entry in jobs["test"]["strategy"]["matrix"]["include"]]
    assert {tier for some in tiers for tier in some} <= set(checks.TIERS) and [] in tiers


@pytest.mark.parametrize("name", WORKFLOWS)
def test_permissions_are_the_least(name):
    assert yaml.safe_load((FOLDER / name).read_text())["permissions"] == {"contents": "read"}
