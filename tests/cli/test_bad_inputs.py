"""Bad files, folders, environments and words: one sentence, status 2, and what was there stays as it was.

Nothing here trains: a run that takes what it should refuse is seen by what it then writes.
"""

from __future__ import annotations

import copy
import io
import json
import lzma
import tarfile
from pathlib import Path

import nbformat
import pytest
import safetensors.torch
import tiny
import torch
import yaml
from commands import call, train

from helpers import campaign, runtime
from helpers.lab import checkpoints, variants

DEEP = 20_000  # nested lists


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(project: Path, capsys, *words: str, command=call) -> str:
    """The one sentence on standard error; nothing is printed, written or removed."""
    before = files(project)
    status, out, err = command(capsys, *words)
    assert status == 2 and not out, (status, out, err)
    assert err.startswith("metabook: ") and err.count("\n") == 1 and len(err) < 1000, err
    assert files(project) == before
    return err


def changed(content, path: str, value):
    """A copy with one entry replaced, or removed where ``value`` is ``...``; an empty path is the whole."""
    if not path:
        return value
    content = copy.deepcopy(content)
    *way, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    place = content
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


# ---------------------------------------- words
@pytest.mark.parametrize(
    "words, sentence",
    [
        (["train", "first", "--budget", "9" * 400], "is not a duration"),
        (["train", "first", "--set", "seed=1", "--set", "seed=2"], "seed is set twice"),
        (["train", "first", "--set", "seed=1", "--seed", "2"], "seed is set twice"),
        (["run", "one", "--set", "seed=1", "--set", "seed=2"], "seed is set twice"),
        (["train", "first", "--set", "=1"], "'=1' is not a setting"),
        (["train", "first", "--set", "seed="], "seed of first must be a whole number"),
        (["train", "first", "--set", "seed=" + "9" * 30], "seed must be a whole number of at least 0 and at most"),
        (["train", "first", "--set", "seed=" + "9" * 5000], "seed of first must be a whole number"),
        (["train", "first", "--set", "outer_rate=nan"], "outer_rate of first must be a finite number"),
        (["train", "first", "--set", "outer_rate=1e400"], "outer_rate of first must be a finite number"),
        (["train", "first", "--set", "hidden=" + "[" * 3000], "hidden of first must be a whole number"),
        (["train", "first", "--set", "hidden.epochs=3"], "hidden of first is 8 and has no field 'epochs'"),
        (["train", "first", "--threads", "99999"], "is not a whole number"),
        (["train", "first\n"], "there is no experiment"),
        (["train", "x" * 300], "there is no experiment"),
        (["train", "first", "--seed", "1", "--out", "notebooks/01_one.ipynb"], "is a file: name a folder"),
        (["evaluate", ""], "there is no checkpoint ''"),
        (["evaluate", "a\0b"], "there is no checkpoint"),
        (["evaluate", "a\0b.safetensors.xz"], "is damaged or not of this book"),
        (["evaluate", "x" * 300], "xxx"),
        (["show", ""], "there is no experiment ''"),
        (["show", "../first"], "there is no experiment '../first'"),
        (["verdicts", "--paper", ""], "there is no claims file"),
        (["verdicts", "--paper", "../../elsewhere"], "there is no claims file"),
        (["verdicts", "--paper", "a\0b"], "cannot be read (embedded null byte)"),
        (["verdicts", "--paper", "x" * 300], "xxx"),
        (["run", ""], "there is no chapter ''"),
        (["run", "one", "--profile", ""], "there is no profile ''"),
        (["run", "one", "--set", "rate=inf"], "rate of chapter 01_one must be a finite number"),
        (["campaign", "--minutes", "nan", "--out", "o"], "is not a number of minutes"),
        (["campaign", "--minutes", "inf", "--out", "o"], "is not a number of minutes"),
        (["campaign", "--minutes", "-5", "--out", "o"], "is not a number of minutes"),
        (["campaign", "--minutes", "soon", "--out", "o"], "is not a number of minutes"),
        (["campaign", "--minutes", "1"], "a campaign needs --minutes and --out"),
        (["campaign", "frist", "--minutes", "1", "--out", "o"], "there is no experiment 'frist'"),
        (["campaign", "--minutes", "1", "--out", "notebooks/01_one.ipynb"], "is a file: name a folder"),
        (["campaign", "--merge", "nowhere"], "there are no files campaign-*.tar in nowhere"),
        (["campaign", "--merge", "notebooks/01_one.ipynb"], "is a file: name a folder"),
        (
            ["campaign", "first", "--minutes", "1", "--device", "cpu", "--out", "data"],
            "for the recorded experiments alone",
        ),
        (["run", "one", "--out", "notebooks/01_one.ipynb"], "is a file: name a folder"),
        (["train", "first", "--bud", "0"], "unrecognized arguments: --bud 0"),
        (["train", "first", "--device", ""], "there is no device called ''"),
        (["train", "first", "--budget", "-0"], "is not a duration"),
        (["train", "first", "--seed", "True"], "seed of first must be a whole number"),
        (["train", "first", "--set", "hidden=0"], "hidden of first must be a whole number of at least 1"),
        (
            ["train", "first", "--set", "hidden=9999999999999"],
            "first_hidden-9999999999999 does not run with these values",
        ),
        (["train", "first", "--set", "paper=\udcff"], "paper of first holds a character that cannot be printed"),
        (["train", "first", "--set", "paper=a\0b"], "paper of first holds a character that cannot be printed"),
        (["train", "first", "--seed", "1", "--out", "data/../data"], "is for the recorded experiments alone"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        ([""], "there is no command ''"),
        (["Train"], "there is no command 'Train' (did you mean train?)"),
        (["train", "FIRST"], "there is no experiment 'FIRST' (did you mean first?)"),
        (["train", "first_seed-3"], "first_seed-3 names a variant: train first with what it is named after"),
        (["train", "--budget", "3s"], "--budget is for what is trained: name an experiment or a queue"),
        (["train", "--fresh"], "--fresh is for what is trained: name an experiment or a queue"),
        (["train", "--list", "--device", "cpu"], "--device is for what is trained: name an experiment or a queue"),
        (["train", "--list", "--no-compile"], "--[no-]compile is for what is trained: name an experiment or a queue"),
        (["train", "--threads", "2"], "--threads is for what is trained: name an experiment or a queue"),
        (["train", "first", "--json"], "--json goes with --list"),
        (["train", "first", "--list", "--json"], "--list prints all experiments: it goes alone, or with --json"),
        (["train", "--queue", "paper", "--json"], "--json goes with --list"),
        (["train", "first", "--budget", "-5m"], "--budget: needs a value after it, or after = one that begins with -"),
        (["train", "first", "--budget=-5m"], "'-5m' is not a duration"),
        (["train", "first", "--budget", "5d"], "'5d' is not a duration"),
        (["train", "first", "--seed"], "--seed: needs a value after it"),
        (["train", "first", "--seed=-1"], "the seed of first must be a whole number of at least 0"),
        (["train", "first", "--set", "SEED=1"], "first has no field 'SEED' (did you mean seed?)"),
        (["train", "first", "--set", "seed", "=", "1"], "'seed' is not a setting: write name=value, without spaces"),
        (["train", "first", "--set", "seed = 1"], "'seed = 1' is not a setting: write name=value, without spaces"),
        (["train", "first", "--set", "seed==1"], "seed of first must be a whole number, not '=1'"),
        (["train", "first", "--set", "iterations=1e2"], "iterations of first must be a whole number, not '1e2'"),
        (["train", "first", "--set", "outer_rate=1/0"], "outer_rate of first must be a finite number, not '1/0'"),
        (["train", "first", "--set", "outer_rate=none"], "outer_rate of first must be a finite number, not 'none'"),
        (["train", "first", "--set", "made_of=x"], "first has no field 'made_of'"),
        (["train", "first", "--set", "__class__=1"], "first has no field '__class__'"),
        (["train", "first", "--set", "hidden=8"], "first has these values already: leave them out, or set others"),
        (["train", "first", "--seed", "0"], "first has these values already: leave them out, or set others"),
        (["train", "first", "--out", "/proc/x"], "cannot write into /proc/x/checkpoints"),
        (["evaluate", "first", "--out", "nowhere"], "there is no folder nowhere: name that of --out"),
        (["evaluate", "first", "--out", "notebooks"], "there is no checkpoint 'first' in notebooks; it holds none"),
        (["evaluate", "first", "--out", ""], "'' is not the path of a folder"),
        (["evaluate", "../first"], "there is no checkpoint '../first' (did you mean first?)"),
        (["evaluate", "x.safetensors.xz", "--out", "notebooks"], "leave it out with the file x.safetensors.xz"),
        (["evaluate", "x.safetensors.xz"], "there is no checkpoint x.safetensors.xz"),
        (["evaluate", "notebooks"], "there is no checkpoint 'notebooks'"),
        (["evaluate", "first", "--seed", "3"], "unrecognized arguments: --seed 3"),
        (["show", "first", "--out", "nowhere"], "there is no folder nowhere: name that of --out"),
        (["show", "first_seed-3"], "there is no checkpoint 'first_seed-3'; name a file"),
        (["show", "first_"], "there is no checkpoint 'first_' (did you mean first?)"),
        (["show", "x.safetensors.xz"], "there is no checkpoint x.safetensors.xz"),
        (["show", "first", "second"], "unrecognized arguments: second"),
        (["campaign", "--merge", "notebooks", "--jobs", "2"], "--merge takes a folder and nothing else"),
        (["campaign", "--merge", "notebooks", "--device", "cpu"], "--merge takes a folder and nothing else"),
        (["campaign", "--merge", "notebooks", "--minutes", "2"], "--merge takes a folder and nothing else"),
        (["campaign", "--minutes", "1", "--out", "o", "--jobs", "two"], "'two' is not a whole number of at least 1"),
        (["run", "one", "--set", "profile=quick"], "the profile is chosen by --profile quick, book or paper"),
        (["run", "one", "--set", "rate="], "rate of chapter 01_one must be a finite number, not ''"),
        (["run", "One", "--set", "seed=x"], "One"),
        (["data", "Omniglot"], "there is no data set 'Omniglot' (did you mean omniglot"),
        (["data", "jets", "--jets", "1e3"], "'1e3' is not a whole number of at least 1"),
        (["data", "omniglot", "mnist"], "unrecognized arguments: mnist"),
        (["check", "unit", "books"], "there is no tier 'books' (did you mean book?)"),
        (["@first"], "there is no command '@first'"),
        (["data", ""], "there is no data set ''"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_words(project, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(project)
    monkeypatch.setattr(runtime, "can_compile", lambda: False)
    assert sentence in refused(project, capsys, *words)


# ---------------------------------------- claims
CLAIM = {
    "id": "a", "quantity": "error", "where": "Table 1", "experiment": "first", "metric": "mse_0",
    "value": 0.5, "ci95": 0.1, "better": "lower", "note": "words",
    "direction": [{"left": "first/mse_0", "right": "second/mse_0", "within": 0.1, "label": "words"}],
}  # fmt: skip
CLAIMS = {"paper": "maml", "title": "MAML", "citation": "finn2017maml", "claims": [CLAIM]}


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_good_claims_are_taken(project, capsys):
    write(project / "data/claims/maml.yaml", yaml.safe_dump(CLAIMS))
    status, out, _ = call(capsys, "verdicts")
    assert status == 0 and out.splitlines()[0] == "maml/a  not run  error"


@pytest.mark.parametrize(
    "path, value",
    [
        ("", None), ("", []), ("", "claims"), ("claims", None), ("claims", 3), ("claims", "ab"), ("claims", [None]),
        ("claims", [[]]), ("paper", ...), ("paper", "reptile"), ("paper", 3), ("claims/0/id", ...), ("claims/0/id", 3),
        ("claims/0/quantity", 3), ("claims/0/quantity", None), ("claims/0/where", ["Table"]),
        ("claims/0/experiment", None), ("claims/0/metric", 1.5), ("claims/0/value", "0.5"), ("claims/0/value", [0.5]),
        ("claims/0/value", True), ("claims/0/value", float("nan")), ("claims/0/value", float("inf")),
        ("claims/0/value", 10**400), ("claims/0/ci95", "0.1"), ("claims/0/ci95", -5),
        ("claims/0/better", "sideways"), ("claims/0/better", "Lower"), ("claims/0/better", None),
        ("claims/0/direction", "up"), ("claims/0/direction", None), ("claims/0/direction", ["up"]),
        ("claims/0/direction", {"left": "a/b"}), ("claims/0/direction/0/left", ...), ("claims/0/direction/0/left", 3),
        ("claims/0/direction/0/right", ...), ("claims/0/direction/0/right", None),
        ("claims/0/direction/0/right", float("nan")), ("claims/0/direction/0/right", "first"),
        ("claims/0/direction/0/within", "near"), ("claims/0/direction/0/within", 0),
        ("claims/0/direction/0/label", 3), ("claims/0/direction/0/more", 3), ("claims/0/note", 3),
        ("claims/0/note", None), ("claims/0/quantity", " \n"), ("claims/0/quantity", "\x1b[31mred"),
        ("claims/0/quantity", "<script>alert(1)</script>"), ("claims/0/note", "<img onerror=x>"),
        ("claims/0/from_memory", "yes"), ("claims/0/verdict", "reproduced"),
        ("claims/0", {key: value for key, value in CLAIM.items() if key not in ("value", "ci95", "direction")}),
        ("claims", [CLAIM, CLAIM]),
    ],
    ids=str,
)  # fmt: skip
def test_claims_of_another_shape(project, capsys, path, value):
    write(project / "data/claims/maml.yaml", yaml.safe_dump(changed(CLAIMS, path, value)))
    assert "mend it after data/schemas/claims.schema.json" in refused(project, capsys, "verdicts")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\x00", b"\xff\xfe\xff", b"claims: [", b"[" * 1100, b"paper: !!python/object:os.system x",
        b"claims: *none",
        yaml.safe_dump(CLAIMS).replace("  value: 0.5", "  value: 0.5\n  value: 0.1").encode(),
        b"a: &a [x, x, x, x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (name, name, b", ".join([b"*%c" % (name - 1)] * 9)) for name in range(98, 110)
        ) + b"paper: maml\nclaims: *m\n",
    ],
    ids=["empty", "nul", "no-utf8", "cut", "deep", "code", "no-anchor", "twice", "laughs"],
)  # fmt: skip
def test_claims_that_cannot_be_read(project, capsys, text):
    write(project / "data/claims/maml.yaml", text)
    assert "mend it after data/schemas/claims.schema.json" in refused(project, capsys, "verdicts")


def test_two_papers_may_not_share_the_name_of_a_claim(project, capsys):
    write(project / "data/claims/maml.yaml", yaml.safe_dump(CLAIMS))
    (project / "data" / "claims" / "other.yaml").write_text(yaml.safe_dump(CLAIMS | {"paper": "other"}))
    assert "'a'" in refused(project, capsys, "verdicts")


# ---------------------------------------- records
METRIC = {"value": 0.5, "ci95": 0.1, "n": 20}
RECORD = {
    "experiment": "first", "paper": "maml", "status": "partial", "iterations": {"done": 1, "planned": 60},
    "metrics": {"mse_0": METRIC}, "config": {"name": "first"},
    "curve": [{"iteration": 1, "metrics": {"mse_0": METRIC}}],
    "losses": {"every": 100, "values": [0.5]}, "provenance": {"slices": []},
}  # fmt: skip


def test_a_good_record_is_taken(project, capsys):
    write(project / "data/records/first.json", json.dumps(RECORD))
    assert "recorded: 1 of 60 iterations" in call(capsys, "show", "first")[1]


@pytest.mark.parametrize(
    "path, value",
    [
        ("", None), ("", 3), ("", []), ("experiment", "second"), ("experiment", ["first"]), ("paper", ["maml"]),
        ("paper", ...), ("status", "great"), ("status", None), ("iterations", [1, 60]), ("iterations/done", "1"),
        ("iterations/done", -1), ("iterations/done", True), ("iterations/done", 1.5), ("iterations/done", 61),
        ("iterations/planned", 0), ("iterations/planned", None), ("metrics", []), ("metrics", {}),
        ("status", "complete"), ("config/name", "second"), ("metrics", {"mse_0": 0.5}),
        ("metrics/mse_0/value", "0.5"), ("metrics/mse_0/value", None), ("metrics/mse_0/value", [0.5]),
        ("metrics/mse_0/value", True), ("metrics/mse_0/value", float("nan")), ("metrics/mse_0/value", float("inf")),
        ("metrics/mse_0/value", 10**400), ("metrics/mse_0/ci95", "0.1"), ("metrics/mse_0/ci95", -100),
        ("metrics/mse_0/ci95", ...), ("metrics/mse_0/n", 0), ("metrics/mse_0/n", 1.5), ("config", None),
        ("config", "first"), ("curve", {}), ("curve", [3]), ("curve", [{"iteration": 1}]),
        ("curve/0/metrics/mse_0/value", "low"), ("losses", [0.5]), ("losses/every", 0), ("losses/values", "low"),
        ("losses/values", ["low"]), ("provenance", []),
    ],
    ids=str,
)  # fmt: skip
def test_a_record_of_another_shape(project, capsys, path, value):
    write(project / "data/records/first.json", json.dumps(changed(RECORD, path, value)))
    for words in (["show", "first"], ["verdicts"]):
        assert "restore it from version control" in refused(project, capsys, *words)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\x00", b"\xff\xfe\xff", b"{", b"[" * DEEP, b"9" * 5000,
        json.dumps(RECORD).replace('"paper"', '"paper": "imaml", "paper"').encode(),
        json.dumps(RECORD).replace("0.5", "1e999").encode(), b"\xef\xbb\xbf" + json.dumps(RECORD).encode(),
    ],
    ids=["empty", "nul", "no-utf8", "cut", "deep", "long-number", "twice", "overflow", "mark"],
)  # fmt: skip
def test_a_record_that_cannot_be_read(project, capsys, text):
    write(project / "data/records/first.json", text)
    assert "restore it from version control" in refused(project, capsys, "show", "first")


# ---------------------------------------- checkpoints
@pytest.fixture
def checkpoint(project):
    """The file of a run of one iteration."""
    path, experiment = project / "data" / "checkpoints" / "first.safetensors.xz", tiny.Tiny(name="first", iterations=60)
    generator = runtime.generator(0)
    theta = experiment.setup("cpu", False).init(generator)
    state = checkpoints.State(theta, 1e-3, generator)
    state.apply({name: torch.ones_like(value) for name, value in theta.items()})
    state.iteration, state.window = 1, [torch.tensor(0.5)]
    state.save(path, experiment.config())
    return path


def rewrite(path: Path, tensors: dict, text: str) -> None:
    """A checkpoint with a right digest."""
    metadata = {"metabook": text, "sha256": checkpoints.digest(text, tensors)}
    path.write_bytes(lzma.compress(safetensors.torch.save(tensors, metadata)))


HUGE = b'{"a":{"dtype":"F32","shape":[99999999999999],"data_offsets":[0,4]}}'
CURVE = {"iteration": 1, "metrics": {}}


@pytest.mark.parametrize(
    "path, value",
    [
        ("", []), ("", None), ("format", "metabook checkpoint 2"), ("config", None), ("config", []), ("iteration", "1"),
        ("iteration", None), ("iteration", -5), ("iteration", 1.5), ("iteration", True), ("iteration", 10**9),
        ("iteration", ...), ("seconds", "1"), ("seconds", None), ("seconds", -1), ("seconds", float("nan")),
        ("losses", {}), ("losses", None), ("losses", ["low"]), ("window", 3), ("window", ["low"]), ("window", [[0.5]]),
        ("curve", None), ("curve", {}), ("curve", [3]), ("curve", [{"iteration": 1}]),
        ("curve", [CURVE | {"metrics": 3}]),
        ("curve", [CURVE | {"metrics": {"mse_0": "low"}}]), ("slices", None), ("slices", [3]),
        ("slices", [{"begin": "0"}]),
        ("returns", 3), ("returns", [3]), ("precision", "double"), ("precision", None), ("generator", 3),
    ],
    ids=str,
)  # fmt: skip
def test_a_header_of_another_shape(project, capsys, checkpoint, path, value):
    tensors, header = checkpoints.read_checkpoint(checkpoint)
    rewrite(checkpoint, tensors, json.dumps(changed(header, path, value)))
    for command, words in ((train, ["first", "--budget", "0"]), (call, ["evaluate", "first"])):
        assert "start over with --fresh" in refused(project, capsys, *words, command=command)


def test_a_header_that_is_nested_too_deeply(project, capsys, checkpoint):
    tensors, _ = checkpoints.read_checkpoint(checkpoint)
    rewrite(checkpoint, tensors, "[" * DEEP)
    assert "is damaged" in refused(project, capsys, "evaluate", "first")


def name_of(tensors: dict, start: str) -> str:
    return next(name for name in tensors if name.startswith(start))


@pytest.mark.parametrize(
    "start, change",
    [
        ("theta/", lambda value: value * float("nan")),
        ("theta/", lambda value: value.double()),
        ("theta/", lambda value: value.long()),
        ("theta/", lambda value: value[..., :0]),
        ("theta/", None),
        ("adam/step", None),
        ("adam/step", lambda value: -value),
        ("adam/step", lambda value: value.expand(3).clone()),
        ("adam/exp_avg/", None),
        ("adam/exp_avg/", lambda value: value[..., :0]),
        ("adam/exp_avg_sq/", lambda value: value[None]),
        ("adam/exp_avg_sq/", lambda value: value.long()),
        ("generator", lambda value: value[:16]),
        ("generator", lambda value: value.float()),
        ("generator", None),
    ],
)
def test_tensors_of_another_shape(project, capsys, checkpoint, start, change):
    tensors, header = checkpoints.read_checkpoint(checkpoint)
    name = name_of(tensors, start)
    value = tensors.pop(name)
    rewrite(checkpoint, tensors if change is None else tensors | {name: change(value)}, json.dumps(header))
    assert "start over with --fresh" in refused(project, capsys, "first", "--budget", "0", command=train)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00" * 100, lzma.compress(b""), lzma.compress(b"\xff" * 8),
        lzma.compress(b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
        lzma.compress((10).to_bytes(8, "little") + b"[[[[[[[[[["),
        lzma.compress((DEEP).to_bytes(8, "little") + b"[" * DEEP),
        lzma.compress((76).to_bytes(8, "little") + HUGE.ljust(76)),
    ],
    ids=["empty", "zeros", "nothing", "short", "huge-header", "no-json", "deep", "huge-shape"],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_read(project, capsys, checkpoint, content):
    checkpoint.write_bytes(content)
    assert "is damaged" in refused(project, capsys, "evaluate", "first")
    assert "is damaged" in refused(project, capsys, "first", "--budget", "0", command=train)


# ---------------------------------------- folders and files of another kind
@pytest.mark.parametrize(
    "place, folder, words",
    [
        ("data", False, ["train", "first"]),
        ("data/checkpoints", False, ["train", "first"]),
        ("data/records", False, ["train", "first"]),
        ("data/records", False, ["show", "first"]),
        ("data/records/first.json", True, ["show", "first"]),
        ("data/records/first.json", True, ["verdicts"]),
        ("data/checkpoints/first.safetensors.xz", True, ["evaluate", "first"]),
        ("data/checkpoints/first.safetensors.xz", True, ["train", "first", "--budget", "0"]),
        ("data/checkpoints/.first.safetensors.xz.lock", True, ["train", "first", "--budget", "0"]),
        ("data/claims/maml.yaml", True, ["verdicts"]),
        ("data/claims", False, ["verdicts", "--paper", "maml"]),
        ("data/campaign.yaml", True, ["campaign", "--minutes", "1", "--device", "cpu", "--out", "brought"]),
        ("brought/work", False, ["campaign", "--minutes", "1", "--device", "cpu", "--out", "brought"]),
        ("brought/campaign-1.tar", True, ["campaign", "--merge", "brought"]),
        ("_build", False, ["train", "first", "--seed", "1", "--budget", "0"]),
        ("_build", False, ["run", "one"]),
        ("notebooks/02_two.ipynb", True, ["run", "two"]),
        ("data/jets.npz", True, ["data", "jets"]),
        ("data/names.json.gz", True, ["data", "names"]),
    ],
)
def test_a_folder_for_a_file_and_a_file_for_a_folder(project, capsys, monkeypatch, place, folder, words):
    monkeypatch.chdir(project)
    monkeypatch.setattr(campaign, "check_gradient", lambda _: 0.0)
    path = project / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if folder else path.write_text("")
    status, _, err = call(capsys, *words, *(["--device", "cpu", "--no-compile"] if words[0] == "train" else []))
    assert status == 2 and err.startswith("metabook: ") and err.count("\n") == 1
    assert path.is_dir() if folder else path.read_text() == ""
    assert not list(project.rglob("*.safetensors.xz")) or folder


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"\xff", b"{}", b"[]", b"3", b"null", b'{"cells": 3}', b'{"cells": [3]}', b"[" * DEEP],
)
def test_a_chapter_that_is_no_notebook(project, capsys, content):
    (project / "notebooks" / "01_one.ipynb").write_bytes(content)
    assert "01_one" in refused(project, capsys, "run", "one", "--set", "seed=1")


def test_a_cell_of_parameters_that_is_no_python(project, capsys):
    cell = nbformat.v4.new_code_cell("seed = = 3", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), project / "notebooks" / "01_one.ipynb")
    assert "01_one" in refused(project, capsys, "run", "one", "--set", "seed=1")


# ---------------------------------------- campaigns
@pytest.mark.parametrize(
    "text",
    [
        b"", b"\x00", b"\xff", b"runs:", b"runs: 3", b"runs: first", b"runs: [3]", b"runs: [{gpu: true}]",
        b"runs: {a: b}",
        b"runs: [{run: null}]", b"runs: [{run: [first]}]", b"runs: [{run: first, gpu: [}]", b"[" * 1100,
        b"runs: [{run: first, run: second}]", b"runs: [{run: first, gpu: sometimes}]",
    ],
)  # fmt: skip
def test_a_plan_of_another_shape(project, capsys, monkeypatch, text):
    monkeypatch.setattr(campaign, "check_gradient", lambda _: 0.0)
    path = project / "data" / "campaign.yaml"
    path.parent.mkdir()
    path.write_bytes(text)
    words = ["--minutes", "0.001", "--device", "cpu", "--out", str(project / "brought")]
    status, _, err = call(capsys, "campaign", *words)
    assert status == 2 and err.count("\n") == 1 and "it is a list `runs` of entries `run`" in err


def pack(project: Path, members: dict[str, bytes]) -> None:
    (project / "brought").mkdir()
    with tarfile.open(project / "brought" / "campaign-1.tar", "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(
    "members",
    [
        {"../first.json": b"{}"}, {"/etc/first.json": b"{}"}, {"checkpoints/first.json": b"{}"}, {"first": b""},
        {"records/first.json": b"{}"}, {"checkpoints/first.safetensors.xz": b"x"},
        {"checkpoints/frist.safetensors.xz": b"x"}, {"checkpoints/.safetensors.xz": b""},
    ],
    ids=lambda members: next(iter(members)),
)  # fmt: skip
def test_a_pack_of_something_else(project, capsys, members):
    pack(project, members)
    before = files(project)
    status, _, err = call(capsys, "campaign", "--merge", str(project / "brought"))
    assert status == 2 and err.startswith("metabook: ") and err.count("\n") == 1
    assert files(project) == before


@pytest.mark.parametrize("record", [b"", b"[" * DEEP, b"null", b"[]", json.dumps(RECORD | {"metrics": 3}).encode()])
def test_a_pack_with_a_record_of_another_shape(project, capsys, checkpoint, record):
    pack(project, {"checkpoints/first.safetensors.xz": checkpoint.read_bytes(), "records/first.json": record})
    checkpoint.unlink()
    before = files(project)
    status, out, err = call(capsys, "campaign", "--merge", str(project / "brought"))
    assert status == 2 and "its record is damaged" in out and "1 of 1 runs were refused: first" in err
    assert files(project) == before


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x00" * 10240])
def test_a_pack_that_is_no_archive(project, capsys, content):
    (project / "brought").mkdir()
    (project / "brought" / "campaign-1.tar").write_bytes(content)
    status, _, err = call(capsys, "campaign", "--merge", str(project / "brought"))
    assert status == 2 and err.startswith("metabook: ") and err.count("\n") == 1


# ---------------------------------------- environment
@pytest.mark.parametrize("words", [["train", "first"], ["evaluate", "first"], ["show", "first"], ["verdicts"], ["run"]])
def test_a_root_that_is_no_folder(project, capsys, monkeypatch, words):
    monkeypatch.setenv("METABOOK_ROOT", str(project / "notebooks" / "01_one.ipynb"))
    monkeypatch.setattr(runtime, "can_compile", lambda: False)
    assert "METABOOK_ROOT names" in refused(project, capsys, *words)


@pytest.mark.parametrize("columns", ["1", "0", "-3", "wide", ""])
def test_any_width_of_the_terminal(project, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert call(capsys, "show", "first")[0] == call(capsys, "--help")[0] == 0


# ---------------------------------------- what passed in silence
def test_a_checkpoint_under_another_name(project, capsys, checkpoint):
    checkpoint.rename(checkpoint.with_name("second.safetensors.xz"))
    assert "is a checkpoint of first: restore that of second" in refused(project, capsys, "evaluate", "second")


def test_an_experiment_that_is_named_twice_is_begun_once(project, capsys, monkeypatch):
    """Of two processes under one name only the later would be stopped at the end."""
    monkeypatch.setattr(campaign, "check_gradient", lambda _: 0.0)
    queues = []
    monkeypatch.setattr(campaign, "_side_by_side", lambda queue, *_: queues.append(queue))
    words = ["first", "second", "first", "--minutes", "1", "--device", "cpu", "--out", str(project / "brought")]
    assert call(capsys, "campaign", *words)[0] == 0 and queues == [["first", "second"]]


def test_variants_of_nothing_but_signs_have_names_of_their_own():
    names = {variants.variant(tiny.Tiny(), {"paper": text}).name for text in ("", "🙂", "/", "🙃")}
    assert len(names) == 4


def test_a_gpu_that_is_not_there(project, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "no device 'cuda:99' among the 1 GPUs" in refused(project, capsys, "train", "first", "--device", "cuda:99")


def test_a_chapter_whose_name_a_shell_would_run(project, capsys):
    (project / "notebooks" / "03_$(touch x).ipynb").write_text("{}")
    assert "touch" not in call(capsys, "completion", "bash")[1]
