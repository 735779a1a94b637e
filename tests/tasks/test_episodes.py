"""Few-shot episodes: what a task consists of, that draws are fair and repeatable, and that bad numbers are refused."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from helpers.tasks.episodes import FewShot
from helpers.tasks.images import ImageClasses, rotations
from helpers.types import Examples, Tasks


def coded_images(classes: int, instances: int, size: int = 4) -> torch.Tensor:
    """Images whose first pixel is the class and whose second is the instance, so that a task can be read back."""
    images = torch.zeros(classes, instances, size, size, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(classes, dtype=torch.uint8)[:, None]
    images[..., 0, 1] = torch.arange(instances, dtype=torch.uint8)
    return images


def read_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes and instances of ``x`` ``[T, n, 1, h, w]``."""
    codes = (x * 255).round().long()
    return codes[:, :, 0, 0, 0], codes[:, :, 0, 0, 1]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes_types_and_range():
    tasks = FewShot(torch.randint(0, 256, (30, 20, 28, 28), dtype=torch.uint8), ways=5, shots=2, queries=3).sample(
        7, generator()
    )
    assert isinstance(tasks, Tasks) and isinstance(tasks.support, Examples)
    assert tasks.support.x.shape == (7, 10, 1, 28, 28) and tasks.query.x.shape == (7, 15, 1, 28, 28)
    assert tasks.support.y.shape == (7, 10) and tasks.query.y.shape == (7, 15)
    for part in tasks:
        assert part.x.dtype == torch.float32 and part.y.dtype == torch.int64
        assert part.x.min() >= 0 and part.x.max() <= 1
        assert part.x.is_contiguous() and part.y.is_contiguous()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32))
def test_a_task_is_what_the_documentation_says(ways, shots, queries, n_tasks, seed):
    classes, instances = 8, 10
    tasks = FewShot(coded_images(classes, instances), ways, shots, queries).sample(n_tasks, generator(seed))
    support_class, support_instance = (a.unflatten(1, (ways, shots)) for a in read_back(tasks.support.x))
    query_class, query_instance = (a.unflatten(1, (ways, queries)) for a in read_back(tasks.query.x))
    labels = torch.arange(ways)
    assert (tasks.support.y == labels.repeat_interleave(shots)).all()  # class by class, each label equally often
    assert (tasks.query.y == labels.repeat_interleave(queries)).all()
    for t in range(n_tasks):
        assert len(support_class[t, :, 0].unique()) == ways  # classes without replacement
        for way in range(ways):
            assert (support_class[t, way] == support_class[t, way, 0]).all()
            assert (query_class[t, way] == support_class[t, way, 0]).all()  # a label means one class in both parts
            drawn = torch.cat([support_instance[t, way], query_instance[t, way]])
            assert len(drawn.unique()) == shots + queries  # no image twice, none in both parts


def test_same_generator_state_same_tasks():
    family = FewShot(coded_images(50, 20), 5, 1, 1)
    first, again, other = family.sample(8, generator(3)), family.sample(8, generator(3)), family.sample(8, generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first.support + first.query, again.support + again.query, strict=True))
    assert not torch.equal(first.support.x, other.support.x)
    one = generator(3)
    assert not torch.equal(family.sample(8, one).support.x, family.sample(8, one).support.x)  # the state moves on


def test_no_global_randomness():
    family = FewShot(coded_images(50, 20), 5, 1, 1)
    before = torch.random.get_rng_state()
    family.sample(8, generator())
    assert torch.equal(before, torch.random.get_rng_state())


def test_draws_are_uniform():
    """Each class, each instance, and each label of a class equally often: chi-square below its 1 - 1e-6 quantile."""
    from scipy.stats import chi2

    classes, instances, ways, n_tasks = 12, 6, 4, 6000
    tasks = FewShot(coded_images(classes, instances), ways, 1, 2).sample(n_tasks, generator(11))
    drawn, instance = read_back(tasks.support.x)
    query_instance = read_back(tasks.query.x)[1]

    def statistic(values: torch.Tensor, cells: int) -> float:
        counts = torch.bincount(values.flatten(), minlength=cells).double()
        expected = values.numel() / cells
        return float(((counts - expected) ** 2 / expected).sum())

    quantile = 1 - 1e-6
    assert statistic(drawn, classes) < chi2.ppf(quantile, classes - 1)
    assert statistic(drawn * ways + tasks.support.y, classes * ways) < chi2.ppf(quantile, classes * ways - 1)
    assert statistic(instance, instances) < chi2.ppf(quantile, instances - 1)
    assert statistic(query_instance, instances) < chi2.ppf(quantile, instances - 1)
    pair = drawn[:, 0] * classes + drawn[:, 1]  # pairs of classes meet equally often
    counts = torch.bincount(pair, minlength=classes**2).double().view(classes, classes)
    assert counts.diagonal().sum() == 0
    expected = n_tasks / (classes * (classes - 1))
    off_diagonal = counts[~torch.eye(classes, dtype=torch.bool)]
    assert float(((off_diagonal - expected) ** 2 / expected).sum()) < chi2.ppf(quantile, classes * (classes - 1) - 1)


def test_all_classes_and_all_instances_can_be_used_up():
    tasks = FewShot(coded_images(5, 4), ways=5, shots=1, queries=3).sample(10, generator())
    assert (read_back(tasks.support.x)[0].sort(1).values == torch.arange(5)).all()


def test_a_draw_is_fast():
    """About 1.5 ms on one thread; the bound is loose because other processes may share the machine."""
    family = FewShot(torch.zeros(4800, 20, 28, 28, dtype=torch.uint8), 5, 1, 1)
    one = generator()
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        family.sample(32, one)
        best = min(best, time.perf_counter() - start)
    assert best < 0.02


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((9, 1, 1), "9-way"),
        ((5, 5, 6), "5 shots and 6 queries"),
        ((0, 1, 1), "ways"),
        ((5, 0, 1), "shots"),
        ((5, 1, 0), "queries"),
        ((5, 1, -3), "queries"),
        ((5, 1.0, 1), "shots"),
        ((True, 1, 1), "ways"),
    ],
)
def test_bad_numbers(numbers, says):
    assert says in refused(lambda: FewShot(coded_images(8, 10), *numbers))


def test_bad_images():
    assert "float32" in refused(lambda: FewShot(torch.zeros(8, 10, 28, 28), 5, 1, 1))
    assert "[8, 28, 28]" in refused(lambda: FewShot(torch.zeros(8, 28, 28, dtype=torch.uint8), 5, 1, 1))
    assert "list" in refused(lambda: FewShot([1, 2], 5, 1, 1))
    assert "[8, 10, 0, 0]" in refused(lambda: FewShot(torch.zeros(8, 10, 0, 0, dtype=torch.uint8), 5, 1, 1))


def test_whole_numbers_of_numpy():
    found = FewShot(coded_images(8, 10), *map(np.int64, (5, 1, 2))).sample(np.int64(3), generator())
    expected = FewShot(coded_images(8, 10), 5, 1, 2).sample(3, generator())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


@pytest.mark.parametrize("n_tasks", [0, -1, 2.0, True])
def test_bad_number_of_tasks(n_tasks):
    assert "tasks" in refused(lambda: FewShot(coded_images(8, 10), 5, 1, 1).sample(n_tasks, generator()))


def test_generator_on_another_device():
    family = FewShot(torch.zeros(8, 10, 4, 4, dtype=torch.uint8, device="meta"), 5, 1, 1)
    assert "generator" in refused(lambda: family.sample(2, generator()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_everything_stays_there():
    family = FewShot(coded_images(8, 10).cuda(), 5, 1, 1)
    tasks = family.sample(4, torch.Generator("cuda").manual_seed(0))
    assert all(tensor.is_cuda for part in tasks for tensor in part)


# ---------------------------------------- colours, and classes that differ in size


def coloured(counts: list[int]) -> list[torch.Tensor]:
    """Images in three channels; red is the class, green the instance."""
    images = [torch.zeros(count, 3, 4, 4, dtype=torch.uint8) for count in counts]
    for number, one in enumerate(images):
        one[:, 0], one[:, 1] = number, torch.arange(len(one), dtype=torch.uint8).view(-1, 1, 1)
    return images


def test_colours_are_channels():
    even = torch.stack(coloured([6] * 5))
    tasks = FewShot(even, 3, 1, 2).sample(4, generator())
    assert tasks.query.x.shape == (4, 6, 3, 4, 4)
    grey = FewShot(coded_images(5, 6), 3, 1, 2).sample(4, generator())
    assert torch.equal((tasks.query.x[:, :, 0, 0, 0] * 255).round(), read_back(grey.query.x)[0].float()), "same draws"


def test_a_list_of_even_classes_draws_what_a_tensor_draws():
    images = coded_images(8, 10)
    one, other = (FewShot(i, 5, 1, 2).sample(3, generator(7)) for i in (images, list(images)))
    assert torch.equal(one.support.x, other.support.x) and torch.equal(one.query.x, other.query.x)


def test_uneven_classes_are_drawn_without_replacement_and_evenly():
    counts = [5, 9, 40, 6, 5]
    tasks = FewShot(coloured(counts), 3, 2, 3).sample(4000, generator(3))
    x = (torch.cat([tasks.support.x, tasks.query.x], 1)[..., 0, 0] * 255).round().long()
    cls, instance = x[:, :, 0], x[:, :, 1]
    label = torch.cat([tasks.support.y, tasks.query.y], 1)
    assert (instance < torch.tensor(counts)[cls]).all(), "an instance of its own class"
    order = label.argsort(dim=1, stable=True)
    cls, instance = (v.gather(1, order).unflatten(1, (3, 5)) for v in (cls, instance))
    assert (cls == cls[..., :1]).all()
    assert (instance.sort(-1).values.diff(dim=-1) > 0).all(), "no image twice"
    shares = torch.bincount(cls[..., 0].flatten(), minlength=5) / (4000 * 3)
    assert (shares - 0.2).abs().max() < 0.015, "each class as likely as any other, whatever its size"
    drawn = torch.bincount(instance[cls == 2].flatten(), minlength=40).double()
    assert (drawn / drawn.mean() - 1).abs().max() < 0.25, "each image of a class as likely as any other"


def test_classes_that_are_too_small_are_named():
    names = ["cat", "dog", "emu", "fox"]
    classes = ImageClasses(tuple(coloured([9, 3, 9, 2])), names, [""] * 4, {})
    assert refused(lambda: FewShot(classes, 2, 1, 4)) == (
        "1 shots and 4 queries need 5 images of a class, but dog has 3 and fox has 2: choose fewer, "
        "or leave the small classes out"
    )
    assert FewShot(classes.select(["emu", "cat"]), 2, 1, 4).sample(1, generator()).query.x.shape[1] == 8
    assert "class 1 has 3" in refused(lambda: FewShot(coloured([9, 3, 9, 2]), 2, 1, 4))
    assert "and 2 more have fewer as well" in refused(lambda: FewShot(coloured([9] + [1] * 7), 2, 1, 4))


def test_images_that_do_not_go_together():
    three, one = coloured([4])[0], torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    found = refused(lambda: FewShot([three, one], 2, 1, 1))
    assert "not a list of torch.uint8 of shape [n, 1, 4, 4] and torch.uint8 of shape [n, 3, 4, 4]" in found
    assert "a list of torch.float32" in refused(lambda: FewShot([three.float()] * 3, 2, 1, 1))
    assert "a list" in refused(lambda: FewShot([], 2, 1, 1))


@pytest.mark.parametrize("images", [coded_images(3, 4), tuple(coloured([4, 5, 6]))])
def test_classes_are_selected_by_name_or_number(images):
    classes = ImageClasses(images, ["alpha", "beta", "gamma"], ["Greek"] * 3, {})
    chosen = classes.select(["gamma", 0])
    assert chosen.names == ["gamma", "alpha"] and torch.equal(chosen.images[0], images[2])
    assert refused(lambda: classes.select(["gama"])).startswith("there is no class 'gama' (did you mean gamma")
    for wrong in (3, -1):
        assert f"there is no class {wrong}: the 3 classes are numbered from 0" in refused(
            lambda wrong=wrong: classes.select([wrong])
        )
    assert classes.to("cpu").names == classes.names
    turned = rotations(classes)
    assert len(turned.images) == 12 and torch.equal(turned.images[4], torch.rot90(images[1], 1, (-2, -1)))
