"""Claims, records, their schemas and the verdicts: committed files are valid, bad ones are refused, the rules hold."""

from __future__ import annotations

import copy
import json
import re

import jsonschema
import pytest
import yaml

from helpers import experiments
from helpers.errors import UserError
from helpers.lab import records
from helpers.lab.claims import load_claims
from helpers.lab.verdicts import KINDS, NO_DATA, NOT_RUN, judge
from helpers.runtime import root

DATA = root() / "data"
CLAIMS = sorted((DATA / "claims").glob("*.yaml"))
RECORDS = sorted((DATA / "records").glob("*.json"))


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((DATA / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def faults(name: str, content) -> list[str]:
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in validator(name).iter_errors(content)]


def content_of(path):
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def record(name: str, done: int = 10, **metrics) -> dict:
    """A made-up record; a metric is a value, or a pair of value and half-width."""
    origin = {"commit": "0123456789ab", "date": "2025-01-31", "device": "a processor", "threads": 1, "torch": "2.13.0"}
    entries = {key: value if isinstance(value, tuple) else (value, 0.01) for key, value in metrics.items()}
    return {
        "experiment": name,
        "paper": "maml",
        "status": "complete" if done == 10 else "partial",
        "iterations": {"done": done, "planned": 10},
        "metrics": {key: {"value": value, "ci95": half, "n": 600} for key, (value, half) in entries.items()},
        "config": {"name": name, "seed": 0},
        "curve": [{"iteration": 5, "metrics": {"test_accuracy": {"value": 0.5, "ci95": None, "n": 1}}}],
        "losses": {"every": 5, "values": [1.5, 0.5]},
        "provenance": {
            "data": {"data": "omniglot"},
            "seconds": 1.5,
            "slices": [{"begin": 0, "end": done, "seconds": 1.5, "compiled": False, **origin}],
            "evaluated": origin,
        },
    }


def changed(content: dict, path: str, value) -> dict:
    """A copy with one entry replaced, or removed where ``value`` is ``...``."""
    content = copy.deepcopy(content)
    *way, last = path.split("/")
    place = content
    for key in way:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


# ---------------------------------------- committed files


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.stem)
def test_committed_claims_are_valid(path):
    content = content_of(path)
    assert not faults("claims", content)
    assert content["paper"] == path.stem
    bibliography = (root() / "book/references.bib").read_text(encoding="utf-8")
    assert re.search(rf"^@\w+\{{{content['citation']},", bibliography, re.M)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_committed_records_are_valid(path):
    content = content_of(path)
    assert not faults("record", content)
    assert content["experiment"] == path.stem and content["config"]["name"] == path.stem
    done, planned = content["iterations"]["done"], content["iterations"]["planned"]
    assert done <= planned and (content["status"] == "complete") == (done == planned)
    assert content.get("kind") == "live" or content["provenance"]["slices"]
    reached = 0
    for part in content["provenance"]["slices"]:  # the stretches of the run follow each other without a gap
        assert part["begin"] == reached < part["end"]
        reached = part["end"]
    assert reached == done or content.get("kind") == "live"
    assert (DATA / "claims" / f"{content['paper']}.yaml").exists()
    if content.get("kind") == "live":
        assert path.stem.startswith(f"{content['paper']}-live-") and not content["provenance"]["slices"]
        return
    known = experiments.catalogue()
    assert path.stem in known
    assert content["config"] == json.loads(json.dumps(known[path.stem].config())), "of another configuration"


def test_every_claim_can_be_answered():
    claims = load_claims()
    assert claims
    assert len({claim.id for claim in claims}) == len(claims)
    known, measured = set(experiments.catalogue()), records.load_all()
    planned = {name for path in CLAIMS for name in content_of(path).get("planned", ())}
    for claim in claims:
        answers = [f"{claim.experiment}/{claim.metric}"]
        answers += [side for comparison in claim.direction for side in (comparison["left"], comparison["right"])]
        for name, metric in (answer.split("/") for answer in answers if isinstance(answer, str)):
            assert name in known | planned, f"{claim.id}: no experiment {name}, and it is not marked as planned"
            if name in measured:
                assert metric in measured[name]["metrics"], f"{claim.id}: the record {name} has no {metric}"
    assert {judgement.verdict for judgement in judge(claims, measured).values()} <= set(KINDS)
    assert {judgement.verdict for judgement in judge(claims, {}).values()} == {NO_DATA, NOT_RUN}
    assert planned <= {text for claim in claims for text in claim.experiments}, "planned, but no claim names it"


# ---------------------------------------- the schemas refuse


def test_the_schema_accepts_a_record_as_training_writes_it():
    assert not faults("record", record("maml-omniglot-5w1s", test_accuracy=0.5, maml_mse_0=(3.2, None)))
    assert not faults("record", record("x", done=3, test_accuracy=0.5))


@pytest.mark.parametrize(
    "path, value",
    [
        ("paper", ...),
        ("provenance", ...),
        ("status", "finished"),
        ("experiment", "../elsewhere"),
        ("verdict", "reproduced"),
        ("iterations/done", "10"),
        ("iterations/done", -1),
        ("iterations/planned", ...),
        ("metrics", {}),
        ("metrics/test_accuracy", 0.98),
        ("metrics/test_accuracy/value", 98.7),
        ("metrics/test_accuracy/value", None),
        ("metrics/test_accuracy/ci95", -0.1),
        ("metrics/test_accuracy/ci95", ...),
        ("metrics/test_accuracy/n", 0),
        ("config", {}),
        ("losses/every", 0),
        ("provenance/slices", []),
        ("provenance/seconds", -1),
        ("provenance/slices/0/commit", "today"),
        ("provenance/evaluated/device", ...),
    ],
)
def test_the_schema_refuses_a_bad_record(path, value):
    assert faults("record", changed(record("x", test_accuracy=0.5), path, value))


GOOD = {
    "paper": "maml",
    "title": "MAML",
    "citation": "finn2017maml",
    "claims": [
        {
            "id": "a",
            "quantity": "accuracy",
            "where": "Table 1",
            "experiment": "x",
            "metric": "test_accuracy",
            "value": 0.987,
            "ci95": 0.004,
            "direction": [{"left": "x/test_accuracy", "right": 0.5, "within": 0.1, "label": "in words"}],
        }
    ],
}


@pytest.mark.parametrize(
    "path, value",
    [
        ("paper", ...),
        ("citation", ...),
        ("claims", []),
        ("claims/0/where", ...),
        ("claims/0/verdict", "reproduced"),
        ("claims/0/value", 98.7),
        ("claims/0/value", "0.987"),
        ("claims/0/ci95", -0.1),
        ("claims/0/better", "more"),
        ("claims/0/direction/0/left", 0.5),
        ("claims/0/direction/0/left", "x"),
        ("claims/0/direction/0/right", ...),
        ("claims/0/direction/0/within", 0),
        ("claims/0/from_memory", "yes"),
        ("claims/0/origin", "elsewhere"),
        ("origin", "elsewhere"),
        ("claims/0/toy", ""),
        ("claims/0/no_data", True),
        ("claims/0/exact", "yes"),
        ("claims/0/baseline", 1),
    ],
)
def test_the_schema_refuses_bad_claims(path, value):
    assert not faults("claims", GOOD)
    assert faults("claims", changed(GOOD, path, value))


def test_a_claim_has_a_number_or_a_comparison():
    only_words = changed(changed(changed(GOOD, "claims/0/value", ...), "claims/0/ci95", ...), "claims/0/direction", ...)
    assert faults("claims", only_words)


@pytest.mark.parametrize("text", ["claims: [", "paper: maml", "paper: maml\nclaims:\n- {id: a, wherever: Table 1}\n"])
def test_a_bad_claims_file_is_one_sentence(tmp_path, monkeypatch, text):
    (tmp_path / "data/claims").mkdir(parents=True)
    (tmp_path / "data/claims/maml.yaml").write_text(text)
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"maml\.yaml cannot be read .*claims\.schema\.json"):
        load_claims()
    with pytest.raises(UserError, match="no claims file .*known papers: maml"):
        load_claims("reptile")


@pytest.mark.parametrize(
    "path, value",
    [
        ("claims/0/better", "sideways"),
        ("claims/0/value", "0.987"),
        ("claims/0/ci95", -0.1),
        ("claims/0/origin", "elsewhere"),
        ("claims/0/note", 3),
        ("claims/0/exact", "yes"),
        ("claims/0/direction/0/within", 0),
        ("claims/0/direction/0/left", "x"),
    ],
)
def test_a_wrong_part_of_a_claim_is_one_sentence(tmp_path, monkeypatch, path, value):
    (tmp_path / "data/claims").mkdir(parents=True)
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    file = tmp_path / "data" / "claims" / f"{GOOD['paper']}.yaml"
    file.write_text(json.dumps(GOOD))
    (claim,) = load_claims()
    file.write_text(json.dumps(changed(GOOD, path, value)))
    with pytest.raises(UserError, match=r"cannot be read .*claims\.schema\.json"):
        load_claims()
    file.write_text(json.dumps(GOOD | {"claims": GOOD["claims"] * 2}))
    with pytest.raises(UserError, match=f"two claims are called '{claim.id}'"):
        load_claims()
