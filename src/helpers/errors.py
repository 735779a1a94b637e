"""Errors that reach the reader as one sentence."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the reader can mend: one sentence that says what is wrong and what to do about it."""


class DataAbsent(UserError):
    """A raw data set, which is no part of the repository, is not on this machine and could not be downloaded."""
