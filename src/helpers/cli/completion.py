"""The verb ``completion``."""

from __future__ import annotations

import argparse
import re
from functools import partial

from helpers.cli.datasets import KNOWN
from helpers.cli.grammar import Commands, folder
from helpers.errors import UserError


def completion(commands: Commands, options: argparse.Namespace) -> None:
    """Print what a shell needs to complete words of the command line."""
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs a package that is not here: `pip install shtab`") from None
    from helpers import experiments
    from helpers.lab import claims
    from helpers.site import checks, notebooks

    names, chapters = list(experiments.catalogue()), notebooks.chapters()
    words = {  # by verb and argument
        **{(verb, "name"): names for verb in ("show", "train", "campaign")},
        ("evaluate", "checkpoint"): names,
        ("record", "names"): names,
        ("verdicts", "paper"): claims.papers(),
        ("run", "chapter"): chapters,
        ("run", "profile"): notebooks.PROFILES,
        ("refresh", "chapter"): chapters,
        ("check", "tier"): list(checks.TIERS),
        ("data", "name"): KNOWN,
    }
    for verb, command in commands.parsers.items():
        for action in command._actions:
            if known := words.get((verb, action.dest)):
                action.choices = [
                    word for word in known if re.fullmatch(r"[\w.-]+", word)
                ]  # the rest means more to a shell
            if action.type is folder:
                action.complete = shtab.DIRECTORY
    print(shtab.complete(commands.top, options.shell))


def register(commands: Commands) -> None:
    """Add this verb."""
    command = commands.add(
        "completion",
        partial(completion, commands),
        "print what bash or zsh needs to complete verbs, options and names of experiments",
        '''metabook completion bash     for ~/.bashrc: eval "$(metabook completion bash)"
        metabook completion zsh      for ~/.zshrc, after compinit: eval "$(metabook completion zsh)"''',
    )
    command.add_argument("shell", choices=("bash", "zsh"), help="the shell: bash or zsh")
