"""Several processes that compute one meta-gradient together: that of one, up to rounding, or a sentence."""

from __future__ import annotations

import pytest
import torch
from processes import together

import helpers
from helpers import estimators, losses
from helpers.errors import UserError
from helpers.learners import GradientDescent, Proximal
from helpers.models import MLP
from helpers.numerics import ranks
from helpers.tasks import Sinusoids
from helpers.types import Examples, Tasks

COMMON = (MLP((1, 8, 1), activation="tanh"), losses.mean_squared_error, 0.05, 2)
CASES = {
    "maml": (GradientDescent(*COMMON), estimators.maml),
    "fomaml": (GradientDescent(*COMMON), estimators.fomaml),
    "reptile": (GradientDescent(*COMMON), estimators.reptile),
    "imaml": (Proximal(*COMMON, strength=2.0), estimators.imaml()),
    "chunked": (GradientDescent(*COMMON), estimators.chunked(estimators.maml, 2)),
    "traced": (GradientDescent(*COMMON), estimators.traced(estimators.maml)),
}


def gradients(count=5):
    """Of every case, on the same five tasks, as lists."""
    found = {}
    for name, (learner, estimator) in CASES.items():
        draws = helpers.generator(0)
        theta = learner.init(draws, torch.float64)
        tasks = Sinusoids(4, 6).sample(count, draws)
        tasks = Tasks(*(Examples(part.x.double(), part.y.double()) for part in tasks))
        gradient, query = estimators.divided(estimator)(learner, theta, tasks)
        found[name] = {key: value.tolist() for key, value in gradient.items()} | {"losses": query.tolist()}
    return found


@pytest.fixture(scope="module")
def alone():
    return gradients()


@pytest.mark.parametrize("count", [2, 3])
def test_the_meta_gradient_is_that_of_one_process(count, alone):
    """Five tasks, so that no rank has as many as another."""
    for found in together(count, gradients):
        for case, parts in alone.items():
            for name, value in parts.items():
                torch.testing.assert_close(torch.tensor(found[case][name]), torch.tensor(value), rtol=1e-10, atol=1e-12)


def test_all_ranks_have_the_same_to_the_last_bit():
    first, second = together(2, gradients)
    assert first == second


def test_fewer_tasks_than_processes_are_refused():
    first, second = together(2, lambda: gradients(1))
    assert first == ("UserError", "2 processes cannot share 1 tasks: start at most 1")
    assert second == ("SystemExit", "2")  # one sentence is enough


def exchange():
    yes = ranks.any_of(ranks.number() == 1), ranks.any_of(False)
    told = ranks.told(lambda: f"from {ranks.number()}")
    sums = ranks.summed([torch.ones(2), torch.full((3,), 2.0, dtype=torch.float64), torch.ones(())])
    return yes, told, [one.tolist() for one in sums], [one.dtype for one in sums]


def test_what_the_ranks_say_to_each_other():
    expected = (True, False), "from 0", [[2, 2], [4, 4, 4], 2], [torch.float32, torch.float64, torch.float32]
    assert together(2, exchange) == [expected, expected]


def test_alone_nothing_is_exchanged():
    assert (ranks.count(), ranks.number(), ranks.any_of(True), ranks.any_of(False)) == (1, 0, True, False)
    parts = [torch.ones(2)]
    assert ranks.summed(parts) is parts and ranks.told(lambda: 5) == 5
    with ranks.joined():
        assert ranks.count() == 1


def fails():
    def wrong():
        raise UserError("the first one cannot")

    ranks.told(wrong)


def test_what_fails_on_the_first_fails_on_all():
    assert together(2, fails) == [("UserError", "the first one cannot"), ("SystemExit", "2")]


def test_processes_that_cannot_meet(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "x"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="the processes cannot meet .*: start them by torchrun"), ranks.joined():
        pass


@pytest.mark.parametrize(("asked", "expected"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_each_process_of_a_machine_has_a_gpu_of_its_own(asked, expected, monkeypatch):
    assert ranks.own_device(torch.device(asked)) == torch.device(asked)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks.own_device(torch.device(asked)) == torch.device(expected)
