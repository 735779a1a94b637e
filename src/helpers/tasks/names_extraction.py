"""The lists of names, extracted from Babel's locale data."""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from helpers.errors import UserError
from helpers.runtime import write_atomically
from helpers.tasks import names
from helpers.tasks.names import FAMILIES, FORMAT, KINDS, LICENCE, as_json, digest, fits, normalise

__all__ = ["extract"]


def extract(path: Path | str | None = None) -> Path:
    """Make the file from the installed Babel; the same bytes for the same version of it.

    Args:
        path: where to; ``data/names.json.gz`` unless given. The records are of the one in the repository.

    Raises:
        UserError: without Babel, or where the file cannot be written.
    """
    place = Path(path) if path is not None else names.home()
    try:
        import babel
        from babel.core import get_cldr_version
    except ImportError:
        raise UserError("extracting names needs Babel: install it with `pip install 'babel>=2.14'`") from None
    english = {key: name for key, name in of_locale("en").items() if fits(normalise(name))}
    languages = {}
    for family, codes in FAMILIES.items():
        for code in codes:
            native = {key: name for key, name in of_locale(code).items() if key in english}
            name = babel.Locale("en").languages[code]
            languages[code] = {"name": name, "family": family, "script": script(native.values()), "names": native}
    # The header's digest is of the content: how well it was compressed may differ.
    header = {"format": FORMAT, "babel": babel.__version__, "cldr": get_cldr_version(), "licence": LICENCE}
    header["sha256"] = digest(header, english, languages)
    text = as_json({"header": header, "english": english, "languages": languages})
    write_atomically(place, gzip.compress(text.encode(), mtime=0))
    return place


def of_locale(code: str) -> dict[str, str]:
    """All names that Babel has in one language, by concept, sorted by it; those that are missing are left out.

    Raises:
        UserError: if Babel does not know the language.
    """
    from babel import Locale, UnknownLocaleError

    try:
        locale = Locale.parse(code)
        days, months = (kind["stand-alone"]["wide"] for kind in (locale.days, locale.months))
    except (UnknownLocaleError, ValueError):
        raise UserError(f"Babel has no language {code!r}: choose another, or install a newer Babel") from None
    units = {key: forms.get("long") for key, forms in locale._data["unit_display_names"].items()}  # not public
    tables = (locale.territories, locale.languages, locale.scripts, locale.currencies, units, months, days)
    found = {
        f"{kind}/{key}": name
        for kind, table in zip(KINDS, tables, strict=True)
        for key, name in table.items()
        if isinstance(name, str) and name.strip()
    }
    return dict(sorted(found.items()))


def script(names: Iterable[str]) -> str:
    """``Latn`` if nine of ten letters are Latin, else ``other``."""
    letters = [letter for name in names for letter in name if letter.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith(("LATIN", "MODIFIER")) for letter in letters)
    return "Latn" if letters and latin >= 0.9 * len(letters) else "other"
