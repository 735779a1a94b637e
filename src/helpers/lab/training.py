"""The outer loop as a resumable, recorded experiment.

One file holds everything that training needs to go on: parameters, optimiser, random generator, iteration and history,
as a ``.safetensors`` file with a JSON header (no pickle), compressed by xz. It is replaced atomically, so a killed run
continues from its last checkpoint, bit for bit as if it had never stopped (on the same machine with the same engine
settings). On another kind of device a run goes on too, with a generator that is seeded anew from seed and iteration.

Several processes can train one experiment together (:mod:`helpers.numerics.ranks`): all go the same way, the first one
measures and writes, and a run goes on with another number of them.

The file of a finished run holds its parameters alone, in half precision, and the record's metrics are those of the
parameters as stored. Single precision stays where half of it would move a metric by a tenth of its interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import runtime
from helpers.errors import UserError
from helpers.lab import records, reports, stopping
from helpers.lab.checkpoints import LOG_EVERY, State, entries, files, moved, read_checkpoint
from helpers.lab.experiment import Experiment, Run
from helpers.lab.forms import settled
from helpers.lab.schedules import RETURNS, annealed, halved, outer_rate_at, steady
from helpers.lab.statistics import Interval
from helpers.lab.tensorboard import Watch
from helpers.numerics import ranks
from helpers.progress import progress_bar, waiting
from helpers.types import Params
from helpers.validate import positive, whole

PATIENCE = 2.0  # seconds for which an iteration may go on once it should be over; then it is cut off and not kept
RECORDING = 15.0  # the same beyond the budget for the first iteration of a call, which also records its programs


def train(
    experiment: Experiment,
    *,
    device: torch.device | str = "cpu",
    budget: float | None = None,
    fresh: bool = False,
    compiled: bool = False,
    form: str | None = None,
    data: Path | None = None,
    save_every: float = 60.0,
    judged: bool = True,
    arrange: Callable[[Run], None] = lambda run: None,
    progress: bool = True,
    say: Callable[[str], None] = print,
    watch: Watch | None = None,
) -> records.Record | None:
    """Train an experiment, from its checkpoint where there is one, and write its record.

    Args:
        budget: seconds of training in this call; the run then stops cleanly and its record is partial. An iteration
            that goes on for more than ``PATIENCE`` beyond that, or after Ctrl-C, is cut off where it next looks at the
            clock, and nothing of it is kept; the first one, which also records its programs, has ``RECORDING``.
        fresh: start over; what is there is renamed to ``….old`` once there is something to put in its place.
        compiled: use ``torch.compile``; other rounding, so part of what bit-identical resumption presumes.
        form: how the estimator runs, a name of ``helpers.numerics.tracing.FORMS``, where the experiment leaves the
            choice; by default ``"compiled"``, or ``"captured"`` on a GPU and ``"traced"`` elsewhere. Where it fails on
            a GPU, ``"traced"`` and ``"eager"`` are tried, and one line says so. ``"fastest"`` tries all of them for
            some seconds each.
        data: folder with ``checkpoints/`` and ``records/``; by default ``data/`` of the checkout.
        save_every: seconds between checkpoints.
        judged: measure and record also a run that is not over; without that its checkpoint alone is written.
        arrange: told the run before it begins; may change where it computes, not what.
        progress: show a progress bar.
        say: receives one line about how the run ended.
        watch: receives an iteration and what was measured there, the loss or the metrics, by name.

    Returns:
        The record, as written to ``records/NAME.json``; None where none was.

    Raises:
        UserError: if the loss stops being finite (naming the iteration and the last good checkpoint), a file cannot be
            written, the checkpoint is damaged or of another configuration, another process trains the same, the budget
            is over within the first iteration, or one of the processes that train it together is gone.
        KeyboardInterrupt: after Ctrl-C, once checkpoint and record are written; after a second one, or while the run is
            evaluated, at once. The checkpoint then stands, and the next call measures what was not measured.
    """
    data = data or runtime.root() / "data"
    path, *beside = files(experiment.name, data).values()
    with ExitStack() as held:

        def claim() -> None:
            held.enter_context(runtime.only_one(path, f"training {experiment.name}"))
            for one in beside:
                runtime.remove_leftovers(one)

        ranks.told(claim)
        device, watch = torch.device(device), watch or (lambda *_: None)
        how = form or ("compiled" if compiled else "captured" if device.type == "cuda" else "traced")
        if ranks.number():
            progress, say, watch = False, lambda _: None, lambda *_: None
        return _train(
            experiment, device, budget, fresh, how, data, path, save_every, judged, arrange, progress, say, watch
        )


def _train(
    experiment: Experiment,
    device: torch.device,
    budget: float | None,
    fresh: bool,
    form: str,
    data: Path,
    path: Path,
    save_every: float,
    judged: bool,
    arrange: Callable[[Run], None],
    progress: bool,
    say: Callable[[str], None],
    watch: Watch,
) -> records.Record | None:
    # Found out now, not after a minute of training that could then not be kept.
    for kind in ("checkpoints", "records"):
        ranks.told(partial(runtime.ensure_writable, data / kind))
    config = experiment.config()
    # Asked once, at the start: what runs is the code as it was loaded, whatever is committed meanwhile.
    commit = runtime.commit()
    run = experiment.setup(device, form == "compiled")
    arrange(run)
    if ranks.count() > 1 and not run.divides:
        raise UserError(f"{experiment.name} is not divided among processes: train it by one, without torchrun")
    generator = runtime.generator(experiment.seed, device)
    first = run.init(generator)
    state = State(first, experiment.outer_rate, generator, experiment.outer)
    chosen = bool(run.forms)  # else the experiment itself says how it runs
    if chosen and ranks.count() > 1:
        # Each rank would choose for itself, and no graph holds what they tell each other.
        form = "traced" if form in ("fastest", "captured") else form
        run.use(form)
    elif chosen:
        form = settled(form, run, state, device, budget, say)
    compiled = form == "compiled"
    kept = ranks.told(path.exists) and not fresh
    if kept:
        state.restore(path, config, experiment.iterations, experiment.seed, ranks.told(partial(read_checkpoint, path)))
    begin, started, already = state.iteration, time.monotonic(), state.seconds
    watched = experiment.watched
    if watched:
        state.remember()  # a run that was interrupted goes back no further than here

    def check() -> None:
        """Look at the losses since the last look: nothing that is not finite may reach a checkpoint."""
        if not state.window:
            return
        finite = torch.stack(state.window).isfinite().cpu()
        if not finite.all() or not all(value.isfinite().all() for value in state.values().values()):
            at = state.iteration - len(finite) + (int((~finite).nonzero()[0]) if not finite.all() else len(finite) - 1)
            good = f"the last good checkpoint is {path}" if kept else "no checkpoint of this run had been written yet"
            raise UserError(
                f"the loss of {experiment.name} is no longer finite at iteration {at}; {good}: "
                "lower the rates and start with --fresh"
            )

    def save() -> None:
        nonlocal kept, saved
        check()
        if ranks.number():
            saved = time.monotonic()
            return
        elapsed = time.monotonic() - started
        state.seconds = already + elapsed
        # A run that went back has fewer iterations than an earlier slice may say.
        state.slices = [s | {"end": min(s["end"], begin)} for s in state.slices if s["begin"] < begin]
        if state.iteration > begin:
            this = {
                "begin": begin, "end": state.iteration, "seconds": round(elapsed, 1), "compiled": compiled,
                **({"form": form} if chosen else {}), **({"ranks": ranks.count()} if ranks.count() > 1 else {}),
                **runtime.origin(commit, device),
            }  # fmt: skip
            state.slices.append(this | ({"reseeded": True} if state.reseeded else {}))
        if fresh and not kept:
            if moved_to := list(filter(None, map(runtime.set_aside, files(experiment.name, data).values()))):
                say(f"{experiment.name}: the earlier run is kept as {', '.join(map(str, moved_to))}")
        state.save(path, config, over=state.iteration == experiment.iterations)
        kept, saved = True, time.monotonic()

    def due() -> bool:
        """Whether this is a point on the way that was not measured yet; that of a stopped run may be left over."""
        on_the_way = 0 < state.iteration < experiment.iterations and not state.iteration % experiment.evaluate_every
        return on_the_way and state.iteration not in [point["iteration"] for point in state.curve]

    def measure() -> None:
        """Measure a point on the way, and go back where it says so."""
        nonlocal begin
        if time.monotonic() - saved > PATIENCE:
            save()  # a measurement may take minutes, and is no reason to lose what was trained

        def spot() -> dict[str, Any] | None:
            try:
                with stop.measuring():
                    return entries(run.spot_check(state.values()))
            except stopping.CutOff:
                return None

        if (point := ranks.told(spot)) is None:
            say(f"{experiment.name}: stopped while it measured iteration {state.iteration:,}; the next call does that")
            return
        state.curve.append({"iteration": state.iteration, "metrics": point})
        watch(state.iteration, {name: entry["value"] for name, entry in point.items()})
        quiet = steady([point["metrics"][watched]["value"] for point in state.curve]) if watched else None
        if quiet:
            state.remember()
        elif quiet is False and len(state.returns) < RETURNS:
            state.go_back()
            begin = min(begin, state.iteration)
            bar.reset()
            bar.update(state.iteration)

    bar = progress_bar(total=experiment.iterations, initial=begin, desc=experiment.name, disable=not progress)
    saved = started
    with stopping.requests() as stop, bar:

        def check_clock() -> None:
            patience = RECORDING if state.iteration == begin else PATIENCE
            late = budget is not None and time.monotonic() - started > budget + patience
            if late or (stop.first is not None and time.monotonic() - stop.first > PATIENCE):
                raise stopping.CutOff

        def over() -> bool:
            """Whether to end before the next iteration: all ranks, or none."""
            late = budget is not None and trained and time.monotonic() - started > budget
            return ranks.any_of(bool(stop) or late)

        trained = False
        try:
            if due():
                measure()
            while state.iteration < experiment.iterations and not over():
                drawn = generator.get_state()
                if ranks.count() == 1:  # of several none may leave the others within an iteration
                    run.check_clock = check_clock
                try:
                    rate = outer_rate_at(experiment, state.iteration) * 0.5 ** len(state.returns)
                    loss = run.iterate(state, rate)
                except ranks.Lost:
                    generator.set_state(drawn)
                    raise
                except stopping.CutOff:
                    generator.set_state(drawn)
                    say(f"{experiment.name}: stopped within iteration {state.iteration:,}, of which nothing is kept")
                    break
                finally:
                    vars(run).pop("check_clock", None)  # what follows is measuring
                trained = True
                state.iteration += 1
                state.window.append(loss.detach())
                bar.update()
                if state.iteration % LOG_EVERY == 0:
                    check()
                    state.losses.append(torch.stack(state.window).mean().item())
                    state.window = []
                    watch(state.iteration, {"loss": state.losses[-1]})
                    bar.set_postfix(loss=f"{state.losses[-1]:.4f}", refresh=False)
                if due():
                    measure()
                if time.monotonic() - saved > save_every:
                    save()
        except ranks.Lost:
            if state.iteration > begin:
                save()
            raise
        if state.iteration:
            save()
        asked = ranks.any_of(bool(stop))
    if not state.iteration:
        slow = f"an iteration of {experiment.name} takes longer than the {budget or 0:.0f} s that it was given"
        raise KeyboardInterrupt if asked else UserError(f"{slow}: give it more")
    if not judged and state.iteration < experiment.iterations:
        return None

    def judge() -> records.Record:
        """Evaluate what was trained, store it as it is kept, and write the record."""
        try:
            with waiting(f"evaluating {experiment.name}", progress):
                metrics, evaluated = reports.measured(run, state.values(), device, commit)
            if begin == state.iteration:
                metrics |= reports.kept_times(experiment.name, data)
            if state.iteration == experiment.iterations and state.precision == "single":
                metrics = _settle(run, state, metrics, partial(state.save, path, config, over=True), say)
        except KeyboardInterrupt as error:
            raise type(error)(
                f"stopped while {experiment.name} was evaluated; its checkpoint at iteration {state.iteration:,} is "
                "kept, run the same command to go on from there"
            ) from None
        watch(state.iteration, {name: measured.value for name, measured in metrics.items()})
        record = reports.write(experiment, run, state, metrics, evaluated, data)
        headline = ", ".join(f"{name} {records.metric(record, name)}" for name in list(record["metrics"])[:1])
        say(f"{experiment.name}: {records.progress(record)}; {headline}; checkpoint {path}")
        if asked:
            raise KeyboardInterrupt
        return record

    return ranks.told(judge)


def _settle(
    run: Run, state: State, single: dict[str, Interval], save: Callable[[], None], say: Callable[[str], None]
) -> dict[str, Interval]:
    """Store a finished run in half precision, unless that moves its metrics; returns those of what is stored.

    θ of ``state`` is then what the file holds.
    """
    before = state.values()
    rounded = {name: value.to(before[name].dtype) for name, value in halved(before).items()}
    half = run.evaluate(rounded)
    if far := moved(single, half):
        say(f"stored in single precision, since half of it would move {', '.join(far[:3])}")
        return single
    with torch.no_grad():
        for name, value in state.theta.items():
            value.copy_(rounded[name])
    state.precision = "half"
    save()
    return single | half  # the time that the run took is in the first alone


def fit(
    gradient: Callable[[Params, int], tuple[Params, Tensor]],
    theta: Params,
    iterations: int,
    outer_rate: float = 1e-3,
    label: str = "meta-training",
    outer: str = "adam",
    final_rate: float | None = None,
) -> tuple[Params, Tensor]:
    """The outer loop for live cells: steps along a meta-gradient, with a progress bar and nothing kept on disk.

    Args:
        gradient: ``gradient(theta, iteration) -> (gradient, losses)``; it draws its own tasks. Iterations count from
            0; what changes with them, such as ``learner.replace(rate=...)``, makes no new recording.
        theta: where to begin; left as it is.
        outer: ``"adam"``, or ``"sgd"`` for Reptile's plain step.
        final_rate: where ``outer_rate`` goes, linearly; by default it stays.

    Returns:
        The trained parameters and the mean query loss of every iteration ``[iterations]``.

    Raises:
        UserError: for a number of iterations below 1, or rates that are negative or not finite.

    >>> import helpers
    >>> g, family = helpers.generator(0), helpers.Sinusoids()
    >>> learner = helpers.GradientDescent(helpers.MLP((1, 8, 1)), helpers.mean_squared_error, rate=0.01)
    >>> start = learner.init(g)
    >>> theta, losses = helpers.fit(lambda theta, _: helpers.maml(learner, theta, family.sample(4, g)), start, 3)
    >>> theta.keys() == start.keys(), losses.shape
    (True, torch.Size([3]))
    """
    whole(iterations, "number of iterations")
    positive(outer_rate, "outer rate", zero=True)
    state = State(theta, outer_rate, torch.Generator(), outer)
    final = outer_rate if final_rate is None else positive(final_rate, "final outer rate", zero=True)
    history = []
    for iteration in progress_bar(range(iterations), desc=label, leave=False):
        step, losses = gradient(state.values(), iteration)
        state.apply(step, annealed(outer_rate, final, iteration / iterations))
        history.append(losses.detach().mean())
    return state.values(), torch.stack(history)
