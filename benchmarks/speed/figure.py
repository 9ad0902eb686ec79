"""The figure: all times as multiples of the floor, a panel for each case and Fisher type.

Made for print: contenders differ in their markers as well as in colours that colour-blind readers
can tell apart. Hollow markers are of those that compute something else.
"""

from collections.abc import Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.plots import DOTS_PER_INCH, WIDTH_INCHES, Style, line_looks, tidy
from benchmarks.speed import names
from benchmarks.speed.report import QUICK_WARNING
from benchmarks.speed.results import WRONG, Cell, Result

COLUMNS = 2
ROW_INCHES = 0.17
PANEL_INCHES = 0.62  # of a panel, besides its rows
TITLE_INCHES = 0.8
FONT_POINTS = 7.0
OWN_WIDTH = 2.0
ROOM = 1.8  # on both sides of what is drawn, as a factor
ROOM_FOR_NUMBERS = 0.4  # on the right, as a part of the decades that are drawn
EXPLANATION = "Hollow: another quantity, budget or set of parameters. Lines: the range over rounds."

# Colours of Okabe and Ito, and of Tol's muted scheme.
STYLES = {
    names.OURS: Style("#D55E00", "-", "o", width=OWN_WIDTH),
    names.LEAN: Style("#D55E00", "-", "d", filled=False, width=OWN_WIDTH),
    names.EVERYTHING: Style("#D55E00", "-", "o", filled=False, width=OWN_WIDTH),
    names.CURVLINOPS: Style("#0072B2", "-", "s"),
    names.NNGEOMETRY: Style("#009E73", "-", "^"),
    names.KRONFLUENCE: Style("#CC79A7", "-", "D"),
    names.LAPLACE: Style("#56B4E9", "-", "v", filled=False),
    names.AVALANCHE: Style("#882255", "-", "p", filled=False),
    names.PLAIN: Style("#777777", "-", "h", filled=False),
}

SHORTER = {names.EVERYTHING: "all parameters", names.LEAN: "64 MiB budget"}


def draw(cells: Sequence[Cell], title: str, *, quick: bool = False) -> Figure:
    """Draw medians, and the range of all rounds as a line.

    Args:
        cells: What was measured.
        title: Stands above the figure.
        quick: Whether to warn that it shows a smoke test.

    Returns:
        A figure that belongs to no window; save it with ``savefig``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not cells:
        raise ValueError("cells: got none, expected at least one")
    rows = ceil(len(cells) / COLUMNS)
    most = max(len(cell.results) for cell in cells)
    height = rows * (most * ROW_INCHES + PANEL_INCHES) + TITLE_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    lines = [title, *([QUICK_WARNING] if quick else []), EXPLANATION]
    figure.suptitle("\n".join(lines), fontsize="small")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    panels = grid.flatten()
    limits = _limits(cells)
    for axes, cell in zip(panels, cells, strict=False):
        _draw_cell(axes, cell, limits)
    for axes in panels[len(cells) :]:
        axes.set_visible(False)
    for axes in panels[: len(cells)][-COLUMNS:]:
        axes.set_xlabel("time, as a multiple of the floor", fontsize="small")
    return figure


def _limits(cells: Sequence[Cell]) -> tuple[float, float]:
    """Limits of the axis that hold all times, the floor and the numbers beside them."""
    seconds = [(s / cell.floor) for cell in cells for r in cell.results for s in r.seconds]
    low, high = min([1.0, *seconds]) / ROOM, max([1.0, *seconds]) * ROOM
    return low, high * (high / low) ** ROOM_FOR_NUMBERS


def _draw_cell(axes: Axes, cell: Cell, limits: tuple[float, float]) -> None:
    """Draw one panel, whose rows are contenders."""
    labels = [_label(result) for result in cell.results]
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    for row, result in enumerate(cell.results):
        _draw_result(axes, row, result, cell, limits[0])
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT_POINTS)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if label == names.OURS else "normal")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(_heading(cell), fontsize=FONT_POINTS, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=FONT_POINTS)
    axes.tick_params(axis="y", length=0)
    tidy(axes)


def _label(result: Result) -> str:
    """The name, or the part of it that is not in the row above."""
    return SHORTER.get(result.name, result.name)


def _heading(cell: Cell) -> str:
    part = "" if cell.fraction == 1 else f", {cell.fraction:g} of the data"
    return f"{cell.case}: {names.CASES[cell.case]}\n{cell.fisher}{part}, floor {cell.floor:.3g} s"


def _draw_result(axes: Axes, row: int, result: Result, cell: Cell, left: float) -> None:
    """Draw one contender's times, or why there are none."""
    times = cell.times_floor(result)
    if times is None:
        write_beside(axes, left, row, result.status)
        return
    style = STYLES[result.name]
    ends = [min(result.seconds) / cell.floor, max(result.seconds) / cell.floor]
    axes.plot(ends, [row, row], color=style.colour, linewidth=style.width, zorder=2)
    looks = line_looks(style)
    if result.status == WRONG:
        looks |= {"marker": "x"}
    axes.plot([times], [row], **looks)
    write_beside(axes, ends[1], row, _number(result, times))


def _number(result: Result, times: float) -> str:
    """The multiple of the floor, and how wrong the result is."""
    return f"{times:.3g}" + (f" ({result.message})" if result.status == WRONG else "")


def write_beside(axes: Axes, end: float, row: int, text: str) -> None:
    """Write behind the end of a line."""
    axes.annotate(
        text,
        (end, row),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=FONT_POINTS - 1,
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
