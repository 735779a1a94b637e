"""Names in many languages: extraction, the shipped file, tokens, splits, tasks, and refusals."""

from __future__ import annotations

import gzip
import json
import sys
import unicodedata
from dataclasses import replace

import pytest
import torch

from helpers import cli
from helpers.errors import UserError
from helpers.models.tokens import BEGIN, END, PAD
from helpers.runtime import generator
from helpers.tasks import names, names_extraction
from helpers.tasks.names import ALPHABET, FAMILIES, LONGEST, VOCABULARY, Language, LanguageTasks, Names, Pair

ROLES = (names.TRAIN, names.VALIDATION, names.TEST_SEEN, names.TEST_HELD)
FAMILY = {code: family for family, codes in FAMILIES.items() for code in codes}


@pytest.fixture(scope="module")
def library():
    return names.load()


def little(**native: str) -> Names:
    """One made-up language."""
    english = {"a/1": "Germany", "a/2": "Côte d’Ivoire", "b/1": "Gujarati", "c/1": "Gujarati", "d/1": "Malta"}
    return Names(english, {"xx": Language("xx", "X", "Basque", "Latn", native)}, {"sha256": "0"})


# ---------------------------------------- texts and tokens


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Deutschland", "deutschland"),
        ("Österreich", "o\u0308sterreich"),
        ("Côte d’Ivoire", "co\u0302te d'ivoire"),
        ("İtalya", "i\u0307talya"),  # a capital with a dot, not an i
        ("Việt Nam", "vie\u0323\u0302t nam"),  # the mark below comes first, whatever the order in the text
        ("  a\u00a0b  c‑d ", "a b c-d"),
        ("Łotwa", "łotwa"),  # a letter that has no parts
    ],
)
def test_normalised(text, expected):
    assert names.normalise(text) == expected == names.normalise(expected)


def test_tokens_by_hand():
    o, mark = 3 + ALPHABET.index("o"), 3 + ALPHABET.index("\u0308")
    assert names.encode(["Ö"]).tolist() == [[o, mark] + [PAD] * (LONGEST - 2)]
    assert names.encode(["o"], ends=True).tolist() == [[BEGIN, o, END] + [PAD] * (LONGEST - 1)]
    assert names.decode(torch.tensor([[BEGIN, o, mark, END, o], [o, PAD, PAD, PAD, PAD]])) == ["ö", "o"]
    assert names.encode([]).shape == (0, LONGEST)


def test_decoding_undoes_encoding(library):
    """Every name that fits, of languages with many marks; combining marks come back as part of their letter."""
    for code in ("cs", "de", "lt", "mi", "tr", "vi", "yo"):
        sources = [pair.source for pair in library.pairs(code)]
        whole = [unicodedata.normalize("NFC", source) for source in sources]
        for ends in (False, True):
            tokens = names.encode(whole, ends)
            assert tokens.dtype == torch.int64 and tokens.shape == (len(whole), LONGEST + 2 * ends)
            assert names.decode(tokens) == whole
    assert len(set(ALPHABET)) == len(ALPHABET) and VOCABULARY < 70


def test_rows_are_what_the_network_is_trained_on():
    x, y = names.rows([Pair("a/1", "wien", "vienna"), Pair("a/2", "rom", "rome")])
    assert x.shape == (2, 2 * LONGEST + 1) and y.shape == (2, LONGEST + 1)
    assert names.decode(x[:, :LONGEST]) == ["wien", "rom"] and names.decode(y) == ["vienna", "rome"]
    assert (x[:, LONGEST] == BEGIN).all() and torch.equal(x[:, LONGEST + 1 :], y[:, :-1])


# ---------------------------------------- extraction and the file


def test_extraction_from_babel(tmp_path, library):
    """The same bytes twice; and with the versions of the shipped file its very content."""
    babel = pytest.importorskip("babel")
    first, second = names_extraction.extract(tmp_path / "1.json.gz"), names_extraction.extract(tmp_path / "2.json.gz")
    assert first.read_bytes() == second.read_bytes()
    made = names.load(first)
    assert list(made.languages) == [code for codes in FAMILIES.values() for code in codes] == list(library.languages)
    assert made.languages["de"].names["territory/DE"] == "Deutschland" and made.english["territory/DE"] == "Germany"
    assert made.languages["de"].name == "German" and made.languages["de"].family == "Germanic"
    assert {language.script for language in made.languages.values()} == {"Latn"}
    kinds = {concept.split("/")[0] for concept in made.english}
    assert kinds == set(names.KINDS)
    if babel.__version__ == library.header["babel"]:
        assert made.header == library.header


def test_locale_data_with_missing_names(monkeypatch):
    """What Babel lacks, or has empty, is left out, and only that."""
    babel = pytest.importorskip("babel")
    few, many = names_extraction.of_locale("kl"), names_extraction.of_locale("de")
    assert len(few) < len(many) / 3 and all(name.strip() for name in few.values())  # Greenlandic has few names
    real = babel.Locale.territories.fget
    holes = {"DE": "", "FR": None, "AT": "  "}
    monkeypatch.setattr(babel.Locale, "territories", property(lambda self: {**real(self), **holes}))
    found = names_extraction.of_locale("nl")
    assert "territory/BE" in found and not {"territory/DE", "territory/FR", "territory/AT"} & found.keys()
    with pytest.raises(UserError, match="Babel has no language 'qqq'"):
        names_extraction.of_locale("qqq")


def test_scripts():
    assert names_extraction.script(["Deutschland", "Việt Nam"]) == "Latn"
    assert (
        names_extraction.script(["Германия"])
        == names_extraction.script([])
        == names_extraction.script(["123"])
        == "other"
    )


def test_names_equal_to_english_and_missing_ones_are_no_pairs():
    found = little(**{"a/1": "GERMANY", "a/2": "Elfenbeinküste", "b/1": "Gudscharati"})
    assert found.pairs("xx") == found.pairs("xx")
    assert {pair.concept for pair in found.pairs("xx")} == {"a/2", "b/1"}
    assert found.counts("xx") == {"usable": 2, "same": 1, "missing": 2}


def test_pairs_leave_out_what_does_not_fit_and_say_a_name_once():
    found = little(**{"a/1": "x" * (LONGEST + 1), "a/2": "Кот", "b/1": "gu", "c/1": "guj", "d/1": "Malta (1)"})
    assert [pair.concept for pair in found.pairs("xx")] == ["b/1"]


def test_shipped_file(library):
    header = library.header
    assert header["format"] == names.FORMAT and header["cldr"].isdigit() and "Unicode" in header["licence"]
    assert library.provenance == {"data": "names"} | {key: header[key] for key in ("cldr", "babel", "sha256")}
    assert 40 <= len(library.languages) <= 60 and names.home().stat().st_size < 1_000_000
    for code, language in library.languages.items():
        counts = library.counts(code)
        assert language.family == FAMILY[code] and counts["usable"] > 250
        assert counts["missing"] == len(library.english.keys() - language.names.keys())
        for pair in library.pairs(code):
            assert pair.source != pair.target and names.fits(pair.source) and names.fits(pair.target)
    assert ("deutschland", "germany") in {(pair.source, pair.target) for pair in library.pairs("de")}


def test_loading_needs_no_babel(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "babel", None)
    assert names.load().languages.keys() == FAMILY.keys()
    with pytest.raises(UserError, match=r"extracting names needs Babel: install it with `pip install 'babel>=2.14'`"):
        names_extraction.extract(tmp_path / "names.json.gz")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path, library):
    place = tmp_path / "names.json.gz"
    with pytest.raises(
        UserError, match="the file of names .* is missing: restore it .* `metabook data names --extract`"
    ):
        names.load(place)
    whole = names.home().read_bytes()
    for content in (whole[:1000], b"", b"words", gzip.compress(b"[]"), gzip.compress(b'{"header": {}}')):
        place.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or cannot be read"):
            names.load(place)
    content = json.loads(gzip.decompress(whole))
    content["english"]["territory/DE"] = "France"
    place.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(UserError, match="its digest differs"):
        names.load(place)
    content = json.loads(gzip.decompress(whole))
    content["header"] |= {"format": 0}
    del content["header"]["sha256"]
    content["header"]["sha256"] = names.digest(content["header"], content["english"], content["languages"])
    place.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(UserError, match="has format 0, not 1"):
        names.load(place)


def test_command(capsys, tmp_path, monkeypatch):
    assert cli.main(["data", "names"]) == 0
    out = capsys.readouterr().out
    assert "names de: German (Germanic, Latn), " in out and names.load().header["sha256"] in out and "Unicode" in out
    assert cli.main(["data", "jets", "--extract"]) == 2
    assert "--extract makes the file of names anew: it does not go with jets" in capsys.readouterr().err
    pytest.importorskip("babel")
    monkeypatch.setattr(names, "home", lambda: tmp_path / "names.json.gz")
    assert cli.main(["data", "names", "--extract"]) == 0 and (tmp_path / "names.json.gz").is_file()


# ---------------------------------------- splits


def test_languages_are_split_by_family():
    codes = [code for role in ROLES for code in role]
    assert len(codes) == len(set(codes)) and set(codes) <= FAMILY.keys()
    assert len(names.TRAIN) == 18 and len(names.VALIDATION) == 2
    train, validation, seen, held = ({FAMILY[code] for code in role} for role in ROLES)
    assert seen <= train and not held & (train | validation)


def test_concepts_are_split_by_their_english_names(library):
    parts = library.parts()
    assert not parts["shown"] & parts["new"]
    assert parts["shown"] | parts["new"] == {names.normalise(name) for name in library.english.values()}
    assert len(parts["new"]) == round(0.2 * sum(map(len, parts.values())))
    assert library.parts(1) != parts == library.parts()
    for code in library.languages:
        shown, new = (library.pairs(code, part) for part in names.PARTS)
        everything = library.pairs(code)
        assert len(shown) + len(new) == len(everything) == len({pair.target for pair in everything})
        assert {pair.target for pair in shown} <= parts["shown"] and {pair.target for pair in new} <= parts["new"]


def test_parts_do_not_depend_on_the_order_of_the_file(library):
    backwards = replace(library, english=dict(reversed(library.english.items())))
    assert backwards.parts() == library.parts()
    assert [p.target for p in library.pairs("de")[:3]] == [p.target for p in backwards.pairs("de")[:3]]


def test_test_languages_taken_apart(library):
    trained = {pair.target for code in names.TRAIN for pair in library.pairs(code, "shown")}
    for code in (*names.VALIDATION, *names.TEST_SEEN, *names.TEST_HELD):
        few, many = (names.taken_apart(library, code, shots, 100) for shots in (10, 300))
        assert many["support"][:10] == few["support"] and len(many["support"]) == 300
        assert all(few[kind] == many[kind] and len(few[kind]) == 100 for kind in names.PARTS)
        support, shown, new = ({pair.target for pair in many[kind]} for kind in ("support", "shown", "new"))
        assert not support & shown and not new & trained and not (support | shown) & new
        assert len(shown & trained) >= 99  # all but a name that CLDR has in no training language
    with pytest.raises(UserError, match="'se' has .* too few for 300 shots and 100 queries of each kind"):
        names.taken_apart(library, "se", 300, 100)


# ---------------------------------------- tasks


def test_sampling(library):
    family = LanguageTasks(library, ("de", "fr", "lt"), support=6, query=5)
    tasks = family.sample(7, generator(1))
    assert tasks.support.x.shape == (7, 6, 2 * LONGEST + 1) and tasks.query.y.shape == (7, 5, LONGEST + 1)
    again, other = family.sample(7, generator(1)), family.sample(7, generator(2))
    assert torch.equal(tasks.support.x, again.support.x) and torch.equal(tasks.query.y, again.query.y)
    assert not torch.equal(tasks.support.x, other.support.x)
    pairs = {code: {p.source: p.target for p in library.pairs(code, "shown")} for code in family.languages}
    met = []
    for support, source in zip(tasks.support.x, tasks.query.x, strict=True):
        sources = [names.normalise(name) for name in names.decode(torch.cat([support, source])[:, :LONGEST])]
        targets = [names.normalise(name) for name in names.decode(torch.cat([support, source])[:, LONGEST:])]
        assert len(set(targets)) == 11  # no name twice
        met.append({code for code, known in pairs.items() if all(known.get(s) for s in sources)})
        assert len(met[-1]) == 1
    assert set.union(*met[:3]) == set.union(*met[3:6]) == {"de", "fr", "lt"}  # all before any comes again


def test_bad_input_is_refused(library):
    with pytest.raises(UserError, match="'Ω' cannot be encoded|'ω' cannot be encoded"):
        names.encode(["ok", "Ω"])
    with pytest.raises(UserError, match="rows of 20 tokens are too short for a name that needs 21"):
        names.encode(["x" * 21])
    with pytest.raises(UserError, match=r"tokens to decode are \[names, length\], not \[2\]"):
        names.decode(torch.tensor([3, 4]))
    for wrong in (-1, VOCABULARY):
        with pytest.raises(UserError, match=f"only numbers from 0 to {VOCABULARY - 1} are tokens"):
            names.decode(torch.tensor([[wrong]]))
    with pytest.raises(UserError, match="there is no language with names 'ru': use one of af, da"):
        library.pairs("ru")
    with pytest.raises(UserError, match="there is no part of the concepts 'old': use one of shown, new"):
        library.pairs("de", "old")
    with pytest.raises(UserError, match="'se' has .* names, fewer than the 1000 of a task"):
        LanguageTasks(library, ("se",), support=500, query=500)
    with pytest.raises(UserError, match="need at least one language"):
        LanguageTasks(library, ())
    for message, action in (
        ("names to adapt on", lambda: LanguageTasks(library, support=-1)),
        ("names to be judged on", lambda: LanguageTasks(library, query=1.5)),
        ("number of tasks", lambda: LanguageTasks(library).sample(-1, torch.Generator())),
        ("number of shots", lambda: names.taken_apart(library, "de", -1, 1)),
    ):
        with pytest.raises(UserError, match=message):
            action()
