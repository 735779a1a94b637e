"""What an experiment draws, and when: spies on everything that tasks are made from.

``with Spy(monkeypatch) as spy`` notes every draw under its phase. A *draw* is what it was made of (the classes of its
images, the bands of its frequencies, the domains of its jets ...), and the numbers that were drawn. Phases are
``"train"``, in ``run.gradient``; ``"tune"``, in what chooses rates and steps, or for tasks that are handed to it; and
``"test"``, all else. Nothing is measured meanwhile: that takes long, and says nothing about the data.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers.estimators.implicit import ImplicitGradient
from helpers.experiments import (
    imaml,
    jets,
    jets_matrix,
    maml,
    maml_navigation,
    ml3,
    ml3_digits,
    ml3_modelfree,
    ml3_study,
    nested,
    paradigms,
)
from helpers.lab import evaluation, seeds
from helpers.lab.ranking import Judge
from helpers.lab.translation import Translating
from helpers.optimizers.child_training import Population
from helpers.tasks import digits, glyphs, names, omniglot
from helpers.tasks.control.navigation import Navigation
from helpers.tasks.control.point_mass import PointMass
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.episodes import FewShot
from helpers.tasks.families import SPLITS, SinusoidFamilies
from helpers.tasks.frequencies import Frequencies
from helpers.tasks.images import ImageClasses
from helpers.tasks.jets import cuts, protocol
from helpers.tasks.jets.tasks import JetTasks
from helpers.tasks.names import LanguageTasks
from helpers.tasks.sinusoid import Sinusoids
from helpers.tasks.sources import CurveSources, ImageSources

TRAIN, TUNE, TEST = "train", "tune", "test"


@dataclass(frozen=True)
class Draw:
    """What was drawn: of what, and which numbers."""

    made_of: frozenset[Hashable]
    values: frozenset[float | bytes]


@cache
def all_glyphs(split: str) -> ImageClasses:
    """All glyphs of a split, read once."""
    return _load_glyphs(split)


_load_glyphs = glyphs.load


@cache
def known_images() -> dict[bytes, Hashable]:
    """The class of every image that is drawn here, by its pixels: the name of a glyph, or a digit with its split."""
    found: dict[bytes, Hashable] = {}
    for split in ("train", "test"):
        sets = {"glyph": all_glyphs(split), "digit": digits.load(split, "digits")}
        for kind, classes in sets.items():
            for name, images in zip(classes.names, classes.images, strict=True):
                of = name if kind == "glyph" else (split, int(name))
                found |= {image.numpy().tobytes(): of for image in images}
    return found


def _classes(x: Tensor, pool: Tensor | None = None) -> Draw:
    """Of images ``[tasks, n, ...]`` in [0, 1]; with an image of each class that there was, of all these."""
    images = [image.numpy().tobytes() for image in (x * 255).round().to(torch.uint8).flatten(0, 1)]
    made_of = images if pool is None else [image.numpy().tobytes() for image in pool]
    return Draw(frozenset(known_images()[image] for image in made_of), frozenset(images))


def _weights(params: dict[str, Tensor]) -> Draw:
    """Of first parameters, without those that are not drawn."""
    return _numbers([value for name, value in params.items() if name.endswith("weight")])


def _numbers(tree: Any, made_of: frozenset = frozenset()) -> Draw:
    return Draw(made_of, frozenset(number for leaf in tree_leaves(tree) for number in leaf.flatten().tolist()))


class Spy:
    """Notes draws by phase."""

    def __init__(self, monkeypatch) -> None:
        self.patch, self.phase = monkeypatch, TEST
        self.draws: dict[str, list[Draw]] = {TRAIN: [], TUNE: [], TEST: []}
        self._sources()
        self._phases()
        self._measure_nothing()

    def made_of(self, phase: str) -> set[Hashable]:
        """All that the draws of a phase were made of."""
        return set().union(*(draw.made_of for draw in self.draws[phase]))

    def values(self, phase: str) -> set[float | bytes]:
        """All numbers that were drawn in a phase."""
        return set().union(*(draw.values for draw in self.draws[phase]))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is drawn meanwhile belongs to a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def note(self, draw: Draw) -> None:
        self.draws[self.phase].append(draw)

    def _watch(self, owner: Any, name: str, draw) -> None:
        """Note ``draw(result, *arguments)`` whenever a function is called."""
        original = getattr(owner, name)

        @wraps(original)
        def watched(*args, **settings):
            found = original(*args, **settings)
            self.note(draw(found, *args))
            return found

        self.patch.setattr(owner, name, watched)

    def _phase(self, owner: Any, name: str, phase=TUNE) -> None:
        """Draws within a function belong to a phase, and so do tasks that are handed to it to tune on."""
        original = getattr(owner, name)

        @wraps(original)
        def phased(*args, **settings):
            now = phase(*args) if callable(phase) else phase
            if now == TUNE:
                self._handed_on(args)
            with self.during(now or self.phase):
                return original(*args, **settings)

        self.patch.setattr(owner, name, phased)

    def _handed_on(self, args: tuple) -> None:
        """Earlier draws that are among the arguments: they were for tuning, each of them once."""
        given = {
            number
            for arg in args
            for leaf in (tree_leaves(arg) if isinstance(arg, tuple) else [arg])
            if isinstance(leaf, Tensor)
            for number in leaf.flatten().tolist()
        }
        for at, draw in reversed(list(enumerate(self.draws[TEST]))):
            if draw.values and draw.values <= given:
                self.draws[TUNE].append(self.draws[TEST].pop(at))
                given -= draw.values

    def _sources(self) -> None:
        """Everything that a task is made from."""
        self._watch(
            FewShot, "sample",
            lambda found, of, *_: _classes(torch.cat([found.support.x, found.query.x], 1), of.images.images[:, 0]),
        )  # fmt: skip
        self._watch(ImageSources, "batch", lambda found, *_: _classes(found.x[None]))
        self._watch(digits.DigitPairs, "sample", lambda found, *_: _classes(torch.cat([found[0].x, found[1].x], 1)))
        self._watch(
            Sinusoids, "sample",
            lambda found, of, *_: _numbers(found.support.y, frozenset({(of.amplitudes, of.phases, of.inputs)})),
        )  # fmt: skip
        self._watch(Sinusoids, "wave", lambda found, *_: _numbers(found.y[:, 1:]))
        self._watch(Frequencies, "sample", lambda found, *_: _numbers(found.support.y))
        self._watch(CurveSources, "batch", lambda found, *_: _numbers(found.x))
        self._watch(SinusoidFamilies, "draw", lambda found, *_: _numbers(found.frequency, _bands(found.frequency)))
        self._watch(LanguageTasks, "sample", lambda found, of, *_: _named(found, of))
        self._watch(
            Translating, "taken_apart", lambda found, of, codes, *_: _numbers(found[0].x.double(), frozenset(codes))
        )
        for kind in ("of", "bags_of"):
            self._watch(
                JetTasks, kind,
                lambda found, of, chosen, *_: _numbers(
                    found.support.x.sum((-1, -2)), frozenset((of.split, of.domains[i]) for i in chosen)
                ),
            )  # fmt: skip
        self._watch(cuts, "seen", lambda found, samples, domain, process, split: Draw(frozenset({split}), frozenset()))
        for env in (PointMass, Reacher, Navigation):
            self._watch(env, "goals", lambda found, *_: _numbers(found))
        self._watch(Navigation, "published_goals", lambda found, *_: _numbers(found))
        self._watch(Reacher, "reset", lambda found, *_: _numbers(found))
        self._watch(ml3, "motions", lambda found, *_: _numbers(found.x))
        for place in (ml3, ml3_study):
            self._watch(place, "begun", lambda found, *_: _weights(found.start))
        self._watch(seeds, "few_starts", lambda found, *_: Draw(frozenset({"few starts"}), frozenset()))
        self._watch(Population, "minibatch", lambda found, *_: _numbers(found.x.flatten(1).double().sum(1)))

    def _phases(self) -> None:
        """What chooses rates and steps; of two methods the arguments say on what."""
        for owner, name in (
            (maml.SinusoidTraining, "_tuned"),
            (maml_navigation.NavigationTraining, "tuned"),
            (paradigms.WayTraining, "settings"),
            (jets.TaggingTraining, "tuned"),
            (ml3_study.Training, "tuned"),
            (ml3_digits.DigitsTraining, "tuned"),
            (Translating, "choose"),
        ):
            self._phase(owner, name)
        self._phase(paradigms.WayTraining, "judged", lambda run, split, *_: TUNE if split == "valid" else None)
        # The tasks that an iMAML run is watched on are of the training classes, and no metric of the test.
        self._phase(imaml.OmniglotTraining, "draw", lambda *args: TRAIN if imaml.WATCH_SEED in args[2:] else TEST)
        self._phase(jets_matrix.MatrixTraining, "areas", lambda *args: TUNE if args[-1] != protocol.TEST_SEED else TEST)
        self._phase(nested.Training, "curves", lambda run, theta, split, *_: TUNE if split == "validation" else TEST)
        self._phase(cuts, "likelihood_ratio", TRAIN)

    def _measure_nothing(self) -> None:
        """Zeros for everything that is measured."""

        def ppo(e, training, test, settings, updates, seeds):
            self._handed_on((training,))
            return settings[0], torch.zeros(seeds, updates + 1)

        def curve(learner, theta, tasks, steps, *_, **__):
            return torch.zeros(len(steps), len(tasks.query.x))

        def descended(learner, theta, tasks, steps, *_, **__):
            return torch.zeros(len(steps), len(tasks.support.x))

        def judge(judge, learner, theta, tasks, steps):
            return torch.rand(len(next(iter(theta.values()))), len(tasks.query.y), len(steps), 3)

        def translated(of, theta, codes, shots, rate, steps):
            of.taken_apart(codes, max(1, shots))
            return torch.zeros(2, len(next(iter(theta.values()))), len(codes), 2)

        def meta_training(estimator, learner, starts, draw, test, settings, measured):
            draw()
            return torch.zeros(len(measured), len(settings), len(test.support.x))

        def diagnosed(of, learner, theta, tasks, chunk):
            return {kind: torch.zeros(len(tasks.support.x)) for kind in ("residual", "stationarity", "indefinite")}

        for owner, name, stand_in in (
            (ml3_modelfree, "tuned_ppo", ppo),
            (evaluation, "adaptation_curve", curve),
            (
                evaluation.Predictor,
                "__call__",
                lambda of, learner, theta, tasks, batches: torch.zeros(2, len(batches.x)),
            ),
            (
                evaluation.Course,
                "__call__",
                lambda of, _, theta, phi, tasks, at: torch.zeros(2, len(at), len(tasks[0].x)),
            ),
            (ml3_study, "descended", descended),
            (Judge, "__call__", judge),
            (evaluation, "outcomes", curve),
            (Translating, "translated", translated),
            (nested, "meta_training", meta_training),
            (nested.Training, "_seconds", lambda *_: {}),
            (ImplicitGradient, "diagnosed", diagnosed),
        ):
            self.patch.setattr(owner, name, stand_in)
        self.patch.setattr(glyphs, "load", lambda split, *_: all_glyphs(split))
        self.patch.setattr(omniglot, "load", lambda split, *_, **__: all_glyphs(split))
        self.patch.setattr(omniglot, "leaking_split", lambda: all_glyphs("test"))  # which meets training by design


def _bands(frequency: Tensor) -> frozenset[str]:
    """The splits to whose bands frequencies belong."""
    return frozenset(
        split
        for number in frequency.tolist()
        for split, bands in SPLITS.items()
        if any(low < number < high for low, high in bands)
    )


def _named(found: Any, of: LanguageTasks) -> Draw:
    """Names of a task in English, and the languages that there were to draw from."""
    written = names.decode(torch.cat([found.support.y, found.query.y], 1).flatten(0, 1))
    return Draw(frozenset(of.languages), frozenset(written))
