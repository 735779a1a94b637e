"""The page about more than one processor: its loop runs in two, its commands, scripts and jobs can be read."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import torch
from processes import together

from helpers import cli, experiments
from helpers.runtime import root

PAGE = (root() / "book" / "scaling.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def test_its_script_gives_alone_what_it_gives_in_two_processes(tmp_path, monkeypatch):
    (code,) = (block for block in blocks("python") if "divided" in block)
    assert code.count("iterations=50") == 1
    code, found = code.replace("iterations=50", "iterations=3"), []
    for name, count in (("alone", 1), ("two", 2)):
        place = tmp_path / name
        place.mkdir()
        monkeypatch.chdir(place)

        def work():
            exec(compile(code, "scaling.md", "exec"), {"print": lambda *_: None})

        assert (together(2, work) if count == 2 else work()) in (None, [None, None])
        found.append(torch.load(place / "theta.pt"))
    one, two = found
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_its_commands_are_of_the_command_line():
    launched = [line for block in blocks("bash") + blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    words = [shlex.split(line.split("-m helpers.cli", 1)[1]) for line in launched if "-m helpers.cli" in line]
    words += [shlex.split(line.removeprefix("metabook ")) for line in launched if line.startswith("metabook ")]
    assert len(words) == 5
    for one in words:
        options = cli.parser()[0].parse_args(one)
        for name in [options.name] if isinstance(options.name, str) else options.name or []:
            assert experiments.find(name).name == name


@pytest.mark.parametrize("code", blocks("python"))
def test_its_python_is_python_and_fits_the_page(code):
    compile(code, "scaling.md", "exec")
    assert max(map(len, code.splitlines())) <= 76


@pytest.mark.parametrize("script", blocks("sh"))
def test_its_job_scripts_are_such(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0


@pytest.mark.parametrize("script", [script for script in blocks("sh") if "torchrun" in script])
def test_its_job_of_ranks_asks_for_what_it_uses(script):
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script, re.M))
    assert asked["cpus-per-task"] == re.search(r"--nproc-per-node=(\d+)", script)[1]
    hours, minutes, _ = map(int, asked["time"].split(":"))
    assert float(re.search(r"--budget ([\d.]+)h", script)[1]) < hours + minutes / 60
