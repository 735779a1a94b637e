"""One thread for all tests: their tensors are tiny, and sums then come in the same order everywhere."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--only-records", metavar="NAME,...", help="of the committed records evaluate these only")


def pytest_collection_modifyitems(config, items):
    only = config.getoption("--only-records")
    if only is not None:
        unwanted = [item for item in items if _record(item) and _record(item) not in only.split(",")]
        items[:] = [item for item in items if item not in unwanted]
        config.hook.pytest_deselected(items=unwanted)


def _record(item):
    """The committed record that a test evaluates."""
    return item.callspec.id if item.get_closest_marker("records") and hasattr(item, "callspec") else None


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with one chapter and two tiny experiments."""
    import commands  # here, since this file is also tried out alone

    return commands.checkout(tmp_path, monkeypatch)
