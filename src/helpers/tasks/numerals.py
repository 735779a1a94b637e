"""Translation without a corpus: the names of numbers, English to German, letter by letter.

*Four hundred twenty-one* is *vierhunderteinundzwanzig*: German says the one before the twenty, and writes it all as one
word. So letters cannot be replaced in their order; a network must remember what it has read. Both names follow from
the number by grammar, nothing is loaded, and there is exactly one right answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.models.tokens import BEGIN, END, PAD
from helpers.tasks.images import hashed_order
from helpers.types import Examples
from helpers.validate import one_of, whole

__all__ = ["ALPHABET", "LIMIT", "SPLITS", "VOCABULARY", "decode", "encode", "english", "german", "load", "numbers"]

LIMIT = 10_000  # numbers with a name here: 0 to 9999
ALPHABET = " -abcdefghilnorstuvwxyzßöü"  # of both languages; no name has a j, k, m, p or q
VOCABULARY = 3 + len(ALPHABET)  # number of different tokens
SPLITS = ("train", "validation", "test")
_ENGLISH = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_ENGLISH_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_GERMAN = """null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn
siebzehn achtzehn neunzehn""".split()
_GERMAN_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english(n: int) -> str:
    """The American English name of a number, with hyphens and without "and": ``four hundred twenty-one``.

    Raises:
        UserError: if it is not a whole number from 0 to 9999.
    """
    n = _checked(n)
    if n < 20:
        return _ENGLISH[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return _ENGLISH_TENS[tens] + (f"-{_ENGLISH[ones]}" if ones else "")
    size, word = (1000, "thousand") if n >= 1000 else (100, "hundred")
    count, rest = divmod(n, size)
    return f"{_ENGLISH[count]} {word}" + (f" {english(rest)}" if rest else "")


def german(n: int) -> str:
    """The German name of a number, one word: ``vierhunderteinundzwanzig``.

    Of the forms in use it is the long one: ``einhundert``, not ``hundert``, and ``eintausendeinhundert``, not
    ``elfhundert``.

    Raises:
        UserError: if it is not a whole number from 0 to 9999.
    """
    n = _checked(n)
    if n < 20:
        return _GERMAN[n]
    if n < 100:
        tens, ones = divmod(n, 10)
        return (f"{_joined(ones)}und" if ones else "") + _GERMAN_TENS[tens]
    size, word = (1000, "tausend") if n >= 1000 else (100, "hundert")
    count, rest = divmod(n, size)
    return _joined(count) + word + (german(rest) if rest else "")


def _joined(digit: int) -> str:
    """A digit as something follows it: *eins* loses its s."""
    return "ein" if digit == 1 else _GERMAN[digit]


def _checked(n: int) -> int:
    return whole(n, "number to be named", 0, LIMIT - 1)


def encode(names: Sequence[str], ends: bool = False, length: int | None = None, alphabet: str = ALPHABET) -> Tensor:
    """Names as rows of tokens, filled up with ``PAD``.

    Args:
        names: texts in letters of the alphabet.
        ends: put ``BEGIN`` before each name and ``END`` behind it.
        length: of a row; by default as long as the longest needs.
        alphabet: its first letter is token 3.

    Returns:
        int64 ``[names, length]``.

    Raises:
        UserError: for another letter, or if a name is too long.
    """
    rows, tokens = [], {letter: END + 1 + i for i, letter in enumerate(alphabet)}
    for name in names:
        unknown = sorted(set(name) - tokens.keys())
        if unknown:
            raise UserError(f"{name!r} cannot be encoded: the alphabet {alphabet!r} has no {unknown[0]!r}")
        row = [tokens[letter] for letter in name]
        rows.append([BEGIN, *row, END] if ends else row)
    longest = max(map(len, rows), default=0)
    length = longest if length is None else length
    if longest > length:
        raise UserError(f"rows of {length} tokens are too short for a name that needs {longest}")
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows], dtype=torch.int64).view(len(rows), length)


def decode(tokens: Tensor, alphabet: str = ALPHABET) -> list[str]:
    """Rows of tokens as texts: up to the first ``END``, without ``BEGIN`` and ``PAD``.

    Args:
        tokens: int64 ``[names, length]``.
        alphabet: as for :func:`encode`.

    Raises:
        UserError: if it has another shape, or numbers that are no tokens.
    """
    if tokens.dim() != 2:
        raise UserError(f"tokens to decode are [names, length], not {list(tokens.shape)}")
    names = []
    for row in tokens.tolist():
        row = row[: row.index(END)] if END in row else row
        letters = [token for token in row if token not in (PAD, BEGIN)]
        if any(not END < token <= END + len(alphabet) for token in letters):
            last = END + len(alphabet)
            raise UserError(f"only numbers from 0 to {last} are tokens: decode what encode or a model gave")
        names.append("".join(alphabet[token - END - 1] for token in letters))
    return names


def numbers(split: str, seed: int = 0, limit: int = LIMIT) -> list[int]:
    """The numbers of one part, in an order that is random but the same everywhere.

    Args:
        split: ``"train"`` (80 %), ``"validation"`` or ``"test"`` (10 % each).
        seed: another seed, another partition.
        limit: use only the numbers below it.

    Raises:
        UserError: for another split or limit.
    """
    one_of(split, "split", SPLITS)
    whole(limit, "limit", 10, LIMIT)
    order = hashed_order([str(n) for n in range(limit)], seed)
    tenth = limit // 10
    parts = order[2 * tenth :], order[tenth : 2 * tenth], order[:tenth]
    return parts[SPLITS.index(split)]


def load(split: str, seed: int = 0, limit: int = LIMIT) -> Examples:
    """The names of the numbers of one part as tokens.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``, 8000, 1000 and 1000 numbers.
        seed: of the partition, see :func:`numbers`.
        limit: use only the numbers below it; shorter names make shorter rows.

    Returns:
        ``x`` int64 ``[n, S]``, the English letters and ``PAD``; ``y`` int64 ``[n, T]``, ``BEGIN``, the German letters,
        ``END`` and ``PAD``. S and T depend on the limit only, not on the split.

    Raises:
        UserError: for another split or limit.
    """
    chosen = numbers(split, seed, limit)
    sources, targets = ([name(n) for n in range(limit)] for name in (english, german))
    longest = max(map(len, sources)), max(map(len, targets)) + 2
    return Examples(
        encode([sources[n] for n in chosen], length=longest[0]),
        encode([targets[n] for n in chosen], ends=True, length=longest[1]),
    )


def examples(source: Tensor, target: Tensor, batch: int) -> Examples:
    """Sentences as a translator is trained on them, as many as fill minibatches.

    Returns:
        x int64 ``[n, S + T - 1]``, the source and the target without its end; y ``[n, T - 1]``, without its beginning.
    """
    n = len(source) // batch * batch
    return Examples(torch.cat([source, target[:, :-1]], 1)[:n], target[:n, 1:])
