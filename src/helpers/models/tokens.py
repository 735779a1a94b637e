"""The symbols that every sequence shares: padding, beginning and end."""

from __future__ import annotations

__all__ = ["BEGIN", "END", "PAD"]

PAD, BEGIN, END = 0, 1, 2
