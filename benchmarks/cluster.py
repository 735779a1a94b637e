"""What a cluster is worth: children a second by one worker and by two, bytes a child, the scheduler's time a task.

    python benchmarks/cluster.py [--rules 56] [--tasks 10000]

Writes ``book/_static/cluster.json``, and from it ``cluster.svg`` beside it: how many children a second a search can
train by how many workers, as measured here and as the model of ``book/scaling.md`` goes on. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from helpers import cluster, runtime
from helpers.lab import figures
from helpers.optimizers.children import Children
from helpers.optimizers.controller import Controller
from helpers.optimizers.language import grammar

MEASURED = Path(__file__).resolve().parents[1] / "book" / "_static" / "cluster.json"
LONG_CHILD = 600.0  # seconds: an assumption, for five epochs of 32 × 32 images on one processor


def nothing(_: int) -> None:
    """A task that takes no time."""


def measure(rules: int, tasks: int) -> dict[str, Any]:
    """Train the same children by one worker and by two; send empty tasks.

    Args:
        rules: how many children, of rules drawn at random.
        tasks: how many empty tasks.
    """
    words, draws, children = grammar(), runtime.generator(0), Children()
    uniform = Controller(len(words), 8)
    params = {name: 0 * value for name, value in uniform.init(draws).items()}
    chosen = [words.rule(tokens) for tokens in uniform.sample(params, words, rules, draws)]
    seconds, found = {}, []
    for workers in (1, 2):
        with cluster.connected(f"local:{workers}") as client:
            population = cluster.Spread(children, client)
            population.rewards(chosen[: 2 * children.chunk], epochs=2)  # data, recorded programs
            begin = time.perf_counter()
            found = population.rewards(chosen, children.epochs)
            seconds[str(workers)] = time.perf_counter() - begin
            if workers == 2:
                begin = time.perf_counter()
                client.gather(client.map(nothing, range(tasks), pure=False))
                overhead = (time.perf_counter() - begin) / tasks
    moved = len(cloudpickle.dumps((children, chosen))) + len(cloudpickle.dumps(found))
    return {
        "rules": rules, "seconds": seconds, "bytes_a_child": moved / rules, "tasks": tasks,
        "seconds_a_task": overhead, **runtime.origin(runtime.commit(), "cpu"),
    }  # fmt: skip


def rate(workers: np.ndarray, child: float, task: float, together: float = np.inf) -> np.ndarray:
    """Children a second: as many as there are workers, but no more than a round has and the scheduler can send.

    Args:
        workers: how many, ``[n]``.
        child: seconds of a child on one worker.
        task: seconds of the scheduler for it.
        together: children of a round, all of which must be back before the next.
    """
    return np.minimum(np.minimum(workers, together) / child, 1 / task)


def draw(measured: dict[str, Any], path: Path) -> None:
    """The model for the measured children and for longer ones, on logarithmic axes."""
    figure, axes = figures.subplots(1, 1, height=3.2)
    workers, one = np.logspace(0, 4, 200), measured["seconds"]["1"] / measured["rules"]
    task = measured["seconds_a_task"]
    axes.plot(workers, rate(workers, one, task), label=f"a child of {one:.2f} s, as here")
    axes.plot(workers, rate(workers, LONG_CHILD, task), label="a child of ten minutes")
    axes.plot(workers, rate(workers, LONG_CHILD, task, 800), ls=":", label="the same, 800 in a round")
    for number, seconds in measured["seconds"].items():
        axes.plot(int(number), measured["rules"] / seconds, "o", color="black")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="children a second")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rules", type=int, default=56, help="children to train by each number of workers")
    parser.add_argument("--tasks", type=int, default=10_000, help="empty tasks, for the scheduler's time")
    parser.add_argument("--draw", action="store_true", help="draw again what was measured, and measure nothing")
    options = parser.parse_args()
    if not options.draw:
        runtime.write_atomically(
            MEASURED, (json.dumps(measure(options.rules, options.tasks), indent=1) + "\n").encode()
        )
    draw(json.loads(MEASURED.read_text()), MEASURED.with_suffix(".svg"))
    print(MEASURED.read_text())


if __name__ == "__main__":
    main()
