"""The names of numbers: spelling, tokens, parts, and refusals."""

from __future__ import annotations

import pytest
import torch

from helpers.errors import UserError
from helpers.models.tokens import BEGIN, END, PAD
from helpers.tasks import images, numerals
from helpers.tasks.numerals import ALPHABET, LIMIT, VOCABULARY, decode, encode, english, german, load

NAMES = {  # written by hand
    0: ("zero", "null"),
    1: ("one", "eins"),
    7: ("seven", "sieben"),
    11: ("eleven", "elf"),
    12: ("twelve", "zwölf"),
    13: ("thirteen", "dreizehn"),
    16: ("sixteen", "sechzehn"),
    17: ("seventeen", "siebzehn"),
    20: ("twenty", "zwanzig"),
    21: ("twenty-one", "einundzwanzig"),
    30: ("thirty", "dreißig"),
    36: ("thirty-six", "sechsunddreißig"),
    40: ("forty", "vierzig"),
    60: ("sixty", "sechzig"),
    77: ("seventy-seven", "siebenundsiebzig"),
    100: ("one hundred", "einhundert"),
    101: ("one hundred one", "einhunderteins"),
    111: ("one hundred eleven", "einhundertelf"),
    421: ("four hundred twenty-one", "vierhunderteinundzwanzig"),
    555: ("five hundred fifty-five", "fünfhundertfünfundfünfzig"),
    1000: ("one thousand", "eintausend"),
    1001: ("one thousand one", "eintausendeins"),
    1016: ("one thousand sixteen", "eintausendsechzehn"),
    1100: ("one thousand one hundred", "eintausendeinhundert"),
    2730: ("two thousand seven hundred thirty", "zweitausendsiebenhundertdreißig"),
    9999: ("nine thousand nine hundred ninety-nine", "neuntausendneunhundertneunundneunzig"),
}


@pytest.mark.parametrize("n", NAMES)
def test_names(n):
    assert (english(n), german(n)) == NAMES[n]


@pytest.mark.parametrize("name", [english, german])
def test_every_number_has_its_own_name(name):
    assert len({name(n) for n in range(LIMIT)}) == LIMIT == 10_000


def test_german_is_one_word_in_which_units_come_first():
    for n in range(LIMIT):
        assert german(n).isalpha() and german(n).islower()
        tens, ones = divmod(n % 100, 10)
        if tens > 1 and ones > 1:
            assert english(n).endswith(f"{english(10 * tens)}-{english(ones)}")
            assert german(n).endswith(f"{german(ones)}und{german(10 * tens)}")


def test_alphabet_is_what_the_names_need():
    used = {letter for n in range(LIMIT) for letter in english(n) + german(n)}
    assert "".join(sorted(used)) == ALPHABET
    assert VOCABULARY == len(ALPHABET) + 3 and sorted((PAD, BEGIN, END)) == [0, 1, 2]


@pytest.mark.parametrize("name", [english, german])
@pytest.mark.parametrize("ends", [False, True])
def test_decoding_undoes_encoding(name, ends):
    names = [name(n) for n in range(LIMIT)]
    tokens = encode(names, ends)
    assert tokens.dtype == torch.int64 and tokens.shape == (LIMIT, max(map(len, names)) + 2 * ends)
    assert 0 <= tokens.min() and tokens.max() < VOCABULARY
    assert decode(tokens) == names


def test_tokens_by_hand():
    a = 3 + ALPHABET.index("a")
    assert encode(["a", ""], ends=True).tolist() == [[BEGIN, a, END], [BEGIN, END, PAD]]
    assert encode(["a"], length=3).tolist() == [[a, PAD, PAD]]
    assert decode(torch.tensor([[BEGIN, a, END, a, a], [a, PAD, a, PAD, PAD]])) == ["a", "aa"]
    assert encode([]).shape == (0, 0) and decode(encode([])) == []


@pytest.mark.parametrize("limit", [LIMIT, 1000, 57])
def test_parts_are_disjoint_and_complete(limit):
    parts = {split: numerals.numbers(split, limit=limit) for split in numerals.SPLITS}
    everything = [n for part in parts.values() for n in part]
    assert len(everything) == limit and set(everything) == set(range(limit))
    assert len(parts["validation"]) == len(parts["test"]) == limit // 10


def test_partition_depends_on_number_and_seed_only(monkeypatch):
    before = numerals.numbers("test")
    assert before[:5] == [9977, 4506, 9079, 5192, 5793]
    assert set(numerals.numbers("test", seed=1)) != set(before)
    hashed = images.hashed_order

    def backwards(names, seed):
        """As if the numbers had come in the opposite order."""
        return [len(names) - 1 - i for i in hashed(names[::-1], seed)]

    monkeypatch.setattr(numerals, "hashed_order", backwards)
    assert numerals.numbers("test") == before


def test_load():
    shapes = {}
    for split in numerals.SPLITS:
        x, y = load(split, limit=1000)
        chosen = numerals.numbers(split, limit=1000)
        assert decode(x) == [english(n) for n in chosen] and decode(y) == [german(n) for n in chosen]
        assert (y[:, 0] == BEGIN).all() and ((y == END).sum(1) == 1).all()
        assert not ((x == BEGIN) | (x == END)).any()
        for tokens in (x, y):  # nothing stands behind the padding
            assert ((tokens == PAD).int().diff(dim=1) >= 0).all()
        shapes[split] = x.shape[1], y.shape[1]
    assert len(set(shapes.values())) == 1
    x, y = load("train")
    assert x.shape == (8000, 42) and y.shape == (8000, 44) and x.dtype == y.dtype == torch.int64


@pytest.mark.parametrize("n", [-1, 10_000, 1.0, "1", True, None])
@pytest.mark.parametrize("name", [english, german])
def test_other_numbers_have_no_name(name, n):
    with pytest.raises(UserError, match="number to be named must be a whole number of at least 0 and at most 9999"):
        name(n)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="has no 'j'"):
        encode(["one", "jack"])
    with pytest.raises(UserError, match="rows of 3 tokens are too short for a name that needs 4"):
        encode(["zero"], length=3)
    with pytest.raises(UserError, match=r"tokens to decode are \[names, length\], not \[2\]"):
        decode(torch.tensor([3, 4]))
    for wrong in (-1, VOCABULARY):
        with pytest.raises(UserError, match=f"only numbers from 0 to {VOCABULARY - 1} are tokens"):
            decode(torch.tensor([[wrong]]))
    with pytest.raises(UserError, match="there is no split 'dev': use one of train, validation, test"):
        load("dev")
    for limit in (5, 10_001, 10.5, True):
        with pytest.raises(UserError, match="limit must be a whole number of at least 10 and at most 10000"):
            load("train", limit=limit)
