"""Names of things in many languages: real translations, shipped in one small file.

Unicode's Common Locale Data Repository (CLDR) says how countries, languages, scripts, currencies, units, months and
days are called in hundreds of languages; the package Babel carries it. ``data/names.json.gz`` is what :func:`extract`
took from there, so that :func:`load` needs neither Babel nor a network. The names are under the Unicode licence.

Texts are made small before anything learns from them (:func:`normalise`): lower case, and every letter with a mark as
the letter and then the mark (Unicode's form NFD). All Latin-script languages then share some sixty tokens. A task is a
language: translate its names to English, letter by letter.
"""

from __future__ import annotations

import gzip
import json
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.parsing import from_json
from helpers.runtime import root
from helpers.tasks import numerals
from helpers.tasks.images import hashed_order, sha256
from helpers.types import Examples, Tasks
from helpers.validate import one_of, whole

__all__ = [
    "ALPHABET",
    "FAMILIES",
    "KINDS",
    "LONGEST",
    "Language",
    "LanguageTasks",
    "Names",
    "Pair",
    "TEST_HELD",
    "TEST_SEEN",
    "TRAIN",
    "VALIDATION",
    "VOCABULARY",
    "decode",
    "encode",
    "fits",
    "load",
    "normalise",
    "rows",
    "taken_apart",
]

# By the first branch that linguists agree on, written by hand; the codes are CLDR's. All are written in Latin letters,
# and CLDR has at least some 300 names of each that differ from the English ones.
FAMILIES = {
    "Germanic": ("af", "da", "de", "fo", "is", "lb", "nb", "nl", "sv"),
    "Romance": ("ca", "es", "fr", "gl", "it", "oc", "pt", "ro", "sc"),
    "Slavic": ("cs", "dsb", "hr", "hsb", "pl", "sk", "sl"),
    "Baltic": ("lt", "lv"),
    "Albanian": ("sq",),
    "Celtic": ("br", "cy", "ga", "gd"),
    "Iranian": ("ku",),
    "Uralic": ("et", "fi", "hu", "se"),
    "Turkic": ("az", "tk", "tr", "uz"),
    "Austronesian": ("id", "jv", "mi", "to"),
    "Bantu": ("ln", "sw", "xh", "zu"),
    "Afroasiatic": ("ha", "mt", "so"),
    "West African": ("ee", "wo", "yo"),  # Niger-Congo without Bantu: three branches, each with one language here
    "Basque": ("eu",),
    "Quechuan": ("qu",),
    "Vietic": ("vi",),
}
# Gu et al. (2018) learn from 18 European languages. Of these 15 are written in Latin letters; Croatian, Upper Sorbian
# and Albanian stand here for Bulgarian, Russian and Greek. Their targets Romanian, Latvian, Finnish and Turkish are
# among the test languages (Korean is not: its letters are others).
TRAIN = (
    "cs", "da", "de", "es", "et", "fr", "hr", "hsb", "hu", "it", "lt", "nl", "pl", "pt", "sk", "sl", "sq", "sv",
)  # fmt: skip
VALIDATION = ("ca", "eu")  # one of a family that is trained on, one that is alone; the test has neither
TEST_SEEN = ("af", "fi", "gl", "is", "lv", "ro")  # their families are trained on
TEST_HELD = ("az", "cy", "ga", "id", "mi", "sw", "tr", "zu")  # theirs are not: Turkic, Celtic, Austronesian, Bantu
MARKS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u0309\u030a\u030b\u030c\u031b\u0323\u0326\u0327\u0328"
ALPHABET = " '-abcdefghijklmnopqrstuvwxyz" + MARKS + "æðøþœßđħıŋłƙɓɔɗəɛ"  # all that is in more than a few names
VOCABULARY = 3 + len(ALPHABET)  # number of different tokens
LONGEST = 20  # letters and marks of a name; longer ones are left out
KINDS = ("territory", "language", "script", "currency", "unit", "month", "day")
PARTS = ("shown", "new")  # of the concepts
NEW_SHARE = 0.2  # of the concepts, kept from all training
FORMAT = 1
LICENCE = "Unicode License V3, https://www.unicode.org/license.txt"
# What is written in several ways, and spaces that must not break.
_SAME = str.maketrans("’‘ʼʻʾ`´‑–\u00a0\u202f", "'''''''--  ")


# ---------------------------------------- texts and tokens
@cache
def normalise(text: str) -> str:
    """A name as the networks see it: lower case, marks after letters, one kind of apostrophe, hyphen and space."""
    return unicodedata.normalize("NFD", " ".join(text.translate(_SAME).lower().split()))


def fits(text: str) -> bool:
    """Whether a normalised name is not empty, short enough, and of letters that are in ``ALPHABET``."""
    return 0 < len(text) <= LONGEST and set(text) <= set(ALPHABET)


def encode(names: Sequence[str], ends: bool = False) -> Tensor:
    """Names as rows of tokens, filled up with ``PAD``.

    Args:
        names: texts; they are normalised first.
        ends: put ``BEGIN`` before each name and ``END`` behind it.

    Returns:
        int64 ``[names, LONGEST]``, two more with ``ends``.

    Raises:
        UserError: for a letter that is not in ``ALPHABET``, or a name that is too long.
    """
    return numerals.encode([normalise(name) for name in names], ends, LONGEST + 2 * ends, ALPHABET)


def decode(tokens: Tensor) -> list[str]:
    """Rows of tokens as texts, up to the first ``END``, without ``BEGIN`` and ``PAD``; letter and mark in one (NFC).

    Args:
        tokens: int64 ``[names, length]``.

    Raises:
        UserError: if it has another shape, or numbers that are no tokens.
    """
    return [unicodedata.normalize("NFC", name) for name in numerals.decode(tokens, ALPHABET)]


class Pair(NamedTuple):
    """One name to translate, both normalised.

    Attributes:
        concept: such as ``territory/DE``.
        source: the native name.
        target: the English one.
    """

    concept: str
    source: str
    target: str


def rows(pairs: Sequence[Pair]) -> Examples:
    """Pairs as a :class:`~helpers.models.seq2seq.Seq2Seq` is trained on them.

    Returns:
        ``x`` int64 ``[n, 2 LONGEST + 1]``, source and target without its last token; ``y`` int64 ``[n, LONGEST + 1]``,
        the target without its first.
    """
    source = encode([pair.source for pair in pairs])
    target = encode([pair.target for pair in pairs], ends=True)
    return Examples(torch.cat([source, target[:, :-1]], 1), target[:, 1:])


# ---------------------------------------- the file
@dataclass(frozen=True, eq=False)
class Language:
    """One language.

    Attributes:
        code: CLDR's, such as ``de``.
        name: in English.
        family: a key of ``FAMILIES``.
        script: of its names, ``Latn``.
        names: native names by concept, as CLDR has them; what it lacks is not there.
    """

    code: str
    name: str
    family: str
    script: str
    names: dict[str, str]


@dataclass(frozen=True, eq=False)
class Names:
    """All names.

    Attributes:
        english: English names by concept, as CLDR has them.
        languages: by code, in the order of ``FAMILIES``.
        header: versions of Babel and CLDR, licence; with ``"sha256"``.
    """

    english: dict[str, str]
    languages: dict[str, Language]
    header: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """What a record says about its data."""
        return {"data": "names"} | {key: self.header[key] for key in ("cldr", "babel", "sha256")}

    def parts(self, seed: int = 0) -> dict[str, frozenset[str]]:
        """The normalised English names, split: ``"shown"`` in training, and ``"new"``, a fifth.

        By name and not by concept: the language and the script Gujarati are one name, which must not be in both.
        """
        targets = sorted({normalise(name) for name in self.english.values()})
        order = hashed_order(targets, seed)
        new = frozenset(targets[i] for i in order[: round(NEW_SHARE * len(targets))])
        return {"shown": frozenset(targets) - new, "new": new}

    def pairs(self, code: str, part: str | None = None, seed: int = 0) -> list[Pair]:
        """What there is to translate in one language, one pair for each English name, in an order that is hashed.

        Left out are names that CLDR lacks, that do not fit (:func:`fits`), and those that are the English name:
        copying would answer them, and a name that nobody has translated yet looks just the same.

        Args:
            code: the language.
            part: ``"shown"`` or ``"new"``; all unless given.
            seed: of the split and of the order.

        Raises:
            UserError: for an unknown language or part.
        """
        one_of(code, "language with names", self.languages)
        if part is not None:
            one_of(part, "part of the concepts", PARTS)
        wanted = None if part is None else self.parts(seed)[part]
        found: dict[str, Pair] = {}
        for concept, native in self.languages[code].names.items():
            pair = Pair(concept, normalise(native), normalise(self.english[concept]))
            usable = fits(pair.source) and fits(pair.target) and pair.source != pair.target
            if usable and (wanted is None or pair.target in wanted):
                found.setdefault(pair.target, pair)
        targets = list(found)
        return [found[targets[i]] for i in hashed_order([f"{code}:{target}" for target in targets], seed)]

    def counts(self, code: str) -> dict[str, int]:
        """Of one language how many names are ``usable``, how many the ``same`` as in English, how many ``missing``;
        the rest of all concepts do not fit or say a name again."""
        names = self.languages[code].names
        same = sum(normalise(names[key]) == normalise(self.english[key]) for key in names)
        return {"usable": len(self.pairs(code)), "same": same, "missing": len(self.english) - len(names)}


def home() -> Path:
    """Where the shipped file is."""
    return root() / "data" / "names.json.gz"


def load(path: Path | str | None = None) -> Names:
    """Read the file of names and verify it; needs no Babel.

    Args:
        path: the file; ``data/names.json.gz`` unless given.

    Raises:
        UserError: when the file is not there, cannot be read, is damaged, or is of another format.

    Source: Unicode CLDR, through Babel; their versions are in the header.
    """
    place = Path(path) if path is not None else home()
    remedy = "restore it from the repository or make it again with `metabook data names --extract`"
    if not place.is_file():
        raise UserError(f"the file of names {place} is missing: {remedy}")
    try:
        content = from_json(gzip.decompress(place.read_bytes()))
        header, english, languages = content["header"], content["english"], content["languages"]
        sound = header.pop("sha256") == digest(header, english, languages)
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zlib.error) as error:
        raise UserError(f"the file of names {place} is damaged or cannot be read: {remedy}") from error
    if not sound:
        raise UserError(f"the file of names {place} is damaged (its digest differs): {remedy}")
    if header["format"] != FORMAT:
        raise UserError(f"the file of names {place} has format {header['format']}, not {FORMAT}: {remedy}")
    found = {code: Language(code, **entry) for code, entry in languages.items()}
    return Names(english, found, header | {"sha256": digest(header, english, languages)})


def as_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def digest(*parts: Any) -> str:
    return sha256(*(as_json(part) for part in parts))


# ---------------------------------------- tasks
@dataclass(frozen=True)
class LanguageTasks:
    """Languages as tasks, for training: names to adapt on and other names of the same language to be judged on.

    Attributes:
        names: what there is.
        languages: their codes.
        support, query: names of a task.
        part: of the concepts.
        seed: of the split of the concepts.

    Raises:
        UserError: if a language has too few names, none is given, or a number of names is below 1.
    """

    names: Names
    languages: Sequence[str] = TRAIN
    support: int = 16
    query: int = 16
    part: str = "shown"
    seed: int = 0
    tables: list[Examples] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole(self.support, "number of names to adapt on", least=0)
        whole(self.query, "number of names to be judged on")
        tables = [rows(self.names.pairs(code, self.part, self.seed)) for code in self.languages]
        if not tables:
            raise UserError("languages as tasks need at least one language")
        for code, table in zip(self.languages, tables, strict=True):
            if (least := self.support + self.query) > len(table.x):
                raise UserError(f"{code!r} has {len(table.x)} names, fewer than the {least} of a task: ask for fewer")
        object.__setattr__(self, "tables", tables)

    def sample(self, n_tasks: int, generator: torch.Generator) -> Tasks:
        """Draw languages, all of them once before any comes again, and of each some names without repetition.

        Returns:
            Support and query, ``x`` ``[n_tasks, names, 2 LONGEST + 1]`` and ``y`` ``[n_tasks, names, LONGEST + 1]``.

        Raises:
            UserError: for a number of tasks below 1.
        """
        whole(n_tasks, "number of tasks")
        count, device = len(self.tables), generator.device
        rounds = [torch.randperm(count, generator=generator, device=device) for _ in range(-(-n_tasks // count))]
        chosen, drawn = torch.cat(rounds)[:n_tasks].tolist(), []
        for language in chosen:
            table = self.tables[language]
            order = torch.randperm(len(table.x), generator=generator, device=device)[: self.support + self.query].cpu()
            drawn.append(Examples(table.x[order], table.y[order]))
        x, y = (torch.stack(parts).to(device) for parts in zip(*drawn, strict=True))
        cut = self.support
        return Tasks(Examples(x[:, :cut], y[:, :cut]), Examples(x[:, cut:], y[:, cut:]))


def taken_apart(names: Names, code: str, shots: int, queries: int, seed: int = 0) -> dict[str, list[Pair]]:
    """A test language taken apart: always the same.

    Args:
        names: what there is.
        code: the language.
        shots: names to adapt on.
        queries: names of each kind to be judged on.
        seed: of the split of the concepts.

    Returns:
        ``"shown"`` and ``"new"``, ``queries`` pairs each: concepts that other languages show in training, and concepts
        that none does. ``"support"``, ``shots`` pairs of shown concepts; fewer shots are the first of more, and the
        queries do not depend on their number.

    Raises:
        UserError: if the language has too few names, or a number of names is below 0.
    """
    whole(shots, "number of shots", 0)
    whole(queries, "number of queries", 0)
    shown, new = (names.pairs(code, part, seed) for part in PARTS)
    if len(shown) < shots + queries or len(new) < queries:
        have = f"{len(shown)} names of shown concepts and {len(new)} of new ones"
        raise UserError(f"{code!r} has {have}: too few for {shots} shots and {queries} queries of each kind")
    return {"support": shown[queries : queries + shots], "shown": shown[:queries], "new": new[:queries]}
