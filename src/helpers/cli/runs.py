"""Verbs that run experiments: ``train``, ``evaluate``, ``campaign``."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from helpers.cli import clustered, listing, places
from helpers.cli.grammar import Commands, Once, add_settings, folder, minutes, positive, ready, seconds, threads
from helpers.errors import UserError, nearest

# What only one command needs is imported there: `metabook train` then works with torch, numpy and four small packages.
QUEUES = ("paper",)  # the catalogue of experiments, the most important first
WORTH_COMPILING = 1_000  # iterations; a shorter run is over before the compiler is
FOOTER = """
n: how many values the mean is over: test tasks, seeds where several were trained, or parts of the test data.
± 95 %: half the width of the mean's 95 % interval; – where there is none, as of a number that was chosen.
`metabook show {name}` says what each metric means."""
# What experiments raise where a value is of the right kind but makes no sense, such as an unknown estimator.
NONSENSE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# ---------------------------------------- train
def train(options: argparse.Namespace) -> int | None:
    """Train, or go on training, recorded experiments and variants of them; alone, or as one of several processes."""
    from helpers.numerics import ranks

    with ranks.joined():
        if options.queue is not None and ranks.count() > 1:
            raise UserError("torchrun divides one experiment among processes: name it instead of --queue")
        return _train(options)


def _train(options: argparse.Namespace) -> int | None:
    from helpers import experiments, runtime

    changes = dict(options.settings)
    _refuse_mixtures(options, own=bool(changes) or options.out is not None or options.data_folder is not None)
    if options.name is None and options.queue is None:
        listing.show(options.json)
        return None
    if options.cluster is not None:
        return clustered.train(options)
    if options.queue is not None:
        return _queue(list(experiments.catalogue().values()), options.budget, options.tensorboard, _prepared(options))
    base, *rest = options.name.partition("_")
    if options.name not in experiments.catalogue() and "".join(rest) and base in experiments.catalogue():
        raise UserError(
            f"{options.name} names a variant: train {base} with what it is named after, as in "
            f"`metabook train {base} --set NAME=VALUE`, which begins it or goes on"
        )
    experiment = experiments.find(options.name)
    if not changes and options.out is None and options.data_folder is None:
        _train_one(experiment, options.budget, options.tensorboard, _prepared(options))
        return None
    out = options.out or runtime.root() / places.OWN
    if out.resolve() == runtime.root() / "data":
        raise UserError(f"{out} is for the recorded experiments alone: name another folder with --out")
    own = _variant(_on_folder(experiment, options.data_folder, False), changes)
    if own == experiment and options.out is None:
        raise UserError(f"{own.name} has these values already: leave them out, or set others")
    _say_images(own, sys.stdout)
    settings = _prepared(options)
    with _values_make_sense(own.name):
        _train_one(own, options.budget, options.tensorboard, settings | {"data": out})
    given = (("--out", options.out), ("--data-folder", options.data_folder))
    found = "".join(f" {option} {shlex.quote(str(place))}" for option, place in given if place is not None)
    print(f"`metabook evaluate {own.name}{found}` measures it again")
    return None


def _on_folder(experiment, place: Path | None, trained: bool):
    """The experiment on the images of a folder, if there is one."""
    from helpers.lab import few_shot

    return experiment if place is None else few_shot.on_folder(experiment, place, trained)


def _say_images(experiment, to: TextIO) -> None:
    """What an own folder holds and what is made of it."""
    if experiment.own is not None:
        print(experiment.own.sentence(experiment.ways), file=to)


def _refuse_mixtures(options: argparse.Namespace, own: bool) -> None:
    queue = options.queue
    if queue is not None and queue not in QUEUES:
        raise UserError(f"there is no queue {queue!r}{nearest(queue, QUEUES)}; the queues are {', '.join(QUEUES)}")
    if queue is not None and options.name is not None:
        raise UserError("name an experiment or a queue, not both")
    if queue is not None and options.fresh:
        raise UserError("--fresh starts over one experiment, not a whole queue: name the experiment instead of --queue")
    if options.list and (options.name is not None or queue is not None):
        raise UserError("--list prints all experiments: it goes alone, or with --json")
    if options.json and (options.name is not None or queue is not None):
        raise UserError("--json goes with --list: what a run measured is JSON in its record")
    if own and options.name is None:
        raise UserError("--set, --seed, --out and --data-folder are for one experiment: name it")
    if options.name is None and queue is None:
        given = [
            f"--{key}" for key in ("tensorboard", "budget", "threads", "cluster") if getattr(options, key) is not None
        ]
        given += ["--fresh"] * options.fresh + ["--[no-]compile"] * (options.compile is not None)
        given += ["--device"] * (options.device != "auto") + ["--tf32"] * options.tf32
        if given:
            raise UserError(f"{given[0]} is for what is trained: name an experiment or a queue")


def _prepared(options: argparse.Namespace) -> dict[str, Any]:
    """Make this process ready to train; returns how :func:`helpers.lab.training.train` is to do it."""
    from helpers import runtime
    from helpers.numerics import ranks

    device = ranks.own_device(ready(options, options.tf32))
    if device.type == "cpu":
        runtime.fast_products()
    return {"device": device, "compiled": options.compile, "fresh": options.fresh}


def _train_one(experiment, budget: float | None, watched_in: Path | None, settings: dict[str, Any]) -> None:
    """Train an experiment that is named; a complete one stays as it is."""
    from helpers.lab import checkpoints

    place = settings.get("data")
    with suppress(UserError):  # a damaged record of a finished run is written anew
        if not settings["fresh"] and checkpoints.complete(experiment, place and place / "records"):
            print(
                f"{experiment.name} is complete ({experiment.iterations:,} iterations): nothing to train. "
                "`metabook evaluate` measures it again, --set trains a variant, --fresh starts over"
            )
            return
    _train_now(experiment, budget, watched_in, settings)


def _train_now(experiment, budget: float | None, watched_in: Path | None, settings: dict[str, Any]) -> None:
    from helpers import runtime
    from helpers.lab import tensorboard, training
    from helpers.numerics import ranks

    if settings["compiled"] is None:  # on a GPU one graph does as much, at once
        worth = settings["device"].type == "cpu" and experiment.iterations >= WORTH_COMPILING
        settings = settings | {"compiled": worth and runtime.can_compile()}
    if settings["compiled"]:
        print("compiling, where that is possible, takes minutes; --no-compile starts at once", file=sys.stderr)
    watched_in = watched_in if ranks.number() == 0 else None
    with tensorboard.watching(watched_in, experiment.name) as watch:
        training.train(experiment, budget=budget, watch=watch, **settings)


def _queue(chosen: list, budget: float | None, watched_in: Path | None, settings: dict[str, Any]) -> int:
    """Train experiments in this order until the time is spent; one that cannot be trained does not stop the others."""
    from helpers.lab import checkpoints

    started, failed = time.monotonic(), []
    for experiment in chosen:
        left = None if budget is None else budget - (time.monotonic() - started)
        if left is not None and left <= 0:
            print(f"the time is spent; {experiment.name} is next")
            break
        try:
            if checkpoints.complete(experiment):
                print(f"{experiment.name}: complete, nothing to do")
            elif checkpoints.given_up(experiment):
                print(f"{experiment.name}: given up; `metabook train {experiment.name} --fresh` starts over")
            else:
                _train_now(experiment, left, watched_in, settings)
        except UserError as error:
            print(f"metabook: {error}", file=sys.stderr)
            failed.append(experiment.name)
        except Exception as error:  # such as a full GPU or disk: the rest of the queue can still be trained
            print(f"metabook: {experiment.name} failed ({type(error).__name__}: {error})", file=sys.stderr)
            failed.append(experiment.name)
    return clustered.status(failed)


def _variant(experiment, changes: dict[str, str]):
    from helpers.lab import variants

    with _values_make_sense(experiment.name):
        return variants.variant(experiment, changes) if changes else experiment


@contextmanager
def _values_make_sense(name: str) -> Iterator[None]:
    """Of what a reader sets, a traceback says less than one sentence."""
    try:
        yield
    except NONSENSE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{name} does not run with these values ({reason}); "
            f"`metabook show {_base(name)}` says what each field means"
        ) from error


# ---------------------------------------- evaluate
def evaluate(options: argparse.Namespace) -> None:
    """Measure a checkpoint anew, and print the metrics."""
    from helpers import experiments, runtime
    from helpers.lab import checkpoints, evaluation, records, tables, variants
    from helpers.progress import waiting

    path = places.checkpoint(options.checkpoint, options.out)
    _, header = checkpoints.read_checkpoint(path)
    trained = variants.restored(header["config"], experiments.catalogue())
    if path != Path(options.checkpoint) and trained.name != options.checkpoint:
        raise UserError(
            f"{path} is a checkpoint of {trained.name}: restore that of {options.checkpoint}, or name the file"
        )
    judged = _variant(_on_folder(trained, options.data_folder, True), dict(options.settings))
    _say_images(judged, sys.stderr if options.json else sys.stdout)
    before, now = trained.own, judged.own
    if before and before.sha256 != now.sha256:
        print(
            f"metabook: it was trained on other images (SHA-256 {before.sha256[:8]}…), and some of the classes that it "
            "is judged on may have been among them",
            file=sys.stderr,
        )
    device = ready(options)
    try:
        with _values_make_sense(judged.name), waiting(f"measuring {judged.name}"):
            measured = evaluation.of_checkpoint(judged, path, device, options.spot)
    except KeyboardInterrupt as error:
        raise type(error)("stopped; an evaluation writes nothing, so run the same command to measure anew") from None
    metrics = {
        name: {key: None if isinstance(part, float) and not math.isfinite(part) else part for key, part in one.items()}
        for name, one in checkpoints.entries(measured).items()
    }
    if options.json:
        found = {"experiment": judged.name, "checkpoint": str(path), "iteration": header["iteration"]}
        found |= {"config": checkpoints.configuration(judged), "metrics": metrics, "machine": runtime.machine(device)}
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    same = not options.settings and before == now
    record = records.load(trained.name, True, path.parent.parent / "records") if same else None
    recorded = record["metrics"] if record and record["iterations"]["done"] == header["iteration"] else {}
    print(f"{judged.name}: {header['iteration']:,} of {trained.iterations:,} iterations, {path}")
    rows = [
        (
            name,
            _number(one["value"]),
            _number(one["ci95"]),
            f"{one['n']:,}",
            _number(recorded.get(name, {}).get("value")),
        )
        for name, one in metrics.items()
    ]
    print(tables.Table(("metric", "measured", "± 95 %", "n", "recorded"), rows, "lrrrr"))
    print(FOOTER.format(name=_base(trained.name)))


def _base(name: str) -> str:
    """The experiment that a variant's name begins with."""
    return name.partition("_")[0]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# ---------------------------------------- campaign
def campaign(options: argparse.Namespace) -> None:
    """Train by priority for some minutes, or take in what a campaign elsewhere brought."""
    from helpers import campaign as library

    if options.merge is not None:
        others = (options.out, options.minutes, options.jobs, options.cluster, options.tf32 or None)
        if options.name or options.device != "auto" or any(other is not None for other in others):
            raise UserError("--merge takes a folder and nothing else")
        library.merge(options.merge)
        return
    if options.out is None or options.minutes is None:
        raise UserError("a campaign needs --minutes and --out, or --merge and the folder of an earlier one")
    if options.cluster is not None and options.jobs is not None:
        raise UserError("--cluster has as many jobs as workers: leave --jobs out")
    if options.cluster is not None and options.tf32:
        raise UserError("the workers of a cluster train without TF32: leave --tf32 out")
    how = {"names": options.name, "jobs": options.jobs, "cluster": options.cluster, "tf32": options.tf32}
    library.run(options.out, minutes=options.minutes, device=options.device, **how)


# ---------------------------------------- grammar
def register(commands: Commands) -> None:
    """Add these verbs."""
    devices = {"default": "auto", "help": "cpu, cuda or auto (the default)"}
    images = {"type": folder, "metavar": "FOLDER", "help": "images of your own, in a folder for each class"}
    cores = {"type": threads, "metavar": "N", "help": "CPU threads"}
    rounding = {"action": "store_true", "help": "let a GPU round products to TF32, faster; the record names it"}
    many = {"metavar": "WHERE", "help": "local:2 for two workers here, or the scheduler's tcp://host:8786 (with Dask)"}

    command = commands.add(
        "evaluate",
        evaluate,
        "measure a checkpoint anew on this machine, and print its metrics with 95 % intervals",
        """metabook evaluate maml-sinusoid-5    beside what its record says
        metabook evaluate maml-sinusoid-5 --set test_tasks=2000
        metabook evaluate maml-sinusoid-5_seed-3 --json   a variant of yours, for programs
        metabook evaluate maml-sinusoid-5_seed-3 --out mine   one that was trained with --out mine
        metabook evaluate maml-omniglot-5w1s --data-folder drawings   on images of your own""",
        "Nothing is written.",
    )
    command.add_argument(
        "checkpoint", metavar="NAME|CHECKPOINT", help="an experiment, a variant of your own, or a checkpoint file"
    )
    add_settings(command, "another value for a field of the experiment, such as test_tasks=2000")
    command.add_argument("--data-folder", **images)
    command.add_argument("--out", type=folder, metavar="FOLDER", help=places.HELP)
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--spot", action="store_true", help="measure only the quick metrics, those named spot_…, where there are some"
    )
    command.add_argument("--device", **devices)
    command.add_argument("--threads", **cores)

    command = commands.add(
        "train",
        train,
        "train a recorded experiment or a variant of it, going on from its checkpoint where there is one",
        """metabook train --list                what there is, and how far it got
        metabook train maml-omniglot-5w1s --budget 20m    stops cleanly; run it again to go on
        metabook train maml-sinusoid-5 --set inner_steps=5 --seed 3    a variant of your own
        metabook train maml-omniglot-5w1s --data-folder drawings    on your own images
        metabook train --queue paper --budget 1h     whatever is not complete
        metabook train --queue paper --cluster local:4   the same by four workers""",
        "Ctrl-C ends the iteration and writes checkpoint and record; a second one stops at once. A variant (--set, "
        "--seed, --out, --data-folder) is named after what was changed and never touches data/; without them the "
        "run is written to data/. A folder of images has a folder for each class, or the folders train, validation and "
        "test with those of the classes; any size and number of images will do, grey or coloured (own.size, "
        "own.channels and own.split_seed can be --set).",
    )
    command.add_argument("name", nargs="?", help="name of the experiment")
    command.add_argument(
        "--list", action="store_true", help="list the experiments, with how far they got and what they are"
    )
    command.add_argument("--json", action="store_true", help="with --list: print JSON, in the order of the queue")
    command.add_argument(
        "--queue", metavar="QUEUE", help="paper: every experiment that is not complete, most important first"
    )
    add_settings(command, "a value for a field that `metabook show NAME` lists")
    command.add_argument("--data-folder", **images)
    command.add_argument(
        "--seed", dest="settings", action=Once, default=[], type=lambda text: ("seed", text), metavar="N",
        help="the same as --set seed=N",
    )  # fmt: skip
    command.add_argument("--out", type=folder, metavar="FOLDER", help=f"where a variant goes; {places.OWN} by default")
    command.add_argument(
        "--tensorboard", type=folder, metavar="FOLDER", help="write losses and metrics for TensorBoard there as well"
    )
    command.add_argument("--budget", type=seconds, metavar="TIME", help="stop cleanly after this long: 90s, 20m, 1.5h")
    command.add_argument("--device", **devices)
    command.add_argument("--threads", **cores)
    command.add_argument("--cluster", **many)
    command.add_argument("--tf32", **rounding)
    command.add_argument("--fresh", action="store_true", help="start over; what is there is renamed to ….old")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the training step first: minutes of waiting, then faster; the default for long runs on a CPU "
        "where it can work; a run goes on bit for bit only with the choice that it began with",
    )

    command = commands.add(
        "campaign",
        campaign,
        "train the long runs by priority for some minutes, side by side, and pack their checkpoints and records",
        """metabook campaign --minutes 12 --device cuda --out brought   where a GPU is at hand
        metabook campaign --merge brought                            back home: into data/""",
    )
    command.add_argument("name", nargs="*", help="experiments, in this order; those of data/campaign.yaml otherwise")
    command.add_argument(
        "--minutes", type=minutes, metavar="M", help="wall time, with evaluations and packing; needs --out"
    )
    command.add_argument("--device", **devices)
    command.add_argument("--tf32", **rounding)
    command.add_argument(
        "--out", type=folder, metavar="FOLDER", help="folder for the archives to take home; a second call goes on in it"
    )
    command.add_argument(
        "--jobs", type=positive, metavar="N", help="runs side by side; one a core, at most six on a GPU"
    )
    command.add_argument("--cluster", **many)
    command.add_argument(
        "--merge", type=folder, metavar="FOLDER", help="put the archives of FOLDER into data/; goes alone"
    )
