"""Where things are, which device runs them, and how errors reach the reader."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


class UserError(Exception):
    """A mistake that the reader can mend: one sentence that says what is wrong and what to do about it."""


def root() -> Path:
    """The root of the checkout, or the folder named by ``METABOOK_ROOT``.

    Returns:
        The folder that holds ``data/`` and ``notebooks/``. It does not depend on the working directory.
    """
    named = os.environ.get("METABOOK_ROOT")
    return Path(named).resolve() if named else Path(__file__).resolve().parents[2]
