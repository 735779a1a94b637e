"""Jets: the file is verified, the detector does what it says, pictures are turned and whole, and so are tasks."""

from __future__ import annotations

import json
import math

import jet_reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from toy_jets import EACH, SAMPLES, arrays, crowd

from helpers.runtime import generator
from helpers.tasks import jets
from helpers.tasks.jets import detector, substructure
from helpers.tasks.jets.detector import Detector, View
from helpers.tasks.jets.tasks import Domain, JetTasks


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("jets") / "jets.npz"
    path.write_bytes(jets.pack(arrays(), {"samples": [{"seeds": (1, 2)}]}))
    return path


@pytest.fixture(scope="module")
def samples(file):
    return jets.load(file)


# ---------------------------------------- the file


def test_what_is_packed_is_loaded(samples):
    made = arrays()
    assert len(samples) == len(made["pt"]) and samples.header["samples"] == [{"seeds": [1, 2]}]
    for name in jets.MEASURED:
        assert np.abs(getattr(samples.measured, name).numpy() - made[name]).max() <= 0.51 * jets.STEPS[name]
    for name in ("process", "shower", "split"):
        assert (getattr(samples, name).numpy() == made[name]).all()
    assert samples.window.tolist() == [i for _ in SAMPLES for i in range(5) for _ in range(EACH)]
    assert samples.counts() == {sample: [EACH] * 5 for sample in SAMPLES}
    assert set(samples.provenance) == {"data", "sha256"}


def test_particles_survive_being_packed(samples):
    made, loaded = arrays()["particles"], samples.particles().numpy()
    there = made[..., 0] > 0
    assert loaded.shape == (len(samples), 40, 3) and loaded.dtype == np.float32
    assert (loaded[~there] == 0).all() and ((loaded[..., 0] > 0) == there).all()
    assert np.abs(np.log(loaded[there][:, 0] / made[there][:, 0])).max() <= 0.0376 / 2
    assert np.abs(loaded - made)[..., 1:].max() <= 0.0051
    rows = torch.tensor([7, 3])
    assert torch.equal(samples.particles(rows), samples.particles()[rows])
    assert torch.equal(samples[rows].particles(), samples.particles()[rows])


def test_coarse_numbers_are_kept_within_their_limits():
    particles = np.zeros((1, 40, 3))
    particles[0, :3] = [[1e6, 5.0, -5.0], [0.3, 0.004, -0.006], [1e-4, 0.0, 0.0]]
    codes, angles = jets.quantise(particles)
    assert codes[0, :4].tolist() == [254, 30, 1, 0]
    assert angles[0, :3].tolist() == [[127, -127], [0, -1], [0, 0]]


def test_the_same_jets_make_the_same_file(file):
    assert jets.pack(arrays(), {"samples": [{"seeds": (1, 2)}]}) == file.read_bytes()


def test_a_damaged_file_is_refused(file, tmp_path):
    content, other = file.read_bytes(), tmp_path / "other.npz"
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for broken in (content[:-1000], b"", b"no archive", bytes(flipped)):
        other.write_bytes(broken)
        message = refused(lambda: jets.load(other))
        assert str(other) in message and "damaged" in message and "metabook data jets" in message


@pytest.mark.parametrize("change", ["array", "header", "missing", "bare"])
def test_a_changed_file_is_refused(file, tmp_path, change):
    with np.load(file) as stored:
        kept = {name: stored[name] for name in stored.files}
    if change == "array":
        kept["mass"] = kept["mass"] + 1
    elif change == "header":
        kept["header"] = np.array(json.dumps(json.loads(str(kept["header"])) | {"samples": []}))
    elif change == "missing":
        del kept["codes"]
    else:
        del kept["header"]
    np.savez(tmp_path / "other.npz", **kept)
    assert "damaged" in refused(lambda: jets.load(tmp_path / "other.npz"))


def test_another_format_is_refused(tmp_path):
    (tmp_path / "new.npz").write_bytes(jets.pack(arrays(), {"format": 2}))
    assert "has format 2" in refused(lambda: jets.load(tmp_path / "new.npz"))


def test_a_missing_file_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    message = refused(jets.load)
    assert str(tmp_path / "data" / "jets.npz") in message and "metabook data jets" in message


def test_selections(samples):
    rows = samples.select("W", "fsr-half", "train", 2)
    assert len(rows) == EACH and (samples.window[rows] == 2).all() and (samples.process[rows] == 0).all()
    assert len(samples.select()) == len(samples) and len(samples.select("Z")) == 0
    assert "'H'" in refused(lambda: samples.select("H"))
    assert "'validate'" in refused(lambda: samples.select(split="validate"))
    assert "at most 4" in refused(lambda: samples.select(window=5))
    assert "at most 24" in refused(lambda: jets.fifth_name(25))
    assert torch.equal(samples.select(window=np.int64(2)), samples.select(window=2))
    assert jets.window_name(0) == "250–300 GeV" and jets.fifth_name(24) == "760–800 GeV"
    assert jets.fifth_of(np.array([250, 259.9, 260, 299.9, 300, 799.9])).tolist() == [0, 0, 1, 4, 5, 24]


# ---------------------------------------- the detector


def test_a_perfect_detector_changes_nothing():
    particles = crowd(5)
    assert torch.equal(Detector()(particles, generator(0)), particles)


def test_cells_sum_what_falls_into_them():
    particles = crowd(50, seed=1)
    cells = Detector(cell=0.1)(particles, generator(0))
    torch.testing.assert_close(cells[..., 0].sum(1), particles[..., 0].sum(1))
    for jet, before in zip(cells, particles, strict=True):
        there = jet[jet[:, 0] > 0, 1:]
        steps = (there - there[0]) / 0.1
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)  # all in the middle of cells
        assert len({tuple(row) for row in steps.round().int().tolist()}) == len(there)  # and each cell once
        assert len(there) < (before[:, 0] > 0).sum()
        # What a cell has is what lies within half a side of its middle.
        near = ((before[:, None, 1:] - there[None]).abs() <= 0.05 + 1e-6).all(-1) * before[:, :1]
        torch.testing.assert_close(near.sum(0), jet[jet[:, 0] > 0, 0], rtol=1e-4, atol=1e-3)


def test_cells_lie_differently_for_each_jet():
    cells = Detector(cell=0.1)(crowd(1).expand(200, -1, -1), generator(0))
    offsets = (cells[:, 0, 1] / 0.1) % 1
    assert offsets.min() < 0.05 and offsets.max() > 0.95 and 0.4 < offsets.mean() < 0.6


def test_smearing_is_unbiased_and_as_wide_as_it_says():
    particles = crowd(3000, seed=2)
    for width in (0.1, 0.3):
        measured = Detector(smearing=width)(particles, generator(0))
        there = particles[..., 0] > 0
        ratio = measured[..., 0][there] / particles[..., 0][there]
        assert ratio.mean() == pytest.approx(1, abs=5 * width / math.sqrt(len(ratio)))
        assert ratio.std() == pytest.approx(width, rel=0.03) and ratio.min() > 0
        assert torch.equal(measured[..., 1:], particles[..., 1:])


def test_dropped_and_soft_cells_are_gone():
    particles = crowd(2000, seed=3)
    there = particles[..., 0] > 0
    left = Detector(dropped=0.2)(particles, generator(0))[..., 0][there] > 0
    assert left.float().mean() == pytest.approx(0.8, abs=0.01)
    hard = Detector(threshold=5.0)(particles, generator(0))[..., 0]
    assert torch.equal(hard, particles[..., 0] * (particles[..., 0] >= 5))
    assert (Detector(dropped=1.0)(particles, generator(0))[..., 0] == 0).all()


def test_pileup_adds_as_much_as_it_says():
    particles = crowd(2000, seed=4)
    measured = Detector(pileup=30, pileup_pt=0.5)(particles, generator(0))
    assert torch.equal(measured[:, :40], particles)
    more = measured[..., 0].sum(1) - particles[..., 0].sum(1)
    assert (more >= 0).all() and more.mean() == pytest.approx(15, rel=0.03)
    added = measured[:, 40:]
    there = added[..., 0] > 0
    radius = added[there][:, 1:].norm(dim=1)
    assert radius.max() <= 1 and (radius**2).mean() == pytest.approx(0.5, abs=0.01)  # even over the disc
    assert there.sum(1).double().var().item() == pytest.approx(30, rel=0.15)


def test_a_detector_is_random_by_its_generator_only():
    detector, particles = Detector(0.1, 0.5, 0.2, 0.1, 20), crowd(10)
    torch.manual_seed(0)
    one = detector(particles, generator(1))
    torch.manual_seed(1)
    assert torch.equal(one, detector(particles, generator(1)))
    assert not torch.equal(one, detector(particles, generator(2)))


@pytest.mark.parametrize(
    "wrong",
    [{"cell": -0.1}, {"dropped": 1.1}, {"smearing": "x"}, {"pileup": math.nan}, {"threshold": math.inf}],
)
def test_impossible_detectors_are_refused(wrong):
    assert next(iter(wrong)) in refused(lambda: Detector(**wrong))


SEES = {
    "detector": lambda particles: Detector()(particles, generator(0)),
    "momentum": jets.momentum,
    "observables": jets.observables,
    "orient": jets.orient,
    "picture": jets.picture,
    "view": View(),
}


@pytest.mark.parametrize("sees", SEES.values(), ids=SEES)
def test_particles_that_are_none_are_refused(sees):
    for place, wrong in ((0, math.nan), (0, -1.0), (0, math.inf), (1, math.nan), (2, -math.inf)):
        particles = crowd(3)
        particles[1, 2, place] = wrong
        assert "finite pT of at least 0" in refused(lambda particles=particles: sees(particles))
    for particles in (crowd(3)[0], crowd(3)[..., :2], crowd(3).long()):
        assert "floats [n, slots, 3]" in refused(lambda particles=particles: sees(particles))
    assert "pixels" in refused(lambda: jets.picture(crowd(3), 0))
    assert "half width" in refused(lambda: jets.picture(crowd(3), half_width=0.0))


# ---------------------------------------- views


def moved(particles, angle=0.0, shift=(0.0, 0.0), mirror=False):
    x, y = particles[..., 1] * (-1 if mirror else 1), particles[..., 2]
    turned = torch.stack([math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y], -1)
    there = (particles[..., :1] > 0).float()
    return torch.cat([particles[..., :1], (turned + torch.tensor(shift)) * there], -1)


@settings(max_examples=20, deadline=None)
@given(st.floats(-3.1, 3.1), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.booleans())
def test_the_picture_does_not_depend_on_how_the_jet_lies(angle, right, up, mirror):
    particles = crowd(8, seed=5)
    expected = jets.orient(particles)
    found = jets.orient(moved(particles, angle, (right, up), mirror))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_prongs_are_centred_below_and_the_heavier_side_is_right():
    particles = torch.zeros(2, 40, 3)
    particles[:, :3] = torch.tensor([[100.0, 0.2, 0.1], [50.0, -0.3, 0.4], [5.0, -0.2, -0.2]])
    particles[1] = moved(particles[1], 2.0)
    turned = jets.orient(particles)
    distance = math.hypot(0.5, 0.3)
    for jet in turned:
        torch.testing.assert_close(jet[0], torch.tensor([100.0, 0.0, 0.0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(jet[1], torch.tensor([50.0, 0.0, -distance]), atol=1e-5, rtol=0)
        assert jet[2, 1] > 0  # what is beside the axis is on the right
        assert (jet[3:] == 0).all()
    assert torch.equal(turned[0, :, 0], particles[0, :, 0])
    torch.testing.assert_close(torch.cdist(turned[0, :3, 1:], turned[0, :3, 1:]),
                               torch.cdist(particles[0, :3, 1:], particles[0, :3, 1:]))  # fmt: skip
    still = jets.orient(particles, rotate=False, flip=False)
    torch.testing.assert_close(still[0, 1], torch.tensor([50.0, -0.5, 0.3]), atol=1e-5, rtol=0)


def test_a_jet_of_one_prong_is_turned_by_its_longest_axis():
    particles = torch.zeros(1, 40, 3)
    particles[0, :3] = torch.tensor([[10.0, 0.0, 0.0], [5.0, 0.08, 0.08], [5.0, -0.03, -0.03]])
    turned = jets.orient(particles)[0, :3, 1:]
    assert turned[:, 0].abs().max() < 1e-5
    assert turned[1, 1] < turned[0, 1] < turned[2, 1]  # the longer side is below


def test_jets_without_particles_are_no_trouble():
    nothing = torch.zeros(3, 40, 3)
    for view in (View(), View("particles"), View(zoom=80.4)):
        seen = view(Detector(0.1, 1.0, 0.2, 0.1)(nothing, generator(0)))
        assert (seen == 0).all()
    assert all((values == 0).all() for values in jets.observables(nothing))


def test_zooming_puts_prongs_of_the_same_decay_at_the_same_distance():
    for pt in (300.0, 700.0):
        apart = 2 * 80.4 / pt
        particles = torch.zeros(1, 40, 3)
        particles[0, :2] = torch.tensor([[pt / 2 + 10, 0.0, apart / 2], [pt / 2 - 10, 0.0, -apart / 2]])
        plain, zoomed = jets.orient(particles), jets.orient(particles, zoom=80.4)
        assert plain[0, 1, 2].item() == pytest.approx(-apart, abs=1e-5)
        assert zoomed[0, 1, 2].item() == pytest.approx(-1, abs=0.05)  # the sum of vectors is a little shorter
    for zoom in (-1.0, 0.0, math.nan):
        assert "mass in GeV" in refused(lambda zoom=zoom: jets.orient(particles, zoom=zoom))
        assert "mass in GeV" in refused(lambda zoom=zoom: View(zoom=zoom))


def test_pictures_hold_the_whole_jet():
    particles = crowd(300, seed=6)
    particles[..., 1:] *= 0.9
    images = jets.picture(particles)
    assert images.shape == (300, 25, 25) and images.min() >= 0
    torch.testing.assert_close(images.sum((1, 2)), torch.ones(300), atol=1e-5, rtol=0)
    step = torch.linspace(-1.2, 1.2, 25)  # the middle of the jet is where it was
    share = particles[..., 0] / particles[..., 0].sum(1, keepdim=True)
    torch.testing.assert_close((images.sum(1) * step).sum(1), (share * particles[..., 1]).sum(1), atol=1e-4, rtol=0)
    torch.testing.assert_close((images.sum(2) * -step).sum(1), (share * particles[..., 2]).sum(1), atol=1e-4, rtol=0)


def test_where_pixels_are():
    particles = torch.zeros(1, 40, 3)
    particles[0, :4] = torch.tensor([[6.0, 0.0, 0.0], [2.0, 0.5, 1.0], [1.0, 0.05, -0.5], [1.0, 2.0, 0.0]])
    image = jets.picture(particles)[0]
    assert image[12, 12].item() == pytest.approx(0.6) and image[2, 17].item() == pytest.approx(0.2)
    assert image[17, 12].item() == pytest.approx(0.05, abs=1e-5) == image[17, 13].item()  # between two pixels
    assert image.sum().item() == pytest.approx(0.9)  # one is outside


def test_the_view_of_particles():
    seen = View("particles")(Detector(pileup=20)(crowd(20, seed=7), generator(0)))
    assert seen.shape == (20, 40, 3)
    assert (seen[:, :-1, 0] >= seen[:, 1:, 0]).all() and (seen[..., 0].sum(1) <= 1 + 1e-5).all()
    assert "'pixels'" in refused(lambda: View("pixels"))


def test_observables_of_two_massless_prongs():
    particles = torch.zeros(2, 40, 3)
    particles[0, :2] = torch.tensor([[200.0, 0.0, 0.2], [100.0, 0.1, -0.3]])
    particles[1, :1] = torch.tensor([[300.0, 0.1, 0.0]])
    seen = jets.observables(particles)
    assert seen.mass[0].item() == pytest.approx(math.sqrt(2 * 2e4 * (math.cosh(0.1) - math.cos(0.5))), rel=1e-4)
    assert seen.mass[1].item() == pytest.approx(0, abs=1e-3)
    assert seen.pt[1].item() == pytest.approx(300) and 290 < seen.pt[0] < 300
    assert seen.tau21[0].item() == pytest.approx(0, abs=1e-3)
    many = crowd(4500, seed=8)  # more than one chunk
    assert all(len(values) == 4500 for values in jets.observables(many))
    assert jets.observables(many).tau21.median() < 0.6


@pytest.fixture(scope="module")
def with_fastjet():
    """Cells ``[processes, windows, EACH, slots, 3]``, and τ₂₁ of them by FastJet."""
    with np.load(jet_reference.PATH) as stored:
        tau21, pt = torch.from_numpy(stored["tau21"] * jet_reference.STEP).float(), torch.from_numpy(stored["pt"])
    cells = jet_reference.measured_jets()
    torch.testing.assert_close(cells[..., 0].sum(-1).mean(-1), pt, rtol=1e-3, atol=0)  # of the very same cells
    return cells, tau21


def from_fastjet(cells, tau21):
    """Absolute differences of τ₂₁, ``[processes, windows, EACH]``."""
    return (jets.observables(cells.flatten(0, 2)).tau21.view(tau21.shape) - tau21).abs()


def test_subjettiness_is_that_of_fastjet(with_fastjet):
    apart = from_fastjet(*with_fastjet)
    assert apart.mean() < 0.004 and apart.mean(-1).max() < 0.01
    assert (apart > 0.05).float().mean() < 0.02 and (apart > 0.1).float().mean() < 0.005


def test_subjettiness_from_the_hardest_cones_is_not(with_fastjet, monkeypatch):
    monkeypatch.setattr(substructure, "_kt_axes", lambda particles: torch.stack(detector._prongs(particles)[:2], 1))
    apart = from_fastjet(*with_fastjet)
    assert apart.mean() > 0.04 and apart[jets.PROCESSES.index("QCD")].mean() > 0.1


def test_axes_are_those_of_merging_all_pairs():
    def merged(jet):
        """The two kT jets, pair by pair: pT and place of each, the harder first."""
        left = [(pt, place) for pt, *place in jet.tolist() if pt > 0]
        while len(left) > 2:
            pairs = [(one, other) for i, one in enumerate(left) for other in left[:i]]
            pair = min(pairs, key=lambda pair: min(pair)[0] * math.dist(pair[0][1], pair[1][1]))
            left = [one for one in left if one not in pair] + [(pair[0][0] + pair[1][0], max(pair)[1])]
        return [place for _, place in sorted(left, reverse=True)]

    particles = Detector(cell=0.1, threshold=0.5)(crowd(30, seed=9), generator(0))
    found = substructure._kt_axes(substructure._hardest_first(particles))
    torch.testing.assert_close(found, torch.tensor([merged(jet) for jet in particles]))


def test_subjettiness_of_few_particles():
    particles = crowd(50, seed=10)
    assert jets.observables(particles[:0]).tau21.shape == (0,)
    assert (jets.observables(particles[:, :1]).tau21 == 0).all()  # one slot
    particles[:, 1:] = 0
    assert (jets.observables(particles).tau21 == 0).all()  # one particle
    two = crowd(50, seed=10)[:, :2]
    assert jets.observables(two).tau21.max() < 1e-4


# ---------------------------------------- tasks

CALORIMETER = Detector(cell=0.1, threshold=0.5, smearing=0.1)


def family(samples, shots=4, queries=6, **changes):
    wanted = jets.domains(["W"], [0, 3], ["fsr-half", "fsr-one"], [Detector(), CALORIMETER])
    return JetTasks(samples, **{"domains": wanted, "split": "train", "shots": shots, "queries": queries} | changes)


def identity(monkeypatch):
    """Inputs that say which jet they are, in place of pictures: its position, a process each 10 000."""
    monkeypatch.setattr(
        jets.JetSamples, "particles",
        lambda self, rows: torch.stack([rows.float() % 2000, self.process[rows].float(), self.split[rows].float()], -1)
        .unsqueeze(1),
    )  # fmt: skip
    monkeypatch.setattr(jets.View, "__call__", lambda self, particles: particles)


def test_all_combinations_are_domains():
    found = jets.domains(["W", "Z"], range(5), ["monash"], [Detector()])
    assert len(found) == 10 and found[1] == Domain("W", 1, "monash", Detector())


def test_tasks_have_the_shapes_and_labels_they_say(samples):
    tasks = family(samples).sample(3, generator(0))
    assert tasks.support.x.shape == (3, 8, 1, 25, 25) and tasks.query.x.shape == (3, 12, 1, 25, 25)
    assert tasks.support.x.dtype == torch.float32 and tasks.support.y.dtype == torch.int64
    assert tasks.support.y.tolist() == [[0] * 4 + [1] * 4] * 3 and tasks.query.y.sum() == 18
    seen = family(samples, view=View("particles")).sample(2, generator(0))
    assert seen.query.x.shape == (2, 12, 40, 3)


def test_tasks_draw_different_jets_of_the_right_kind(samples, monkeypatch):
    identity(monkeypatch)
    tasks = family(samples, shots=15, queries=25, domains=(Domain("W", 1, "fsr-one", Detector()),)).sample(
        20, generator(0)
    )
    for t in range(20):
        x, y = torch.cat([tasks.support.x[t], tasks.query.x[t]]), torch.cat([tasks.support.y[t], tasks.query.y[t]])
        assert len(x[:, 0, 0].unique()) == 80
        assert ((x[:, 0, 1] == 0) == (y == 1)).all() and ((x[:, 0, 1] == 4) == (y == 0)).all()
    assert not torch.equal(tasks.support.x[0], tasks.support.x[1])


def test_splits_have_no_jet_in_common(samples, monkeypatch):
    identity(monkeypatch)
    train = family(samples, domains=jets.domains(["W"], range(5), ["fsr-half", "fsr-one"], [Detector()]))
    test = family(samples, split="test", domains=jets.domains(["W"], range(5), ["monash"], [Detector()]))

    def met(tasks):
        return {tuple(row) for row in torch.cat([tasks.support.x, tasks.query.x], 1).reshape(-1, 3).tolist()}

    one, other = (met(f.sample(30, generator(1))) for f in (train, test))
    assert one and other and not one & other
    assert {row[2] for row in one} == {0} and {row[2] for row in other} == {2}


def test_all_randomness_comes_from_the_generator(samples):
    tasks = family(samples)
    one, same, other = (tasks.sample(3, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.query.x, same.query.x) and not torch.equal(one.query.x, other.query.x)
    again = family(samples).sample(3, generator(1))  # the detector's noise is the same in a second family
    assert torch.equal(one.support.x, again.support.x)
    assert not torch.equal(one.support.x, family(samples, seed=1).sample(3, generator(1)).support.x)


def test_a_jet_looks_the_same_twice_and_differently_elsewhere(samples):
    tasks = family(samples)
    assert tasks.inputs(1) is tasks.inputs(1)
    assert tasks.inputs(0).shape == (2, EACH, 1, 25, 25) and tasks.inputs(0).dtype == torch.float16
    assert not torch.equal(tasks.inputs(0), tasks.inputs(1))  # the same jets, seen by another detector
    first = tasks.of([1], generator(0)).support.x[0]
    assert all((tasks.inputs(1).float() == jet).flatten(2).all(-1).any() for jet in first)


def test_tasks_of_given_domains_have_as_many_shots_as_asked_for(samples, monkeypatch):
    identity(monkeypatch)
    chosen = family(samples, domains=jets.domains(["W"], [0, 3], ["fsr-half", "fsr-one"], [Detector()]))
    for shots in (2, 4, 25):
        tasks = chosen.of([3, 0, 3], generator(0), shots)
        assert tasks.support.y.tolist() == [[0] * shots + [1] * shots] * 3
        assert tasks.query.y.tolist() == [[0] * 6 + [1] * 6] * 3
        for t in range(3):
            x, y = torch.cat([tasks.support.x[t], tasks.query.x[t]]), torch.cat([tasks.support.y[t], tasks.query.y[t]])
            assert len(x[:, 0, 0].unique()) == 2 * shots + 12 and ((x[:, 0, 1] == 0) == (y == 1)).all()
    plain, same = (chosen.of([3, 0], generator(1), *more) for more in ((), (4,)))
    assert plain.support.x.shape[1] == 8 and torch.equal(plain.support.x, same.support.x)
    assert torch.equal(plain.query.x, same.query.x)


def test_more_shots_than_there_are_jets_are_refused(samples):
    chosen = family(samples)
    assert chosen.of([0], generator(0), EACH - 6).support.y.shape == (1, 2 * (EACH - 6))
    assert "needs 41 jets of each class" in refused(lambda: chosen.of([0], generator(0), EACH - 5))


def test_bags_have_the_shares_they_say(samples, monkeypatch):
    identity(monkeypatch)
    tasks = family(samples, queries=5, domains=(Domain("W", 1, "fsr-one", Detector()),))
    drawn = tasks.bags(10, 15, generator(0), (0.25, 0.81, 0.0))
    assert drawn.support.x.shape[:2] == (10, 45) and drawn.support.y.shape == (10, 45)
    assert drawn.query.y.tolist() == [[0] * 5 + [1] * 5] * 10
    signal = (drawn.support.x[..., 0, 1] == 0).float().unflatten(1, (3, 15))
    shares = drawn.support.y.unflatten(1, (3, 15))
    assert torch.equal(signal.mean(-1), shares[..., 0]) and torch.equal(
        shares[0, :, 3], torch.tensor([4.0, 12.0, 0.0]) / 15
    )
    assert 1 < len({tuple(row) for row in signal[:, 0].tolist()})  # the order within a bag says nothing
    for t in range(10):
        assert len(torch.cat([drawn.support.x[t], drawn.query.x[t]])[:, 0, 0].unique()) == 55


def test_impossible_tasks_are_refused(samples):
    assert "at least one domain" in refused(lambda: family(samples, domains=()))
    assert "shots" in refused(lambda: family(samples, shots=0))
    assert "queries" in refused(lambda: family(samples, queries=True))
    assert "needs 46 jets" in refused(lambda: family(samples, shots=40))
    monash = jets.domains(["W"], [0], ["monash"], [Detector()])
    assert "there are 0 of QCD for train" in refused(lambda: family(samples, domains=monash))
    qcd = jets.domains(["QCD"], [0], ["fsr-one"], [Detector()])
    assert "background" in refused(lambda: family(samples, domains=qcd))
    assert "'sideways'" in refused(lambda: family(samples, split="sideways"))
    tasks = family(samples)
    assert "at least 1" in refused(lambda: tasks.sample(0, generator(0)))
    assert "between 0 and 1" in refused(lambda: tasks.bags(1, 8, generator(0), (0.2, 1.2)))
    assert "size of a bag" in refused(lambda: tasks.bags(1, 0, generator(0)))
    assert "needs 66 jets" in refused(lambda: tasks.bags(1, 60, generator(0)))


def test_the_shipped_file():
    samples = jets.load()
    assert jets.home().stat().st_size <= 20e6
    seeds = [seed for sample in samples.header["samples"] for seed in sample["seeds"]]
    assert len(set(seeds)) == len(seeds)  # so no jet of one split is in another
    for (process, shower, split), counts in samples.counts().items():
        assert len(set(counts)) == 1, (process, shower, split)
        mass = samples.measured.mass
        for window in range(5):
            mine = mass[samples.select(process, shower, split, window)]
            histogram = torch.histc(mine, 20, 60, 100).unfold(0, 3, 1).sum(1)  # of 2 GeV, three at a time
            if process == "W" and len(mine) >= 300:
                assert 78 <= 62 + 2 * histogram.argmax() + 1 <= 84, (shower, split, window)
            if process == "QCD" and len(mine) >= 1000:  # falls; of fewer jets chance would say otherwise somewhere
                heights = torch.histc(mine, 4, 40, 200)
                assert (heights.diff() < 0).all(), (shower, split, window)
            if process == "top" and window >= 2:
                # The peak: at 400 GeV a part of the decay is still outside of many jets, which lowers the median.
                wide = torch.histc(mine, 60, 100, 220).unfold(0, 4, 1).sum(1)
                assert 168 <= 104 + 2 * wide.argmax() <= 178, (shower, split, window)
