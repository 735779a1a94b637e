"""``metabook train --cluster``: a queue or one experiment on the workers of a Dask cluster."""

from __future__ import annotations

import argparse
import sys

from helpers.errors import UserError


def train(options: argparse.Namespace) -> int:
    """Train what is named on a cluster: the runs of a queue side by side, of a search its children."""
    from helpers import cluster, experiments
    from helpers.experiments.nos import Search
    from helpers.lab import checkpoints, training

    given = {"--set and --seed": options.settings, "--out": options.out, "--data-folder": options.data_folder}
    given |= {"--fresh": options.fresh, "--compile": options.compile, "--tensorboard": options.tensorboard}
    given |= {"--threads": options.threads, "--tf32": options.tf32}
    for option, value in given.items():
        if value:
            raise UserError(f"{option} is for a run on this machine: leave it out, or leave --cluster out")
    device = options.device.replace("auto", "cpu")  # the workers', of which this machine may have none
    chosen = list(experiments.catalogue().values()) if options.name is None else [experiments.find(options.name)]
    todo = [e for e in chosen if not checkpoints.complete(e) and not checkpoints.given_up(e)]
    if not todo:
        print("there is nothing to train: what was named is complete, or was given up")
        return 0
    with cluster.connected(options.cluster) as client:
        if options.name is not None and isinstance(todo[0], Search):
            arrange = cluster.spread(client, device)
            training.train(todo[0], device=device, budget=options.budget, arrange=arrange)
            return 0
        return status(cluster.train(todo, client, budget=options.budget, settings={"device": device}))


def status(failed: list[str]) -> int:
    """The exit status after a queue, of which these experiments could not be trained; a line names them."""
    if failed:
        print(f"metabook: not trained: {', '.join(failed)}; the messages above say why", file=sys.stderr)
    return 2 if failed else 0
