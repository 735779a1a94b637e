"""Where the checkout is, one process at a time, and what interrupted writing leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from refusals import refused

from helpers import runtime
from helpers.errors import Busy

HOLD = """
import sys, time
from pathlib import Path
from helpers import runtime
with runtime.only_one(Path(sys.argv[1]), "at it"):
    print("held", flush=True)
    time.sleep(600)
"""


# ---------------------------------------- the checkout


def test_without_a_checkout_one_sentence_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("METABOOK_ROOT", raising=False)
    monkeypatch.setattr(
        runtime, "__file__", str(tmp_path / "lib" / "python3.11" / "site-packages" / "helpers" / "r.py")
    )
    (tmp_path / "lib" / "data").mkdir(parents=True)  # of somebody else
    message = refused(runtime.root)
    assert "clone the repository" in message and "METABOOK_ROOT" in message
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    assert runtime.root() == tmp_path
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path / "nowhere"))
    assert "which is no folder" in refused(runtime.root)


# ---------------------------------------- one process at a time


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_one_process_whatever_its_temporary_folder(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    others = tmp_path / "tmp"
    others.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env=os.environ | {"TMPDIR": str(others)}, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match="another process is at it at this moment"), runtime.only_one(path, "at it"):
            pytest.fail("both are at it")
    finally:
        child.kill()
        child.wait()
    with runtime.only_one(path, "at it"):  # the lock went with its process
        pass
    assert not list(tmp_path.rglob(".*")), "nothing lies about"


def test_a_lock_follows_no_link_and_empties_nothing(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".x.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(Exception, match="cannot open the lock"), runtime.only_one(tmp_path / "x", "at it"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


# ---------------------------------------- files


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        runtime.write_atomically(tmp_path / "x", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "before"


KILLED = """
import os, signal, sys
from pathlib import Path
from helpers import runtime
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
runtime.write_atomically(Path(sys.argv[1]), b"half")
"""


def test_what_a_killed_write_left_is_removed_at_the_next_start(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "x[1]")])
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x[1].")
    others = [".x[1].lock", ".y.abcdefgh", "x[1]", ".x[1].abcdefgh.xz"]
    for name in others:
        (tmp_path / name).write_text("")
    with runtime.only_one(tmp_path / "x[1]", "at it"):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_setting_aside_loses_nothing(tmp_path):
    path = tmp_path / "x"
    assert runtime.set_aside(path) is None
    for content in "abc":
        path.write_text(content)
        runtime.set_aside(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.old": "a", "x.old1": "b", "x.old2": "c"}
