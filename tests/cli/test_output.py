"""What a terminal, a log and a shell get to see: progress bars, completion, numbers for TensorBoard."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import types

import pytest
from commands import call, train

from helpers import cli, experiments, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ---------------------------------------- progress
@pytest.mark.parametrize(
    "stream, no_color, every, seen",
    [
        (Terminal, "", 20.0, "\r"),
        (Terminal, "1", 20.0, ""),
        (io.StringIO, "", 20.0, ""),
        (io.StringIO, "1", 20.0, ""),
        (Terminal, "1", 0.0, "\n"),
        (io.StringIO, "", 0.0, "\n"),
    ],
)
def test_bars_are_redrawn_in_a_terminal_alone(project, monkeypatch, stream, no_color, every, seen):
    """Elsewhere a long run writes a line now and then, and a short one nothing."""
    written = stream()
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(progress, "EVERY", every)
    monkeypatch.setattr(sys, "stderr", written)
    assert cli.main(["train", "first", "--device", "cpu", "--no-compile", "--budget", "0"]) == 0
    text = written.getvalue()
    assert seen in text if seen else not text
    assert seen == "\r" or not set("\r\x1b") & set(text)
    if seen == "\n":
        assert all(line.startswith("first: ") for line in text.splitlines())


# ---------------------------------------- completion
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_options_and_names(project, capsys, tmp_path, shell):
    status, out, err = call(capsys, "completion", shell)
    assert (status, err) == (0, "")
    words = [
        *cli.parser()[1].names,
        *experiments.catalogue(),
        "--tensorboard",
        "01_one",
        "quick",
        "omniglot",
        "records",
    ]
    assert not [word for word in words if word not in out]
    if program := shutil.which(shell):
        script = tmp_path / "script"
        script.write_text(out)
        assert subprocess.run([program, "-n", str(script)]).returncode == 0


def test_bash_completes_the_name_of_an_experiment(project, capsys):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    script = call(capsys, "completion", "bash")[1]
    ask = "COMP_WORDS=(metabook train fi); COMP_CWORD=2; _shtab_metabook; echo ${COMPREPLY[@]}"
    ran = subprocess.run([bash, "--norc", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert ran.stdout.split() == ["first"], ran.stderr


def test_completion_without_its_package_is_one_sentence(project, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, out, err = call(capsys, "completion", "bash")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "`pip install shtab`" in err


# ---------------------------------------- TensorBoard
class Writer:
    """Stands for TensorBoard's; ``seen`` has what all of them were told."""

    seen: list[tuple] = []

    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, name, value, iteration):
        self.seen.append((self.folder, name, value, iteration))

    def close(self):
        self.seen.append((self.folder, "closed"))


def test_tensorboard_gets_losses_and_points(project, capsys, monkeypatch):
    import dataclasses

    monkeypatch.setattr(Writer, "seen", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    known = experiments.catalogue()
    known["first"] = dataclasses.replace(known["first"], iterations=100, evaluate_every=50)
    status, out, err = train(capsys, "first", "--tensorboard", str(project / "board"))
    assert (status, err) == (0, "") and out.startswith("first: 100 iterations; ")
    folder = str(project / "board" / "first")
    points = [(name, iteration) for of, name, _, iteration in Writer.seen[:-1] if of == folder]
    measured = ["mse_0", "mse_1"]
    assert points == [*((n, 50) for n in measured), ("loss", 100), *((n, 100) for n in measured)]
    assert Writer.seen[-1] == (folder, "closed")
    assert all(isinstance(value, float) and value > 0 for *_, value, _ in Writer.seen[:-1])


def test_tensorboard_without_its_package_is_one_sentence(project, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, out, err = train(capsys, "first", "--tensorboard", str(project / "board"))
    assert (status, out) == (2, "") and err.count("\n") == 1 and "`pip install tensorboard`" in err
    assert not (project / "board").exists() and not (project / "data").exists()


def test_tensorboard_is_for_what_is_trained(project, capsys):
    assert "name an experiment or a queue" in train(capsys, "--tensorboard", "board")[2]
