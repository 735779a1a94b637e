"""The command line: ``metabook run | train | check | bench | data``."""

from __future__ import annotations

import argparse
import re
import sys

from helpers.runtime import UserError


def seconds(text: str) -> float:
    """Parse a duration such as ``90``, ``90s``, ``20m`` or ``1.5h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 90s, 20m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def train(options: argparse.Namespace) -> None:
    """Train, or go on training, a recorded experiment."""
    import torch

    from helpers import experiments, runtime, training

    if options.list or not options.name:
        for name in experiments.catalogue():
            print(name)
        return
    experiment = experiments.find(options.name)
    device = runtime.pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    runtime.keep_memory()
    compiled = runtime.can_compile() if options.compile is None else options.compile
    training.train(experiment, device=device, budget=options.budget, fresh=options.fresh, compiled=compiled)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="metabook", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="train a recorded experiment, from its checkpoint where there is one")
    command.add_argument("name", nargs="?", help="the experiment")
    command.add_argument("--list", action="store_true", help="list the experiments")
    command.add_argument("--budget", type=seconds, help="stop cleanly after this long: 90s, 20m, 1.5h")
    command.add_argument("--device", default="auto", help="cpu, cuda or auto (the default)")
    command.add_argument("--threads", type=int, help="CPU threads")
    command.add_argument("--fresh", action="store_true", help="ignore an existing checkpoint")
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile (the default where it can work)")
    command.set_defaults(do=train)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; every mistake of the user's is one sentence on standard error and exit status 2."""
    options = parser().parse_args(arguments)
    try:
        options.do(options)
    except UserError as error:
        print(f"metabook: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metabook: stopped; what was done is saved, run the same command to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
