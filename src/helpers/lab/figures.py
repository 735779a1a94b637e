"""The house style: one look for every figure and table of the book.

Figures are drawn on an opaque white ground, so that they read the same on a light and on a dark page; the page's
style sheet gives them a margin and round corners in dark mode. Lines differ by colour, marker *and* dash pattern, and
the colours are those of Okabe and Ito, which stay apart under the common kinds of colour blindness. Nothing here
changes the values that it draws.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helpers.errors import UserError
from helpers.lab.tables import numbers

if TYPE_CHECKING:  # matplotlib is heavy and not needed for training: only the functions that draw import it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
WIDTH = 7.0
"""Width of a figure in inches: the text column of the book."""
COLOURS = {
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
    "grey": "#6E6E6E",
}
"""Okabe and Ito's palette without its yellow (too faint on white), and a grey for what is only context."""
CYCLE = ("blue", "vermillion", "green", "purple", "orange", "sky", "black")
"""The order in which lines take their colours."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1)))
_SETTINGS: dict[str, Any] = {
    "figure.dpi": 150,  # half as many pixels again as the text column has, for dense screens; the page scales them down
    "savefig.dpi": 150,
    "figure.figsize": (WIDTH, 3.2),
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.transparent": False,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": True,
    "legend.framealpha": 0.85,  # lines may run behind it
    "legend.edgecolor": "none",
    "legend.handlelength": 3.2,  # long enough to show the dash pattern
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.cmap": "gray_r",
    "image.interpolation": "nearest",
    "svg.hashsalt": "metabook",
}


def _settings() -> dict[str, Any]:
    """The matplotlib settings of the house style, with its line cycle."""
    from cycler import cycler

    cycle = cycler(color=[COLOURS[name] for name in CYCLE], linestyle=list(DASHES))
    return {**_SETTINGS, "axes.prop_cycle": cycle}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The house style inside a ``with`` block; matplotlib's settings are as before when the block ends."""
    import matplotlib

    # Not matplotlib.rc_context: the first figure switches a notebook display on, which would be undone with the rest.
    settings = _settings()
    before = {name: matplotlib.rcParams[name] for name in settings}
    matplotlib.rcParams.update(settings)
    try:
        yield
    finally:
        matplotlib.rcParams.update(before)


def use() -> None:
    """The house style from here on, for a whole notebook: the first drawing cell calls it once."""
    import matplotlib

    matplotlib.rcParams.update(_settings())


def subplots(rows: int = 1, columns: int = 1, height: float | None = None, **keywords: Any) -> tuple[Figure, Any]:
    """A figure as wide as the text, in the house style.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        height: Height of the whole figure in inches; 2.9 a row without it.
        **keywords: Passed on to ``matplotlib.pyplot.subplots``.

    Returns:
        The figure, and its axes as matplotlib gives them: one, or an array.
    """
    import matplotlib.pyplot as plt

    with style():
        return plt.subplots(rows, columns, figsize=(WIDTH, height or 2.9 * rows), **keywords)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash pattern of the ``index``-th line, as keywords for ``Axes.plot``."""
    return {
        "color": COLOURS[CYCLE[index % len(CYCLE)]],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def band(
    ax: Axes,
    x: Sequence[float] | Tensor,
    mean: Sequence[float] | Tensor,
    ci95: Sequence[float] | Tensor | None = None,
    label: str | None = None,
    index: int = 0,
    **keywords: Any,
) -> None:
    """A line and the band of its 95 % interval.

    Args:
        ax: Where to draw.
        x: Abscissae, shape [n].
        mean: The line, shape [n].
        ci95: Half-width of the interval, shape [n]; no band without it.
        label: Entry of the legend.
        index: Which of the house's lines this is; sets colour, marker and dashes together.
        **keywords: Passed on to ``Axes.plot``; wins over the house's choice.

    Raises:
        UserError: The three have different lengths.
    """
    xs, middle = numbers(x), numbers(mean)
    half = None if ci95 is None else numbers(ci95)
    if len(xs) != len(middle) or (half is not None and len(half) != len(xs)):
        lengths = [len(values) for values in (xs, middle, half) if values is not None]
        raise UserError(f"band: x, mean and ci95 must have the same length; theirs are {lengths}.")
    chosen = {**look(index), "markevery": max(1, len(xs) // 10), **keywords}
    (line,) = ax.plot(xs, middle, label=label, **chosen)
    if half is not None:
        low = [m - h for m, h in zip(middle, half, strict=True)]
        high = [m + h for m, h in zip(middle, half, strict=True)]
        ax.fill_between(xs, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def adaptation_curve(
    ax: Axes,
    curves: Mapping[str, tuple[Any, Any]],
    ylabel: str = "query loss",
    log: bool = False,
) -> None:
    """Performance on the query set against the number of inner steps, one line a method.

    Args:
        ax: Where to draw.
        curves: For each method, mean and half-width of the 95 % interval after 0, 1, 2, ... steps, both of shape
            [steps + 1]; the half-width may be ``None``.
        ylabel: What the curves measure, with its unit.
        log: Logarithmic vertical axis.
    """
    for index, (name, (mean, ci95)) in enumerate(curves.items()):
        values = numbers(mean)
        band(ax, list(range(len(values))), values, ci95, label=name, index=index, markevery=1)
    ax.set_xlabel("inner steps")
    ax.set_ylabel(ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    if log:
        ax.set_yscale("log")
    ax.legend()


def paper_vs_book(
    rows: Sequence[Mapping[str, Any]], unit: str = "", scale: float = 1.0, ax: Axes | None = None
) -> Figure:
    """What the paper claims beside what the book measured: two dots with their intervals on every row.

    Args:
        rows: One mapping a claim: ``quantity`` (its name), ``paper`` and ``book`` (values, ``None`` where there is
            none), and optionally ``paper_ci95`` and ``book_ci95`` (half-widths), ``verdict`` (written at the right)
            and ``scale`` (instead of ``scale`` for this row).
        unit: Unit of the horizontal axis.
        scale: Factor on all values, 100 for fractions shown in per cent.
        ax: Where to draw; a new figure without it.

    Returns:
        The figure.

    Raises:
        UserError: There is no row.
    """
    rows = list(rows)
    if not rows:
        raise UserError("paper_vs_book: there is no claim to draw; give at least one row.")
    names = [textwrap.fill(str(row["quantity"]), 30) for row in rows]
    with style():
        if ax is None:
            _, ax = subplots(height=0.9 + 0.24 * sum(1 + max(1, name.count("\n")) for name in names))
        for side, offset, colour, marker, face, label in (
            ("paper", -0.14, COLOURS["grey"], "D", "white", "paper"),
            ("book", 0.14, COLOURS["blue"], "o", None, "this book"),
        ):
            there = [(place, row) for place, row in enumerate(rows) if row.get(side) is not None]
            both = [row.get("paper") is not None and row.get("book") is not None for _, row in there]
            if there:
                ax.errorbar(
                    [float(row[side]) * row.get("scale", scale) for _, row in there],
                    [place + offset * beside for (place, _), beside in zip(there, both, strict=True)],
                    xerr=[abs(float(row.get(f"{side}_ci95") or 0)) * row.get("scale", scale) for _, row in there],
                    linestyle="none",
                    capsize=3,
                    color=colour,
                    marker=marker,
                    markerfacecolor=face,
                    label=label,
                )
        for place, row in enumerate(rows):
            if row.get("verdict"):
                at = {"xy": (1.01, place), "xycoords": ("axes fraction", "data")}
                ax.annotate(str(row["verdict"]), va="center", fontsize=9, color="#222222", **at)
        ax.set_yticks(range(len(rows)), names)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xlabel(unit)
        ax.grid(axis="y", visible=False)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return ax.figure  # type: ignore[return-value]


def contact_sheet(
    images: Tensor,
    columns: int = 10,
    titles: Sequence[str] | None = None,
    ink_is_one: bool = True,
    height: float | None = None,
) -> Figure:
    """Small images side by side, row after row.

    Args:
        images: Shape [n, height, width] or [n, 1, height, width], any number type; black is the largest value.
        columns: Images in a row.
        titles: A short title for each image.
        ink_is_one: Draw high values dark, as ink on paper.
        height: Height of the figure in inches; from the shape without it.

    Returns:
        The figure.

    Raises:
        UserError: The shape is none of the two, or there is no image.
    """
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or not len(images):
        raise UserError(f"contact_sheet: expected images of shape [n, height, width], not {list(images.shape)}.")
    picture = images.detach().to("cpu", torch.float32)
    top = float(picture.max()) or 1.0
    columns = min(columns, len(picture))
    rows = math.ceil(len(picture) / columns)
    cell = WIDTH / columns
    aspect = picture.shape[1] / picture.shape[2]
    tall = height or rows * (cell * aspect + (0.22 if titles else 0.04))
    figure, axes = subplots(rows, columns, height=tall, squeeze=False)
    for index, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if index < len(picture):
            ax.imshow(picture[index].numpy(), cmap="gray_r" if ink_is_one else "gray", vmin=0, vmax=top)
            if titles is not None and index < len(titles):
                ax.set_title(str(titles[index]), fontsize=8, fontweight="normal", pad=2)
    return figure
