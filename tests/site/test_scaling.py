"""The page about several processes: its Python runs in two of them, its commands and its job script can be read."""

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
    (code,) = blocks("python")
    assert max(map(len, code.splitlines())) <= 76, "too wide for the page"
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
    assert len(words) == 2
    for one in words:
        options = cli.parser()[0].parse_args(one)
        assert experiments.find(options.name).name == options.name


@pytest.mark.parametrize("script", blocks("sh"))
def test_its_job_script_is_one(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script, re.M))
    assert asked["cpus-per-task"] == re.search(r"--nproc-per-node=(\d+)", script)[1]
    hours, minutes, _ = map(int, asked["time"].split(":"))
    assert float(re.search(r"--budget ([\d.]+)h", script)[1]) < hours + minutes / 60
