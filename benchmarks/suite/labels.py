"""Labels at the ends of lines, which name many lines more readably than a legend does."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from sklearn.isotonic import isotonic_regression

from benchmarks.plots import Style, line_looks

POINTS_PER_INCH = 72
FONT_POINTS = 7.0
LINE_SPACING = 1.35
# In fractions of the width of the axes, to the right of them.
SAMPLE_FROM, SAMPLE_TO, TEXT_FROM = 1.035, 1.105, 1.12


class LineLabel(NamedTuple):
    """A label to place.

    Attributes:
        text: What it says.
        style: How the line looks, of which the label shows a sample.
        height: Where the line ends, as a fraction of the height of the axes.
        bold: Whether it stands out.
    """

    text: str
    style: Style
    height: float
    bold: bool


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels apart, in all as little as possible.

    Args:
        heights: Where they should be, in any order, between 0 and 1.
        gap: Smallest distance between two.

    Returns:
        Where they should go instead, in the same order, between 0 and 1 as far as there is room.
        They are the least-squares solution of all with their vertical order.
    """
    if not heights:
        return []
    order = np.argsort(heights, kind="stable")
    gap = min(gap, 1 / max(len(heights) - 1, 1))
    steps = gap * np.arange(len(heights))
    # With the steps taken off, "apart by a gap" is "not falling": a monotonic regression.
    levels = isotonic_regression(
        np.asarray(heights)[order] - steps, y_min=0.0, y_max=max(1.0 - float(steps[-1]), 0.0)
    )
    moved = np.empty(len(heights))
    moved[order] = levels + steps
    return [float(height) for height in moved]


def label_lines(axes: Axes, labels: Sequence[LineLabel], axes_inches: float) -> None:
    """Name lines to the right of the axes, each with a sample of the line and a thread to its end.

    Args:
        axes: Axes whose lines end at their right border.
        labels: The labels.
        axes_inches: About how tall the axes are, from which follows how far labels must be apart.
    """
    gap = FONT_POINTS * LINE_SPACING / POINTS_PER_INCH / axes_inches
    for label, height in zip(labels, spread([label.height for label in labels], gap), strict=True):
        _thread(axes, label, height)
        sample = line_looks(label.style)
        axes.plot(
            [SAMPLE_FROM, (SAMPLE_FROM + SAMPLE_TO) / 2, SAMPLE_TO],
            [height] * 3,
            transform=axes.transAxes,
            clip_on=False,
            markevery=[1],
            **sample,
        )
        axes.text(
            TEXT_FROM,
            height,
            label.text,
            transform=axes.transAxes,
            fontsize=FONT_POINTS,
            fontweight="bold" if label.bold else "normal",
            verticalalignment="center",
        )


def _thread(axes: Axes, label: LineLabel, height: float) -> None:
    """Draw a hairline from the end of a line to its label."""
    axes.plot(
        [1.0, SAMPLE_FROM],
        [label.height, height],
        transform=axes.transAxes,
        clip_on=False,
        color=label.style.colour,
        linewidth=0.5,
    )
