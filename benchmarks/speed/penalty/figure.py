"""The figure: all times as multiples of a plain training step, a panel for each case.

Made for print: contenders differ in their markers as well as in colours that colour-blind readers
can tell apart, and each has a row with its name.
"""

from collections.abc import Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.plots import DOTS_PER_INCH, WIDTH_INCHES, Style, line_looks, tidy
from benchmarks.speed import figure as estimation
from benchmarks.speed import names as speed
from benchmarks.speed.penalty import names
from benchmarks.speed.penalty.comparisons import relative_range
from benchmarks.speed.penalty.results import Record
from benchmarks.speed.report import QUICK_WARNING
from benchmarks.speed.results import WRONG

COLUMNS = 2
EXPLANATION = "Filled: a penalty and its gradient. Hollow: whole steps. Lines: range over rounds."

PENALTY_STYLE = Style("#D55E00", "-", "o", width=estimation.OWN_WIDTH)
SEPARATE_STYLE = Style("#CC79A7", "-", "P")
STEP_STYLE = Style("#555555", "-", "D", filled=False)


def draw(records: Sequence[Record], title: str, *, quick: bool = False) -> Figure:
    """Draw medians, and the range of all rounds as a line.

    Args:
        records: What was measured of each case.
        title: Stands above the figure.
        quick: Whether to warn that it shows a smoke test.

    Returns:
        A figure that belongs to no window; save it with ``savefig``.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not records:
        raise ValueError("records: got none, expected at least one")
    rows = ceil(len(records) / COLUMNS)
    most = max(len(_contenders(record)) for record in records)
    panel = most * estimation.ROW_INCHES + estimation.PANEL_INCHES
    height = rows * panel + estimation.TITLE_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    lines = [title, *([QUICK_WARNING] if quick else []), EXPLANATION]
    figure.suptitle("\n".join(lines), fontsize="small")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    limits = _limits(records)
    for axes, record in zip(panels, records, strict=False):
        _draw_record(axes, record, limits)
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    for axes in panels[: len(records)][-COLUMNS:]:
        axes.set_xlabel("time, × that of a plain step", fontsize="small")
    return figure


def _contenders(record: Record) -> list[str]:
    """Whoever has a row: all but the plain step, which is the line at 1, and who is absent."""
    measured = [name for name in record.rounds if name != names.STEP]
    return [*measured, *(name for name in record.statuses if name not in record.rounds)]


def _limits(records: Sequence[Record]) -> tuple[float, float]:
    """Limits of the axis that hold all times and the numbers beside them."""
    ends = [
        end
        for record in records
        for name in record.rounds
        for end in relative_range(record.rounds, name)
    ]
    low, high = min(ends) / estimation.ROOM, max(ends) * estimation.ROOM
    return low, high * (high / low) ** estimation.ROOM_FOR_NUMBERS


def _draw_record(axes: Axes, record: Record, limits: tuple[float, float]) -> None:
    """Draw one panel, whose rows are contenders."""
    rows = _contenders(record)
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    for row, name in enumerate(rows):
        _draw_row(axes, row, name, record, limits[0])
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(rows)), rows, fontsize=estimation.FONT_POINTS)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    step = f"{record.milliseconds[names.STEP]:.3g} ms"
    heading = f"{record.case}: {names.CASES[record.case]}\nbatches of {record.batch}, step {step}"
    axes.set_title(heading, fontsize=estimation.FONT_POINTS, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=estimation.FONT_POINTS)
    axes.tick_params(axis="y", length=0)
    tidy(axes)


def _draw_row(axes: Axes, row: int, name: str, record: Record, left: float) -> None:
    """Draw one contender's times, or why there are none."""
    status = record.statuses.get(name, "")
    if name not in record.rounds:
        estimation.write_beside(axes, left, row, status)
        return
    low, middle, high = relative_range(record.rounds, name)
    style = style_of(name)
    axes.plot([low, high], [row, row], color=style.colour, linewidth=style.width, zorder=2)
    looks = line_looks(style) | ({"marker": "x"} if status == WRONG else {})
    axes.plot([middle], [row], **looks)
    message = f" ({record.messages[name]})" if name in record.messages else ""
    estimation.write_beside(axes, high, row, f"{middle:.3g}{message}")


def style_of(name: str) -> Style:
    """How a contender looks."""
    if name in (speed.CURVLINOPS, speed.NNGEOMETRY):
        return estimation.STYLES[name]
    if names.is_step(name):
        return STEP_STYLE
    return PENALTY_STYLE if name.startswith("penalty") else SEPARATE_STYLE
