"""The commands that run the chapters and build the pages: ``python -m helpers.site``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import yaml

from helpers.errors import exit_status
from helpers.site.builder import build, check_site
from helpers.site.runner import refresh, run_chapters


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.site", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute copies of chapters")
    run.add_argument("chapter", nargs="*")
    run.add_argument("--profile", default="book")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--out", type=Path)
    run.add_argument("--force", action="store_true", help="also what has not changed")
    commands.add_parser("build", help="build the site from the executed chapters")
    commands.add_parser("check", help="check the built site")
    renew = commands.add_parser("refresh", help="put fresh outputs into the committed notebooks")
    renew.add_argument("chapter", nargs="*")
    given = parser.parse_args(None if argv is None else list(argv))
    if given.command == "run":
        values = {name: yaml.safe_load(value) for name, value in given.parameter}
        return exit_status(run_chapters, given.chapter, given.profile, values, given.out, force=given.force)
    if given.command == "build":
        return exit_status(lambda: print(f"The book is at {build() / 'index.html'}"))
    if given.command == "check":
        return exit_status(lambda: print(f"{check_site()} pages are as they should be"))
    return exit_status(refresh, given.chapter)
