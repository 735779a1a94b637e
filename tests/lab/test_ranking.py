"""Judging how scores rank."""

from __future__ import annotations

import torch

from helpers.lab.ranking import in_parts


def test_parts_are_dealt():
    background, signal = torch.tensor([0.0, 10, 1, 11]), torch.tensor([5.0, 5, 6, 6])
    assert in_parts(background, signal, 2).tolist() == [[1, 0.5, 0.5], [0, 1, 1]]
