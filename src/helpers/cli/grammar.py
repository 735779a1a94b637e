"""What the commands are made of: a parser with one-sentence complaints, and the kinds of their arguments."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one sentence, and which guesses at no option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        message = message.replace("expected one argument", "needs a value after it, or after = one that begins with -")
        print(f"metabook: {message}; `{self.prog} --help` shows the usage", file=sys.stderr)
        raise SystemExit(2)


class Commands:
    """The verbs of a parser, ``top``; ``parsers`` has that of each verb, in the order of the help."""

    def __init__(self, top: Parser) -> None:
        self._group = top.add_subparsers(metavar="COMMAND", title="commands")
        self.top = top
        self.parsers: dict[str, argparse.ArgumentParser] = {}

    @property
    def names(self) -> list[str]:
        """The verbs."""
        return list(self.parsers)

    def add(
        self, name: str, action: Callable[[argparse.Namespace], int | None], summary: str, examples: str, more: str = ""
    ) -> argparse.ArgumentParser:
        """A verb.

        Args:
            action: what it does; returns the exit status, None standing for 0.
            summary: one clause, which the help of ``metabook`` shows.
            examples: lines for the verb's own help.
            more: sentences for the verb's own help.
        """
        command = self._group.add_parser(
            name,
            help=summary.replace("%", "%%"),
            description=f"{summary[0].upper()}{summary[1:]}.{more and ' '}{more}",
            epilog=_aligned(examples),
            formatter_class=_Help,
        )
        command.set_defaults(do=action, parser=command)
        self.parsers[name] = command
        return command


def _aligned(examples: str) -> str:
    """Examples line by line; what is said of each, two spaces after it or more, begins in one column."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in examples.strip().splitlines()]
    longest = max(len(command) for command, *_ in lines)
    return "\n".join(["examples:", *(f"  {command:<{longest}}  {' '.join(said)}".rstrip() for command, *said in lines)])


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are; the description is wrapped."""

    def add_text(self, text: str | None) -> None:
        wrapped = text is not None and not text.startswith("examples:")
        super().add_text("\n".join(self._split_lines(text, max(self._width, 11))) if wrapped else text)


def ready(options: argparse.Namespace, tf32: bool = False) -> Any:
    """Make this process ready for ``--threads`` and for TF32, and return the torch device that ``--device`` names."""
    import torch

    from helpers import runtime

    device = runtime.pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    runtime.allow_tf32(tf32)
    runtime.keep_memory()
    return device


# ---------------------------------------- kinds of arguments
def setting(text: str) -> tuple[str, str]:
    """Parse ``name=value``; what the value stands for depends on the field or parameter (:mod:`helpers.settings`)."""
    name, equals, value = text.partition("=")
    if not (equals and all(part.isidentifier() for part in name.split("."))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting: write name=value, without spaces")
    return name, value


class Once(argparse.Action):
    """Collect settings; of two values for one name neither is what was meant."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, _: Any = None):
        before = getattr(namespace, self.dest)
        if value[0] in dict(before):
            parser.error(f"{value[0]} is set twice: choose one value")
        setattr(namespace, self.dest, [*before, value])


def add_settings(command: argparse.ArgumentParser, of: str) -> None:
    """The option ``--set``, the same for every verb that takes values."""
    command.add_argument(
        "--set", dest="settings", action=Once, default=[], type=setting, metavar="NAME=VALUE",
        help=f"{of}; a list is written 1,3,10; once for each name",
    )  # fmt: skip


def seconds(text: str) -> float:
    """Parse a duration such as ``90``, ``90s``, ``20m``, ``1.5h`` or ``1h30m``."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", text)
    total = sum(float(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip() or not math.isfinite(total):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: write 90s, 20m, 1.5h or 1h30m")
    return total


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not re.fullmatch(r"[0-9]{1,6}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def threads(text: str) -> int:
    """Parse a number of threads; a library that cannot start so many ends the whole process."""
    if positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST_THREADS}")
    return int(text)


def minutes(text: str) -> float:
    """Parse a finite number of minutes above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return number


def folder(text: str) -> Path:
    """Parse the path of a folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the path of a folder")
    if os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text} is a file: name a folder")
    return Path(text)
