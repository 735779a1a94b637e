"""What the tests of bad input share."""

from __future__ import annotations

import pytest

from helpers.errors import UserError


def refused(action) -> str:
    """The message of the UserError that ``action`` raises: one line, not empty."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message
    return message
