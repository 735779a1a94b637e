"""Every kind of recorded experiment in miniature on a device that is not the CPU: two iterations, and evaluated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import standin
import torch
from miniatures import MINIATURES, judged_once
from miniatures import little as little  # a fixture

from helpers import experiments, runtime
from helpers.lab import training

SHORT = {"iterations": 2, "evaluate_every": 1}
# On images of glyphs these take the way of others: of their kind on curves, and on images of those that are not here.
ALIKE = {f"ways-ways-glyphs-{method}" for method in ("optimizer", "initialization", "architecture", "scratch")}
ALIKE |= {"comparison-fomaml"}  # MAML's way, by an estimator that maml-mlp has
NAMES = [name for name in MINIATURES if name not in ALIKE]
HALVED = "ways-ways-sinusoid-initialization"  # stored in half precision in the end, as the others would be


@pytest.mark.parametrize("name", NAMES)
def test_two_iterations_and_the_evaluation(name, tmp_path, little, monkeypatch):  # noqa: F811
    if "modelfree" in name:
        pytest.importorskip("stable_baselines3", reason='needs stable-baselines3: pip install -e ".[control]"')
    experiment = MINIATURES[name]()
    settable = {key: value for key, value in SHORT.items() if key in experiment.__dataclass_fields__}
    experiment = replace(experiment, **settable)
    if name != HALVED:
        judged_once(monkeypatch)
    with standin.card():
        record = training.train(experiment, device="cuda", data=tmp_path, progress=False, say=lambda _: None)
    assert record["status"] == "complete" and record["metrics"]
    assert record["provenance"]["slices"][0]["device"] == record["provenance"]["evaluated"]["device"] == "stand-in"


LONG = (
    "nos", "nos-transfer", "imaml", "modelfree", "comparison-maml", "jets-imaml-proportions", "maml-Omniglot",
    "navigation",
)  # fmt: skip


class Late(Exception):
    """What the clock raises."""


@pytest.mark.parametrize("name", LONG)
def test_a_long_iteration_looks_at_the_clock(name, little):  # noqa: F811
    run = MINIATURES[name]().setup(torch.device("cpu"), compiled=False)
    draws = runtime.generator(0)
    theta = run.init(draws)

    def late():
        raise Late

    run.check_clock = late
    with pytest.raises(Late):
        run.gradient(theta, draws, 0)
    del run.check_clock
    run.gradient(theta, draws, 0)


def test_every_module_of_experiments_has_a_miniature():
    kinds = {type(MINIATURES[name]()) for name in NAMES}
    assert {type(e) for e in experiments.catalogue().values()} <= kinds
