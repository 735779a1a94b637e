"""What experiments of several papers share."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from helpers.lab.statistics import Interval


class Recorded:
    """What the experiments' dataclasses share: their configuration is their fields."""

    def config(self) -> dict[str, Any]:
        """The fields by their names, fit for JSON."""
        return asdict(self)


class OnOmniglot(Recorded):
    """An experiment whose data are Omniglot."""

    def data(self) -> dict[str, Any]:
        """Digest of the images and of the split."""
        from helpers.tasks import omniglot

        return omniglot.provenance()


def both_names(spot: dict[str, Interval]) -> dict[str, Interval]:
    """Metrics of a spot check that is as thorough as the evaluation: once as ``spot_…`` and once without."""
    return spot | {name.removeprefix("spot_"): value for name, value in spot.items()}
