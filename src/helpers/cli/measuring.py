"""The verb that measures checkpoints again and writes their records anew: ``record``."""

from __future__ import annotations

import argparse
import sys

from helpers.cli.grammar import Commands, ready, threads
from helpers.errors import UserError


def record(options: argparse.Namespace) -> int:
    """Evaluate checkpoints again and write their records; one that cannot be measured does not stop the others."""
    from helpers import experiments
    from helpers.lab import records, reports
    from helpers.progress import waiting

    if bool(options.names) == options.all:
        raise UserError("name the experiments whose checkpoints are to be measured, or say --all")
    device = ready(options)
    names = options.names or [name for name in experiments.catalogue() if (records.folder() / f"{name}.json").exists()]
    failed = []
    for experiment in [experiments.find(name) for name in names]:
        try:
            with waiting(f"measuring {experiment.name}"):
                reports.again(experiment, device, compiled=options.compile)
        except UserError as error:
            print(f"metabook: {error}", file=sys.stderr)
            failed.append(experiment.name)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


def register(commands: Commands) -> None:
    """Add this verb."""
    command = commands.add(
        "record",
        record,
        "measure committed checkpoints again and write their records anew; nothing is trained",
        """metabook record maml-sinusoid-5
        metabook record --all""",
        "A record keeps every metric, the values behind it by seed or by task, and a digest of both; "
        "`metabook evaluate` measures without writing anything.",
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="experiments; `metabook train --list` prints them")
    command.add_argument("--all", action="store_true", help="all that have a record; hours on one processor core")
    command.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: cpu)")
    command.add_argument(
        "--compile",
        action="store_true",
        help="compile the inner steps first, where the experiment can: worth it from some minutes of measuring on",
    )
    command.add_argument("--threads", type=threads, metavar="N", help="threads of the processor")
