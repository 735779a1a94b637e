"""What an iteration of each Omniglot experiment asks of a GPU: how often it launches, and that it never waits.

The numbers are those of the table in ``book/reproducing.md``.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import replace

import pytest
import standin
import torch
from miniatures import few_glyphs

from helpers import experiments, runtime
from helpers.lab.checkpoints import State
from helpers.lab.few_shot import OnOmniglot
from helpers.runtime import root
from helpers.tasks import omniglot

ROW = re.compile(r"^\| ((?:`[\w-]+`(?:, )?)+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)
FORMS = ("eager", "traced", "captured")
SIZES = {"ways": 2, "meta_batch": 2}  # an operation is a launch whatever its size
JUDGED = {"test_tasks": 2, "spot_tasks": 1, "diagnosed_tasks": 1}
# How many examples, and how fast it learns: it makes no difference, or hardly one.
OTHER = {"name", "shots", "train_shots", "queries", "query_sets", "iterations", "outer_rate", "outer_rate_hold",
         "outer_rate_restarts", "inner_rate", "inner_batch", "strength", "seed", "start", "watched", "chunk",
         "evaluate_every", "headline_steps", "test_steps", "test_shots", "test_batch"}  # fmt: skip


def table() -> dict[tuple[str, ...], list[int]]:
    """The launches that the page says, by the experiments with that program."""
    page = (root() / "book" / "reproducing.md").read_text(encoding="utf-8")
    return {
        tuple(re.findall(r"[\w-]+", names)): [int(number.replace(",", "")) for number in numbers]
        for names, *numbers in ROW.findall(page)
    }


def program(experiment) -> tuple:
    """What decides the operations of an iteration."""
    fields = experiment.__dataclass_fields__.keys() - SIZES.keys() - JUDGED.keys() - OTHER
    return type(experiment), *((name, getattr(experiment, name)) for name in sorted(fields))


def small(name: str, **changes):
    experiment = experiments.find(name)
    settings = {"start": None} | SIZES | JUDGED | changes
    return replace(experiment, **{k: v for k, v in settings.items() if k in experiment.__dataclass_fields__})


def launches(experiment, form: str) -> int:
    """In one iteration, the draw, the gradient and the outer step, of which none waits for the card."""
    device = torch.device("cuda")
    run, draws = experiment.setup(device, compiled=False), runtime.generator(0, device)
    state = State(run.init(draws), experiment.outer_rate, draws, experiment.outer)
    run.use(form)
    if form != "eager":
        run.iterate(state, experiment.outer_rate)  # records or captures
    with standin.Launches() as seen:
        loss = run.iterate(state, experiment.outer_rate)
    assert seen.waits == [] and loss.isfinite()
    return seen.count


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(omniglot, "load", lambda *_, **__: few_glyphs())
    few_glyphs()
    with standin.card():
        yield


# Half a minute each. The commit decides whose turn it is; `-k launches` with METABOOK_EVERY=1 asks them all.
LONG = ("maml-omniglot-20w", "anil-omniglot-20w", "msl", "reptile", "imaml")
ROWS = {names[0]: (names, counts) for names, counts in table().items()}
LATER = sorted(name for name in ROWS if name.startswith(LONG))
TURN = LATER[zlib.crc32(runtime.commit().encode()) % len(LATER)]
CASES = [name for name in ROWS if name not in LATER or name == TURN or "METABOOK_EVERY" in os.environ]


@pytest.mark.parametrize("name", CASES)
def test_launches_are_those_of_the_page(name):
    assert [launches(small(name), form) for form in FORMS] == ROWS[name][1]


def test_every_experiment_is_on_the_page_with_its_program():
    rows = table()
    known = {name: one for name, one in experiments.catalogue().items() if isinstance(one, OnOmniglot)}
    assert sorted(name for names in rows for name in names) == sorted(known)
    programs = [{program(known[name]) for name in names} for names in rows]
    assert [len(row) for row in programs] == [1] * len(rows)


def test_more_tasks_and_ways_launch_as_much_and_more_examples_hardly_more():
    few = launches(small("maml-omniglot-5w1s"), "traced")
    assert launches(small("maml-omniglot-5w1s", ways=5, meta_batch=3), "traced") == few
    assert launches(small("maml-omniglot-5w5s"), "traced") == pytest.approx(few, rel=0.01)
