"""Every kind of recorded experiment in miniature, on little data."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from helpers import tasks
from helpers.estimators import implicit
from helpers.experiments import (
    ablation,
    imaml,
    imaml_comparison,
    jets,
    jets_cuts,
    jets_matrix,
    maml,
    maml_navigation,
    metanmt,
    ml3,
    ml3_control,
    ml3_digits,
    ml3_modelfree,
    nested,
    nos,
    nos_transfer,
    reptile,
    ways,
)
from helpers.lab import experiment, training
from helpers.numerics import tracing
from helpers.optimizers import children, entries
from helpers.optimizers.rules import PAPER_RULES
from helpers.tasks import glyphs, omniglot, small_images
from helpers.tasks.jets import protocol as jets_protocol
from helpers.tasks.jets import samples

SHORT = {"iterations": 2, "evaluate_every": 1}
JETS = {
    "shots": 2, "seeds": 2, "test_rates": (0.3,), "test_steps": (1,), "test_draws": 1, "test_queries": 10,
    "tuning_queries": 5,
}  # fmt: skip
TAGGING = JETS | {"tagger": "particles", "queries": 4, "bag": 5, "meta_batch": 2, "inner_steps": 1}
WAY = {
    "test_tasks": 3, "validation_tasks": 2, "spot_tasks": 1, "queries": 3, "meta_batch": 2,
    "rates": (0.1,), "steps": (1,), "filters": 4, "minibatch": 4,
}  # fmt: skip
ML3 = {"seeds": 2, "meta_batch": 2, "way": 2, "tuning_rates": (0.01,)}
SINE = ML3 | {"points": 7, "hidden": (5,), "test_tasks": 2, "test_steps": (0, 1, 10), "far": 11}
TURTLES = {
    "test_families": 1, "validation_families": 1, "shifted_families": 1, "test_tasks": 2, "test_queries": 5,
    "families": 2, "steps": 1, "step_tasks": 2, "query_tasks": 2, "hidden": (4,), "seeds": 2, "measured": (0, 1),
    "sgd_rates": (0.1,), "adam_rates": (0.01,), "levels": (1.0,),
}  # fmt: skip
CHILDREN = children.Children(train=100, valid=50, test=50, batch=50, filters=2, epochs=1, chunk=7)


def on_omniglot(kind, **settings):
    return kind("mini", test_tasks=2, **settings)


def way(e, **changes):
    steps = {"inner_steps": min(e.inner_steps, 1), "seeds": 2 if e.family == "sinusoid" else 1}
    return replace(e, name="mini", **WAY | steps | {"sources": min(e.sources, 2), "test_shots": (e.shots,)} | changes)


def comparison(method):
    few = {
        "inner_steps": 1,
        "meta_batch": 1,
        "cost": 2,
        "budget": 4,
        "seeds": 2,
        "filters": 2,
        "test_tasks": 2,
        "cg_steps": 1,
    }
    return replace(next(e for e in imaml_comparison.experiments() if e.method == method), name="mini", queries=1, **few)


IMAML = {"inner_steps": 1, "meta_batch": 1, "chunk": 1, "headline_steps": 1, "test_steps": (1,), "spot_tasks": 1}
IMAML |= {"diagnosed_tasks": 1, "cg_steps": 1}
FAST = {"headline_steps": 1, "test_steps": (1,), "meta_batch": 2}

MINIATURES = {
    **{  # every kind of it there is
        f"maml-{kind.__name__}": lambda kind=kind: on_omniglot(kind, chunk=1, **FAST | {"inner_steps": 2})
        for kind in (maml.Omniglot, *maml.Omniglot.__subclasses__())
    },
    "maml-mlp": lambda: on_omniglot(maml.Omniglot, network="mlp", estimator="fomaml", **FAST),
    "maml-sinusoid": lambda: maml.SinusoidStudy("mini", hidden=(4,), meta_batch=2, test_tasks=3, test_steps=(0, 1, 10)),
    "navigation": lambda: maml_navigation.NavigationStudy(
        "mini", trajectories=3, curvature=2, horizon=5, hidden=(4,), meta_batch=2, seeds=2, test_tasks=3,
        test_trajectories=2, test_steps=(0, 1, 2), tuning_rates=(0.1, 0.5), tuning_tasks=2,
    ),
    "reptile": lambda: on_omniglot(reptile.Omniglot, inner_steps=1, meta_batch=1, test_steps=2, spot_tasks=2),
    "reptile-combinations": lambda: on_omniglot(reptile.Combinations, longest=2, test_steps=1),
    "reptile-sine": lambda: reptile.SineDemo("mini", hidden=(4,), test_tasks=3, test_steps=(0, 1)),
    "imaml": lambda: on_omniglot(imaml.Omniglot, **IMAML),
    "imaml-newton": lambda: on_omniglot(imaml.Omniglot, solver="hessian-free", newton_cg_steps=1, **IMAML),
    **{
        f"comparison-{method}": lambda method=method: comparison(method)
        for method in sorted({e.method for e in imaml_comparison.experiments()})
    },
    "sine": lambda: ml3.SineStudy("mini", **SINE),
    "sine-starts": lambda: ml3.SineStudy("mini", starts=3, **SINE),
    "shaped": lambda: ml3.ShapedSine("mini", points=6, test_tasks=2, seeds=2, meta_batch=2, way=2),
    "inverse": lambda: ml3.InverseDynamics("mini", points=6, hidden=(5,), test_tasks=2, test_steps=(0, 1, 3), **ML3),
    "car": lambda: ml3_control.Car("mini", hidden=3, loss_width=5, test_policies=2, test_steps=(0, 2), **ML3),
    "mass": lambda: ml3_control.Reaching(
        "mini", body="mass", hidden=(4,), loss_width=5, horizon=4, test_goals=2, test_steps=(0, 2), **ML3
    ),
    "arm": lambda: ml3_control.Reaching(
        "mini", hidden=(4,), loss_width=5, horizon=4, test_goals=2, test_steps=(0, 2), goals=1, policies=1,
        members=2, member_hidden=(5, 4), member_epochs=1, rollouts=2, **ML3
    ),
    "digits": lambda: ml3_digits.Digits(
        "mini", images="digits", architecture="mlp", hidden=(8,), seeds=2, meta_batch=3, test_steps=(0, 1),
        test_tasks=2, test_images=20, tuning_factors=(1.0,), tuning_rates=(0.1,),
    ),
    "modelfree": lambda: ml3_modelfree.ModelFree(
        "mini", hidden=(4,), loss_hidden=(5,), trajectories=2, updates=1, goals=2, seeds=2, test_goals=2,
        test_updates=(0, 1), ppo_updates=(0, 1), ppo_settings=((1e-3, 1, 0.9),), ppo_goals=1,
    ),
    "modelfree-reacher": lambda: ml3_modelfree.ModelFree(
        "mini", task="reacher", max_action=0.1, rewards=True, hidden=(4,), loss_hidden=(5,), trajectories=2, updates=1,
        goals=2, seeds=2, test_goals=2, test_updates=(0, 1), ppo_updates=(0, 1), ppo_settings=((1e-3, 1, 0.9),),
        ppo_goals=1,
    ),
    "nos": lambda: nos.Search(
        "mini", CHILDREN, searches=2, proposals=2, rounds=1, ppo_steps=2, iterations=2, population=2, tournament=1,
        recheck=1,
    ),
    "nos-transfer": lambda: nos_transfer.Transfer(
        "mini", rules=(*entries.TABLE[:2], ("rule04", PAPER_RULES[3], "linear")), size=8, train=100, valid=50,
        test=50, batch=50, epochs=1, seeds=2, found=0, chunk=5, rates=(1e-2,),
    ),
    **{
        f"jets-{method}-{inner}": lambda method=method, inner=inner: jets.Tagging(
            "mini", method, inner=inner, given=(inner,), **TAGGING
        )
        for method, inner in (("maml", "labels"), ("maml", "mixture"), ("reptile", "labels"), ("imaml", "proportions"))
    },
    "jets-images": lambda: jets.Tagging("mini", "pooled", zoom=True, **TAGGING | {"tagger": "images"}),
    "jets-matrix": lambda: jets_matrix.Matrix("mini", batch=5, **JETS),
    "jets-cuts": lambda: jets_cuts.Cuts("mini", parts=2, iterations=1),
    "languages": lambda: metanmt.Translation(
        "mini", "fomaml", sources=("de", "fr"), hidden=6, embedding=5, batch=3, count=4, budget=24, seeds=2,
        sizes=(0, 4), queries=5, validation=("ca",), seen=("af",), held=("az",), rates=(1e-2,), steps=(1,),
        fixed=(4, 1e-2, 1),
    ),
    **{
        f"turtles-{kind}": lambda kind=kind: nested.NestedExperiment("mini", kind, **TURTLES)
        for kind in sorted({e.kind for e in nested.experiments()})
    },
    **{f"ways-{e.name}": lambda e=e: way(e) for e in ways.experiments()},
    **{f"combined-{e.name}": lambda e=e: way(e) for e in ablation.experiments()},
}  # fmt: skip


three_parts = cache(glyphs.three_parts)


@cache
def few_glyphs():
    return glyphs.load("train", limit=6)


@cache
def few_jets():
    """The first of every process, shower, split and window."""
    every = samples.load()
    kinds = torch.stack([every.process, every.shower, every.split, every.window], 1)
    kind = kinds.unique(dim=0, return_inverse=True)[1]
    rows = torch.cat([(kind == k).nonzero()[:30, 0] for k in range(int(kind.max()) + 1)])
    return every._map(lambda values: values[rows])


def unrecorded(monkeypatch):
    """Nothing is recorded to be replayed, which takes seconds."""
    monkeypatch.setattr(tracing, "_specialized", lambda function, build: function)
    monkeypatch.setattr(implicit, "linearized", lambda *_, **__: implicit._linearize)


def judged_once(monkeypatch):
    """A finished run stays in single precision: to store half of it evaluates once more, which is alike for all."""
    monkeypatch.setattr(training, "_settle", lambda run, state, metrics, save, say: metrics)


@pytest.fixture
def little(monkeypatch):
    """Little data and short episodes, of the right form, and nothing recorded.

    A spot check that is a whole evaluation is left out: one of those follows at the end.
    """
    unrecorded(monkeypatch)
    monkeypatch.setattr(experiment.Run, "spot_check", lambda run, theta: {})
    monkeypatch.setattr(omniglot, "load", lambda *_, **__: few_glyphs())
    monkeypatch.setattr(omniglot, "provenance", lambda: few_glyphs().provenance)
    images = small_images.images
    monkeypatch.setattr(small_images, "images", lambda data, *rest: images("digits", *rest))
    monkeypatch.setattr(small_images, "provenance", lambda data: {"data": "digits"})
    monkeypatch.setattr(nos_transfer, "child", lambda size, channels: children.child(size, 1, 2))
    monkeypatch.setattr(glyphs, "three_parts", three_parts)
    monkeypatch.setattr(reptile, "BLOCK", 2)
    monkeypatch.setattr(imaml_comparison, "REPTILE_STEPS", 2)
    car, black_box = ml3_control.Car.env, ml3_modelfree.ModelFree.environment
    monkeypatch.setattr(ml3_control.Car, "env", lambda e: replace(car(e), horizon=6, waypoint_until=3))
    monkeypatch.setattr(ml3_modelfree.ModelFree, "environment", lambda e: replace(black_box(e), horizon=5))
    monkeypatch.setattr(tasks.jets, "load", few_jets)
    for where in (jets_protocol, jets_matrix):
        monkeypatch.setattr(where, "WINDOWS", (0, 1, 2))
    monkeypatch.setattr(jets_protocol, "EDGES", jets_protocol.EDGES[:3])
    monkeypatch.setattr(jets_protocol, "TRAIN_WINDOWS", (0,))
    monkeypatch.setattr(jets_protocol, "TRAIN_SHOWERS", ("fsr-one",))
    for name in ("LABELS", "PROPORTIONS", "MIXTURES", "WRONG", "DRIFTED"):
        monkeypatch.setattr(jets, name, tuple(one._replace(size=8) for one in getattr(jets, name)[:1]))
