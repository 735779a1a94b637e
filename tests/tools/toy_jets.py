"""Jets that nobody simulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.runtime import generator
from helpers.tasks import jets

EACH = 40  # jets of each sample and window
SAMPLES = [(p, s, "train") for s in ("fsr-half", "fsr-one") for p in ("W", "QCD")] + [
    ("W", "monash", "test"),
    ("QCD", "monash", "test"),
]


SCALES = ("fsr-half", "fsr-one", "fsr-two")
EVERYWHERE = [  # process, shower, split, jets in a window
    *((process, shower, "train", 30) for shower in SCALES for process in ("QCD", "W")),
    *((process, shower, "validation", 30) for shower in SCALES for process in ("QCD", "W")),
    *((process, "monash", "test", 40) for process in ("QCD", "W", "WT", "Z", "top")),
    *((process, "fsr-one", "test", 40) for process in ("QCD", "W")),
    *((process, "vincia", "test", 28) for process in ("QCD", "W")),
]  # fmt: skip


def crowd(n: int, seed: int = 0, count: int = jets.PARTICLES) -> torch.Tensor:
    """Jets of two prongs and some particles around, ``[n, count, 3]``, the hardest first, the last slots empty."""
    draws = generator(seed)
    size = torch.rand(n, count, generator=draws).sort(1, descending=True).values ** 4 * 100 + 0.2
    place = 0.3 * torch.randn(n, count, 2, generator=draws)
    place[:, ::2] = 0.03 * place[:, ::2]
    place[:, 1::4] = 0.03 * place[:, 1::4] + torch.tensor([0.5, 0.3])
    place = place.clamp(-1, 1)
    there = torch.arange(count) < torch.randint(count // 2, count, (n, 1), generator=draws)
    return torch.cat([size.unsqueeze(-1), place], -1) * there.unsqueeze(-1)


def arrays() -> dict[str, np.ndarray]:
    """What a simulation might have made; τ₃₂ is the number of the jet."""
    windows = len(jets.WINDOWS) - 1
    n = len(SAMPLES) * windows * EACH
    edges = np.tile(np.repeat(np.array(jets.WINDOWS[:-1]), EACH), len(SAMPLES))
    return {
        "particles": crowd(n).double().numpy(), "pt": edges + 49.999, "rapidity": np.linspace(-2, 2, n),
        "mass": np.linspace(0, 300, n), "tau21": np.linspace(0, 1, n), "tau32": np.arange(n) * 1e-4,
    } | {
        name: np.repeat([known.index(sample[i]) for sample in SAMPLES], windows * EACH)
        for i, (name, known) in enumerate(
            (("process", jets.PROCESSES), ("shower", jets.SHOWERS), ("split", jets.SPLITS))
        )
    }  # fmt: skip


def arrays_everywhere():
    """What a simulation might have made: jets of 255 GeV, whatever their window; two prongs at 80 GeV, one at 40."""
    five = len(jets.WINDOWS) - 1
    count = np.array([each for *_, each in EVERYWHERE])
    particles = crowd(five * count.sum())
    particles[..., 0] *= 255 / particles[..., 0].sum(1, keepdim=True)
    qcd = torch.tensor([sample[0] == "QCD" for sample in EVERYWHERE]).repeat_interleave(torch.tensor(five * count))
    particles[qcd, :, 1:] *= 0.5
    window = np.concatenate([np.repeat(jets.WINDOWS[:-1], each) for each in count])
    made = dict.fromkeys(("rapidity", "mass", "tau21", "tau32"), np.zeros(len(window)))
    for i, (name, known) in enumerate((("process", jets.PROCESSES), ("shower", jets.SHOWERS), ("split", jets.SPLITS))):
        made[name] = np.repeat([known.index(sample[i]) for sample in EVERYWHERE], five * count)
    return made | {"particles": particles.double().numpy(), "pt": window + 25.0}


@contextmanager
def everywhere(folder: Path) -> Iterator[jets.JetSamples]:
    """Jets of every domain, prongs of QCD half as far apart, loaded from where the shipped file would be."""
    (folder / "data").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METABOOK_ROOT", str(folder))
        jets.home().write_bytes(jets.pack(arrays_everywhere(), {"samples": []}))
        yield jets.load()
