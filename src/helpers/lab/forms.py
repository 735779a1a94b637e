"""In which form a run is executed: what works on this machine, and what is fastest."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from helpers import runtime
from helpers.errors import UserError
from helpers.lab.checkpoints import State
from helpers.lab.experiment import Run
from helpers.numerics import tracing

_PATIENCE = 2.0  # seconds for which a form is timed


def settled(
    form: str,
    run: Run,
    state: State,
    device: torch.device,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Leave a run in a form in which it can be executed here, and return that one's name; ``state`` stays as it is.

    A form that fails is passed over with one line, on a GPU in the order captured, traced, eager. ``"fastest"`` tries
    all for some seconds; compiling takes minutes, so that it is tried only where at least a quarter of an hour is to be
    trained.

    Raises:
        UserError: where none works.
    """
    on_card, found = device.type == "cuda", {}
    if form == "fastest":
        kinds = ["eager", "traced"] + ["captured"] * on_card
        kinds += ["compiled"] * ((budget is None or budget >= 900) and runtime.can_compile())
    elif on_card:
        kinds = list(dict.fromkeys((form, "traced", "eager")))
    else:
        run.use(form)
        return form
    for kind in kinds:
        try:
            with tracing.unchanged(*state.changes()):
                seconds = _seconds(kind, run, state, _PATIENCE if form == "fastest" else 0.0)
            found[kind] = seconds, vars(run).copy()
        except Exception as error:  # whatever a driver or a compiler may say
            say(f"{kind}: failed ({' '.join(str(error).split())[:120] or type(error).__name__}); going on without")
        if found and form != "fastest":
            return kind
    if not found:
        raise UserError("the estimator runs in none of its forms here; the lines above say why")
    best = min(found, key=lambda kind: found[kind][0])
    vars(run).update(found[best][1])  # with what was recorded, so that nothing is recorded again
    say(", ".join(f"{kind} {1000 * seconds:.1f} ms" for kind, (seconds, _) in found.items()) + f" an iteration: {best}")
    return best


def _seconds(form: str, run: Run, state: State, patience: float) -> float:
    """The time of an iteration in a form, measured for about so many seconds; for 0, the first one alone is tried."""
    rate = run.experiment.outer_rate
    run.use(form)
    run.iterate(state, rate).item()  # recording, capturing or compiling
    began, calls = time.monotonic(), 0
    while patience and (calls < 3 or (time.monotonic() - began < patience and calls < 200)):
        run.iterate(state, rate).item()  # waits for the device
        calls += 1
    return (time.monotonic() - began) / max(1, calls)
