"""Every chapter, in the profile ``quick``, on a device that is not the CPU; and that a tensor left behind is found."""

from __future__ import annotations

import time

import matplotlib
import nbformat
import pytest
import standin
from IPython.display import display
from matplotlib import pyplot as plt

from helpers.errors import UserError
from helpers.runtime import root
from helpers.site import notebooks

# What may be forgotten: a place of a chapter and what it would read then. It has to fail in its own cell.
FORGOTTEN = {
    "01_learning_to_learn": ("torch.tensor([1.0, -1.0], device=device)", "torch.tensor([1.0, -1.0])"),
    "02_maml": ("new = torch.utils._pytree.tree_map(lambda t: t.to(device), new)", ""),
    "03_reptile": ("train_glyphs.to(device), ways=5, shots=6", "train_glyphs, ways=5, shots=6"),
    "04_imaml": ("few_shot = FewShot(train_glyphs.images.to(device)", "few_shot = FewShot(train_glyphs.images"),
    "05_ml3": ("(shaped, on_cpu(shaped_theta))", "(shaped, shaped_theta)"),
    "06_neural_optimizer_search": (").to(device)\n    optimizer", ")\n    optimizer"),
    "07_jets": ("here = samples.to(device)", "here = samples"),
    "09_beyond": ("{n: v.to(device) for n, v in checkpoints", "{n: v for n, v in checkpoints"),
}  # fmt: skip
ON_THE_CPU = {"08_scoreboard"}  # nothing is computed there
# Two workers begin with half of a list each: the long ones are dealt out in turn, or one of them would have them all.
LONGEST_FIRST = sorted(notebooks.chapters(), key=lambda name: (root() / f"notebooks/{name}.ipynb").stat().st_size)[::-1]


def run(source: str, where: str, names: dict) -> None:
    exec(compile(source, where, "exec"), names)
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("chapter", LONGEST_FIRST[::2] + LONGEST_FIRST[1::2])
def test_a_chapter_on_another_device(chapter, monkeypatch, record_property):
    begin = time.process_time()
    assert (chapter in FORGOTTEN) != (chapter in ON_THE_CPU), "say what may be forgotten in it"
    notebook = nbformat.read(root() / "notebooks" / f"{chapter}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    right, wrong = FORGOTTEN.get(chapter, (None, None))
    monkeypatch.chdir(root() / "notebooks")
    names, found = {"__name__": "__main__", "display": display}, []
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    try:
        with matplotlib.rc_context(), standin.card():
            for number, cell in enumerate(cells, 1):
                where = f"{chapter}, code cell {number}"
                if right and right in cell.source:
                    with pytest.raises((RuntimeError, TypeError, UserError), match="device|cuda"):
                        run(cell.source.replace(right, wrong), f"{where}, with a tensor left behind", dict(names))
                    found.append(number)
                run(cell.source, where, names)
                if "parameters" in cell.metadata.get("tags", []):
                    names |= {"profile": "quick", "device": "cuda"}
    finally:
        plt.switch_backend(backend)
    record_property("processor_seconds", round(time.process_time() - begin, 1))
    assert len(found) == (chapter in FORGOTTEN), "what may be forgotten is no longer there"
    assert getattr(names["device"], "type", names["device"]) == "cuda"
