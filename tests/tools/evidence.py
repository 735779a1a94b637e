"""Made-up claims and records."""

from __future__ import annotations

from helpers.lab.claims import Claim


def record(name, complete=True, **metrics):
    """A made-up record of five seeds; a metric is a value with a half-width of 0.01, or value and half-width."""
    pairs = {key: value if isinstance(value, tuple) else (value, 0.01) for key, value in metrics.items()}
    return {
        "experiment": name,
        "paper": "p",
        "status": "complete" if complete else "partial",
        "iterations": {"done": 10, "planned": 10 if complete else 20},
        "config": {"name": name, "seed": 0},
        "metrics": {key: {"value": v, "ci95": half, "n": 5, "per": "seed"} for key, (v, half) in pairs.items()},
    }


def claim(name="c", better="higher", metric="score", value=None, ci95=None, direction=(), **marks):
    return Claim("p", name, "q", "Table 1", "x", metric, value, ci95, better, tuple(direction), **marks)


def ordering(right="y/score", left="x/score", **more):
    return {"left": left, "right": right, **more}
