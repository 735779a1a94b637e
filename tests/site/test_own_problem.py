"""The page about problems of one's own: its code runs in order, at tiny sizes, and so do its commands."""

from __future__ import annotations

import re
import shlex

import pytest
from commands import call

from helpers.runtime import root

PAGE = (root() / "book" / "own_problem.md").read_text(encoding="utf-8")
TINY = {  # what the page says, and what is run instead
    "iterations = traced(maml), generator(0), 300": "iterations = traced(maml), generator(0), 2",
    "iterations = 300": "iterations = 2",
    "filters=32": "filters=4",
    "tasks=200": "tasks=4",
    "family.sample(200": "family.sample(4",
    "steps=16": "steps=3",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page has been worked through; with what its Python printed and left behind."""
    folder = tmp_path_factory.mktemp("own")
    code = "\n".join(blocks("python"))
    for said, tiny in TINY.items():
        assert code.count(said) == 1, f"the page no longer says {said!r}"
        code = code.replace(said, tiny)
    printed: list[str] = []
    names = {"print": lambda *parts: printed.append(" ".join(map(str, parts)))}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "own_problem.md", "exec"), names)
    return folder, printed, names


def test_the_code_of_the_page(place):
    folder, printed, names = place
    assert re.fullmatch(
        rf"{re.escape(str(folder))}/drawings: \d+ images of 24 classes, \d+×\d+ to \d+×\d+ pixels, at least 1\d of "
        r"each, scaled to 28×28 in colour; classes: 14 for train, 5 for validation, 5 for test, drawn with seed 0; "
        r"SHA-256 [0-9a-f]{8}…",
        printed[0],
    )
    assert [line.split(":")[0] for line in printed[1:7]] == ["0 steps", "1 steps", "3 steps"] * 2
    assert [line.split()[0] for line in printed[7:]] == ["MAML", "Reptile", "iMAML"]
    assert names["own"].channels == 3 and len(names["history"]) == 2
    longest = max(len(line) for block in blocks("python") for line in block.splitlines())
    assert longest <= 76, "too wide for the page"


@pytest.mark.slow
def test_the_commands_of_the_page(place, monkeypatch, capsys):
    folder, *_ = place
    monkeypatch.chdir(folder)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    train, judge = (shlex.split(line)[1:] for line in lines)
    few = ["--set", "test_tasks=2", "--device", "cpu"]
    fewer = ["iterations=1" if word == "iterations=2000" else word for word in train]
    assert fewer != train
    status, out, err = call(capsys, *fewer, *few, "--set", "meta_batch=1", "--no-compile", "--out", "mine")
    assert status == 0, err
    assert re.search(r"maml-omniglot-5w1s_own-folder-[0-9a-f]{8}_\S*iterations-1", out)
    again = re.fullmatch(r"`metabook (.+)` measures it again", out.splitlines()[-1])[1]
    status, out, err = call(capsys, *shlex.split(again), "--device", "cpu")
    assert status == 0, err
    rows = [line.split() for line in out.splitlines() if "accuracy" in line]
    assert rows and all(row[1] == row[4] for row in rows), "measured and recorded agree"
    status, out, err = call(capsys, *judge, *few)
    assert status == 0 and "in grey and inverted" in out, err


def test_the_settings_of_the_page_exist(place):
    from helpers import experiments
    from helpers.lab import variants
    from helpers.lab.few_shot import on_folder

    folder, *_ = place
    own = on_folder(experiments.find("maml-omniglot-5w1s"), folder / "drawings")
    settings = re.findall(r"`--set ([\w.]+)=(\w+)`", PAGE)
    assert len(settings) == 6
    for name, value in settings:
        assert variants.variant(own, {name: value}) != own
