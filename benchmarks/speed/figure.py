"""The figures: times as multiples of one for scale, a panel for each case.

Made for print: contenders differ in their markers as well as in colours that colour-blind readers
can tell apart, and each has a row with its name.
"""

from collections.abc import Sequence
from math import ceil

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

OWN = Style("#D55E00", "-", "o", width=OWN_WIDTH)
OWN_HOLLOW = OWN._replace(filled=False)
# Colours of Okabe and Ito, and of Tol's muted scheme.
LOOKS = {
    names.OURS: OWN,
    names.LEAN: OWN_HOLLOW._replace(marker="d"),
    names.DEFAULT_RANK: OWN_HOLLOW._replace(marker="*"),
    names.THIN: OWN_HOLLOW._replace(marker="v"),
    names.EVERYTHING: OWN_HOLLOW,
    names.CURVLINOPS: Style("#0072B2", "-", "s"),
    names.NNGEOMETRY: Style("#009E73", "-", "^"),
    names.LAPLACE: Style("#56B4E9", "-", "v", filled=False),
    names.AVALANCHE: Style("#882255", "-", "p", filled=False),
    names.PLAIN: Style("#777777", "-", "h", filled=False),
}
STEP, SEPARATE = Style("#555555", "-", "D", filled=False), Style("#CC79A7", "-", "P")
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
            axes.plot([low, middle, end], [place] * 3, markevery=[1], **line_looks(_style(one)))
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


def _style(result: Result) -> Style:
    """How a contender's line looks."""
    if "step" in result.name:
        style = STEP
    else:
        is_penalty = result.name.startswith(names.PENALTY)
        style = LOOKS.get(result.name, OWN if is_penalty else SEPARATE)
    return style._replace(marker="x") if result.status == WRONG else style
