"""FastJet's τ₂₁ of shipped jets after the detector, with which ``jets.observables`` is compared.

``python tests/tools/jet_reference.py`` makes the file anew; it needs the optional packages ``fastjet`` and ``awkward``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from helpers.runtime import generator
from helpers.tasks import jets
from helpers.tasks.jets.protocol import DATA_DETECTOR, WINDOWS

PATH = Path(__file__).parents[1] / "tasks" / "fastjet_tau21.npz"
EACH = 200  # jets of a process and window
STEP = 1e-4  # of the whole numbers in the file


def measured_jets() -> Tensor:
    """Cells of the first test jets of each process and window: ``[processes, windows, EACH, slots, 3]``."""
    samples, draws = jets.load(), generator(0)
    rows = [samples.select(process, "monash", "test", w)[:EACH] for process in jets.PROCESSES for w in WINDOWS]
    cells = DATA_DETECTOR(samples.particles(torch.cat(rows)), draws)
    return cells.view(len(jets.PROCESSES), len(WINDOWS), EACH, *cells.shape[1:])


def fastjet_tau21(cells: Tensor) -> np.ndarray:
    """τ₂/τ₁ by FastJet, asked as in ``helpers.tasks.jets.simulation``: ``[n]``, of massless cells ``[n, slots, 3]``."""
    import awkward
    import fastjet

    pt, eta, phi = (awkward.from_regular(cells[..., i].double().numpy()) for i in range(3))
    pt, eta, phi = (values[pt > 0] for values in (pt, eta, phi))
    momenta = {"px": pt * np.cos(phi), "py": pt * np.sin(phi), "pz": pt * np.sinh(eta), "E": pt * np.cosh(eta)}
    event = awkward.zip(momenta, with_name="Momentum4D")
    clustered = fastjet.ClusterSequence(event, fastjet.JetDefinition(fastjet.kt_algorithm, 1.0))
    tau = np.asarray(clustered.njettiness("NormalizedMeasure", "OnePass_WTA_KT_Axes", [1, 2], 1.0, 1.0))
    return np.divide(tau[:, 1], tau[:, 0], where=tau[:, 0] > 0, out=np.zeros(len(tau))).clip(0, 1)


def main() -> None:
    """Write the file."""
    cells = measured_jets()
    tau21 = fastjet_tau21(cells.flatten(0, 2)).reshape(cells.shape[:3])
    stored = {"tau21": np.rint(tau21 / STEP).astype(np.uint16), "pt": cells[..., 0].sum(-1).mean(-1).numpy()}
    PATH.write_bytes(jets.samples.archive(stored))


if __name__ == "__main__":
    main()
