"""Where runs are: the recorded ones in ``data/``, own ones in ``_build/own`` or in the folder of ``--out``."""

from __future__ import annotations

from pathlib import Path

from helpers.errors import UserError, nearest

OWN = Path("_build") / "own"  # where own variants go, within the checkout
HELP = "look for the run in this folder, which training was given with --out"


def homes(out: Path | None) -> list[Path]:
    """The folders in which a run is looked for."""
    from helpers.runtime import root

    return [root() / "data", root() / OWN] if out is None else [out]


def checkpoint(name: str, out: Path | None = None) -> Path:
    """The file that is meant: a path, or the name of a committed or own run.

    Raises:
        UserError: if there is none.
    """
    from helpers import experiments
    from helpers.lab.checkpoints import SUFFIX

    if name.endswith(SUFFIX):
        if out is not None:
            raise UserError(f"--out says where a name is looked for: leave it out with the file {name}")
        return Path(name)
    places = [home / "checkpoints" for home in homes(out)]
    for place in places:
        if name == Path(name).name and (place / f"{name}{SUFFIX}").exists():
            return place / f"{name}{SUFFIX}"
    if out is None and name in experiments.catalogue():
        raise UserError(
            f"{name} has no checkpoint: `metabook train {name}` makes it, and --out FOLDER finds one elsewhere"
        )
    there = sorted(path.name.removesuffix(SUFFIX) for place in places for path in place.glob(f"*{SUFFIX}"))
    if out is not None:
        if not out.exists():
            raise UserError(f"there is no folder {out}: name that of --out when the run was trained")
        held = f"it holds {', '.join(there[:5])}{' …' * (len(there) > 5)}" if there else "it holds none"
        raise UserError(f"there is no checkpoint {name!r} in {out}{nearest(name, there)}; {held}")
    raise UserError(
        f"there is no checkpoint {name!r}{nearest(name, [*there, *experiments.catalogue()])}; name a file, an "
        f"experiment that `metabook train --list` prints, or a variant in {OWN}, or give the --out of its training"
    )


def experiment(name: str, out: Path | None = None):
    """The experiment of that name, or the variant that was trained under it; and the folder of its run.

    Raises:
        UserError: if there is neither.
    """
    from helpers import experiments
    from helpers.lab import checkpoints, variants

    known = experiments.catalogue()
    if out is None and name in known:
        return known[name], homes(None)[0]
    if out is None and not name.endswith(checkpoints.SUFFIX) and not any(name.startswith(f"{one}_") for one in known):
        experiments.find(name)  # which says what there is
    path = checkpoint(name, out)
    _, header = checkpoints.read_checkpoint(path)
    return variants.restored(header["config"], known), path.parent.parent
