"""The site's sources: what a build would not notice, or would notice only after minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from helpers.runtime import root

BASE = root()
CONFIG = yaml.safe_load((BASE / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((BASE / "_toc.yml").read_text(encoding="utf-8"))
URL = CONFIG["repository"]["url"]
NOTEBOOKS = sorted((BASE / "notebooks").glob("*.ipynb"))
PROSE = sorted((BASE / "book").glob("*.md"))
ENTRIES = dict(re.findall(r"^@\w+\{([^,\s]+),(.*?)^\}", (BASE / "book/references.bib").read_text("utf-8"), re.M | re.S))


def pages() -> list[str]:
    """All documents of the table of contents."""
    return [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]


def text(path: Path) -> str:
    """A page's source; of a notebook its Markdown cells, without outputs."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def without_code(markdown: str) -> str:
    """Without literal blocks that show syntax instead of using it."""
    return re.sub(r"^````md.*?^````", "", markdown, flags=re.M | re.S)


def sources() -> list[Path]:
    """All text files of the project, without what is generated or downloaded."""
    kinds = {".py", ".md", ".yml", ".yaml", ".toml", ".cff", ".css", ".svg", ".bib", ".ipynb", ".json", ".lock", ".txt"}
    generated = {"_build", ".git", ".venv", "raw", "__pycache__", ".hypothesis", ".pytest_cache", ".ruff_cache"}
    found = []
    for folder, folders, files in os.walk(BASE):
        folders[:] = [name for name in folders if name not in generated and not name.endswith(".egg-info")]
        paths = [Path(folder, name) for name in files]
        found += [path for path in paths if path.suffix in kinds or path.name in ("Makefile", "LICENSE", "run")]
    return found


def cited(path: Path) -> dict[str, str]:
    """The keys cited on a page, each with the entry that it stands for once the page's own prefix is taken off."""
    content = without_code(text(path))
    prefixes = re.findall(r":keyprefix:\s*(\S+)", content)
    keys = {
        key.strip()
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", content)
        for key in re.sub(r"^.*<|>$", "", group).split(",")
    }
    return {key: next((key.removeprefix(p) for p in prefixes if key.startswith(p)), key) for key in keys}


def test_the_table_of_contents_names_pages_that_exist():
    missing = [page for page in pages() if not any((BASE / f"{page}{end}").exists() for end in (".md", ".ipynb"))]
    assert not missing


def test_every_chapter_and_every_prose_page_is_in_the_table_of_contents():
    listed = set(pages())
    written = [path.relative_to(BASE).with_suffix("").as_posix() for path in [*NOTEBOOKS, *PROSE]]
    assert [page for page in written if page not in listed] == []
    assert len(pages()) == len(listed)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PROSE], ids=lambda path: path.stem)
def test_every_citation_has_an_entry(path):
    assert {key for key, entry in cited(path).items() if entry not in ENTRIES} == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_chapter_with_its_own_references_cites_with_its_prefix(path):
    content = text(path)
    if "{bibliography}" not in content:
        pytest.skip("this chapter has no list of references of its own")
    (prefix,) = re.findall(r":keyprefix:\s*(\S+)", content)
    assert ":filter: docname in docnames" in content
    assert any(key.startswith(prefix) for key in cited(path))


def test_no_two_lists_of_references_share_a_prefix():
    prefixes = [p for path in NOTEBOOKS for p in re.findall(r":keyprefix:\s*(\S+)", text(path))]
    assert len(prefixes) == len(set(prefixes))


@pytest.mark.parametrize("key", sorted(ENTRIES))
def test_every_entry_can_be_found(key):
    fields = dict(re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?\s*$", ENTRIES[key], re.M))
    assert {"title", "year"} <= set(fields) and {"author", "editor"} & set(fields)
    assert "doi" in fields or "url" in fields
    if "doi" in fields:
        assert re.fullmatch(r"10\.\d{4,5}/\S+", fields["doi"])
    if "url" in fields:
        assert fields["url"].startswith("https://")
    assert fields["year"] in key, "keys are name, year, word"
    if "eprint" in fields:
        assert fields["doi"] == f"10.48550/arXiv.{fields['eprint']}"


def test_keys_are_unique():
    keys = re.findall(r"^@\w+\{([^,\s]+),", (BASE / "book/references.bib").read_text(encoding="utf-8"), re.M)
    assert sorted(keys) == sorted(ENTRIES), "a key twice, or an entry whose closing brace is not on a line of its own"


def glossary() -> list[str]:
    block = re.search(r"^:::\{glossary\}(.*?)^:::", text(BASE / "book/glossary.md"), re.M | re.S)
    return [line for line in block[1].splitlines() if line and not line.startswith((" ", ":"))]


def test_glossary_terms_are_unique():
    terms = [term.lower() for term in glossary()]
    assert len(terms) > 25
    assert sorted(terms) == sorted(set(terms))


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PROSE], ids=lambda path: path.stem)
def test_terms_that_pages_refer_to_are_in_the_glossary(path):
    known = {term.lower() for term in glossary()}
    used = [re.sub(r"^.*<|>$", "", name).lower() for name in re.findall(r"\{term\}`([^`]+)`", without_code(text(path)))]
    assert [name for name in used if name not in known] == []


def test_the_citation_file_is_complete():
    content = yaml.safe_load((BASE / "CITATION.cff").read_text(encoding="utf-8"))
    assert content["cff-version"] == "1.2.0" and content["message"] and content["title"] == CONFIG["title"]
    assert content["authors"] == [{"name": "The metabook authors"}]
    assert content["license"] == "MIT"


def test_the_licence_is_mit():
    licence = (BASE / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License") and "the metabook authors" in licence


def test_the_address_of_the_repository_stands_in_one_place():
    """``_config.yml`` has it; first cells of notebooks carry a copy, and tests may build little books of their own."""
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", URL)
    holders = [
        path.relative_to(BASE).as_posix() for path in sources() if URL in path.read_text("utf-8", errors="ignore")
    ]
    assert [name for name in holders if name != "_config.yml" and not name.startswith(("notebooks/", "tests/"))] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cells_carry_that_address(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "bootstrap" in code[0]["metadata"].get("tags", [])
    found = set(re.findall(r"https://github\.com/[\w.-]+/[\w-]+", "".join(code[0]["source"])))
    assert found == {URL}, "run `make refresh`"
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1


def test_no_file_names_a_path_of_somebody_s_machine():
    personal = re.compile(r"(?<![\w.])/(?:home|Users|root|work|tmp)/[\w.-]+|[A-Z]:\\\\Users")
    allowed = {"tests/test_builder.py"}
    hits = {}
    for path in sources():
        name = path.relative_to(BASE).as_posix()
        found = personal.findall(path.read_text("utf-8", errors="ignore"))
        if found and name not in allowed:
            hits[name] = found[:3]
    assert hits == {}


def test_images_of_pages_have_alternative_text():
    for path in PROSE:
        for figure in re.findall(r"^:::\{figure\}(.*?)^:::", text(path), re.M | re.S):
            assert ":alt:" in figure and ":name:" in figure, path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_of_chapters_have_caption_name_and_alternative_text(path):
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            about = cell["metadata"].get("mystnb", {})
            assert about.get("figure", {}).get("caption"), f"cell {number} has a figure without a caption"
            assert about["figure"].get("name"), f"cell {number} has a figure that cannot be referred to"
            assert about.get("image", {}).get("alt"), f"cell {number} has a figure without alternative text"


def test_the_build_does_not_execute_and_keeps_its_buttons():
    assert CONFIG["execute"]["execute_notebooks"] == "off"
    assert CONFIG["sphinx"]["recursive_update"] is True
    assert CONFIG["launch_buttons"].keys() >= {"colab_url", "binderhub_url"}
    assert ".venv" in CONFIG["exclude_patterns"] and "data" in CONFIG["exclude_patterns"]
    assert not any("intersphinx" in name for name in CONFIG["sphinx"]["extra_extensions"])


def test_the_helper_reference_finds_all_modules():
    spec = importlib.util.spec_from_file_location("book_extension", BASE / "book/_ext/book_extension.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    files = (BASE / "src/helpers").rglob("*.py")
    names = {".".join(path.relative_to(BASE / "src").with_suffix("").parts).removesuffix(".__init__") for path in files}
    assert set(extension.modules()) == {name for name in names - {"helpers"} if "._" not in name}
    rooms = {room for floor in extension.FLOORS for room in floor.rooms}
    assert {name.split(".")[1] for name in extension.modules()} == rooms, "put the new module on its floor"
