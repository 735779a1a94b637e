"""The frame of experiments: all of the catalogue conform to it, and wrong fields are refused in one sentence."""

from __future__ import annotations

import ast
import dataclasses
import re
from dataclasses import replace
from functools import cache
from typing import get_origin, get_type_hints

import pytest
import torch
from refusals import refused
from tiny import Tiny, TinyRun

from helpers import experiments, fields
from helpers.experiments import maml, nos
from helpers.lab import experiment as base
from helpers.lab import records
from helpers.lab.few_shot import FewShotExperiment
from helpers.lab.statistics import Interval
from helpers.runtime import root

KINDS = {type(e).__name__ + "-" + type(e).__module__.rpartition(".")[2]: e for e in experiments.catalogue().values()}


def documented(kind: type) -> set[str]:
    """Names under *Attributes* in the docstrings of a class and those above it."""
    found = set()
    for one in kind.__mro__:
        listed = (one.__doc__ or "").partition("Attributes:")[2]
        found |= {
            n for line in re.findall(r"^\s+([a-z0-9_, ]+):", listed, re.M) for n in line.replace(" ", "").split(",")
        }
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_stands_in_the_frame(name):
    kind = type(KINDS[name])
    assert issubclass(kind, base.Experiment) and kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
    names = [field.name for field in dataclasses.fields(kind)]
    assert set(names) <= documented(kind), f"without a word: {sorted(set(names) - documented(kind))}"
    hints = fields.hints(kind)
    assert all(isinstance(hints[name], type) or get_origin(hints[name]) for name in names)
    # What an experiment must have and what it may have is all there, as a field, a property or a default.
    assert all(hasattr(KINDS[name], asked) for asked in get_type_hints(base.Experiment))
    assert set(names) <= set(KINDS[name].config()) | {"own", "start", "watched"}


def test_nothing_optional_is_looked_up_by_name():
    """The frame declares every default, so that a misspelt name is an error."""
    wrong = []
    for place in ("lab", "experiments", "campaign.py", "cli", "site"):
        path = root() / "src" / "helpers" / place
        assert path.exists()
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3):
                        wrong.append(f"{file.name}:{node.lineno}")
    assert not wrong


def test_defaults():
    run = TinyRun(Tiny())
    assert run.forms == () and run.table({}) is None and run.check_clock() is None
    assert "has no forms" in refused(lambda: run.use("traced"))
    theta = run.init(torch.Generator().manual_seed(0))
    assert run.spot_check(theta) == run.evaluate(theta)
    assert Tiny().outer == "adam" and Tiny().watched is None and Tiny().data() == {"data": "sinusoids"}


@cache
def omniglot() -> maml.Omniglot:
    return maml.Omniglot("maml-x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 0}, "the ways of maml-x must be a whole number of at least 1, not 0"),
        ({"shots": -1}, "the shots of maml-x must be a whole number of at least 1, not -1"),
        ({"iterations": 0}, "the iterations of maml-x must be a whole number of at least 1, not 0"),
        ({"test_tasks": 0}, "the test_tasks of maml-x must be a whole number of at least 1, not 0"),
        ({"meta_batch": 2.0}, "the meta_batch of maml-x must be a whole number, not 2.0"),
        ({"chunk": True}, "the chunk of maml-x must be a whole number, not True"),
        ({"seed": -1}, "the seed of maml-x must be a whole number of at least 0, not -1"),
        ({"inner_rate": -0.1}, "the inner_rate of maml-x must be a finite number of at least 0, not -0.1"),
        ({"outer_rate": float("nan")}, "the outer_rate of maml-x must be a finite number of at least 0, not nan"),
        ({"inner_rate": "0.1"}, "the inner_rate of maml-x must be a number, not '0.1'"),
        ({"estimator": "mamml"}, "the estimator of maml-x must be one of maml, fomaml, not 'mamml'"),
        ({"test_steps": 3}, "the test_steps of maml-x must be a tuple of any number of entries, not 3"),
        ({"test_steps": (1, -3)}, "the test_steps of maml-x must be a whole number of at least 0, not -3"),
        ({"name": 3}, "the name of 3 must be a text, not 3"),
    ],
)
def test_wrong_fields_are_refused(change, message):
    assert refused(lambda: replace(omniglot(), **change)) == message


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("reptile-omniglot-5w1s", {"outer": "rmsprop"}, "must be one of adam, sgd, not 'rmsprop'"),
        ("reptile-omniglot-5w1s", {"carry": 1}, "must be True or False, not 1"),
        ("imaml-omniglot-5w1s", {"strength": 0.0}, "greater than 0, not 0.0"),
        ("imaml-omniglot-5w1s", {"start": 5}, "must be a text, not 5"),
        ("jets-maml", {"given": ("labels", "guesses")}, "must be one of labels, proportions, mixture, not 'guesses'"),
        ("jets-pooled", {"inner": "mixture"}, "pooled training is on labels"),
        ("languages-fomaml", {"fixed": (30, 3e-3)}, "must be a tuple of 3 entries"),
        ("maml-sinusoid-10", {"seeds": 0}, "at least 1, not 0"),
        ("nos-digits", {"children": None}, "must be of the kind Children, not None"),
        ("ways-glyphs-joint", {"family": "images"}, "must be one of sinusoid, glyphs"),
        ("combined-loss", {"learned": ("loss", "noise")}, "must be one of loss, rule, start, not 'noise'"),
    ],
)
def test_wrong_fields_of_other_kinds(name, change, part):
    assert part in refused(lambda: replace(experiments.find(name), **change))


def test_a_whole_number_will_do_for_a_rate_and_zero_where_it_means_something():
    assert replace(omniglot(), inner_rate=1, inner_steps=0, seed=0, test_steps=(0,)).inner_rate == 1
    assert "the epochs of the children" in refused(lambda: nos.Children(epochs=0))


def test_tolerances():
    """As the records tier uses them: the first pattern counts, and every recorded metric has one."""
    accuracy = Interval(0.9, 0.01, 600)
    assert omniglot().tolerance("transductive_accuracy", {"transductive_accuracy": accuracy}) == pytest.approx(
        5.5 / 600 / 5
    )
    sines = experiments.find("maml-sinusoid-10")
    recorded = {"maml_mse_1": Interval(1.0, 0.1, 5), "maml_diverged_1": Interval(0.0, 0.0, 5)}
    assert sines.tolerance("maml_mse_1", recorded) == pytest.approx(1e-3)
    recorded["maml_diverged_1"] = Interval(0.01, 0.0, 5)
    assert sines.tolerance("maml_mse_1", recorded) == pytest.approx(1e-3 + maml.DIVERGED / 3_000)
    known = experiments.catalogue()
    for name, record in of_runs():
        metrics = {key: records.metric(record, key) for key in record["metrics"]}
        allowed = [known[name].tolerance(key, metrics) for key in metrics]
        assert all(0 <= one < float("inf") for one in allowed)


def of_runs():
    """The committed records that have a checkpoint."""
    return [(name, record) for name, record in records.load_all().items() if record.get("kind") != "live"]


def test_the_headline_of_few_shot_images_is_named_for_what_it_is():
    """Whether a task's queries are seen together is in the name; the first metric of a record is the headline."""
    for name, record in of_runs():
        experiment = experiments.find(name)
        if isinstance(experiment, FewShotExperiment):
            assert next(iter(record["metrics"])) == experiment.headline, name
            assert experiment.headline in ("transductive_accuracy", "inductive_accuracy"), name
