"""The comparison of outputs, by nbval and by `make test`: what may differ passes, and a wrong number fails."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers.runtime import root
from helpers.site import compare, runner

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SHOW_PNG = f"from IPython.display import Image, display\nimport base64\ndisplay(Image(base64.b64decode('{PNG}')))"


def stdout(text):
    return [new_output("stream", name="stdout", text=text)]


def result(**data):
    return [new_output("execute_result", data={"text/" + kind: text for kind, text in data.items()}, execution_count=1)]


def shown(**data):
    return [new_output("display_data", data={"text/" + kind: text for kind, text in data.items()})]


def html(text):
    return f"from IPython.display import HTML, display\ndisplay(HTML({text!r}))"


HTML_PLAIN = "<IPython.core.display.HTML object>"
FRAME = f"<img width=2.5 src='data:image/png;base64,{PNG}'>"
TRAINED = {"nbval": {"rtol": 0.05}}
HALF = {"nbval": {"share": 0.5, "widths": 0.3}}
COLUMNS = {"nbval": {"atol": 0.6, "columns": {"rate": {"atol": 0.005}, "text": None}}}


def table(computed, committed, head="| value | rate | text |"):
    """Source and outputs of a cell that shows a table with one row."""
    texts = [
        f"{line}\n| ---: | ---: | :--- |\n| {row} |"
        for line, row in (("| value | rate | text |", computed), (head, committed))
    ]
    plain = "<IPython.core.display.Markdown object>"
    return f"from IPython.display import Markdown\nMarkdown({texts[0]!r})", result(plain=plain, markdown=texts[1])


# name: source, committed outputs, cell metadata, does it pass?
CASES = {
    "same": ("print('loss 0.25 after 3')", stdout("loss 0.25 after 3\n"), {}, True),
    "float within 1e-6": ("print(0.1234567891)", stdout("0.1234567890\n"), {}, True),
    "float off": ("print(0.12346)", stdout("0.12345\n"), {}, False),
    "sign": ("print(0.5)", stdout("-0.5\n"), {}, False),
    "exponent": ("print('1.5e-3')", stdout("1.5e-4\n"), {}, False),
    "result off": ("0.5", result(plain="0.6"), {}, False),
    "integer off by one": ("print('600 tasks, 0.98')", stdout("601 tasks, 0.98\n"), {}, False),
    "integer off within the cell's tolerance": ("print(100)", stdout("101\n"), TRAINED, False),
    "integer that the cell frees": ("print(100)", stdout("101\n"), {"nbval": {"rtol": 0.05, "integers": True}}, True),
    "large integer": ("print(1000000001)", stdout("1000000000\n"), {}, False),
    "a number and its twin with a point": ("print('5, 0.9999')", stdout("5.0, 1\n"), {"nbval": {"rtol": 0.001}}, True),
    "integer became another float": ("print(5.1)", stdout("5\n"), {}, False),
    "within a share of the interval": ("print('1.3 ± 0.5')", stdout("1.5 ± 0.4\n"), HALF, True),
    "with blanks that do not break": ("print('1.3\xa0±\xa00.5')", stdout("1.5\xa0±\xa00.4\n"), HALF, True),
    "beyond the share of the interval": ("print('1.3 ± 0.4')", stdout("1.6 ± 0.4\n"), HALF, False),
    "another interval": ("print('1.3 ± 0.4')", stdout("1.3 ± 0.6\n"), HALF, False),
    "no interval to share": ("print('1.3')", stdout("1.5\n"), HALF, False),
    "columns as they like": (*table("2.5 | 0.010 | some", "2 | 0.014 | other"), COLUMNS, True),
    "a column that is not free": (*table("2.5 | 0.010 | some", "1.8 | 0.010 | some"), COLUMNS, False),
    "a column beyond its own": (*table("2.5 | 0.010 | some", "2.5 | 0.020 | some"), COLUMNS, False),
    "another number of columns": (*table("2.5 | 0.010 | some", "2.5 | 0.010"), COLUMNS, False),
    "another head": (*table("2.5 | 0.010 | some", "2.5 | 0.010 | some", "| a | rate | text |"), COLUMNS, False),
    "a column that is not there": ("print(0.5)", stdout("0.5\n"), COLUMNS, False),
    "an animation": (html(FRAME.replace("2.5", "1.5")), shown(plain=HTML_PLAIN, html=FRAME), {}, True),
    "no animation": (html("<b>0.5</b>"), shown(plain=HTML_PLAIN, html=FRAME), {}, False),
    "float within the cell's tolerance": ("print(0.98)", stdout("0.97\n"), TRAINED, True),
    "float beyond the cell's tolerance": ("print(0.98)", stdout("0.90\n"), TRAINED, False),
    "absolute tolerance": ("print(0.01)", stdout("-0.01\n"), {"nbval": {"atol": 0.05}}, True),
    "sign within tolerance keeps its column": (
        "print('[ 0.01,  2.5]')",
        stdout("[-0.01,  2.5]\n"),
        {"nbval": {"atol": 0.05}},
        True,
    ),
    "missing output": ("pass", stdout("0.5\n"), {}, False),
    "unexpected output": ("print(0.5)", [], {}, False),
    "fewer results": ("print(0.5)", stdout("0.5\n") + result(plain="1"), {}, False),
    "fewer numbers": ("print('a 0.5')", stdout("a 0.5 0.6\n"), {}, False),
    "changed text": ("print('accuracy 0.5')", stdout("precision 0.5\n"), TRAINED, False),
    "a number in a name": ("print('conv4')", stdout("conv3\n"), TRAINED, False),
    "nan and nan": ("print('nan', 0.5)", stdout("nan 0.5\n"), {}, True),
    "nan for a number": ("print(float('nan'))", stdout("0.5\n"), TRAINED, False),
    "number for nan": ("print(0.5)", stdout("nan\n"), TRAINED, False),
    "inf": ("print(float('inf'))", stdout("-inf\n"), TRAINED, False),
    "html within": (html("<b>0.98</b>"), shown(plain=HTML_PLAIN, html="<b>0.97</b>"), TRAINED, True),
    "html off": (html("<b>0.98</b>"), shown(plain=HTML_PLAIN, html="<b>0.97</b>"), {}, False),
    "markdown off": (
        "from IPython.display import Markdown\nMarkdown('*0.98*')",
        result(plain="<IPython.core.display.Markdown object>", markdown="*0.97*"),
        {},
        False,
    ),
    "latex off": (
        "from IPython.display import Latex\nLatex('$0.98$')",
        result(plain="<IPython.core.display.Latex object>", latex="$0.97$"),
        {},
        False,
    ),
    "another picture": (
        SHOW_PNG,
        [new_output("display_data", data={"image/png": "AAAA", "text/plain": "<Figure size 10x9 with 1 Axes>"})],
        {},
        True,
    ),
    "no picture": ("pass", [new_output("display_data", data={"image/png": PNG, "text/plain": "x"})], {}, False),
    "unexpected picture": (SHOW_PNG, [], {}, False),
    "stderr": ("import sys\nprint('50%', file=sys.stderr)\nprint(0.5)", stdout("0.5\n"), {}, True),
    "timing": ("print(12.5)", stdout("99.5\n"), {"tags": ["nbval-ignore-output"]}, True),
    "timing that fails": ("1 / 0", stdout("99.5\n"), {"tags": ["nbval-ignore-output"]}, False),
    "error that is meant": (
        "1 / 0",
        [new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])],
        {"tags": ["raises-exception"]},
        True,
    ),
    "another error": (
        "[][0]",
        [new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])],
        {"tags": ["raises-exception"]},
        False,
    ),
    "silenced result": ("0.5;", [], {}, True),
    "silenced result that was committed": ("0.5;", result(plain="0.5"), {}, True),
    "ignored by a comment": ("# NBVAL_IGNORE_OUTPUT\nprint(0.5)", stdout("0.6\n"), {}, True),
    "a line that is written over": ("print('1.5', end='\\r')\nprint('0.5')", stdout("0.5\n"), {}, True),
    "no code": ("", [], {"never": "run"}, True),
    "never run": ("print(0.5)", [], {"never": "run"}, False),
}


def write(names, path):
    """Cases as the cells of one notebook."""
    cells = []
    for source, outputs, metadata, _ in map(CASES.get, names):
        count = None if "never" in metadata else 1
        cells.append(new_code_cell(source, outputs=outputs, metadata=metadata, execution_count=count))
    notebook = new_notebook(cells=cells, metadata={"kernelspec": {"name": "no-such-kernel", "display_name": "x"}})
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """All cases run by one pytest; which of them passed."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copy(root() / "notebooks" / "conftest.py", folder)
    write(CASES, folder / "cases.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    ran = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder)], env=environment, capture_output=True, text=True, cwd=folder
    )
    states = dict(re.findall(r"Cell (\d+) (PASSED|FAILED|ERROR)", ran.stdout))
    assert len(states) == len(CASES), ran.stdout + ran.stderr
    return ran, {name: states[str(number)] == "PASSED" for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_comparison(outcomes, name):
    assert outcomes[1][name] == CASES[name][3]


def test_wrong_number_fails_the_run_and_is_named(outcomes):
    ran, _ = outcomes
    assert ran.returncode == 1
    assert "number 1 differs: committed 0.12345, computed 0.12346" in ran.stdout


def test_the_check_of_chapters_gives_the_verdicts_of_nbval(outcomes, tmp_path, monkeypatch):
    """Cell by cell, although papermill runs them otherwise; an error it does not accept, not even one that is meant."""
    monkeypatch.setenv("METABOOK_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    names = [name for name in CASES if name != "timing that fails" and "raises-exception" not in str(CASES[name])]
    write(names, committed := tmp_path / "notebooks" / "01_cases.ipynb")
    copy = runner.run_chapters(parameters={})["01_cases"]
    found = compare.compare_cells(nbformat.read(committed, 4), nbformat.read(copy, 4))
    verdicts = {name: not wrong for name, (_, wrong) in zip(names, found, strict=True)}
    assert verdicts == {name: outcomes[1][name] for name in names}


def test_a_copy_of_another_notebook_is_not_compared():
    one, other = (new_notebook(cells=[new_code_cell(source, execution_count=1)]) for source in ("1", "2"))
    with pytest.raises(ValueError, match="another notebook"):
        list(compare.compare_cells(one, other))
    with pytest.raises(ValueError, match="longer"):
        list(compare.compare_cells(one, new_notebook(cells=one.cells + other.cells)))


def test_cells_that_papermill_puts_in_are_left_out():
    committed = new_notebook(cells=[new_code_cell("1", execution_count=1)])
    injected = new_code_cell("profile = 'quick'", metadata={"tags": ["injected-parameters"]})
    executed = new_notebook(cells=[injected, new_code_cell("1", execution_count=2, outputs=stdout("0.5"))])
    assert [len(found) for _, found in compare.compare_cells(committed, executed)] == [1]
