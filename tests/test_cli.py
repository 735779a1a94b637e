"""The command line: what reaches the helpers, one sentence and status 2 for each mistake, 130 for Ctrl-C."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import tiny
import torch
import toy_jets

from helpers import cli, experiments, runtime
from helpers.errors import UserError
from helpers.lab import checkpoints, training
from helpers.site import checks, runner

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with one chapter and two tiny experiments."""
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell("profile = 'book'\nseed = 0\ndevice = 'cpu'", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / "01_one.ipynb")
    known = {name: tiny.Tiny(name=name, iterations=60) for name in ("first", "second")}
    monkeypatch.setattr(experiments, "catalogue", lambda: known)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def call(capsys, *words: str) -> tuple[int, str, str]:
    """Run a command; returns exit status, standard output and standard error."""
    try:
        status = cli.main(list(words))
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def train(capsys, *words: str) -> tuple[int, str, str]:
    return call(capsys, "train", "--device", "cpu", "--no-compile", *words)


# ---------------------------------------- mistakes


@pytest.mark.parametrize(
    "words, sentence",
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run", "07_jets"], "there is no chapter '07_jets'; the chapters are 01_one"),
        (["run", "--profile", "fast"], "there is no profile 'fast'; the profiles are quick, book, paper"),
        (
            ["run", "--parameters", "sede=1"],
            "chapter 01_one has no parameter 'sede'; its parameters are: profile, seed",
        ),
        (["run", "--parameters", "seed"], "'seed' is not a parameter: write name=value"),
        (["run", "-p", "seed=[1"], "cannot be read"),
        (["run", "-p", "device=toaster"], "there is no device called 'toaster'"),
        (["train", "third"], "there is no experiment 'third'; known: first, second"),
        (["train", "first", "--budget", "soon"], "'soon' is not a duration"),
        (["train", "first", "--threads", "0"], "'0' is not a whole number of at least 1"),
        (["train", "first", "--device", "toaster"], "there is no device called 'toaster'"),
        (["train", "first", "--device", "meta"], "device 'meta' is not supported"),
        (["train", "first", "--device", "cpu", "--depth", "3"], "unrecognized arguments: --depth 3"),
        (["train", "--queue", "later"], "there is no queue 'later'; known: paper"),
        (["train", "first", "--queue", "paper"], "name an experiment or a queue, not both"),
        (["train", "--queue", "paper", "--fresh"], "--fresh starts over one experiment"),
        (["check", "everything"], "there is no tier 'everything'; the tiers are unit"),
        (["bench"], "bench.py is missing: run this from a complete checkout"),
        (["data", "imagenet"], "invalid choice: 'imagenet'"),
        (["data", "omniglot", "--jets", "20"], "--jets is a number of jets to simulate: it does not go with omniglot"),
        (["data", "jets", "--jets", "0"], "'0' is not a whole number of at least 1"),
        (["data", "jets", "--jets", "19"], "at least 20, not 19"),
        (["data", "jets"], "jets.npz is missing: restore it from the repository or make it again with `metabook data"),
        pytest.param(["train", "first", "--device", "cuda"], "device=cuda was asked for, but", marks=WITHOUT_GPU),
        pytest.param(["run", "-p", "device=cuda"], "device=cuda was asked for, but", marks=WITHOUT_GPU),
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
    status, _, err = call(capsys, "run", "one", "--parameters", "ways=20")
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("metabook: 1 of 1 chapters failed: 01_one in code cell 2")
    assert "UserError: 20-way tasks need at least 20 classes, but there are 5: choose fewer ways" in last


def test_no_image_data(project, capsys, monkeypatch):
    from helpers.tasks import omniglot

    def offline():
        raise UserError("no network")

    monkeypatch.delenv("METABOOK_DATA", raising=False)
    monkeypatch.setattr(omniglot, "fetch", offline)
    status, _, err = call(capsys, "data", "omniglot")
    assert status == 2 and err.count("\n") == 1
    assert f"are not in {project / 'data' / 'raw'}" in err and "metabook data omniglot" in err


def test_an_unexpected_file_error_is_one_sentence(project, capsys, monkeypatch):
    def fails(*_, **__):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(runner, "run_chapters", fails)
    assert call(capsys, "run") == (2, "", "metabook: Permission denied (/somewhere)\n")


# ---------------------------------------- what the words mean


@pytest.mark.parametrize(
    "text, value",
    [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), ("0", 0)],
)
def test_durations(text, value):
    assert cli.seconds(text) == value


@pytest.mark.parametrize("text", ["", "m", "-5", "5 m", "1d", "1h-", "1e3", "nan"])
def test_bad_durations(text):
    with pytest.raises(cli.argparse.ArgumentTypeError):
        cli.seconds(text)


def test_run_hands_everything_on(project, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run_chapters", lambda *a, **k: calls.append((a, k)) or {"01_one": Path("there")})
    words = ["01", "--profile", "quick", "--parameters", "seed=3", "rate=0.1", "-p", "name=x", "flag=true", "--force"]
    assert call(capsys, "run", *words, "--out", "o") == (0, "there\n", "")
    values = {"seed": 3, "rate": 0.1, "name": "x", "flag": True}
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


def test_data_prints_counts_and_digests(project, capsys, monkeypatch):
    from helpers.tasks import glyphs
    from helpers.tasks.images import ImageClasses

    def load(split):
        images = torch.zeros(3, 20, 28, 28, dtype=torch.uint8)
        return ImageClasses(images, ["a", "b", "c"], ["x", "x", "y"], {"data": "glyphs", "images_sha256": split * 2})

    monkeypatch.setattr(glyphs, "load", load)
    status, out, _ = call(capsys, "data", "glyphs")
    assert status == 0
    assert out.splitlines() == [
        "glyphs train: 3 classes × 20 images of 28×28 pixels, 2 groups", "  images_sha256 traintrain",
        "glyphs test: 3 classes × 20 images of 28×28 pixels, 2 groups", "  images_sha256 testtest",
    ]  # fmt: skip


def test_data_prints_the_counts_of_labelled_images(project, capsys, monkeypatch):
    from helpers.tasks import cifar10

    def load(split):
        images, labels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
        return cifar10.Labelled(images, labels, {"data": "cifar10", "split": split, "sha256": split * 2})

    monkeypatch.setattr(cifar10, "load", load)
    monkeypatch.setattr(cifar10, "find", lambda: Path("there"))
    assert call(capsys, "data", "cifar10")[1].splitlines() == [
        "image files: there",
        "cifar10 train: 10 classes × 2 images of 32×32 pixels in colour", "  sha256 traintrain",
        "cifar10 test: 10 classes × 2 images of 32×32 pixels in colour", "  sha256 testtest",
    ]  # fmt: skip


@pytest.fixture
def jet_file(project):
    """A few jets, where the shipped file would be."""
    from helpers.tasks import jets

    (project / "data").mkdir(exist_ok=True)
    jets.home().write_bytes(jets.pack(toy_jets.arrays(), {"samples": []}))
    return jets.load().header["sha256"]


JETS = [
    f"jets {split}: {process} with {shower}, 40 + 40 + 40 + 40 + 40 jets"
    for process, shower, split in (
        ("W", "fsr-half", "train"), ("QCD", "fsr-half", "train"), ("W", "fsr-one", "train"),
        ("QCD", "fsr-one", "train"), ("W", "monash", "test"), ("QCD", "monash", "test"),
    )
]  # fmt: skip


def test_data_prints_the_counts_of_jets(jet_file, capsys, monkeypatch):
    from helpers.tasks.jets import simulation

    monkeypatch.setattr(simulation, "generate", lambda *_: pytest.fail("nothing is to be simulated"))
    status, out, err = call(capsys, "data", "jets")
    assert (status, err) == (0, "") and out.splitlines() == [*JETS, f"  sha256 {jet_file}"]


def test_jets_are_simulated_where_a_number_is_given(jet_file, capsys, monkeypatch):
    from helpers.tasks.jets import simulation

    asked = []
    monkeypatch.setattr(simulation, "generate", asked.append)
    assert call(capsys, "data", "jets", "--jets", "40")[1].splitlines() == [*JETS, f"  sha256 {jet_file}"]
    assert asked == [40]


def test_without_pythia_one_sentence_says_what_to_install(jet_file, capsys, monkeypatch):
    from helpers.tasks import jets
    from helpers.tasks.jets import simulation

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(simulation, "import_module", missing)
    before = jets.home().read_bytes()
    status, out, err = call(capsys, "data", "jets", "--jets", "20")
    assert (status, out) == (2, "") and err.startswith("metabook: ") and err.count("\n") == 1
    assert "needs Pythia 8 and FastJet: `pip install pythia8mc==8.317.2 fastjet awkward`" in err
    assert jets.home().read_bytes() == before


@pytest.mark.parametrize(
    ("name", "module", "file"), [("mnist", "digits", "train-images"), ("cifar10", "cifar10", "data_batch_1.bin")]
)
def test_files_are_found_or_one_sentence_says_where_they_were_looked_for(
    project, capsys, monkeypatch, name, module, file
):
    library = importlib.import_module(f"helpers.tasks.{module}")

    def no_network():
        raise UserError(f"{name} could not be downloaded")

    monkeypatch.delenv("METABOOK_DATA", raising=False)
    monkeypatch.setattr(library, "fetch", no_network)
    status, out, err = call(capsys, "data", name)
    assert status == 2 and "none here" in out
    assert len(err.splitlines()) == 1 and file in err and "METABOOK_DATA" in err


@pytest.mark.parametrize("words", [[], ["run"], ["train"], ["check"], ["bench"], ["data"]])
def test_help(capsys, words):
    status, out, err = call(capsys, *words, "--help")
    assert status == 0 and not err
    assert max(map(len, out.splitlines())) <= 100
    if not words:
        assert all(f"    {name} " in out for name in ("run", "train", "check", "bench", "data"))


def test_list_prints_names_only(project, capsys):
    """Scripts read it line by line."""
    assert call(capsys, "train", "--list") == call(capsys, "train") == (0, "first\nsecond\n", "")


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


# ---------------------------------------- training


def test_training_in_slices(project, capsys):
    status, out, _ = train(capsys, "first", "--budget", "0")
    assert status == 0 and out.startswith("first: 1 of 60 iterations; mse_0 ")
    status, out, _ = train(capsys, "first", "--threads", "1")
    assert status == 0 and out.startswith("first: 60 iterations;")
    record = json.loads((project / "data" / "records" / "first.json").read_text())
    assert [s["begin"] for s in record["provenance"]["slices"]] == [0, 1]
    status, out, _ = train(capsys, "first", "--fresh", "--budget", "0")
    assert status == 0 and "1 of 60" in out


def test_queue_goes_by_priority_until_the_time_is_spent(project, capsys):
    status, out, _ = train(capsys, "--queue", "paper")
    assert status == 0
    assert [line.split(";")[0] for line in out.splitlines()] == ["first: 60 iterations", "second: 60 iterations"]
    status, out, _ = train(capsys, "--queue", "paper")
    assert (status, out) == (0, "first: complete, nothing to do\nsecond: complete, nothing to do\n")

    (project / "data" / "checkpoints" / "second.safetensors.xz").unlink()
    (project / "data" / "records" / "second.json").unlink()
    status, out, _ = train(capsys, "--queue", "paper", "--budget", "0.01s")
    assert status == 0
    assert "first: complete" in out and re.search(r"second: \d+ of 60|the time is spent; second is next", out)


def test_queue_hands_on_the_time_that_is_left(project, capsys, monkeypatch):
    budgets = []

    def slow(experiment, budget, **_):
        budgets.append(budget)
        time.sleep(0.3)

    monkeypatch.setattr(training, "train", slow)
    _, out, _ = train(capsys, "--queue", "paper", "--budget", "10")
    assert 9.9 < budgets[0] <= 10 and 9 < budgets[1] <= 9.7
    budgets.clear()
    status, out, _ = train(capsys, "--queue", "paper", "--budget", "0.2s")
    assert status == 0 and len(budgets) == 1 and "the time is spent; second is next" in out


def test_queue_is_not_stopped_by_one_bad_experiment(project, capsys):
    folder = project / "data" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "first.safetensors.xz").write_bytes(b"broken")
    status, out, err = train(capsys, "--queue", "paper")
    assert status == 2
    assert "metabook: the checkpoint" in err and "is damaged" in err
    assert "second: 60 iterations" in out
    assert (folder / "first.safetensors.xz").read_bytes() == b"broken"


def test_queue_goes_on_after_any_error_and_says_so_at_the_end(project, capsys, monkeypatch):
    right = training.train

    def full(experiment, **settings):
        if experiment.name == "first":
            raise RuntimeError("out of memory")
        return right(experiment, **settings)

    monkeypatch.setattr(training, "train", full)
    status, out, err = train(capsys, "--queue", "paper")
    assert status == 2 and "second: 60 iterations" in out
    assert "first failed (RuntimeError: out of memory)" in err
    assert err.splitlines()[-1] == "metabook: not trained: first; the messages above say why"


def test_queue_passes_over_what_was_given_up(project, capsys, monkeypatch):
    monkeypatch.setattr(checkpoints, "given_up", lambda experiment: experiment.name == "first")
    status, out, _ = train(capsys, "--queue", "paper")
    assert status == 0 and out.startswith("first: given up;") and "second: 60 iterations" in out


def test_a_complete_record_of_another_configuration_is_not_complete(project, capsys):
    train(capsys, "--queue", "paper")
    experiments.catalogue()["first"] = tiny.Tiny(name="first", iterations=61)
    status, _, err = train(capsys, "--queue", "paper")
    assert status == 2 and "another configuration (it differs in iterations)" in err


def test_ctrl_c_ends_with_130(project, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_chapters", interrupted)
    status, out, err = call(capsys, "run")
    assert (status, out) == (130, "") and err.startswith("metabook: stopped; ") and err.count("\n") == 1


RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch, tiny
from helpers import cli, experiments
torch.set_num_threads(1)
experiments.catalogue = lambda: {{"tiny": tiny.Tiny(pause={pause})}}
sys.exit(cli.main(["train", "tiny", "--device", "cpu", "--no-compile", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_a_record_and_goes_on_bit_for_bit(tmp_path, number):
    """A signal from outside, as Ctrl-C in a terminal or a machine that is shut down sends it."""
    environment = {**os.environ, "METABOOK_ROOT": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    code = RUN.format(tests=str(Path(tiny.__file__).parent), pause=0.02)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        seen = ""
        while not re.search(r" [1-9]\d*/240 \[", seen):  # the progress bar moves: it trains
            assert process.poll() is None, seen
            seen = (seen + process.stderr.read(1))[-200:]
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "metabook: stopped; what was finished is kept, run the same command to go on"
    record = json.loads((tmp_path / "data" / "records" / "tiny.json").read_text())
    assert record["status"] == "partial" and 0 < record["iterations"]["done"] < 240
    assert f"tiny: {record['iterations']['done']} of 240 iterations" in out
    tiny.train(tmp_path / "data")
    tiny.train(tmp_path / "whole")
    tiny.assert_same(tmp_path / "data", tmp_path / "whole")


def test_devices():
    assert runtime.pick_device("cpu") == torch.device("cpu")
    assert runtime.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
