"""What `pytest --nbval notebooks` compares, and how: as `make test` does, by `helpers.site.compare`."""

from __future__ import annotations

import os
from types import MethodType

import pytest

from helpers.site import compare

# As in `make book`: one thread each, because the order of a sum, and so its rounding, depends on the number of threads.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", VECLIB_MAXIMUM_THREADS="1")


def pytest_configure(config) -> None:
    config.option.nbval_current_env = True  # the kernel of this Python, whichever the notebook names
    config.option.nbval_kernel_startup_timeout = 300  # a busy machine


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if hasattr(item, "cell") and hasattr(item, "compare_outputs"):
            item.compare_outputs = MethodType(_compare_outputs, item)
            item.output_timeout = 60  # likewise; nbval waits five seconds


def pytest_runtest_setup(item) -> None:
    cell = getattr(item, "cell", None)
    if cell is not None and compare.never_run(cell):
        pytest.fail(compare.NEVER_RUN, pytrace=False)


def _compare_outputs(item, test, ref, skip_compare=None) -> bool:
    options = item.cell.metadata.get("nbval", {})
    item.comparison_traceback = compare.differences(ref, test, item.cell.source, **options)
    return not item.comparison_traceback
