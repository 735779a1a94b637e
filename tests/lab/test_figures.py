"""The house style draws what it is given, says what is wrong with it, and leaves matplotlib as it was."""

from __future__ import annotations

import math

import matplotlib
import pytest
import torch

from helpers.errors import UserError
from helpers.lab import figures, tables
from helpers.lab.claims import Claim

matplotlib.use("Agg")

ROWS = [
    {
        "quantity": "5-way 1-shot",
        "paper": 0.987,
        "paper_ci95": 0.004,
        "book": 0.983,
        "book_ci95": 0.003,
        "verdict": "reproduced",
    },  # noqa: E501
    {"quantity": "20-way | 1-shot", "paper": 0.958, "paper_ci95": None, "book": None, "verdict": ""},
]


@pytest.fixture(autouse=True)
def _close():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_the_style_ends_with_its_block():
    before = dict(matplotlib.rcParams)
    with figures.style():
        assert matplotlib.rcParams["figure.dpi"] == 150
    assert dict(matplotlib.rcParams) == before


def test_lines_differ_without_colour():
    looks = [figures.look(index) for index in range(len(figures.CYCLE))]
    for key in ("color", "marker", "linestyle"):
        assert len({str(look[key]) for look in looks}) == len(looks)


def test_band_draws_line_and_interval():
    _, ax = figures.subplots()
    figures.band(ax, torch.arange(3), torch.tensor([1.0, 2.0, 3.0]), [0.5, 0.5, 0.5], label="a line")
    assert list(ax.lines[0].get_ydata()) == [1, 2, 3]
    points = ax.collections[0].get_paths()[0].vertices
    assert points[:, 1].min() == 0.5 and points[:, 1].max() == 3.5
    with pytest.raises(UserError, match=r"\[3, 2, 3\]"):
        figures.band(ax, [0, 1, 2], [1, 2], [0, 0, 0])


def test_adaptation_curve_starts_at_step_zero():
    _, ax = figures.subplots()
    figures.adaptation_curve(ax, {"MAML": ([3.0, 1.0], [0.1, 0.1]), "oracle": ([0.2, 0.2], None)}, log=True)
    assert [list(line.get_xdata()) for line in ax.lines] == [[0, 1], [0, 1]]
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "inner steps"


def test_paper_vs_book_draws_every_value_that_exists():
    figure = figures.paper_vs_book(ROWS, unit="accuracy, %", scale=100)
    paper, book = figure.axes[0].containers
    assert [list(container[0].get_xdata()) for container in (paper, book)] == [pytest.approx([98.7, 95.8]), [98.3]]
    with pytest.raises(UserError, match="no claim"):
        figures.paper_vs_book([])


def test_contact_sheet_shows_every_image():
    figure = figures.contact_sheet(torch.eye(28).expand(7, 1, 28, 28), columns=5)
    assert sum(bool(ax.images) for ax in figure.axes) == 7
    assert figures.contact_sheet(torch.zeros(3, 4, 4, dtype=torch.uint8)).axes[0].images
    for wrong in (torch.zeros(0, 28, 28), torch.zeros(3, 3, 28, 28), torch.zeros(28, 28)):
        with pytest.raises(UserError, match="shape"):
            figures.contact_sheet(wrong)


def test_claims_table_as_markdown_and_as_text():
    table = tables.claims_table(ROWS, scale=100)
    header, rule, first, second = table._repr_markdown_().splitlines()
    assert header == "| claim | paper | this book | verdict |" and rule == "| :--- | ---: | ---: | :--- |"
    assert first.replace("\u00a0", " ") == "| 5-way 1-shot | 98.70 ± 0.40 | 98.30 ± 0.30 | reproduced |"
    assert second == "| 20-way \\| 1-shot | 95.80 | – | not run |"
    assert "98.70" in repr(table) and "|" not in repr(table).splitlines()[0]
    with pytest.raises(UserError, match="cells"):
        tables.Table(["a", "b"], [[1]])


def test_claim_rows_take_values_from_records_and_verdicts_from_the_rule():
    claims = [
        Claim(
            paper="p",
            id="a",
            quantity="A",
            where="Table 1",
            experiment="x",
            metric="test_accuracy",
            value=0.9,
            ci95=0.01,
            from_memory=True,
        ),
        Claim(paper="p", id="b", quantity="B", where="Table 1", experiment="absent", metric="test_accuracy", value=0.9),
    ]
    record = {
        "experiment": "x",
        "status": "partial",
        "iterations": {"done": 10, "planned": 1000},
        "metrics": {"test_accuracy": {"value": 0.95, "ci95": None, "n": 1}},
    }
    record |= {"paper": "p", "config": {"name": "x"}}
    ours, absent = tables.claim_rows(claims, {"x": record})
    assert ours["book"] == 0.95 and ours["book_ci95"] is None and ours["verdict"] == "reproduced"
    assert "10 of 1,000 iterations" in ours["note"] and "memory" in ours["note"]
    assert absent["book"] is None and absent["verdict"] == "not run"
    assert "90.00\u00a0±\u00a01.00\u00a0% | 95.00\u00a0% | reproduced" in tables.claims_table([ours])._repr_markdown_()
    assert not any(isinstance(value, float) and math.isnan(value) for row in (ours, absent) for value in row.values())


def test_the_house_style_leaves_a_notebook_s_display_switched_on():
    import matplotlib

    with figures.style():
        matplotlib.rcParams["interactive"] = True  # what the inline backend does at the first figure
    assert matplotlib.rcParams["interactive"]
    matplotlib.rcParams["interactive"] = False
