"""The command line: help, what reaches the helpers, one sentence and status 2 for each mistake, 130 for Ctrl-C."""

from __future__ import annotations

import argparse
import json
import re
import signal
from pathlib import Path

import nbformat
import pytest
import torch
from commands import call

from helpers import __version__, cli, errors, experiments
from helpers.cli import grammar
from helpers.errors import UserError
from helpers.site import builder, checks, runner

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


# ---------------------------------------- mistakes


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["fly"], "there is no command 'fly'; they are show, verdicts, evaluate, train, campaign, record, book, run,"),
        (["trian", "first"], "there is no command 'trian' (did you mean train?)"),
        (["--verbose"], "unrecognized arguments: --verbose"),
        (["run", "oen"], "there is no chapter 'oen' (did you mean one?)"),
        (["run", "07_jets"], "there is no chapter '07_jets'; the chapters are 01_one"),
        (["run", "--profile", "fast"], "there is no profile 'fast'; the profiles are quick, book, paper"),
        (
            ["run", "--set", "sede=1"],
            "chapter 01_one has no parameter 'sede' (did you mean seed?); its parameters are: profile, seed",
        ),
        (["run", "--set", "seed"], "'seed' is not a setting: write name=value"),
        (["run", "--set", "seed=[1"], "seed of chapter 01_one must be a whole number, not '[1'"),
        (["run", "--set", "seed=2020-01-01"], "seed of chapter 01_one must be a whole number"),
        (["run", "--set", "rate=!!binary x"], "rate of chapter 01_one must be a finite number"),
        (["run", "--set", "device=toaster"], "there is no device called 'toaster'"),
        (["run", "--out", "a\0b"], "is not the path of a folder"),
        (["refresh", "seven"], "there is no chapter 'seven'"),
        (["book", "--check"], "does not exist; build the book with `make book`"),
        (["book", "--check", "--committed"], "not allowed with argument"),
        (["show", "frist"], "there is no experiment 'frist' (did you mean first?); `metabook train --list` names"),
        (["verdicts", "--paper", "maml"], "there is no claims file"),
        (["evaluate", "frist"], "there is no checkpoint 'frist'"),
        (["evaluate", "first"], "first has no checkpoint: `metabook train first` makes it"),
        (["evaluate", "none.safetensors.xz"], "there is no checkpoint none.safetensors.xz"),
        (["train", "third"], "there is no experiment 'third'"),
        (["train", ""], "there is no experiment ''"),
        (["train", "--list", "first"], "--list prints all experiments: it goes alone, or with --json"),
        (["train", "--set", "hidden=3"], "--set, --seed, --out and --data-folder are for one experiment: name it"),
        (["train", "first", "--set", "hiden=3"], "first has no field 'hiden' (did you mean hidden?); `metabook show"),
        (["train", "first", "--set", "hidden=three"], "hidden of first must be a whole number, not 'three'"),
        (["train", "first", "--set", "hidden=3.0"], "hidden of first must be a whole number, not '3.0'"),
        (["train", "first", "--set", "name=mine"], "a variant is named after what was changed"),
        (["train", "first", "--seed", "-1"], "seed of first must be a whole number of at least 0"),
        (["train", "first", "--set", "iterations=0"], "iterations of first must be a whole number of at least 1"),
        (["train", "first", "--seed", "1", "--out", ""], "is not the path of a folder"),
        (["train", "first", "--budget", "soon"], "'soon' is not a duration"),
        (["train", "first", "--threads", "0"], "'0' is not a whole number of at least 1"),
        (["train", "first", "--device", "toaster"], "there is no device called 'toaster'"),
        (["train", "first", "--device", "meta"], "device 'meta' is not supported"),
        (["train", "first", "--device", "cpu", "--depth", "3"], "unrecognized arguments: --depth 3"),
        (["train", "--queue", "soon"], "there is no queue 'soon'; the queues are paper"),
        (["train", "first", "--queue", "paper"], "name an experiment or a queue, not both"),
        (["train", "--queue", "paper", "--fresh"], "--fresh starts over one experiment"),
        (["check", "everything"], "there is no tier 'everything'; the tiers are unit"),
        (["check", "record"], "there is no tier 'record' (did you mean records?)"),
        (["bench"], "bench.py is missing: run this from a complete checkout"),
        (["data", "imagenet"], "there is no data set 'imagenet'; the data sets are omniglot, mnist"),
        (["data", "omnigloth"], "there is no data set 'omnigloth' (did you mean omniglot?)"),
        (["data", "omniglot", "--jets", "20"], "--jets is a number of jets to simulate: it does not go with omniglot"),
        (["data", "jets", "--jets", "0"], "'0' is not a whole number of at least 1"),
        (["data", "jets", "--jets", "19"], "at least 20, not 19"),
        (["data", "jets"], "jets.npz is missing: restore it from the repository or make it again with `metabook data"),
        pytest.param(["train", "first", "--device", "cuda"], "device=cuda was asked for, but", marks=WITHOUT_GPU),
        pytest.param(["run", "--set", "device=cuda"], "device=cuda was asked for, but", marks=WITHOUT_GPU),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_mistake_is_one_sentence(project, capsys, words, sentence):
    status, out, err = call(capsys, *words)
    assert status == 2
    assert err.startswith("metabook: ") and err.count("\n") == 1 and sentence in err
    assert not out
    assert not list(project.rglob("*.safetensors.xz")) and not (project / "_build").exists()


def test_a_mistake_inside_a_chapter_is_one_sentence(project, capsys):
    """An N that is too large, say, is only found by the chapter itself."""
    source = (
        "import torch\nfrom helpers.tasks import FewShot\n"
        "FewShot(torch.zeros(5, 2, 8, 8, dtype=torch.uint8), ways=ways, shots=1, queries=1)"
    )
    cells = [
        nbformat.v4.new_code_cell("ways = 5", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / "notebooks" / "01_one.ipynb")
    status, _, err = call(capsys, "run", "one", "--set", "ways=20")
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("metabook: 1 of 1 chapters failed: 01_one in code cell 2")
    assert "UserError: 20-way tasks need at least 20 classes, but there are 5: choose fewer ways" in last


def test_an_unexpected_file_error_is_one_sentence(project, capsys, monkeypatch):
    def fails(*_, **__):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(runner, "run_chapters", fails)
    assert call(capsys, "run") == (2, "", "metabook: Permission denied (/somewhere)\n")


def test_ctrl_c_ends_with_130(project, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_chapters", interrupted)
    status, out, err = call(capsys, "run")
    assert (status, out) == (130, "") and err.startswith("metabook: stopped; ") and err.count("\n") == 1


# ---------------------------------------- what the words mean


@pytest.mark.parametrize(
    "text, value",
    [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), ("0", 0)],
)
def test_durations(text, value):
    assert grammar.seconds(text) == value


@pytest.mark.parametrize("text", ["", "m", "-5", "5 m", "1d", "1h-", "1e3", "nan"])
def test_bad_durations(text):
    with pytest.raises(argparse.ArgumentTypeError):
        grammar.seconds(text)


def test_run_hands_everything_on(project, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run_chapters", lambda *a, **k: calls.append((a, k)) or {"01_one": Path("there")})
    words = ["01", "--profile", "quick", "--set", "seed=3", "--set", "rate=1", "--set", "papers=maml", "--force"]
    assert call(capsys, "run", *words, "--out", "o") == (0, "there\n", "")
    values = {"seed": 3, "rate": 1.0, "papers": ["maml"]}
    assert calls == [((["01"], "quick", values, Path("o")), {"force": True})]


def test_check_hands_tiers_and_status_on(project, capsys, monkeypatch):
    monkeypatch.setattr(checks, "run", lambda names, all_records: 1 if names == ["unit", "book"] else int(all_records))
    assert call(capsys, "check", "unit", "book")[0] == 1
    assert call(capsys, "check")[0] == 0


def test_bench_runs_the_program_with_its_arguments(project, capfd):
    program = project / "benchmarks" / "bench.py"
    program.parent.mkdir()
    program.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)\n")
    assert cli.main(["bench", "--case", "mlp"]) == 3
    assert capfd.readouterr().out == "['--case', 'mlp']\n"


VERBS = cli.parser()[1].names


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(capsys, verb):
    """Each verb says what it is for, in a terminal's width, and how it is written."""
    status, out, err = call(capsys, *filter(None, [verb]), "--help")
    assert status == 0 and not err and "%%" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert f"\n  metabook {verb}" in out if verb else all(re.search(rf"^    {name}\s", out, re.M) for name in VERBS)


def test_alone_it_shows_the_help(capsys):
    assert call(capsys) == call(capsys, "--help")


def test_version(capsys):
    status, out, err = call(capsys, "--version")
    assert (status, err) == (0, "") and out.startswith(f"metabook {__version__} (commit ")


def test_letters_that_the_terminal_lacks_are_no_error(project, capsys, monkeypatch):
    import io
    import sys

    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(checks, "run", lambda *_, **__: print("θ"))
    assert cli.main(["check"]) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"?\n"


def test_book_runs_then_builds(project, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run_chapters", lambda **settings: calls.append(settings))
    monkeypatch.setattr(builder, "build", lambda notebooks: calls.append(notebooks) or project)
    monkeypatch.setattr(builder, "check_site", lambda: 9)
    assert call(capsys, "book", "--force") == (0, f"The book is at {project / 'index.html'}\n", "")
    assert calls == [{"force": True}, None]
    assert call(capsys, "book", "--committed")[0] == 0 and calls[2:] == [project / "notebooks"]
    assert call(capsys, "book", "--check") == (0, "9 pages are as they should be\n", "")


def test_refresh_hands_chapters_on(project, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "refresh", calls.append)
    assert call(capsys, "refresh", "01", "one") == (0, "", "") and calls == [["01", "one"]]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_request_to_stop_is_one_sentence(capsys, number, status):
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert errors.exit_status(signal.raise_signal, number) == status
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.startswith("metabook: stopped; what was finished is kept")


def test_train_without_a_name_lists_the_experiments(project, capsys):
    status, out, err = call(capsys, "train", "--list")
    assert (status, err) == (0, "") and call(capsys, "train") == (status, out, err)
    assert out.index("first ") < out.index("second ")


def test_the_catalogue_is_well_formed():
    """Each experiment is a JSON configuration under its own name, for a paper; the first is the most important one."""
    known = experiments.catalogue()
    assert list(known)[0] == "maml-omniglot-5w1s"
    papers = list(dict.fromkeys(experiment.paper for experiment in known.values()))
    assert papers[:6] == ["maml", "reptile", "imaml", "ml3", "nos", "jets"]
    for name, experiment in known.items():
        assert experiment.name == name == json.loads(json.dumps(experiment.config()))["name"]
        assert experiment.iterations > 0 and experiment.evaluate_every > 0 and experiment.paper
    with pytest.raises(UserError, match="there is no experiment 'x'"):
        experiments.find("x")
