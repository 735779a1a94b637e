"""Pairs of digits: files are verified, pairs share no digit, tasks are what they say, and the experiment runs."""

from __future__ import annotations

import math
import types
from itertools import chain

import numpy as np
import pytest
import torch
from refusals import refused
from torch.func import grad, vmap

from helpers.experiments.ml3_digits import Digits, experiments
from helpers.lab import checkpoints, training
from helpers.lab.evaluation import DIVERGED
from helpers.learners.descent import GradientDescent
from helpers.learners.learned import LossDescent
from helpers.learners.paths import MinibatchLossDescent
from helpers.losses import LOSS, cross_entropy
from helpers.models.lenet import LeNet
from helpers.numerics.differences import central_differences, error
from helpers.runtime import generator
from helpers.tasks import digits
from helpers.tasks.images import sha256
from helpers.types import Examples

SMALL = {
    "images": "digits", "architecture": "mlp", "hidden": (8,), "seeds": 2, "meta_batch": 3, "iterations": 4,
    "evaluate_every": 2, "test_steps": (0, 1, 3), "test_tasks": 2, "test_images": 20, "tuning_factors": (1.0, 3.0),
}  # fmt: skip


def idx(array: np.ndarray) -> bytes:
    """The bytes of an idx file."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    """A root folder with a miniature MNIST in data/raw/MNIST/raw, which the module takes for the real one.

    Every image is filled with its position in the file; digit d occurs d more times than digit 0.
    """
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    monkeypatch.delenv("METABOOK_DATA", raising=False)
    place = tmp_path / "data" / "raw" / "MNIST" / "raw"
    place.mkdir(parents=True)
    digests = {}
    for split, rarest in (("train", 6), ("test", 3)):
        labels = np.random.default_rng(rarest).permutation(np.repeat(np.arange(10), rarest + np.arange(10)))
        labels = labels.astype(np.uint8)
        images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None], (len(labels), 28, 28)).copy()
        digests[split] = sha256(images, labels)
        for kind, array in (("images", images), ("labels", labels)):
            (place / f"{digits.PARTS[split]}-{digits.KINDS[kind]}").write_bytes(idx(array))
    monkeypatch.setitem(digits.SHA256, "mnist", digests)
    monkeypatch.setattr(digits, "import_torchvision", no_network)
    return place


def no_network():
    def download(*_, **__):
        raise OSError("no network")

    return types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=download))


def labels_of(place, split):
    return np.frombuffer((place / f"{digits.PARTS[split]}-{digits.KINDS['labels']}").read_bytes()[8:], np.uint8)


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("test", 3)])
def test_the_first_images_of_each_digit_are_kept(miniature, split, count):
    classes = digits.load(split, "mnist")
    assert classes.images.shape == (10, count, 28, 28) and classes.images.dtype == torch.uint8
    labels = labels_of(miniature, split)
    for digit in range(10):
        assert classes.images[digit, :, 0, 0].tolist() == np.flatnonzero(labels == digit)[:count].tolist()
    assert classes.names == list("0123456789")
    assert classes.provenance == digits.provenance("mnist") | {"split": split}


def test_files_are_found_where_metabook_data_says(miniature, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    miniature.rename(elsewhere)
    assert "no network" in refused(lambda: digits.load("train", "mnist"))
    assert len(digits.load("train", "mnist", folder=elsewhere)) == 10
    monkeypatch.setenv("METABOOK_DATA", str(elsewhere))
    assert digits.find() == elsewhere and len(digits.load("train", "mnist")) == 10


def test_missing_data_says_where_and_how(miniature, tmp_path, monkeypatch):
    (miniature / "t10k-labels-idx1-ubyte").unlink()
    (tmp_path / "nowhere").mkdir()
    monkeypatch.setenv("METABOOK_DATA", str(tmp_path / "nowhere"))
    for message in (
        refused(lambda: digits.load("train", "mnist")),
        refused(lambda: digits.load("train", "mnist", download=False)),
    ):
        assert "t10k-labels-idx1-ubyte" in message and "METABOOK_DATA" in message
        assert str(tmp_path / "nowhere") in message and str(miniature) in message
    assert not list((tmp_path / "nowhere").iterdir())


def test_a_folder_of_data_that_is_none_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("METABOOK_DATA", str(tmp_path / "nowhere"))
    assert "METABOOK_DATA names" in refused(lambda: digits.load("train", "mnist"))


def test_a_download_is_laid_where_it_is_found(miniature, monkeypatch):
    kept = {file.name: file.read_bytes() for file in miniature.iterdir()}
    for file in miniature.iterdir():
        file.unlink()

    def download(folder, download):
        raw = miniature.__class__(folder) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, content in kept.items():
            (raw / name).write_bytes(content)

    torchvision = types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=download))
    monkeypatch.setattr(digits, "import_torchvision", lambda: torchvision)
    assert len(digits.load("test", "mnist")) == 10
    assert {file.name for file in miniature.iterdir()} == set(kept)
    assert [entry.name for entry in miniature.parent.iterdir()] == ["raw"]  # nothing of the download is left


@pytest.mark.parametrize("damage", ["pixel", "short", "header", "empty"])
def test_damaged_files_are_named(miniature, damage):
    file = miniature / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    if damage == "pixel":
        content[-1] ^= 1
    elif damage == "header":
        content[2] = 13
    file.write_bytes({"short": content[:-5], "empty": b""}.get(damage, content))
    message = refused(lambda: digits.load("train", "mnist"))
    assert str(miniature) in message and "train-images" in message and "delete" in message
    assert len(digits.load("test", "mnist")) == 10


def test_unknown_names_are_refused():
    assert "'tset'" in refused(lambda: digits.load("tset"))
    assert "'emnist'" in refused(lambda: digits.load("train", "emnist"))
    assert "'emnist'" in refused(lambda: digits.provenance("emnist"))


def test_small_digits():
    train, test = digits.load("train"), digits.load("test")
    assert train.images.shape == (10, 124, 8, 8) and test.images.shape == (10, 50, 8, 8)
    assert train.images.min() == 0 and train.images.max() == 255
    assert torch.equal(train.images, digits.load("train").images)
    # A one is ink in the middle columns, a zero is paper there: the classes are in the order of the digits.
    middle = test.images[:, :, 2:6, 3:5].float().mean((1, 2, 3))
    assert middle[1] > 2 * middle[0]
    from sklearn.datasets import load_digits

    found = load_digits()
    for digit in range(10):  # the two parts are disjoint pieces of what is there, image by image
        here = [image.tobytes() for image in np.rint(found.images[found.target == digit] * 255 / 16).astype(np.uint8)]
        mine = [image.numpy().tobytes() for image in chain(train.images[digit], test.images[digit])]
        assert len(set(here)) == len(here) and len(set(mine)) == 174 and set(mine) <= set(here)


@pytest.mark.records
@pytest.mark.skipif(digits.find() is None, reason="MNIST is not here")
def test_the_real_mnist():
    train, test = digits.load("train", "mnist", download=False), digits.load("test", "mnist", download=False)
    assert train.images.shape == (10, 5421, 28, 28) and test.images.shape == (10, 892, 28, 28)


@pytest.mark.parametrize("train", [1, 2, 3, 4])
def test_held_out_pairs_share_no_digit_with_training_pairs(train):
    for seed in range(20):
        seen, held_out = digits.pairs(seed, train)
        assert len(seen) == train and len(held_out) == 5 - train
        assert sorted(chain(*seen, *held_out)) == list(range(10))  # so each digit is in one pair only
        assert digits.pairs(seed, train) == (seen, held_out)


def test_five_seeds_train_on_five_pairs_without_a_common_digit():
    for first in (0, 5):
        assert sorted(chain(*(digits.pairs(first + seed)[0][0] for seed in range(5)))) == list(range(10))
    assert digits.pairs(0) != digits.pairs(5)


@pytest.mark.parametrize("train", [0, 5, True, 1.0])
def test_impossible_numbers_of_pairs_are_refused(train):
    assert "at least 1 and at most 4" in refused(lambda: digits.pairs(0, train))


def numbered(instances=12):
    """Images that say which they are: pixel 0 is the digit, pixel 1 the instance."""
    images = torch.zeros(10, instances, 1, 3, dtype=torch.uint8)
    images[..., 0, 0], images[..., 0, 1] = torch.arange(10)[:, None], torch.arange(instances)
    images[..., 0, 2] = 255
    return images


def test_tasks_are_balanced_disjoint_and_labelled_in_the_order_of_the_pair():
    family = digits.DigitPairs(numbered(), ((3, 1), (0, 7)), shots=6, queries=10)
    tasks = family.sample(50, generator(0))
    assert tasks.support.x.shape == (50, 6, 3) and tasks.query.x.shape == (50, 10, 3)
    assert tasks.support.x.dtype == torch.float32 and (tasks.support.x[..., 2] == 1).all()
    met = set()
    for t in range(50):
        x = torch.cat([tasks.support.x[t], tasks.query.x[t]])
        y = torch.cat([tasks.support.y[t], tasks.query.y[t]])
        rows = [tuple(round(v) for v in (255 * row[:2]).tolist()) for row in x]
        assert len(set(rows)) == 16
        pair = tuple({digit for (digit, _), label in zip(rows, y.tolist(), strict=True) if label == k} for k in (0, 1))
        met.add(tuple(digit for one in pair for digit in one))
        assert tasks.support.y[t].sum() == 3 and tasks.query.y[t].sum() == 5
    assert met == {(3, 1), (0, 7)}


def test_all_randomness_comes_from_the_generator():
    family = digits.DigitPairs(numbered(), ((3, 1), (0, 7)), 2, 4)
    torch.manual_seed(0)
    one = family.sample(5, generator(1))
    torch.manual_seed(1)
    same, other = family.sample(5, generator(1)), family.sample(5, generator(2))
    assert torch.equal(one.support.x, same.support.x) and torch.equal(one.query.y, same.query.y)
    assert not torch.equal(one.support.x, other.support.x)


def test_impossible_tasks_are_refused():
    images, pairs = numbered(), ((0, 1),)
    assert "uint8" in refused(lambda: digits.DigitPairs(images.float(), pairs, 2, 2))
    assert "at least one pair" in refused(lambda: digits.DigitPairs(images, (), 2, 2))
    assert "not 4 and 4" in refused(lambda: digits.DigitPairs(images, ((4, 4),), 2, 2))
    assert "not 4 and 10" in refused(lambda: digits.DigitPairs(images, ((4, 10),), 2, 2))
    assert "height, width" in refused(lambda: digits.DigitPairs(images[..., :0], pairs, 2, 2))
    assert "shots" in refused(lambda: digits.DigitPairs(images, pairs, 3, 2))
    assert "queries" in refused(lambda: digits.DigitPairs(images, pairs, 2, 0))
    assert "need 13 images" in refused(lambda: digits.DigitPairs(images, pairs, 12, 14))
    assert len(digits.DigitPairs(images, pairs, 12, 12).sample(1, generator(0)).query.y[0]) == 12
    family = digits.DigitPairs(images, pairs, 2, 2)
    assert "at least 1" in refused(lambda: family.sample(0, generator(0)))


def test_lenet_is_the_public_codes_network():
    """Against the same layers as modules; one image at a time, many at once, and under vmap with weights of its own."""
    model = LeNet()
    params = model.init(generator(0), torch.float64)
    assert sum(value.numel() for value in params.values()) == 21_432
    modules = torch.nn.Sequential(
        torch.nn.Conv2d(1, 10, 5), torch.nn.MaxPool2d(2), torch.nn.ReLU(),
        torch.nn.Conv2d(10, 20, 5), torch.nn.MaxPool2d(2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(320, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2),
    ).double()  # fmt: skip
    for (name, value), slot in zip(params.items(), modules.parameters(), strict=True):
        bound = slot.abs().max()
        assert 0.5 < value.abs().max() / bound < 2, name  # drawn as PyTorch draws them
        slot.data = value.T if name in ("linear1.weight", "linear2.weight") else value
    x = torch.rand(4, 784, generator=generator(1), dtype=torch.float64)
    outputs = model(params, x)
    torch.testing.assert_close(outputs, modules(x.view(4, 1, 28, 28)), rtol=1e-10, atol=1e-12)
    other = {name: 2 * value for name, value in params.items()}
    both = vmap(model)({name: torch.stack([params[name], other[name]]) for name in params}, torch.stack([x, x]))
    torch.testing.assert_close(both, torch.stack([outputs, model(other, x)]), rtol=1e-10, atol=1e-12)
    assert "28×28" in refused(lambda: LeNet(side=8))


def test_minibatches_are_descended_in_turn():
    experiment = Digits("t", **SMALL)
    model = experiment.model(6)
    learner, draws = experiment.learner(model), generator(0)
    theta, start = learner.init(draws, torch.float64), model.init(draws, torch.float64)
    x = torch.randn(3, 4, 6, generator=draws, dtype=torch.float64)
    y = torch.randint(2, (3, 4), generator=draws)
    plain = LossDescent(model, cross_entropy, experiment.inner_rate, learned=learner.learned)
    phi = start
    for batch in range(3):
        phi = plain.adapt(theta, Examples(x[batch], y[batch]), start=phi)
    for name, value in learner.adapt(theta, Examples(x, y), start=start).items():
        assert torch.equal(value, phi[name])
    assert isinstance(learner, MinibatchLossDescent)


def test_the_meta_gradient_through_minibatches():
    experiment = Digits("t", **SMALL, inner_steps=3, inner_rate=0.5)
    learner, draws = experiment.learner(experiment.model(6)), generator(0)
    theta, start = learner.init(draws, torch.float64), learner.model.init(draws, torch.float64)
    x, y = torch.randn(3, 4, 6, generator=draws, dtype=torch.float64), torch.randint(2, (3, 4), generator=draws)

    def objective(theta):
        return learner.query_loss(learner.adapt(theta, Examples(x, y), start=start), Examples(x[0], y[0]))

    assert error(grad(objective)(theta), central_differences(objective, theta)) <= 1e-5


@pytest.fixture(scope="module")
def run():
    return Digits("t", **SMALL, inner_steps=2).setup(torch.device("cpu"), False)


def test_every_seed_descends_its_own_loss_on_its_own_pairs(run):
    theta = run.init(generator(0))
    assert all(name.startswith(LOSS) and len(value) == 2 for name, value in theta.items())
    gradient, loss = run.gradient(theta, generator(1), 0)
    assert gradient.keys() == theta.keys() and 0.3 < loss < 1.5
    again, _ = run.gradient(theta, generator(1), 0)
    changed = {name: torch.stack([value[0], 2 * value[1]]) for name, value in theta.items()}
    other, _ = run.gradient(changed, generator(1), 0)
    for name in theta:
        assert torch.equal(gradient[name], again[name])
        torch.testing.assert_close(gradient[name][0], other[name][0])  # the seeds do not see each other
        assert not torch.allclose(gradient[name][1], other[name][1])
    assert run.families[0].pairs == digits.pairs(0)[0] and run.families[1].pairs == digits.pairs(1)[0]


def test_every_task_has_a_fresh_optimizee_unless_one_start_is_asked_for(run):
    def different(run, draws):
        starts = [run.starts(draws)["linear1.weight"] for _ in range(2)]
        assert all(start.shape == (2, 3, 64, 8) for start in starts)
        return len({value.sum().item() for start in starts for value in start.flatten(0, 1)})

    same = Digits("t", **SMALL, one_start=True).setup(torch.device("cpu"), False)
    assert different(run, generator(0)) == 12 and different(same, generator(0)) == 2


def test_metrics_are_named_finite_and_the_same_on_every_call(run):
    theta = run.init(generator(0))
    metrics = run.evaluate(theta)
    assert next(iter(metrics)) == "ml3_accuracy" and metrics["ml3_accuracy"] == metrics["ml3_accuracy_3"]
    for kind in ("ml3", "ce", "ml3_tuned", "ce_tuned"):
        for steps in (0, 1, 3):
            for name in (f"{kind}_{{}}_{steps}", f"{kind}_{{}}_{steps}_train_pair", f"arch_{kind}_{{}}_{steps}"):
                assert 0 <= metrics[name.format("accuracy")].value <= 1
                assert math.isfinite(metrics[name.format("loss")].value) and metrics[name.format("loss")].n == 2
        assert metrics[f"{kind}_loss_0"] == metrics["ce_loss_0"]  # the same networks before they learn
    spot = run.spot_check(theta)
    assert spot and all(metrics[name] == value for name, value in spot.items()) and spot.keys() < metrics.keys()
    assert metrics == run.evaluate(theta)


def test_descending_the_cross_entropy_helps_and_tuning_helps_more(run):
    training_pairs, held_out = zip(*run.pairs, strict=True)
    plain = GradientDescent(run.model, cross_entropy, 1.0)
    slow, fast = (run.curves(plain, {}, rate, held_out, run.test)[0] for rate in (0.001, 0.3))
    assert slow.shape == (2, 3, 2)
    assert (fast[1, -1] < slow[1, -1] - 0.01).all() and torch.equal(fast[:, 0], slow[:, 0])
    each = run.curves(plain, {}, torch.tensor([0.001, 0.3]), held_out, run.test)[0]  # a rate for each seed
    torch.testing.assert_close(each, torch.stack([slow[..., 0], fast[..., 1]], -1))
    only = run.curves(plain, {}, 0.3, held_out, run.test, (3,))[0]
    torch.testing.assert_close(only[:, 0], fast[:, -1])
    tuned = run.tuned(plain, {}, training_pairs, (0.001, 0.3))
    assert tuned.keys() == {0, 1, 3} and (tuned[3] == 0.3).all()


def test_a_loss_without_slope_changes_nothing(run):
    held_out = [pairs for _, pairs in run.pairs]
    theta = {name: torch.zeros_like(value) for name, value in run.init(generator(0)).items()}
    still = run.curves(run.learner, theta, 1.0, held_out, run.test)[0]
    assert torch.equal(still[:, 0], still[:, -1])


def test_what_diverges_has_a_number(run):
    held_out = [pairs for _, pairs in run.pairs]
    curves = run.curves(run.learner, run.init(generator(0)), 1e30, held_out, run.test)[0]
    assert (curves[1, -1] == DIVERGED).all() and curves.isfinite().all()


def test_the_spot_check_is_the_first_network(run):
    theta = run.init(generator(0))
    spot = run.spot_check(theta)
    both = run.curves(run.learner, theta, run.experiment.inner_rate, [pairs for _, pairs in run.pairs], run.test)
    assert both.shape == (2, 2, 3, 2) and not torch.equal(both[0], both[1])
    for steps, values in zip((0, 1, 3), both[0, 1], strict=True):
        assert spot[f"spot_ml3_loss_{steps}"].value == pytest.approx(values.mean().item())


def test_training_writes_a_record(tmp_path):
    experiment = Digits("digits-smoke", **SMALL | {"test_steps": (0, 1)})
    quiet = {"data": tmp_path, "progress": False, "say": lambda line: None}
    record = training.train(experiment, **quiet)
    assert record["status"] == "complete" and record["metrics"]["ml3_accuracy"]["n"] == 2
    assert record["provenance"]["data"] == digits.provenance("digits")
    assert len(record["curve"]) == 1
    theta = checkpoints.load_theta("digits-smoke", tmp_path / "checkpoints")
    fresh = experiment.setup(torch.device("cpu"), False).init(generator(0))
    assert any(not torch.equal(theta[name], fresh[name]) for name in fresh)


def test_the_experiments_are_told_apart():
    found = experiments()
    assert len({e.name for e in found}) == len(found) <= 3 and all(e.paper == "ml3" for e in found)
    assert found[0].name == "ml3-mnist" and found[0].inner_rate == 1e-3 and found[0].inner_steps == 1
    assert "'gru'" in refused(lambda: Digits("t", architecture="gru"))
