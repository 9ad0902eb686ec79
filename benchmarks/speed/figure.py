"""The figures: times as multiples of one for scale, a panel for each case.

Made for print: contenders differ in their markers as well as in colours that colour-blind readers
can tell apart, and each has a row with its name.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.report.style import (
    FONT_POINTS,
    OWN_WIDTH,
    Style,
    line_looks,
    name_rows,
    new_figure,
    tidy,
)
from benchmarks.speed import names
from benchmarks.speed.results import WRONG, Record, Result

COLUMNS = 2
ROW_INCHES, PANEL_INCHES, TITLE_INCHES = 0.17, 0.62, 0.8  # of a panel, besides its rows
ROOM = 1.8  # on both sides of what is drawn, as a factor
ROOM_FOR_NUMBERS = 0.4  # on the right, as a part of the decades that are drawn

# Colours of Okabe and Ito, and of Tol's muted scheme, with a marker; hollow for those in HOLLOW.
OWN_COLOUR = "#D55E00"
LOOKS = {
    names.OURS: (OWN_COLOUR, "o"),
    names.LEAN: (OWN_COLOUR, "d"),
    names.DEFAULT_RANK: (OWN_COLOUR, "*"),
    names.THIN: (OWN_COLOUR, "v"),
    names.EVERYTHING: (OWN_COLOUR, "o"),
    names.CURVLINOPS: ("#0072B2", "s"),
    names.NNGEOMETRY: ("#009E73", "^"),
    names.LAPLACE: ("#56B4E9", "v"),
    names.AVALANCHE: ("#882255", "p"),
    names.PLAIN: ("#777777", "h"),
}
HOLLOW = (
    *(names.LEAN, names.DEFAULT_RANK, names.THIN, names.EVERYTHING),
    *(names.LAPLACE, names.AVALANCHE, names.PLAIN),
)
PENALTY_LOOKS, SEPARATE_LOOKS, STEP_LOOKS = (OWN_COLOUR, "o"), ("#CC79A7", "P"), ("#555555", "D")
SHORTER = {
    names.LEAN: "64 MiB budget",
    names.DEFAULT_RANK: "default rank",
    names.THIN: f"rank {names.THIN_RANK}",
    names.EVERYTHING: "all parameters",
}


def draw(records: Sequence[Record], title: Sequence[str]) -> Figure:
    """Draw a panel for each record: medians, and the range of all rounds as a line."""
    if not records:
        raise ValueError("records: got none, expected at least one")
    rows = ceil(len(records) / COLUMNS)
    most = max(len(record.shown) for record in records)
    height = rows * (most * ROW_INCHES + PANEL_INCHES) + TITLE_INCHES
    figure = new_figure(height)
    figure.suptitle("\n".join([*title, records[0].legend]), fontsize="small")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    times = [one.range_over(record.scale) for record in records for one in record.shown]
    ends = [1.0, *(end for ends in times for end in ends or ())]
    low, high = min(ends) / ROOM, max(ends) * ROOM
    for axes, record in zip(grid, records, strict=False):
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** ROOM_FOR_NUMBERS)
        _draw_panel(axes, record, low)
    for axes in grid[len(records) :]:
        axes.set_visible(False)
    for axes in grid[: len(records)][-COLUMNS:]:
        axes.set_xlabel(f"time, as a multiple of {records[0].unit}", fontsize="small")
    return figure


def _draw_panel(axes: Axes, record: Record, left: float) -> None:
    """Draw one panel, whose rows are contenders."""
    labels = [SHORTER.get(one.name, one.name) for one in record.shown]
    for place, one in enumerate(record.shown):
        end, text = left, one.status
        if (times := one.range_over(record.scale)) is not None:
            middle, low, end = times
            text = f"{middle:.3g}" + (f" ({one.message})" if one.status == WRONG else "")
            axes.plot([low, middle, end], [place] * 3, markevery=[1], **_looks(one))
        axes.annotate(
            text,
            (end, place),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=FONT_POINTS - 1,
            verticalalignment="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    name_rows(axes, labels, [label == names.OURS for label in labels])
    axes.set_title(record.heading, fontsize=FONT_POINTS, loc="left")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=FONT_POINTS)
    tidy(axes)


def _looks(result: Result) -> dict[str, Any]:
    """How a contender's line looks, for Matplotlib."""
    others = PENALTY_LOOKS if result.name.startswith(names.PENALTY) else SEPARATE_LOOKS
    is_step = "step" in result.name
    colour, marker = STEP_LOOKS if is_step else LOOKS.get(result.name, others)
    style = Style(
        colour,
        "-",
        "x" if result.status == WRONG else marker,
        filled=not is_step and result.name not in HOLLOW,
        width=OWN_WIDTH if colour == OWN_COLOUR else 1.1,
    )
    return line_looks(style)
