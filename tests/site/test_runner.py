"""helpers.site.runner on small projects made on the spot: what runs, what is left alone, and what is refused."""

import base64
import io
import os
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from matplotlib.animation import FuncAnimation
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers.errors import Busy, UserError
from helpers.runtime import only_one, root
from helpers.site import builder, checks, config, notebooks, runner

PARAMETERS = new_code_cell("profile = 'book'\nseed: int = 0\ndevice = 'cpu'", metadata={"tags": ["parameters"]})
CONFIG = """
title: A book
only_build_toc_files: true
repository: {url: "https://github.com/somebody/somebook", branch: main, path_to_book: ""}
execute: {execute_notebooks: "off"}
launch_buttons: {colab_url: "https://colab.research.google.com"}
html: {use_repository_button: true}
"""
TOC = "format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_one\n- file: notebooks/02_two\n"


def chapter(folder, name, *sources):
    cells = [new_markdown_cell(f"# Chapter {name}"), PARAMETERS, *map(new_code_cell, sources)]
    path = folder / "notebooks" / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A book of two chapters, in a path with a space."""
    folder = tmp_path / "a book"
    for name in ("notebooks", "book", "src/helpers", "data/claims", "data/raw"):
        (folder / name).mkdir(parents=True)
    (folder / "requirements.lock").write_text("torch==2.13.0\n")
    (folder / "src/helpers/models.py").write_text("one = 1\n")
    (folder / "_config.yml").write_text(CONFIG)
    (folder / "_toc.yml").write_text(TOC)
    (folder / "book/intro.md").write_text("# A book\n\nSee [one](../notebooks/01_one).\n")
    chapter(folder, "01_one", "print(profile, seed)")
    chapter(folder, "02_two", "print(6 * 7)")
    monkeypatch.setenv("METABOOK_ROOT", str(folder))
    return folder


def printed(path):
    return "".join(out.text for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", []))


def test_chapters_and_their_short_names(project):
    assert notebooks.chapters() == ["01_one", "02_two"]
    assert notebooks.select() == ["01_one", "02_two"]
    assert notebooks.select(["02", "two", "notebooks/02_two.ipynb"]) == ["02_two"]
    with pytest.raises(UserError, match="there is no chapter '03'; the chapters are 01_one, 02_two"):
        notebooks.select(["03"])


def test_parameters_are_those_of_the_tagged_cell(project):
    assert notebooks.parameters_of("01_one") == {"profile": str, "seed": int, "device": str}
    cell = new_code_cell(
        "rate = 1e-3\nsome = []\nhours = (\n    0.0\n)\nother = 2 * 3", metadata={"tags": ["parameters"]}
    )
    nbformat.write(new_notebook(cells=[cell]), project / "notebooks/02_two.ipynb")
    assert notebooks.parameters_of("02_two") == {"rate": float, "some": list[str], "hours": float, "other": str}
    cell.source = "rate = "
    nbformat.write(new_notebook(cells=[cell]), project / "notebooks/02_two.ipynb")
    with pytest.raises(UserError, match="the cell of parameters of .*02_two.ipynb cannot be read"):
        notebooks.parameters_of("02_two")


def test_texts_become_parameters_of_their_kind(project):
    names = notebooks.chapters()
    assert notebooks.read_parameters(names, [("seed", "3"), ("device", "1")]) == {"seed": 3, "device": "1"}
    with pytest.raises(UserError, match="seed of chapter 01_one must be a whole number, not 'x'"):
        notebooks.read_parameters(names, [("seed", "x")])
    with pytest.raises(UserError, match="01_one has no parameter 'sede' .did you mean seed"):
        notebooks.read_parameters(names, [("sede", "3")])


def test_refusals_come_before_anything_runs(project):
    with pytest.raises(UserError, match="no profile 'fast'; the profiles are quick, book, paper"):
        runner.run_chapters(profile="fast")
    with pytest.raises(UserError, match="01_one has no parameter 'sede' .*; its parameters are: profile, seed, device"):
        runner.run_chapters(parameters={"sede": 1})
    (project / "notebooks/02_two.ipynb").write_text('{"cells": [')
    with pytest.raises(UserError, match="not a readable notebook"):
        runner.run_chapters()
    assert not list(project.rglob("*.digest"))


def test_only_what_changed_runs_again(project, monkeypatch, capsys):
    source = (project / "notebooks/01_one.ipynb").read_bytes()
    done = runner.run_chapters(parameters={"seed": 3}, names=["01"], out=project / "_build/x")
    assert printed(done["01_one"]) == "book 3\n"
    assert (project / "notebooks/01_one.ipynb").read_bytes() == source
    again = []

    def run(name, values, out, digest, *_):  # a kernel each time would take long
        again.append(name)
        (out / f"{name}.digest").write_text(digest)

    monkeypatch.setattr(runner, "_run_one", run)

    def runs_again():
        again.clear()
        runner.run_chapters(parameters={"seed": 3}, names=["01"], out=project / "_build/x")
        return again == ["01_one"]

    assert not runs_again()
    assert "01_one: unchanged" in capsys.readouterr().out
    chapter(project, "02_two", "print(6 * 8)")
    (project / "data/raw/cache.bin").write_bytes(b"made by a run")
    assert not runs_again()
    (project / "src/helpers/models.py").write_text("one = 2\n")
    assert runs_again()
    (project / "data/claims/maml.yaml").write_text("value: 98.7\n")
    assert runs_again()


def test_hidden_files_are_no_part_of_a_run(project):
    before = runner._surroundings()
    (project / "data/claims/.maml.yaml.partial").write_text("half")
    assert runner._surroundings() == before


def test_the_longest_chapter_runs_first(project, monkeypatch):
    order = []
    monkeypatch.setattr(runner, "_run_one", lambda name, *_: order.append(name))
    chapter(project, "02_two", "print(6 * 7)" + 20 * "  # the longer of the two")
    runner.run_chapters(jobs=1)
    assert order == ["02_two", "01_one"]
    for name, seconds in (("01_one", 50), ("02_two", 40)):  # what an earlier run left
        (project / f"_build/book/{name}.ipynb").write_text("")
        (project / f"_build/book/{name}.digest").write_text(f"digest\n{seconds}\n")
    assert runner.times(project / "_build/book") == {"01_one": 50, "02_two": 40}
    runner.run_chapters(jobs=1)
    assert order[2:] == ["01_one", "02_two"]


def test_kernel_is_this_environments_with_one_thread_the_profile_and_a_budget(project, monkeypatch, capsys):
    work = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    kernel = "import os, sys\nprint(sys.prefix, os.environ['OMP_NUM_THREADS'], os.path.basename(os.getcwd()))"
    chapter(project, "01_one", "print(profile, seed)", work)
    chapter(project, "02_two", kernel)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # of whoever runs the tests
    monkeypatch.setattr(runner, "BUDGETS", {"quick": 1, "book": 900})
    assert printed(runner.run_chapters(["01"], "quick")["01_one"]) == "quick 0\n"
    assert "budget 1 s: over its budget\n" in capsys.readouterr().out
    (seconds,) = runner.times(project / "_build/quick").values()
    assert 1 < seconds < 60, "the kernel's time is part of it"
    assert printed(runner.run_chapters(["02"])["02_two"]) == f"{sys.prefix} 1 notebooks\n"
    assert "budget 900 s\n" in capsys.readouterr().out


def test_failing_cell_is_named_and_others_finish(project, capsys):
    path = chapter(project, "01_one", "half = 0.5", "half.nothing", "print('never')")
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        runner.run_chapters()
    assert "1 of 2 chapters failed: 01_one in code cell 3 (`half.nothing`): AttributeError" in str(caught.value)
    assert "Traceback" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert printed(project / "_build/book/02_two.ipynb") == "42\n"
    assert not (project / "_build/book/01_one.ipynb").exists()
    assert not (project / "_build/book/01_one.digest").exists()
    with pytest.raises(UserError, match="01_one.ipynb is missing"):
        builder.build()


def test_dying_kernel_is_named(project):
    chapter(project, "01_one", "import os\nos._exit(3)")
    with pytest.raises(UserError, match=r"01_one in code cell 2 \(`import os`\): the kernel died"):
        runner.run_chapters(["01"])


def test_interrupt_keeps_what_is_done_and_leaves_no_kernel(project):
    chapter(project, "01_one", "import os, time", "open('../pid', 'w').write(str(os.getpid()))", "time.sleep(600)")
    command = [sys.executable, "-m", "helpers.cli", "run"]
    # A process in the background of a script inherits SIGINT ignored, and Python then leaves it so.
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not ((project / "pid").exists() and (project / "_build/book/02_two.digest").exists()):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "stopped; what was finished is kept" in error and "Traceback" not in error
    kernel = int((project / "pid").read_text() or 0)
    for _ in range(100):
        try:
            os.kill(kernel, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the kernel is still running")


def test_chapters_are_run_into_a_folder_by_one_process_at_a_time(project, monkeypatch):
    monkeypatch.setattr(runner, "_run_one", lambda *_: pytest.fail("it ran"))
    out = project / "_build/book"
    out.mkdir(parents=True)
    with only_one(out, "running chapters"):
        with pytest.raises(Busy, match="another process is running chapters into .*book at this moment"):
            runner.run_chapters()
        with pytest.raises(Busy):
            checks._chapters()  # what lies there is not taken for its own
    with only_one(project / "_build", "building"), pytest.raises(Busy, match="another process is building the site"):
        builder.build()
    with only_one(project / "notebooks", "refreshing"), pytest.raises(Busy, match="is refreshing chapters"):
        runner.refresh()


def test_a_refresh_that_is_stopped_takes_nothing_over_from_an_earlier_one(project, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = project / "_build/refresh"
    out.mkdir(parents=True)
    for name in notebooks.chapters():  # what an earlier refresh left of other notebooks
        chapter(project, name, "print('old')")
        (out / f"{name}.ipynb").write_bytes((project / f"notebooks/{name}.ipynb").read_bytes())
        (out / f"{name}.digest").write_text("digest")
        path = chapter(project, name, "print('new')")
    before = path.read_bytes()
    monkeypatch.setattr(runner, "run_chapters", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.refresh()
    assert path.read_bytes() == before


def test_a_second_ctrl_c_waits_for_no_kernel(monkeypatch):
    """Asked to end, papermill shuts its kernel down; who asks twice has it killed."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); print(1, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    child.stdout.readline()

    def wait(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        runner._end([child], {})
    assert child.wait(timeout=10) == -signal.SIGKILL


def test_refresh_stamps_the_address_and_keeps_a_failing_chapter(project):
    bootstrap = new_code_cell("url = 'https://github.com/OWNER/metabook.git'", metadata={"tags": ["bootstrap"]})
    path = project / "notebooks/01_one.ipynb"
    nbformat.write(new_notebook(cells=[bootstrap, PARAMETERS, new_code_cell("print(url)")]), path)
    broken = chapter(project, "02_two", "1 / 0")
    before = broken.read_bytes()
    with pytest.raises(UserError, match="02_two in code cell 2"):
        runner.refresh()
    assert printed(path) == "https://github.com/somebody/somebook.git\n"
    assert broken.read_bytes() == before
    notebook = nbformat.read(path, 4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3]
    assert "papermill" not in str(notebook)
    once = path.read_bytes()
    runner.refresh(["01"])
    assert path.read_bytes() == once


def test_tidy_removes_progress_bars_but_no_warnings():
    outputs = [
        new_output("stream", name="stderr", text="\r 50%|#"),
        new_output("stream", name="stderr", text="careful"),
    ]
    notebook = new_notebook(cells=[new_code_cell("1", outputs=outputs)])
    notebooks.tidy(notebook)
    assert [out.text for out in notebook.cells[0].outputs] == ["careful"]


def png(picture, mode=None, **settings):
    stream = io.BytesIO()
    Image.fromarray(picture, mode).save(stream, "PNG", **settings)
    return base64.b64encode(stream.getvalue()).decode()


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded.replace("\\\n", "")))).convert("RGBA"))


def test_tidy_packs_pictures_and_keeps_every_pixel():
    draws = np.random.default_rng(0)
    few = np.repeat(draws.integers(0, 256, (10, 10, 4), dtype=np.uint8), 9, axis=0)  # also some that is transparent
    many = np.cumsum(draws.integers(0, 2, (60, 80, 4), dtype=np.uint8), axis=1, dtype=np.uint8)
    opaque = np.dstack([many[..., :3], np.full(many.shape[:2], 255, np.uint8)])
    pictures = {"few": few, "many": many, "opaque": opaque, "rgb": few[..., :3].copy(), "grey": few[..., 0].copy()}
    for name, picture in pictures.items():
        loose = png(picture, compress_level=0, dpi=(96, 96))
        cell = new_code_cell("1", outputs=[new_output("display_data", data={"image/png": loose})])
        notebooks.tidy(new_notebook(cells=[cell]))
        packed = cell.outputs[0].data["image/png"]
        assert len(packed) < 0.8 * len(loose), name
        assert np.array_equal(pixels(packed), pixels(loose)), name
        assert Image.open(io.BytesIO(base64.b64decode(packed))).info["dpi"] == pytest.approx((96, 96), abs=0.1)
        notebooks.tidy(new_notebook(cells=[cell]))
        assert cell.outputs[0].data["image/png"] == packed, "a second time changes nothing"


def test_tidy_packs_the_frames_of_an_animation():
    figure, axes = plt.subplots(figsize=(1, 1))
    page = FuncAnimation(figure, lambda i: axes.plot([0, i], color=(i / 3, 0.3, 0.5)), frames=3).to_jshtml()
    plt.close(figure)
    cell = new_code_cell("1", outputs=[new_output("display_data", data={"text/html": page})])
    notebooks.tidy(new_notebook(cells=[cell]))
    packed = cell.outputs[0].data["text/html"]
    assert len(packed) < len(page)
    frames, before = ([match[2] for match in notebooks._FRAME.finditer(text)] for text in (packed, page))
    assert len(frames) == 3 and all(map(np.array_equal, map(pixels, frames), map(pixels, before)))
    # Nothing but the frames was touched.
    assert notebooks._FRAME.sub("", packed) == notebooks._FRAME.sub("", page)


def executed(project, *outputs):
    """Copies of the chapters as a run leaves them, the second with these outputs."""
    for name in notebooks.chapters():
        notebook = nbformat.read(project / "notebooks" / f"{name}.ipynb", 4)
        notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        for number, cell in enumerate(notebook.cells[1:], 1):
            cell.execution_count = number
        notebook.cells[-1].outputs = list(outputs) if name == "02_two" else []
        (project / "_build/book").mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, project / "_build/book" / f"{name}.ipynb")


def test_an_unchanged_site_is_not_built_again(project, monkeypatch, capsys):
    def build(*_, **__):
        raise AssertionError("built")

    executed(project)
    builder.build()
    page = project / "_build/html/notebooks/02_two.html"
    first = page.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", build)
        builder.build()
        assert "the site: unchanged" in capsys.readouterr().out and page.read_bytes() == first
        stamp = (project / "_build/html.digest").read_bytes()
        for path in (page, project / "book/intro.md", project / "requirements.lock"):
            before = path.read_bytes()
            path.unlink() if path == page else path.write_bytes(before + b"\n# more\n")
            with pytest.raises(AssertionError, match="built"):
                builder.build()
            path.write_bytes(before)
            (project / "_build/html.digest").write_bytes(stamp)
            builder.build()  # as it was, so there is nothing to do
        page.unlink()
        with pytest.raises(AssertionError, match="built"):
            builder.build()
    assert not (project / "_build/html.digest").exists(), "what was not built to the end has no stamp"


@pytest.mark.slow
def test_site_is_built_and_checked_and_survives_a_bad_one(project, capsys):
    executed(project, new_output("display_data", data={"image/png": png(np.zeros((9, 9), np.uint8))}))
    index = builder.build() / "index.html"
    assert index == project / "_build/html/index.html" and index.exists()
    page = project / "_build/html/notebooks/02_two.html"
    first = page.read_text()
    assert "https://colab.research.google.com/github/somebody/somebook/blob/main/notebooks/02_two.ipynb" in first

    (project / "book/intro.md").write_text("# A book\n\nSee {ref}`nowhere`.\n")
    for _ in range(2):  # twice: a page that Sphinx has read before must warn again
        with pytest.raises(UserError, match="1 things? to mend"):
            builder.build()
        assert "nowhere" in capsys.readouterr().err
    assert page.read_text() == first  # the pages that a reader has open are still there

    next((project / "_build/html").rglob("_images/*.png")).unlink()
    page.write_text(first.replace("colab.research", "colab.elsewhere"))
    (project / "_build/html/notebooks/01_one.html").unlink()
    with pytest.raises(UserError) as caught:
        builder.check_site()
    for problem in ("no page for chapter 01_one", "02_two.html has a dead image", "02_two.html has no link to https"):
        assert problem in str(caught.value)


def test_unexecuted_chapters_are_not_published(project):
    with pytest.raises(UserError, match="code cell 1 of .*01_one.ipynb was never run"):
        builder.build(project / "notebooks")


def test_missing_site_is_one_sentence(project):
    with pytest.raises(UserError, match="does not exist; build the book with `make book`"):
        builder.check_site()


def test_committed_chapters_follow_the_conventions():
    url = config.repository()["url"]
    for name in notebooks.select():
        cells = nbformat.read(root() / "notebooks" / f"{name}.ipynb", 4).cells
        code = [cell for cell in cells if cell.cell_type == "code"]
        tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
        assert tags.count("parameters") == 1 and tags.count("bootstrap") == 1 and "injected-parameters" not in tags, (
            name
        )
        assert "bootstrap" in code[0].metadata.get("tags", []) and url in code[0].source, name
        assert {"profile", "seed", "device"} <= set(notebooks.parameters_of(name)), name
