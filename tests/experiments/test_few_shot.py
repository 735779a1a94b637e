"""Every kind of experiment on classes of images on a reader's own images: in colour, of classes that differ in size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import standin
import torch
from miniatures import judged_once, unrecorded
from pictures import folder
from refusals import refused

from helpers import experiments, losses
from helpers.lab import checkpoints, training, variants
from helpers.lab.evaluation import accuracy_curve, adaptation_curve
from helpers.lab.few_shot import OnImages, on_folder
from helpers.learners.descent import GradientDescent
from helpers.models.convnet import ConvNet
from helpers.runtime import generator
from helpers.tasks.episodes import FewShot

FEW = {"ways": 3, "queries": 1, "test_tasks": 2, "meta_batch": 1}
IMAML = {"spot_tasks": 1, "diagnosed_tasks": 1, "inner_steps": 1, "headline_steps": 1, "test_steps": (1,), "chunk": 1}
WAY = {"seeds": 1, "validation_tasks": 1, "spot_tasks": 1, "rates": (0.1,), "steps": (1,), "filters": 3}
WAY |= {"test_shots": (1,), "minibatch": 4}
CHANGES = {
    "maml-omniglot-5w1s": {},
    "maml-omniglot-5w1s-mlp": {},
    "reptile-omniglot-5w1s": {"train_shots": 2, "test_shots": (1,), "inner_steps": 1, "test_steps": 1, "spot_tasks": 1},
    "reptile-combinations": {"shots": 2, "longest": 2, "inner_batch": 2, "test_steps": 1},
    "imaml-omniglot-5w1s": IMAML | {"query_sets": 2},
    "imaml-omniglot-5w1s-weak": IMAML | {"query_sets": 2},
    **{
        f"ways-glyphs-{method}": WAY | ({"inner_steps": 1} if method in ("initialization", "architecture") else {})
        for method in ("recurrence", "initialization", "architecture", "metric", "multisource", "nearest")
    },
    "imaml-compare-maml": {"seeds": 2, "filters": 2, "cost": 10, "budget": 10},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("own") / "pictures", [4, 7, 5] * 5)


def small(name: str, place) -> OnImages:
    known = experiments.catalogue()
    own = on_folder(known[name], place)
    changes = {key: value for key, value in (FEW | CHANGES[name]).items() if key in known[name].__dataclass_fields__}
    own = replace(own, own=replace(own.own, size=16), **changes)
    return replace(own, iterations=1) if "iterations" in own.__dataclass_fields__ else own


def test_every_class_of_few_shot_experiments_is_here():
    kinds = {type(one) for one in experiments.catalogue().values() if isinstance(one, OnImages) and one.of_images}
    here = {type(experiments.find(name)) for name in CHANGES}
    assert {kind for kind in kinds if not any(issubclass(kind, one) for one in here)} == set()


@pytest.mark.parametrize("name", CHANGES)
def test_it_trains_and_is_judged(name, place, tmp_path, monkeypatch):
    unrecorded(monkeypatch)
    if name != "maml-omniglot-5w1s-mlp":
        judged_once(monkeypatch)
    experiment = small(name, place)
    with standin.card():  # raises where a GPU would, on tensors of different devices
        record = training.train(experiment, device="cuda", data=tmp_path, progress=False, say=lambda _: None)
    assert record["status"] == "complete"
    assert 0 <= next(iter(record["metrics"].values()))["value"] <= 1
    assert record["provenance"]["data"]["data"] == "own folder"
    assert "leaking_accuracy" not in record["metrics"]
    assert variants.restored(checkpoints.configuration(experiment), experiments.catalogue()) == experiment
    theta = experiment.learner().init(torch.Generator())
    first = next((value.shape for part, value in theta.items() if part.endswith("conv1.weight")), None)
    assert first is None or first[2] == 3, "the first layer has three channels"


def test_the_images_are_no_part_of_a_recorded_configuration():
    for one in experiments.catalogue().values():
        assert "own" not in checkpoints.configuration(one)


def test_a_checkpoint_keeps_its_size_and_channels(place):
    plain = experiments.find("maml-omniglot-5w1s")
    judged = on_folder(plain, place, trained=True)
    assert (judged.own.channels, judged.own.size) == (1, 28) and judged.classes("test").images[0].shape[1] == 1
    restored = variants.restored(checkpoints.configuration(small(plain.name, place)), {plain.name: plain})
    assert "name their folder with --data-folder" in refused(lambda: restored.classes("train"))
    again = on_folder(restored, place, trained=True)
    assert again == restored and again.classes("train").images[0].shape[1:] == (3, 16, 16)


def test_accuracies_are_the_same_in_parts():
    family = FewShot(torch.randint(0, 256, (6, 5, 16, 16), dtype=torch.uint8, generator=generator(0)), 3, 1, 2)
    tasks, steps = family.sample(31, generator(1)), (0, 2)
    learner = GradientDescent(ConvNet(3, filters=4), losses.cross_entropy, 0.4)
    theta = learner.init(generator(2))
    whole = adaptation_curve(learner, theta, tasks, steps, losses.accuracy, chunk=25)
    assert torch.equal(accuracy_curve(learner, theta, tasks, steps), whole)
