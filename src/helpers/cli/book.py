"""Verbs that run chapters, build the pages and check: ``book``, ``run``, ``refresh``, ``check``, ``bench``."""

from __future__ import annotations

import argparse
import subprocess
import sys

from helpers.cli.grammar import Commands, add_settings, folder
from helpers.errors import UserError

# What only one command needs is imported there: `metabook train` then works with torch, numpy and four small packages.


def book(options: argparse.Namespace) -> None:
    """Run what changed, build the pages, and check them."""
    from helpers.runtime import root
    from helpers.site import builder, runner

    if options.check:
        print(f"{builder.check_site()} pages are as they should be")
        return
    if not options.committed:
        runner.run_chapters(force=options.force)
    index = builder.build(root() / "notebooks" if options.committed else None) / "index.html"
    print(f"The book is at {index}")


def run(options: argparse.Namespace) -> None:
    """Execute copies of chapters, and print where they are."""
    from helpers import runtime
    from helpers.site import notebooks, runner

    if "profile" in dict(options.settings):
        raise UserError("the profile is chosen by --profile quick, book or paper: leave it out of --set")
    values = notebooks.read_parameters(notebooks.select(options.chapter), options.settings)
    if "device" in values:  # known to be wrong now, not after the chapter's first cells
        runtime.pick_device(values["device"])
    done = runner.run_chapters(options.chapter, options.profile, values, options.out, force=options.force)
    for path in done.values():
        print(path)


def refresh(options: argparse.Namespace) -> None:
    """Put fresh outputs into the committed notebooks, and what they measured for claims into records."""
    from helpers.lab import live
    from helpers.runtime import root
    from helpers.site import notebooks, runner

    try:
        runner.refresh(options.chapter)
    finally:  # of the chapters that were run, also where another failed
        for name in notebooks.select(options.chapter):
            live.keep(notebooks.read(root() / "notebooks" / f"{name}.ipynb"), name)


def check(options: argparse.Namespace) -> int:
    """Run the tiers of checks."""
    from helpers.site import checks

    return checks.run(options.tier, all_records=options.all)


def bench(options: argparse.Namespace) -> int:
    """Run the benchmark, which is a program of its own: it needs the libraries that it compares with."""
    from helpers.runtime import root

    program = root() / "benchmarks" / "bench.py"
    if not program.exists():
        raise UserError(f"{program} is missing: run this from a complete checkout")
    return subprocess.run([sys.executable, str(program), *options.rest]).returncode


def register(commands: Commands) -> None:
    """Add these verbs."""
    chapter = "such as 02_maml, 02 or maml; all when none is named"

    command = commands.add(
        "book",
        book,
        "run the chapters that changed, each within some minutes, and build the pages",
        """metabook book                        the pages are then at _build/html/index.html
        metabook book --committed            from the committed outputs, running nothing
        metabook book --check                look at every page, link and image of the built pages""",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--committed", action="store_true", help="run nothing: build from the committed outputs")
    which.add_argument("--check", action="store_true", help="run and build nothing: check the existing pages")
    which.add_argument("--force", action="store_true", help="run unchanged chapters, too")

    command = commands.add(
        "run",
        run,
        "run copies of chapters with other parameters or at another scale",
        """metabook run                         every chapter, as it is published
        metabook run maml --profile quick    one chapter, in seconds
        metabook run maml --set seed=1 --set inner_rate=0.2""",
        "The notebooks stay as they are. What has not changed is not run again.",
    )
    command.add_argument("chapter", nargs="*", help=chapter)
    command.add_argument("--profile", default="book", help="the scale: quick, book (the default) or paper")
    add_settings(command, "a value for a parameter of the chapter, one of its cell tagged parameters")
    command.add_argument("--out", type=folder, metavar="FOLDER", help="where the copies go; _build/PROFILE by default")
    command.add_argument("--force", action="store_true", help="run unchanged chapters, too")

    command = commands.add(
        "refresh",
        refresh,
        "run chapters and overwrite the outputs in notebooks/, to be committed",
        """metabook refresh                     every chapter
        metabook refresh 02 08               these two""",
    )
    command.add_argument("chapter", nargs="*", help=chapter)

    command = commands.add(
        "check",
        check,
        "check the code, the chapters, the pages and the records, tier by tier",
        """metabook check                       everything; a quarter to half an hour on two cores
        metabook check unit                  the helpers alone
        metabook check records --all         every committed checkpoint, evaluated again""",
    )
    command.add_argument(
        "tier",
        nargs="*",
        help="unit (the helpers), chapters (each once, outputs compared), smoke (each in seconds), book (the "
        "pages), records (checkpoints evaluated again); all when none is named",
    )
    command.add_argument(
        "--all", action="store_true", help="evaluate all records, not only the sample that the commit selects"
    )

    command = commands.add(
        "bench",
        bench,
        "time one meta-gradient against other libraries; writes _build/bench.json",
        "metabook bench",
        "It takes some minutes. Further words are options of benchmarks/bench.py, which its --help lists.",
    )
    command.set_defaults(takes_rest=True)
