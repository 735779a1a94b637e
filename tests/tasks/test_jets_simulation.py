"""Simulating jets: the same seed makes the same jets however they are computed, and they have the known masses."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import refused

from helpers.tasks import jets
from helpers.tasks.jets import simulation
from helpers.tasks.jets.plan import Sample, plan
from helpers.tasks.jets.simulation import simulate

needed = pytest.mark.skipif(not simulation.available(), reason="Pythia 8 and FastJet are not installed")


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---------------------------------------- what needs no simulation


def test_without_the_programs_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(simulation, "import_module", missing)
    for action in (
        lambda: simulate("W", "fsr-one", 1, 10),
        lambda: simulation.generate(20, tmp_path / "jets.npz", 1, False),
    ):
        assert "pip install pythia8mc==8.317.2 fastjet awkward" in refused(action)
    assert not (tmp_path / "jets.npz").exists()


def test_the_plan_of_the_shipped_file():
    samples = plan()
    assert 140_000 < 5 * sum(sample.per_window for sample in samples) < 155_000
    assert len({(s.process, s.shower, s.split) for s in samples}) == len(samples)
    assert {s.shower for s in samples if s.split == "train"} == {"fsr-half", "fsr-one", "fsr-two"}
    assert {s.process for s in samples if s.shower == "monash"} == set(jets.PROCESSES)
    seeds = [sample.seed(block) for sample in samples for block in range(200)]
    assert len(set(seeds)) == len(seeds) and 1 <= min(seeds) and max(seeds) <= 900_000_000
    assert all(s.per_window == 5 for s in plan(20) if s.split == "validation")


def test_impossible_samples_are_refused():
    assert "'H'" in refused(lambda: Sample("H", "fsr-one", "train", 5))
    assert "'herwig'" in refused(lambda: Sample("W", "herwig", "train", 5))
    assert "'dev'" in refused(lambda: Sample("W", "fsr-one", "dev", 5))
    for number in (0, True, 5.0):
        assert "number of jets" in refused(lambda number=number: Sample("W", "fsr-one", "train", number))
    assert "multiple of 5" in refused(lambda: Sample("W", "fsr-one", "train", 7))
    assert "at least 20" in refused(lambda: plan(19))


def block(sample, number, n=200):
    """What a block of a simulation might find: jets whose mass is the block's number."""
    pt = np.random.default_rng(sample.seed(number)).uniform(*jets.WINDOWS[:: len(jets.WINDOWS) - 1], n)
    found = {name: np.zeros(n) for name in jets.MEASURED}
    return found | {"pt": pt, "mass": np.full(n, float(number)), "particles": np.zeros((n, jets.PARTICLES, 3))}


def test_blocks_are_used_in_their_order_whichever_comes_first(monkeypatch):
    sample = Sample("W", "fsr-one", "train", 40)
    made = []
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [3, 1, 0, 2, 7, 6, 5, 4]):
        filling = simulation._Filling(sample)
        gained = sum(filling.take(number, block(sample, number)) for number in order)
        assert filling.full and gained == 200 and (filling.counts == 8).all() and filling.used < 8
        made.append({name: np.concatenate([part[name] for part in filling.parts]) for name in filling.parts[0]})
    assert same(*made)
    assert (np.diff(made[0]["mass"]) >= 0).all()
    assert (np.bincount(jets.fifth_of(made[0]["pt"])) == 8).all()


def test_a_sample_that_cannot_be_filled_is_given_up(monkeypatch):
    def nothing(sample, number):
        found = block(sample, number)
        return {name: value[found["pt"] < 700] for name, value in found.items()}

    monkeypatch.setattr(simulation, "_import", lambda name: None)
    monkeypatch.setattr(simulation, "_block", nothing)
    message = refused(lambda: simulation.make([Sample("W", "fsr-one", "train", 5)], 1, False))
    assert "hardly ever" in message and "GeV" in message
    twice = [Sample("W", "fsr-one", "train", 5)] * 2
    assert "none twice" in refused(lambda: simulation.make(twice, 1, False))
    assert "at least one" in refused(lambda: simulation.make([], 1, False))


def test_the_file_is_written_and_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(simulation, "_import", lambda name: None)
    monkeypatch.setattr(simulation, "_block", block)
    monkeypatch.setattr(simulation.metadata, "version", lambda name: "1.0")
    path = simulation.generate(20, tmp_path / "jets.npz", 1, False)
    samples = jets.load(path)
    planned = plan(20)
    assert samples.counts() == {(s.process, s.shower, s.split): [s.per_window] * 5 for s in planned}
    assert samples.header["versions"]["pythia8mc"] == "1.0"
    assert samples.header["samples"][0]["seeds"][0] == planned[0].seed(0)
    assert all(len(sample["seeds"]) >= 1 for sample in samples.header["samples"])


# ---------------------------------------- what does


@needed
def test_the_same_seed_makes_the_same_jets_whatever_the_batch():
    one, same_seed, other = (
        simulate("QCD", "fsr-one", seed, 60, batch) for seed, batch in ((11, 60), (11, 17), (12, 60))
    )
    assert same(one, same_seed) and not np.array_equal(one["pt"], other["pt"])
    n = len(one["pt"])
    assert 15 < n <= 60 and one["particles"].shape == (n, jets.PARTICLES, 3)


@needed
def test_particles_add_up_to_the_jet():
    found = simulate("W", "fsr-one", 13, 60)
    particles = found["particles"]
    pt, there = particles[..., 0], particles[..., 0] > 0
    # Distances are those of rapidity, which for soft particles with a mass is not close to η.
    assert (np.diff(pt, axis=1) <= 0).all() and np.abs(particles[pt > 2][:, 1:]).max() < 1.5
    few = there.sum(1) < jets.PARTICLES  # so these are all of them
    assert few.sum() > 5
    x, y = (pt * np.cos(particles[..., 2])).sum(1), (pt * np.sin(particles[..., 2])).sum(1)
    np.testing.assert_allclose(np.hypot(x, y)[few], found["pt"][few], rtol=1e-6)
    assert (np.abs(y)[few] < 1e-6 * x[few]).all()
    share = pt.sum(1) / found["pt"]
    assert np.median(share) > 0.97 and share.min() > 0.6
    assert ((found["pt"] >= 250) & (found["pt"] < 800)).all()
    assert ((found["tau21"] >= 0) & (found["tau21"] <= 1) & (np.abs(found["rapidity"]) < 2)).all()


@needed
@pytest.mark.slow
def test_processes_do_not_change_the_jets():
    samples = [Sample("W", "fsr-one", "train", 5), Sample("QCD", "fsr-one", "train", 5)]
    (one, header), (two, again) = (simulation.make(samples, workers, False) for workers in (1, 2))
    assert same(one, two) and header == again


@needed
@pytest.mark.slow
def test_masses():
    """The W boson's peak is where it should be, and the masses of QCD jets fall."""
    w, qcd = (simulate(process, "fsr-one", 17, 1000)["mass"] for process in ("W", "QCD"))
    edges = np.arange(60, 101)
    smooth = np.convolve(np.histogram(w, edges)[0], np.ones(3), "valid")
    assert 78 <= edges[1 + smooth.argmax()] + 0.5 <= 84
    low, middle, high = (np.mean((qcd >= a) & (qcd < a + 50)) for a in (10, 60, 110))
    assert low > 1.5 * middle > 1.5 * high
