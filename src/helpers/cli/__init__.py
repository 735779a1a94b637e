"""The command line of the book: look at results, train experiments, run chapters, build the pages, check everything.

Every mistake of the user's is one sentence on standard error and exit status 2; Ctrl-C ends with 130, a request to
terminate with 143.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from helpers.cli import book, completion, datasets, evidence, measuring, runs
from helpers.cli.grammar import Commands, Parser
from helpers.errors import exit_status, nearest

__all__ = ["main", "parser"]


def parser() -> tuple[Parser, Commands]:
    """The grammar of the command ``metabook``, and its verbs."""
    top = Parser(
        prog="metabook",
        description=(__doc__ or "").splitlines()[0],
        epilog="`metabook COMMAND --help` explains a command and shows examples. To look around: `metabook train "
        "--list`, `metabook show maml-sinusoid-5`, `metabook evaluate maml-sinusoid-5`, `metabook verdicts`.",
    )
    top.add_argument("--version", action="store_true", help="print the version and the commit of the code")
    top.set_defaults(do=lambda _: top.print_help(), parser=top, takes_rest=False)
    commands = Commands(top)
    for group in (evidence, runs, measuring, book, datasets, completion):
        group.register(commands)
    return top, commands


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # letters that the terminal does not have are written as question marks
            stream.reconfigure(errors="replace")
    top, commands = parser()
    verb = next(iter(words), None)
    if verb is not None and not verb.startswith("-") and verb not in commands.names:
        top.error(f"there is no command {verb!r}{nearest(verb, commands.names)}; they are {', '.join(commands.names)}")
    options, options.rest = top.parse_known_args(words)
    if options.rest and not options.takes_rest:
        options.parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    if options.version:
        return exit_status(version)
    return exit_status(options.do, options)


def version() -> None:
    """Print the version of the package and the commit of its code."""
    import helpers
    from helpers import runtime

    print(f"metabook {helpers.__version__} (commit {runtime.commit()})")
