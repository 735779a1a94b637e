"""The recorded experiments of the ML3 chapter: losses that are learned for regression, shaping and inverse dynamics.

Those in which the learned loss improves a policy are in :mod:`helpers.experiments.ml3_control`. All have one form: an
experiment says what it learns with (``learner``), what it trains on (``tasks``) and how it is judged (``judge``);
:class:`Training` does the rest, several seeds side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers import runtime
from helpers.experiments.ml3_study import TEST_SEED, TUNING_SEED, Metrics, Ml3Experiment, Training, table
from helpers.lab import statistics
from helpers.lab.statistics import chosen
from helpers.learners.learned import LossDescent, begun
from helpers.learners.paths import landscapes
from helpers.losses import LearnedLoss, mean_squared_error
from helpers.models.mlp import MLP
from helpers.models.physics import Frequency, InertiaNetwork
from helpers.numerics.landscapes import downhill_share
from helpers.tasks.control.motions import inertia_error, motions, seen_of_dynamics, torque_error
from helpers.tasks.control.reacher import Reacher
from helpers.tasks.frequencies import Frequencies, frequency_error, prediction_error, seen_of_frequency, whole_waves
from helpers.tasks.sinusoid import Sinusoids
from helpers.types import Examples, Model, Params, Started, Tasks


# ---------------------------------------- regression
@dataclass(frozen=True)
class SineStudy(Ml3Experiment):
    """Sine regression. Judged on other sines, over 100 steps, from starts of PyTorch's own kind.

    Attributes:
        points: of a task; support and query are the same, as in the public code.
        amplitudes: range of the training tasks' amplitudes. The paper trains on one task, sin(x − π) on [−2, 2].
        phases: range of their phases.
        inputs: range of their inputs.
        starts: first parameters that there are. The public code re-seeds its global generator at every evaluation and
            so trains on the same ten again and again; None draws new ones at every iteration.
        test_tasks: the same for all seeds.
        far: a number of steps beyond the horizon of the paper.
        tuning_rates: for the mean squared error, besides the common rate.
        adam_rate: where Adam descends instead.
    """

    hidden: tuple[int, ...] = (100, 10)
    points: int = 100
    amplitudes: tuple[float, float] = (1.0, 1.0)
    phases: tuple[float, float] = (math.pi, math.pi)
    inputs: tuple[float, float] = (-2.0, 2.0)
    starts: int | None = None
    test_tasks: int = 50
    test_steps: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    far: int = 500
    tuning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
    adam_rate: float = 1e-3

    def learner(self) -> LossDescent:
        """The public code's networks: Xavier starts in training, and a loss without biases."""
        body = MLP((2, 50, 50, 1), scale="xavier", bias=False)
        model = MLP((1, *self.hidden, 1), scale="xavier")
        return LossDescent(
            model, mean_squared_error, self.inner_rate, self.inner_steps, learned=LearnedLoss(body, positive=True)
        )

    def family(self) -> Sinusoids:
        """The training tasks; a task's query set is its support set."""
        return Sinusoids(self.points, 1, False, self.amplitudes, self.phases, self.inputs)

    def tasks(self, count: int, generator: torch.Generator) -> Started:
        """Whole tasks, each with a start of its own or one of the few that there are."""
        support, _ = self.family().sample(count, generator)
        return self.from_starts(Tasks(support, support), self.starts, generator)

    def tests(self, run: Training, seed: int, model: Model) -> Started:
        """Sines of many amplitudes and phases, with starts drawn as PyTorch's layers are."""
        draws = runtime.generator(seed)
        family = Sinusoids(self.points, 1, False, (0.2, 5.0), (-math.pi, math.pi))
        support, _ = family.sample(self.test_tasks, draws)
        return run.common(begun(model, Started(support, support, {}), draws))

    def judge(self, run: Training, theta: Params) -> Metrics:
        """``ml3_mse_{steps}`` and ``mse_mse_{steps}`` (same rate), ``tuned_mse_{steps}`` (a rate chosen on other
        tasks); and with Adam, another network and five times the steps."""
        m: Metrics = {}
        model, steps = MLP((1, *self.hidden, 1), scale=None), (*self.test_steps, self.far)
        tests, others = self.tests(run, TEST_SEED, model), self.tests(run, TUNING_SEED, model)
        learner = run.learner.replace(model=model)
        rate = run.tuned(theta, self.tuning_rates, others, self.test_steps[-1], learner=learner)
        m |= run.compared(
            theta, tests, steps, "mse", {"ml3": None, "mse": self.inner_rate, "tuned": rate}, learner=learner
        )
        some = tuple(s for s in self.test_steps if s in (0, 10, 50, 100))
        adam = {"learner": learner, "rate": self.adam_rate, "optimizer": "adam"}
        table(m, "adam_ml3_mse", some, run.learned(theta, tests, some, **adam))
        table(m, "adam_mse_mse", some, run.plain(theta, tests, some, **adam))
        # Three tanh layers where the loss was trained for two of ReLU.
        other = MLP((1, 40, 40, 40, 1), scale=None, activation="tanh")
        tests, learner = self.tests(run, TEST_SEED, other), run.learner.replace(model=other)
        m |= run.compared(theta, tests, some, "mse", {"arch_ml3": None, "arch_mse": self.inner_rate}, learner=learner)
        m["tuned_rate"] = chosen(rate)
        return {"test_mse": m[f"ml3_mse_{self.test_steps[-1]}"]} | m


@dataclass(frozen=True)
class ShapedSine(Ml3Experiment):
    """The loss of sin(ωx), with the true frequency known at meta-training or not.

    Every inner run begins at ω = 0.1 and goes ten steps at rate 1; each of its points contributes the meta-gradient of
    one step. (The public code takes an outer step at every point of every task, here they are averaged.)

    Attributes:
        shaped: meta-train on (ω − ω*)², else on the mean squared error.
        truths: range of the true frequencies.
        points: of a task.
        truth: that of the paper's figure.
        reach: range of ω in which the landscape is looked at.
        close: how near to ω* a descent has to end.
    """

    inner_rate: float = 1.0
    way: int = 10
    meta_batch: int = 16
    iterations: int = 10_000
    outer_rate: float = 3e-3
    evaluate_every: int = 5_000
    shaped: bool = True
    points: int = 64
    truths: tuple[float, float] = (-5.0, 5.0)
    truth: float = 0.5
    reach: tuple[float, float] = (-7.0, 7.0)
    close: float = 0.25
    test_tasks: int = 50

    def learner(self) -> LossDescent:
        """ω, and the public code's loss network, which is linear at its end and thus has no lower bound."""
        body = MLP((3, 10, 10, 10, 1), scale="xavier", activation="elu")
        loss = frequency_error if self.shaped else prediction_error
        learned = LearnedLoss(body, seen_of_frequency, positive=False)
        return LossDescent(Frequency(), loss, self.inner_rate, self.inner_steps, learned=learned)

    def tasks(self, count: int, generator: torch.Generator) -> Started:
        """Frequencies and inputs drawn uniformly."""
        return begun(Frequency(), Frequencies(self.points, self.truths).sample(count, generator), generator)

    def landscape(self, theta: Params, truth: Tensor, omegas: Tensor) -> tuple[Tensor, Tensor]:
        """The learned loss ``[seeds, truths, omegas]`` and the mean squared error ``[truths, omegas]`` over ω."""
        points, tasks = {"omega": omegas[:, None]}, whole_waves(truth)
        return landscapes(self.learner().replace(loss=prediction_error), theta, points, tasks)

    def judge(self, run: Training, theta: Params) -> Metrics:
        """``learned_basin``: share of the range from which going downhill ends within ``close`` of ω* = ``truth``;
        ``learned_basin_all``: the same averaged over many ω*; ``mse_basin`` and so on of the mean squared error. And
        what ten steps of the training's rate reach from its start: ``reached`` (share) and ``distance``."""
        m: Metrics = {}
        device = next(iter(theta.values())).device
        omegas = torch.linspace(*self.reach, 1401, device=device)
        low, high = self.truths
        many = low + (high - low) * torch.rand(self.test_tasks, generator=runtime.generator(TEST_SEED)).to(device)
        for kind, truth in (("", torch.tensor([self.truth], device=device)), ("_all", many)):
            learned, plain = self.landscape(theta, truth, omegas)
            shares = downhill_share(learned, omegas, truth, self.close)
            m[f"learned_basin{kind}"] = statistics.over_seeds(shares.mean(1))
            of_plain = downhill_share(plain, omegas, truth, self.close)
            m[f"mse_basin{kind}"] = statistics.interval(of_plain)  # one for each ω*
        tests = run.common(self.tasks(self.test_tasks, runtime.generator(TEST_SEED)))

        def away(phi: Params, query: Examples) -> Tensor:
            return (phi["omega"][0] - query.y[0, 1]).abs()

        steps = (0, 1, 5, 10)
        distance = run.learned(theta, tests, steps, away)
        table(m, "distance", steps, distance)
        table(m, "reached", steps, (distance <= self.close).double())
        return {"basin": m["learned_basin"]} | m


@dataclass(frozen=True)
class InverseDynamics(Ml3Experiment):
    """Learning the mass matrix of a two-link arm from torques along a trajectory.

    The arm is the reacher without the armature that MuJoCo adds to its joints: with it M would be all but constant. A
    task is a smooth random motion; the query set is another one. With ``shaped`` the loss is meta-trained on the error
    of the mass matrix, which nothing measures on a real arm; else on the error of the torques.

    Attributes:
        shaped: meta-train on the mass matrix.
        points: of a motion.
        seconds: that it lasts.
        test_tasks: the same for all seeds, as in all of these studies.
        waves: of a joint's motion: sines up to so many periods.
        tuning_rates: for the error of the torques, besides the common rate.
    """

    inner_rate: float = 1e-2
    way: int = 5
    meta_batch: int = 4
    iterations: int = 2_000
    evaluate_every: int = 1_000
    shaped: bool = True
    hidden: tuple[int, ...] = (32, 32)
    points: int = 64
    seconds: float = 4.0
    waves: int = 3
    test_tasks: int = 20
    test_steps: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 50, 100)
    tuning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 0.1, 0.3)

    def arm(self) -> Reacher:
        """The reacher without armature, whose mass matrix depends on the elbow."""
        return Reacher(armature=0.0)

    def learner(self) -> LossDescent:
        """The network for M, and a loss that sees torques."""
        model = InertiaNetwork(MLP((4, *self.hidden, 3), scale="xavier", activation="tanh"))
        learned = LearnedLoss(MLP((8, 50, 50, 1), scale="xavier", activation="elu"), seen_of_dynamics)
        loss = inertia_error if self.shaped else torque_error
        return LossDescent(model, loss, self.inner_rate, self.inner_steps, learned=learned)

    def motions(self, count: int, generator: torch.Generator) -> Examples:
        """``count`` motions: :func:`helpers.tasks.control.motions.motions`."""
        units = self.learner().model
        return motions(self.arm(), units, count, generator, self.points, self.seconds, self.waves)

    def tasks(self, count: int, generator: torch.Generator) -> Started:
        """A motion to learn from and one to be judged on, each task with a network of its own."""
        support, query = self.motions(count, generator), self.motions(count, generator)
        return begun(self.learner().model, Started(support, query, {}), generator)

    def judge(self, run: Training, theta: Params) -> Metrics:
        """``{kind}_torque_{steps}`` and ``{kind}_inertia_{steps}``: mean squared errors on a new motion.

        Kinds: ``ml3``; ``mse``, of the torques, at the same rate; ``tuned``, at a rate chosen on other motions."""
        m: Metrics = {}
        model, steps = run.learner.model, self.test_steps
        tests, others = (
            run.common(self.tasks(self.test_tasks, runtime.generator(s))) for s in (TEST_SEED, TUNING_SEED)
        )
        on_torques = run.learner.replace(loss=torque_error)
        rate = run.tuned(theta, self.tuning_rates, others, max(steps), learner=on_torques)
        rates = {"ml3": None, "mse": self.inner_rate, "tuned": rate}
        for what, error in (("torque", torque_error), ("inertia", inertia_error)):

            def measure(phi: Params, query: Examples, error=error) -> Tensor:
                return error(model(phi, query.x), query.y)

            m |= run.compared(theta, tests, steps, what, rates, measure, on_torques)
        m["tuned_rate"] = chosen(rate)
        return {"torque_error": m[f"ml3_torque_{max(steps)}"]} | m


def experiments() -> list[Ml3Experiment]:
    """The experiments of the chapter, the most important first."""
    many = {
        "amplitudes": (0.2, 5.0), "phases": (-math.pi, math.pi), "inputs": (-5.0, 5.0), "meta_batch": 4, "way": 5,
        "iterations": 1_500, "evaluate_every": 500,
    }  # fmt: skip
    return [
        SineStudy("ml3-sine"),
        SineStudy("ml3-sine-cycling", starts=10),
        SineStudy("ml3-sine-tasks", **many),
        ShapedSine("ml3-shaped-sine"),
        ShapedSine("ml3-shaped-sine-plain", shaped=False),
        InverseDynamics("ml3-inverse-dynamics"),
        InverseDynamics("ml3-inverse-dynamics-plain", shaped=False),
    ]
