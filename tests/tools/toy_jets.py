"""Jets that nobody simulated."""

from __future__ import annotations

import numpy as np
import torch

from helpers.runtime import generator
from helpers.tasks import jets

EACH = 40  # jets of each sample and window
SAMPLES = [(p, s, "train") for s in ("fsr-half", "fsr-one") for p in ("W", "QCD")] + [
    ("W", "monash", "test"),
    ("QCD", "monash", "test"),
]


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
