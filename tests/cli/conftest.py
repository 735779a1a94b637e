"""A miniature checkout for the command line."""

import commands
import pytest


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with one chapter and two tiny experiments."""
    return commands.checkout(tmp_path, monkeypatch)
