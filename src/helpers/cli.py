"""The command line of the book: run chapters, train recorded experiments, check everything, time it, prepare data.

Every mistake of the user's is one sentence on standard error and exit status 2; Ctrl-C ends with 130.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from helpers.errors import UserError, exit_status
from helpers.runtime import root

# What only one command needs is imported there: `metabook train` then works with torch, numpy and four small packages.
QUEUES = ("paper",)  # the catalogue of experiments, the most important first


def seconds(text: str) -> float:
    """Parse a duration such as ``90``, ``90s``, ``20m``, ``1.5h`` or ``1h30m``."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 90s, 20m, 1.5h or 1h30m")
    return sum(float(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not re.fullmatch(r"[0-9]{1,6}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parameter(text: str) -> tuple[str, Any]:
    """Parse ``name=value``; the value is read as YAML: ``0.1`` is a number, ``true`` a truth value, ``cpu`` a text."""
    import yaml

    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a parameter: write name=value")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"the value in {text!r} cannot be read: quote it as YAML asks") from None


# ---------------------------------------- commands; each returns an exit status, None standing for 0
def run(options: argparse.Namespace) -> None:
    """Execute copies of chapters, and print where they are."""
    from helpers import runtime
    from helpers.site import runner

    values = dict(pair for group in options.parameters for pair in group)
    if "device" in values:  # known to be wrong now, not after the chapter's first cells
        runtime.pick_device(str(values["device"]))
    done = runner.run_chapters(options.chapter, options.profile, values, options.out, force=options.force)
    for path in done.values():
        print(path)


def train(options: argparse.Namespace) -> int | None:
    """Train, or go on training, recorded experiments."""
    import torch

    from helpers import experiments, runtime

    if options.queue is not None and options.queue not in QUEUES:
        raise UserError(f"there is no queue {options.queue!r}; known: {', '.join(QUEUES)}")
    if options.queue is not None and options.name:
        raise UserError("name an experiment or a queue, not both")
    if options.queue is not None and options.fresh:
        raise UserError("--fresh starts over one experiment, not a whole queue: name the experiment instead of --queue")
    if options.list or not (options.name or options.queue):
        for name in experiments.catalogue():
            print(name)
        return None
    names = [options.name] if options.name else list(experiments.catalogue())
    chosen = [experiments.find(name) for name in names]
    device = runtime.pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    runtime.keep_memory()
    if device.type == "cpu":
        runtime.fast_products()
    compiled = runtime.can_compile() if options.compile is None else options.compile
    settings = {"device": device, "compiled": compiled, "fresh": options.fresh}
    return _queue(chosen, options.budget, settings) if options.queue else _train(chosen[0], options.budget, settings)


def _train(experiment, budget: float | None, settings: dict[str, Any]) -> None:
    from helpers.lab import training

    training.train(experiment, budget=budget, **settings)


def _queue(chosen: list, budget: float | None, settings: dict[str, Any]) -> int:
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
                _train(experiment, left, settings)
        except UserError as error:
            print(f"metabook: {error}", file=sys.stderr)
            failed.append(experiment.name)
        except Exception as error:  # such as a full GPU or disk: the rest of the queue can still be trained
            print(f"metabook: {experiment.name} failed ({type(error).__name__}: {error})", file=sys.stderr)
            failed.append(experiment.name)
    if failed:
        print(f"metabook: not trained: {', '.join(failed)}; the messages above say why", file=sys.stderr)
    return 2 if failed else 0


def campaign(options: argparse.Namespace) -> None:
    """Train by priority for some minutes, or take in what a campaign elsewhere brought."""
    from helpers import campaign as library

    if options.merge is not None:
        if options.name or options.out is not None:
            raise UserError("--merge takes a folder and nothing else")
        library.merge(options.merge)
        return
    if options.out is None or options.minutes is None:
        raise UserError("a campaign needs --minutes and --out, or --merge and the folder of an earlier one")
    library.run(options.out, minutes=options.minutes, device=options.device, names=options.name, jobs=options.jobs)


def check(options: argparse.Namespace) -> int:
    """Run the tiers of checks."""
    from helpers.site import checks

    return checks.run(options.tier, all_records=options.all)


def bench(options: argparse.Namespace) -> int:
    """Run the benchmark, which is a program of its own: it needs the libraries that it compares with."""
    program = root() / "benchmarks" / "bench.py"
    if not program.exists():
        raise UserError(f"{program} is missing: run this from a complete checkout")
    return subprocess.run([sys.executable, str(program), *options.rest]).returncode


def data(options: argparse.Namespace) -> None:
    """Get a data set ready and say what it holds."""
    from importlib import import_module

    if options.jets is not None and options.name != "jets":
        raise UserError(f"--jets is a number of jets to simulate: it does not go with {options.name}")
    if options.extract and options.name != "names":
        raise UserError(f"--extract makes the file of names anew: it does not go with {options.name}")
    if options.name == "jets":
        return _jets(options.jets)
    if options.name == "names":
        return _names(options.extract)
    library = import_module(f"helpers.tasks.{'digits' if options.name == 'mnist' else options.name}")
    if options.name != "glyphs":
        place = library.find()
        print(f"image files: {place or 'none here, so from a cache, else downloaded'}", flush=True)
    for split in ("train", "test"):
        found = library.load(split, "mnist") if options.name == "mnist" else library.load(split)
        shape = "×".join(str(size) for size in found.images.shape[2:])
        if options.name == "cifar10":
            classes = len(library.CLASSES)
            held = f"{classes} classes × {len(found.labels) // classes} images of {shape} pixels in colour"
        else:
            turned = " (turned copies are classes too)" if found.provenance.get("rotations") else ""
            count = f"{len(found):,} classes × {found.images.shape[1]} images of {shape} pixels"
            held = f"{count}{turned}, {len(set(found.groups))} groups"
        print(f"{options.name} {split}: {held}")
        for name, value in found.provenance.items():
            if name.endswith("sha256"):
                print(f"  {name} {value}")


def _jets(per_window: int | None) -> None:
    """Simulate jets where a number is given, then say what the file holds."""
    from helpers.tasks import jets

    if per_window is not None:
        from helpers.tasks.jets import simulation

        simulation.generate(per_window)
    found = jets.load()
    for (process, shower, split), windows in found.counts().items():
        print(f"jets {split}: {process} with {shower}, {' + '.join(f'{count:,}' for count in windows)} jets")
    print(f"  sha256 {found.header['sha256']}")


def _names(extract: bool) -> None:
    """Take names from Babel where that is asked for, then say what the file holds."""
    from helpers.tasks import names, names_extraction

    if extract:
        names_extraction.extract()
    found = names.load()
    for code, language in found.languages.items():
        counts = ", ".join(f"{count:,} {what}" for what, count in found.counts(code).items())
        print(f"names {code}: {language.name} ({language.family}, {language.script}), {counts}")
    print(f"  {len(found.english):,} concepts of CLDR {found.header['cldr']} through Babel {found.header['babel']}")
    print(f"  {found.header['licence']}")
    print(f"  sha256 {found.header['sha256']}")


# ---------------------------------------- grammar
class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"metabook: {message}; `{self.prog} --help` shows the usage", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The grammar of the command ``metabook``: what each of its commands takes."""
    top = _Parser(prog="metabook", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, action, summary: str, examples: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(do=action)
        return command

    command = add(
        "run",
        run,
        "execute copies of chapters with papermill; what has not changed is not run again",
        "  metabook run                                  every chapter, as it is published\n"
        "  metabook run maml --profile quick             one chapter, in seconds\n"
        "  metabook run maml --parameters seed=1 device=cuda",
    )
    command.add_argument("chapter", nargs="*", help="such as 02_maml, 02 or maml; all when none is named")
    command.add_argument("--profile", default="book", help="quick, book (the default) or paper")
    command.add_argument(
        "-p", "--parameters", nargs="+", action="append", default=[], type=parameter, metavar="NAME=VALUE",
        help="values for the cell of the chapter that is tagged parameters",
    )  # fmt: skip
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where the copies go; _build/PROFILE by default")
    command.add_argument("--force", action="store_true", help="also what has not changed")

    command = add(
        "train",
        train,
        "train a recorded experiment, going on from its checkpoint where there is one",
        "  metabook train --list                         the names\n"
        "  metabook train maml-omniglot-5w1s --budget 20m   stops cleanly; the same command goes on\n"
        "  metabook train --queue paper --budget 1h      whatever is not complete, most important first",
    )
    command.add_argument("name", nargs="?", help="the experiment")
    command.add_argument("--list", action="store_true", help="list the experiments")
    command.add_argument("--queue", metavar="QUEUE", help="instead of one experiment all of a queue: paper")
    command.add_argument("--budget", type=seconds, metavar="TIME", help="stop cleanly after this long: 90s, 20m, 1.5h")
    command.add_argument("--device", default="auto", help="cpu, cuda or auto (the default)")
    command.add_argument("--threads", type=positive, metavar="N", help="CPU threads")
    command.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile, the default where it can work; go on with what the run began with",
    )

    command = add(
        "campaign",
        campaign,
        "train the long runs by priority for some minutes, several side by side, and pack what came of it",
        "  metabook campaign --minutes 12 --device cuda --out brought   where a GPU is at hand\n"
        "  metabook campaign --merge brought                            back home: into data/",
    )
    command.add_argument("name", nargs="*", help="experiments, in this order; those of data/campaign.yaml otherwise")
    command.add_argument("--minutes", type=float, metavar="M", help="of wall time, evaluations and packing included")
    command.add_argument("--device", default="auto", help="cpu, cuda or auto (the default)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="where the packs go; a second call goes on there")
    command.add_argument(
        "--jobs", type=positive, metavar="N", help="runs side by side; one a core, at most six on a GPU"
    )
    command.add_argument("--merge", type=Path, metavar="FOLDER", help="put the packs of that folder into data/")

    command = add("check", check, "run the checks, tier by tier")
    command.add_argument("tier", nargs="*", help="unit, chapters, smoke, book, records; all when none is named")
    command.add_argument("--all", action="store_true", help="evaluate all records, not only those whose turn it is")

    add(
        "bench",
        bench,
        "time one meta-gradient against other libraries; writes _build/bench.json",
        "  metabook bench     (further words are handed on to benchmarks/bench.py)",
    )

    command = add("data", data, "get a data set ready, verify it, and print its counts and digests")
    known = ("omniglot", "mnist", "cifar10", "glyphs", "jets", "names")
    command.add_argument(
        "name",
        choices=known,
        help="glyphs are drawn from fonts, jets are simulated, names are from CLDR, the others are images",
    )
    command.add_argument(
        "--jets", type=positive, metavar="N", help="simulate data/jets.npz, N jets a window of each sample (hours)"
    )
    command.add_argument("--extract", action="store_true", help="make data/names.json.gz anew from the installed Babel")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    grammar = parser()
    options, options.rest = grammar.parse_known_args(arguments)
    if options.rest and options.do is not bench:
        grammar.error(f"unrecognized arguments: {' '.join(options.rest)}")
    return exit_status(options.do, options)


if __name__ == "__main__":
    sys.exit(main())
