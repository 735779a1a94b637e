"""Languages as tasks: error rates by hand, the estimators' gradients, fine-tuning, and one experiment end to end."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers.errors import UserError
from helpers.estimators.equal_cost import method
from helpers.estimators.explicit import maml
from helpers.experiments import catalogue, metanmt
from helpers.experiments.metanmt import TEST_SEED, Translation
from helpers.lab import checkpoints, records, training
from helpers.lab.translation import KINDS
from helpers.learners.descent import GradientDescent
from helpers.learners.fine_tuning import FineTuning
from helpers.learners.minibatch import MinibatchAdam
from helpers.models.layers import stacked
from helpers.models.seq2seq import Seq2Seq, translation_loss
from helpers.runtime import generator
from helpers.tasks import names
from helpers.tasks.batches import minibatches
from helpers.tasks.names import LONGEST, VOCABULARY, LanguageTasks
from helpers.tasks.spelling import edit_distance, errors
from helpers.types import Examples, Tasks

SMALL = Translation(
    "languages-small", "fomaml", sources=("de", "fr"), hidden=6, embedding=5, batch=3, count=4, budget=24, seeds=2,
    sizes=(0, 4, 8), queries=5, validation=("ca",), seen=("af",), held=("az", "mi"), rates=(1e-3, 1e-2), steps=(1, 2),
    fixed=(4, 1e-2, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return names.load()


@pytest.mark.parametrize(
    "one, other, distance",
    [
        ("", "", 0), ("a", "", 1), ("", "abc", 3), ("same", "same", 0), ("kitten", "sitting", 3),
        ("flaw", "lawn", 2), ("germany", "german", 1), ("ab", "ba", 2), ("österreich", "osterreich", 1),
    ],
)  # fmt: skip
def test_edit_distance_by_hand(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


def test_errors_by_hand():
    assert errors(["vienna", "rom"], ["vienna", "rome"]) == (0.1, 0.5)
    assert errors(["", ""], ["ab", "cd"]) == (1, 0)
    assert errors(["abcdef"], ["xy"]) == (3, 0)  # more edits than letters
    for wrong in ((["a"], ["a", "b"]), ([], []), ([""], [""])):
        with pytest.raises(UserError, match="translations cannot be held against"):
            errors(*wrong)


@pytest.mark.parametrize("name", ["transfer", "fomaml", "reptile"])
def test_gradient_by_finite_differences(name, library):
    """Of the losses that each method goes down, its inner gradient held where it is; and what a step of it costs."""
    model = Seq2Seq(VOCABULARY, LONGEST, hidden=3, embedding=3)
    learner, estimator, size = method(name, model, translation_loss, batch=2, inner_rate=0.5, count=4)
    count = size.pop("tasks")
    assert count * sum(size.values()) == 8  # names, and so gradients: the same for all
    tasks = LanguageTasks(library, ("de", "lt"), **size).sample(count, generator(0))
    theta = model.init(generator(1), torch.float64)
    gradient, values = estimator(learner, theta, tasks)

    def loss(params, examples, task):
        return translation_loss(model(params, examples.x[task]), examples.y[task])

    inner = []
    for task in range(count if name != "transfer" else 0):
        at = {key: value.clone().requires_grad_() for key, value in theta.items()}
        found = torch.autograd.grad(loss(at, tasks.support, task), list(at.values()))
        inner.append(dict(zip(at, found, strict=True)))

    def objective(theta):
        total = 0.0
        for task in range(count):
            phi = theta if name == "transfer" else {n: v - 0.5 * inner[task][n] for n, v in theta.items()}
            total += loss(phi, tasks.query, task).item()
            total += loss(theta, tasks.support, task).item() if name == "reptile" else 0
        return total / count

    way = {key: torch.randn(value.shape, generator=generator(2), dtype=value.dtype) for key, value in theta.items()}
    h = 1e-5
    ahead, back = (objective({key: value + s * h * way[key] for key, value in theta.items()}) for s in (1, -1))
    assert (ahead - back) / (2 * h) == pytest.approx(sum((gradient[k] * way[k]).sum().item() for k in way), rel=1e-7)
    assert values.shape == (count,)


def test_exact_meta_gradient_by_finite_differences(library):
    """MAML through one inner step of the translating network: second derivatives of recurrence and attention."""
    model = Seq2Seq(VOCABULARY, LONGEST, hidden=3, embedding=3)
    learner = GradientDescent(model, translation_loss, 0.5, steps=1)
    tasks = LanguageTasks(library, ("de", "lt"), support=2, query=2).sample(2, generator(0))
    theta = model.init(generator(1), torch.float64)
    gradient, _ = maml(learner, theta, tasks)
    way = {key: torch.randn(value.shape, generator=generator(2), dtype=value.dtype) for key, value in theta.items()}
    h = 1e-5
    ahead, back = (
        maml(learner, {key: value + s * h * way[key] for key, value in theta.items()}, tasks)[1].mean() for s in (1, -1)
    )
    expected = sum((gradient[key] * way[key]).sum() for key in way).item()
    assert ((ahead - back) / (2 * h)).item() == pytest.approx(expected, rel=1e-7)


def test_fine_tuning_is_adam_on_each_language_and_seed(library):
    model = Seq2Seq(VOCABULARY, LONGEST, hidden=4, embedding=3)
    starts = [model.init(generator(seed), torch.float64) for seed in range(2)]
    tables = [names.rows(names.taken_apart(library, code, 6, 5)["support"]) for code in ("ro", "tr", "zu")]
    support = Examples(*(torch.stack(tensors) for tensors in zip(*tables, strict=True)))
    tuner = FineTuning(model, translation_loss, TEST_SEED)
    once, twice = list(tuner.path(stacked(starts), support, 0.01, (1, 2)))
    (direct,) = tuner.path(stacked(starts), support, 0.01, (2,))
    learner = MinibatchAdam(model, translation_loss, 0.01, carry=False)
    for s, start in enumerate(starts):
        for i, table in enumerate(tables):
            phi = learner.adapt(start, Examples(table.x[None], table.y[None]))  # six names are one minibatch
            again = learner.step({}, phi, table)
            for key in start:
                torch.testing.assert_close(once[key][3 * s + i], phi[key], rtol=1e-7, atol=1e-9)
                torch.testing.assert_close(twice[key][3 * s + i], again[key], rtol=1e-6, atol=1e-8)
                assert torch.equal(twice[key], direct[key])
    (none,) = tuner.path(stacked(starts), support, 0.01, (0,))
    assert all(torch.equal(none[key][3], starts[1][key]) for key in starts[1])
    shares = tuner.accuracy(none, support)
    assert shares.shape == (6,) and ((0 <= shares) & (shares <= 1)).all()


def test_fine_tuning_goes_from_minibatch_to_minibatch(library):
    model = Seq2Seq(VOCABULARY, LONGEST, hidden=4, embedding=3)
    start = model.init(generator(0), torch.float64)
    table = names.rows(names.taken_apart(library, "ro", 6, 5)["support"])
    support = Examples(table.x[None], table.y[None])
    (found,) = FineTuning(model, translation_loss, TEST_SEED, batch=2).path(stacked([start]), support, 0.01, (3,))
    batches = minibatches(support, 2, 3, generator(TEST_SEED))
    learner = MinibatchAdam(model, translation_loss, 0.01, carry=False)
    expected = learner.adapt(start, Examples(batches.x[0], batches.y[0]))
    for key in start:
        torch.testing.assert_close(found[key][0], expected[key], rtol=1e-6, atol=1e-8)


def test_an_experiment_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(metanmt, "traced", lambda function: function)  # recording takes longer than all of this
    record = training.train(SMALL, data=tmp_path, progress=False, say=lambda line: None)
    assert record["status"] == "complete" and record["iterations"]["done"] == SMALL.iterations == 2
    metrics = record["metrics"]
    assert list(metrics)[0] == "cer_8"
    for shots in SMALL.sizes:
        for measure in ("cer", "exact"):
            for group in ("seen", "held"):
                kinds = [metrics[f"{measure}_{shots}_{group}_{kind}"] for kind in KINDS]
                whole = metrics[f"{measure}_{shots}_{group}"]
                assert whole["n"] == 2 and whole["value"] == pytest.approx(sum(k["value"] for k in kinds) / 2)
        each = [metrics[f"cer_{shots}_language_{code}"]["value"] for code in ("af", "az", "mi")]
        assert metrics[f"cer_{shots}"]["value"] == pytest.approx(sum(each) / 3)
    lost = metrics["cer_4"]["value"] - metrics["cer_8"]["value"]
    assert metrics["lost"]["value"] == pytest.approx(lost, abs=1e-7)  # a record has nine digits
    for shots in (4, 8):
        assert metrics[f"rate_{shots}"]["value"] in SMALL.rates and metrics[f"steps_{shots}"]["value"] in SMALL.steps
    assert metrics["start_cer_af"]["value"] == metrics["cer_0_language_af"]["value"]

    theta = checkpoints.load_theta(SMALL.name, tmp_path / "checkpoints")
    again = SMALL.setup(torch.device("cpu"), compiled=False).spot_check(theta)
    assert again.keys() == {name for name in metrics if name.startswith("spot_")}
    for name, value in again.items():
        assert metrics[name]["value"] == pytest.approx(value.value, rel=1e-8), name
    size = (tmp_path / "checkpoints" / f"{SMALL.name}.safetensors.xz").stat().st_size
    parameters = sum(value.numel() for value in theta.values())
    assert size < 4 * parameters + 20_000  # nothing of the optimiser is kept


def test_seeds_side_by_side_are_seeds_apart(library):
    """The gradient of each seed is that of its own network on its own languages."""
    learner, estimator, size = method("fomaml", SMALL.model(), translation_loss, 2, 0.3, 4)
    count = size.pop("tasks")
    family = LanguageTasks(library, ("de", "fr"), **size)
    drawn = [family.sample(count, generator(seed)) for seed in range(2)]
    starts = [SMALL.model().init(generator(seed), torch.float64) for seed in range(2)]
    both = Tasks(
        *(Examples(*(torch.stack(t) for t in zip(*pair, strict=True))) for pair in zip(*drawn, strict=True)),
    )
    together, values = torch.func.vmap(lambda theta, tasks: estimator(learner, theta, tasks))(stacked(starts), both)
    for s in range(2):
        apart, losses = estimator(learner, starts[s], drawn[s])
        torch.testing.assert_close(values[s], losses)
        for key, gradient in apart.items():
            torch.testing.assert_close(together[key][s], gradient, rtol=1e-9, atol=1e-12)


def test_scratch_learns_nothing():
    scratch = Translation("languages-none", "scratch", hidden=6, embedding=5, seeds=2)
    run = scratch.setup(torch.device("cpu"), compiled=False)
    gradient, loss = run.gradient(run.init(generator(0)), generator(0), 0)
    assert scratch.iterations == 1 and loss == 0 and not any(g.any() for g in gradient.values())


def test_recorded_experiments_spend_the_same_and_never_meet_the_test_languages():
    chosen = [e for e in catalogue().values() if e.paper == "metanmt"]
    assert len({e.name for e in chosen}) == len(chosen) >= 4
    for e in chosen:
        assert not set(e.sources) & {*e.validation, *e.seen, *e.held}
        json.dumps(e.config())
        if e.method != "scratch":
            _, _, size = method(e.method, e.model(), translation_loss, e.batch, e.inner_rate, e.count)
            assert size["tasks"] * (size["support"] + size["query"]) == e.per_step == 144
            assert e.iterations * e.per_step == pytest.approx(e.budget, abs=e.per_step)
    trained = [e.config() | {"name": "", "method": "", "sources": ""} for e in chosen if e.method != "scratch"]
    assert all(config == trained[0] for config in trained)


def test_records_say_what_was_chosen():
    """Rates and steps of every record are of the grid."""
    for e in (e for e in catalogue().values() if e.paper == "metanmt"):
        record = records.load(e.name, missing_ok=True)
        for shots in e.sizes if record else ():
            assert math.isfinite(records.metric(record, f"cer_{shots}").value)
            if shots:
                assert records.metric(record, f"rate_{shots}").value in e.rates
                assert records.metric(record, f"steps_{shots}").value in e.steps


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="there is no method 'magic': choose one of scratch, transfer, fomaml, reptile"):
        method("magic", SMALL.model(), translation_loss)
