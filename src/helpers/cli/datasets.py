"""The verb ``data``."""

from __future__ import annotations

import argparse
from importlib import import_module

from helpers.cli.grammar import Commands, positive
from helpers.errors import UserError, nearest

KNOWN = ("omniglot", "mnist", "cifar10", "glyphs", "jets", "names")


def data(options: argparse.Namespace) -> None:
    """Get a data set ready and say what it holds."""
    name = options.name
    if name not in KNOWN:
        raise UserError(f"there is no data set {name!r}{nearest(name, KNOWN)}; the data sets are {', '.join(KNOWN)}")
    if options.jets is not None and name != "jets":
        raise UserError(f"--jets is a number of jets to simulate: it does not go with {name}")
    if options.extract and name != "names":
        raise UserError(f"--extract makes the file of names anew: it does not go with {name}")
    if name == "jets":
        return _jets(options.jets)
    if name == "names":
        return _names(options.extract)
    return _images(name)


def _images(name: str) -> None:
    """Find or fetch images, then say what there are."""
    library = import_module(f"helpers.tasks.{'digits' if name == 'mnist' else name}")
    if name != "glyphs":
        place = library.find()
        print(f"image files: {place or 'none here, so from a cache, else downloaded'}", flush=True)
    for split in ("train", "test"):
        found = library.load(split, "mnist") if name == "mnist" else library.load(split)
        shape = "×".join(str(size) for size in found.images.shape[2:])
        if name == "cifar10":
            classes = len(library.CLASSES)
            held = f"{classes} classes × {len(found.labels) // classes} images of {shape} pixels in colour"
        else:
            turned = " (turned copies are classes too)" if found.provenance.get("rotations") else ""
            count = f"{len(found):,} classes × {found.images.shape[1]} images of {shape} pixels"
            held = f"{count}{turned}, {len(set(found.groups))} groups"
        print(f"{name} {split}: {held}")
        for key, value in found.provenance.items():
            if key.endswith("sha256"):
                print(f"  {key} {value}")


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


def register(commands: Commands) -> None:
    """Add this verb."""
    command = commands.add(
        "data",
        data,
        "download or verify a data set, and print its counts and digests",
        """metabook data omniglot               found, or downloaded
        metabook data jets --jets 1600       simulated anew""",
    )
    command.add_argument("name", help=f"{', '.join(KNOWN)}: glyphs are drawn from fonts, the others are files")
    command.add_argument(
        "--jets",
        type=positive,
        metavar="N",
        help="simulate data/jets.npz anew, N jets per window and sample; 1600: an hour",
    )
    command.add_argument("--extract", action="store_true", help="make data/names.json.gz anew from the installed Babel")
