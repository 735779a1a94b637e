"""Numbers in the prose of the chapters: a cell prints them, a claim quotes them, or it is said here what they are."""

from __future__ import annotations

import math
import re

import pytest
from scipy.stats import norm

from helpers.runtime import root
from helpers.site import notebooks

# With a point, or in per cent.
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)|(?<![\w.,])\d[\d,]*(?=\s*(?:%|per cent))")
# Formulas, code, roles and the targets of links are no prose.
OTHER = re.compile(r"```\w+\n.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)", re.DOTALL)
KNOWN = {
    "03_reptile": {"2.4": "a line of the algorithm"},
    "04_imaml": {"0.0007": "an outer rate of `imaml-omniglot-5w1s-staged`"},
    "05_ml3": {"0.00": "how a half-width is printed", "2.1": "a line of the algorithm"},
    "07_jets": {"80.4": "the mass of the W in GeV", "0.6": "a place in a picture"},
    "08_scoreboard": {"0.28": "per cent beyond 2.77", "1.645": "leaves 5 per cent", "1.16": "1.645 shorter by √2"},
}


def numbers(text: str) -> set[str]:
    return set(NUMBER.findall(OTHER.sub("", text)))


def printed(notebook) -> str:
    """All text that the cells of a notebook printed."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            found += [output.get("text", ""), *(str(data[kind]) for kind in data if kind.startswith("text/"))]
    return "\n".join(found)


def unknown(notebook, more: str) -> set[str]:
    """Numbers of the prose that neither a cell nor ``more`` has."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return numbers(prose) - set(re.findall(r"\d[\d,]*(?:\.\d+)?", printed(notebook) + more))


@pytest.mark.parametrize("chapter", notebooks.chapters())
def test_a_number_in_the_prose_is_printed_or_quoted(chapter):
    claims = "\n".join(path.read_text(encoding="utf-8") for path in (root() / "data" / "claims").iterdir())
    notebook = notebooks.read(root() / "notebooks" / f"{chapter}.ipynb")
    assert unknown(notebook, claims) == KNOWN.get(chapter, {}).keys()


def test_what_an_exercise_of_the_scoreboard_calculates():
    assert norm.sf([2.77, 1.645, 1.645 / math.sqrt(2)]) == pytest.approx([0.0028, 0.05, 0.12], rel=0.03)
    assert round(1.645 / math.sqrt(2), 2) == 1.16


def test_a_number_that_nobody_printed_is_found():
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    said = "So 0.75 and 98.4 %, but `0.1`, $0.2$, [a link](page-0.3) and 12 of 20 are no results; 7 % is."
    shown = [new_output("stream", name="stdout", text="accuracy 98.4 %, 0.7512")]
    notebook = new_notebook(cells=[new_markdown_cell(said), new_code_cell("", outputs=shown)])
    assert unknown(notebook, "the paper has 7") == {"0.75"}
