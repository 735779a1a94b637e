"""Every kind of recorded experiment in miniature: what it draws in training, for tuning and for the test, by spies."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from miniatures import MINIATURES, little  # noqa: F401 (a fixture)
from spies import TEST, TRAIN, TUNE, Spy, all_glyphs

from helpers import estimators
from helpers.experiments import (
    catalogue,
    jets_cuts,
    maml,
    metanmt,
    ml3,
    ml3_digits,
    nested,
    nos,
    nos_transfer,
    paradigms,
)
from helpers.lab import few_shot
from helpers.runtime import generator
from helpers.tasks import digits, names
from helpers.tasks.jets import protocol
from helpers.types import Examples, Tasks

CPU = torch.device("cpu")
MEASURED_ALONE = ("nos", "nos-transfer")  # the same images for all; see the tests of these two below
TUNED = (  # beginnings of the names of what chooses something on tasks of its own
    "maml-sinusoid", "sine", "inverse", "car", "mass", "arm", "digits", "modelfree", "languages", "jets-maml",
    "jets-reptile", "jets-imaml", "jets-images", "jets-matrix", "turtles", "navigation",
)  # fmt: skip


def nothing(*args):
    """The place of an estimator: no gradient, no loss."""
    theta, tasks = args[-2:]
    return {name: torch.zeros_like(value) for name, value in theta.items()}, torch.zeros(len(tasks[0][0]))


def seen(monkeypatch, name: str, seed: int = 0, iterations: int = 2) -> Spy:
    """Spies on two iterations and the evaluation of a miniature."""
    experiment = replace(MINIATURES[name](), seed=seed)
    if isinstance(experiment, paradigms.ParadigmExperiment):  # as many, so that one seed would give the same tasks
        experiment = replace(experiment, validation_tasks=experiment.test_tasks)
    with monkeypatch.context() as patch:
        spy = Spy(patch)
        run = experiment.setup(CPU, compiled=False)
        if hasattr(run, "estimator"):
            run.estimator = nothing
        if hasattr(run, "estimators"):
            run.estimators = dict.fromkeys(run.estimators, nothing)
        draws = generator(seed)
        theta = run.init(draws)
        with spy.during(TRAIN):
            for iteration in range(iterations):
                run.gradient(theta, draws, iteration)
        run.evaluate(theta)
    spy.experiment, spy.run = experiment, run
    return spy


def faults(spy: Spy) -> list[str]:
    """What an experiment must not see and did, in words; empty if there is nothing."""
    e, of = spy.experiment, {phase: spy.made_of(phase) for phase in (TRAIN, TUNE, TEST)}
    pairs = ((TRAIN, TUNE), (TRAIN, TEST), (TUNE, TEST))
    match e:
        case nested.NestedExperiment():
            wanted = {TRAIN: {"train"}, TUNE: {"validation"}, TEST: {"test", "shifted"}}
            found = [f"{phase}: families of {bands}" for phase, bands in of.items() if not bands <= wanted[phase]]
            return found + [f"{phase}: no families" for phase in (TUNE, TEST) if of[phase] != wanted[phase]]
        case jets_cuts.Cuts():
            return [f"{phase}: jets of {of[phase]}" for phase in (TRAIN, TEST) if of[phase] != {phase}]
        case ml3_digits.Digits():
            return faults_of_digits(spy)
        case metanmt.Translation():
            wanted = {TRAIN: set(e.sources), TUNE: set(e.validation), TEST: {*e.seen, *e.held}}
            found = [f"{phase}: the languages {codes}" for phase, codes in of.items() if codes != wanted[phase]]
            new = names.load().parts(e.split_seed)["new"]
            return found + [f"train: {name}" for name in sorted(spy.values(TRAIN) & new)]
        case _ if e.paper == "jets":
            splits = {phase: {split for split, _ in made} for phase, made in of.items()}
            wanted = {TRAIN: {"train"}, TUNE: {"validation"}, TEST: {"test"}}
            wanted[TRAIN] = wanted[TRAIN] if getattr(e, "method", "") != "scratch" else set()
            found = [f"{phase}: jets of {split}" for phase, split in splits.items() if split != wanted[phase]]
            measured = {phase: {domain.detector for _, domain in made} for phase, made in of.items()}
            allowed = {
                TRAIN: {*protocol.TRAIN_DETECTORS}, TUNE: {protocol.TUNING_DETECTOR}, TEST: {protocol.DATA_DETECTOR}
            }  # fmt: skip
            found += [f"{phase}: other detectors" for phase, some in measured.items() if not some <= allowed[phase]]
            windows = [{(d.window, d.shower) for _, d in of[phase]} for phase in (TRAIN, TEST)]
            return found + ["test: the windows of training alone"] * (windows[1] <= windows[0])
    images = any(isinstance(value, bytes) for phase in of for value in spy.values(phase))
    what = spy.made_of if images else spy.values
    found = [f"{one} and {other} share {len(both)}" for one, other in pairs if (both := what(one) & what(other))]
    if images:
        known = {split: set(all_glyphs(split).names) for split in ("train", "test")}
        allowed = ((TRAIN, "train"), (TUNE, "train"), (TEST, "test"))
        found += [f"{phase}: classes that are not of {split}" for phase, split in allowed if of[phase] - known[split]]
    if not images and isinstance(e, ml3.SineStudy) and of[TRAIN] & of[TEST]:
        found.append("test: sines of training")
    return found


def faults_of_digits(spy: Spy) -> list[str]:
    """Digits of training pairs on training images, but for the test, of held-out pairs on test images too."""
    e, found = spy.experiment, []
    training, held_out = (
        {d for pairs in part for pair in pairs for d in pair} for part in zip(*e.pairs(), strict=True)
    )
    for phase, allowed, splits in (
        (TRAIN, training, {"train"}), (TUNE, training, {"train"}), (TEST, training | held_out, {"train", "test"})
    ):  # fmt: skip
        of = spy.made_of(phase)
        found += [f"{phase}: images of {split}" for split in {split for split, _ in of} ^ splits]
        found += [f"{phase}: digits {sorted(wrong)}" for wrong in [{digit for _, digit in of} - allowed] if wrong]
    return found


@pytest.mark.parametrize("name", [name for name in MINIATURES if name not in MEASURED_ALONE])
def test_training_tuning_and_test_are_apart(name, monkeypatch, little):  # noqa: F811
    """And the tasks of tuning and test do not depend on the seed, while those of training do."""
    if name.startswith("modelfree"):
        pytest.importorskip("stable_baselines3", reason='needs stable-baselines3: pip install -e ".[control]"')
    spy, other = seen(monkeypatch, name), seen(monkeypatch, name, seed=1, iterations=1)
    assert faults(spy) == faults(other) == []
    assert spy.draws[TEST], "something is judged"
    tuned = name.startswith(TUNED) or getattr(spy.experiment, "method", "") in paradigms.DESCENDING
    assert bool(spy.draws[TUNE]) == tuned, "tuning has tasks of its own"
    if isinstance(spy.experiment, ml3_digits.Digits):
        return  # every seed has pairs of its own
    for phase in (TUNE, TEST):
        assert Counter(spy.draws[phase]) == Counter(other.draws[phase]), f"{phase} depends on the seed"
    if spy.draws[TRAIN] and not isinstance(spy.experiment, jets_cuts.Cuts):
        assert spy.values(TRAIN) != other.values(TRAIN), "training does not depend on the seed"
        assert len(set(spy.draws[TRAIN])) > 1, "all tasks of training are the same"


# ---------------------------------------- the spies see what is wrong


@pytest.mark.parametrize(
    "name", ["maml-Omniglot", "reptile", "reptile-combinations", "imaml", "comparison-maml", "digits"]
)
def test_a_split_that_is_swapped_is_seen(name, monkeypatch, little):  # noqa: F811
    assert faults(seen(monkeypatch, name)) == []
    if name == "digits":
        load = digits.load
        monkeypatch.setattr(digits, "load", lambda split, data: load("train" if split == "test" else "test", data))
    else:
        published = few_shot.OnOmniglot if name != "comparison-maml" else few_shot.OnGlyphs
        monkeypatch.setattr(published, "classes", lambda e, split: e.published("train"))
    assert faults(seen(monkeypatch, name))


def test_tuning_on_the_test_is_seen(monkeypatch, little):  # noqa: F811
    assert faults(seen(monkeypatch, "maml-sinusoid", iterations=0)) == []
    drawn = maml.SinusoidTraining._drawn
    monkeypatch.setattr(maml.SinusoidTraining, "_drawn", lambda run, seed, shots: drawn(run, maml.TEST_SEED, shots))
    assert faults(seen(monkeypatch, "maml-sinusoid", iterations=0))


# ---------------------------------------- what the spies are not for


def test_images_of_update_rules_are_apart(little):  # noqa: F811
    """Children are trained, scored and tested on images of their own; a sweep has another start than what it is for."""
    search = MINIATURES["nos"]()
    run = search.setup(CPU, compiled=False)
    parts = [{x.numpy().tobytes() for x in part.x} for part in search.children.examples]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    for part, used in zip(parts, (run.population.train, run.population.valid), strict=False):
        assert {x.numpy().tobytes() for x in used.x} == part
    assert isinstance(run, nos.SearchRun)


def test_rules_are_swept_and_judged_on_images_of_their_own(monkeypatch, little):  # noqa: F811
    run = MINIATURES["nos-transfer"]().setup(CPU, compiled=False)
    population = run.population(0)
    sets = [{x.numpy().tobytes() for x in part.x} for part in (population.train, population.valid, run.test)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    starts, make = [], run.population
    run.population = lambda seed: starts.append(seed) or make(seed)
    monkeypatch.setattr(
        nos_transfer, "swept", lambda population, entries, rates, *_: torch.zeros(len(entries), len(rates))
    )
    monkeypatch.setattr(nos_transfer, "trained", lambda population, entries, *_: torch.zeros(len(entries), 4))
    theta, draws = run.init(generator(0)), generator(0)
    for iteration in range(3):
        gradient, _ = run.gradient(theta, draws, iteration)
        theta = {name: value - gradient[name] for name, value in theta.items()}
    assert starts == [0, 1, 2]


@pytest.mark.parametrize("name", ["maml-Omniglot", "reptile"])
def test_the_gradient_of_a_few_shot_run_is_its_estimators(name, little):  # noqa: F811
    """Of the tasks that the generator draws, support before query, and not its opposite."""
    run = MINIATURES[name]().setup(CPU, compiled=False)
    theta = run.init(generator(0))
    gradient, loss = run.gradient(theta, generator(1), 0)
    again = generator(1)
    tasks = run.prepared(run.family.sample(run.experiment.meta_batch, again), again)
    estimator = estimators.reptile if name == "reptile" else estimators.maml
    expected, losses = estimator(run.at(0), theta, tasks)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, losses.mean())


def test_the_sinusoid_study_adapts_to_the_support_set(little):  # noqa: F811
    """MAML's gradient is that of its support and query points; the pre-trained network descends the support points."""
    run = MINIATURES["maml-sinusoid"]().setup(CPU, compiled=False)
    theta = run.init(generator(0))
    gradient, loss = run.gradient(theta, generator(1), 0)
    tasks = maml.without_oracle(run.tasks(run.experiment.meta_batch, run.experiment.queries, generator(1)))
    for s in range(run.experiment.seeds):
        own = Tasks(*(Examples(part.x[s], part.y[s]) for part in tasks))
        one = {name.removeprefix("maml/"): value[s] for name, value in theta.items() if name.startswith("maml/")}
        expected, _ = estimators.maml(run.learner, one, own)
        for part, value in expected.items():
            torch.testing.assert_close(gradient[f"maml/{part}"][s], value, rtol=1e-4, atol=1e-6)


def test_all_of_the_catalogue_is_of_a_kind_that_is_spied_on():
    kinds = {type(make()) for make in MINIATURES.values()}
    assert {type(e) for e in catalogue().values()} <= kinds
