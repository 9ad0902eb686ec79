"""The figures: times as multiples of one for scale, a panel for each case.

Made for print: contenders differ in their markers as well as in colours that colour-blind readers
can tell apart, and each has a row with its name.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.files import replace_file
from benchmarks.speed import names
from benchmarks.speed.results import WRONG, Estimation, Result, Training

WIDTH_INCHES = 7.0
DOTS_PER_INCH = 200
COLUMNS = 2
ROW_INCHES = 0.17
PANEL_INCHES = 0.62  # of a panel, besides its rows
TITLE_INCHES = 0.8
FONT_POINTS = 7.0
OWN_WIDTH, OTHER_WIDTH = 2.0, 1.1
ROOM = 1.8  # on both sides of what is drawn, as a factor
ROOM_FOR_NUMBERS = 0.4  # on the right, as a part of the decades that are drawn

# Colours of Okabe and Ito, and of Tol's muted scheme, with a marker; hollow for those in HOLLOW.
OWN_COLOUR = "#D55E00"
LOOKS = {
    names.OURS: (OWN_COLOUR, "o"),
    names.LEAN: (OWN_COLOUR, "d"),
    names.EVERYTHING: (OWN_COLOUR, "o"),
    names.CURVLINOPS: ("#0072B2", "s"),
    names.NNGEOMETRY: ("#009E73", "^"),
    names.KRONFLUENCE: ("#CC79A7", "D"),
    names.LAPLACE: ("#56B4E9", "v"),
    names.AVALANCHE: ("#882255", "p"),
    names.PLAIN: ("#777777", "h"),
}
HOLLOW = (names.LEAN, names.EVERYTHING, names.LAPLACE, names.AVALANCHE, names.PLAIN)
PENALTY_LOOKS, SEPARATE_LOOKS, STEP_LOOKS = (OWN_COLOUR, "o"), ("#CC79A7", "P"), ("#555555", "D")
SHORTER = {names.EVERYTHING: "all parameters", names.LEAN: "64 MiB budget"}


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        result: What was measured of it.
        times: Median and both ends of the range over rounds, as multiples; None without times.
        looks: Colour and marker.
        filled: Whether the marker is.
    """

    result: Result
    times: tuple[float, float, float] | None
    looks: tuple[str, str]
    filled: bool


@dataclass(frozen=True)
class Panel:
    """One case.

    Attributes:
        heading: Stands above it.
        rows: The contenders.
    """

    heading: str
    rows: list[Row]


def draw_estimations(records: Sequence[Estimation], title: Sequence[str]) -> Figure:
    """Draw times as multiples of the floor.

    Raises:
        ValueError: If there is nothing to draw.
    """
    panels = []
    for one in records:
        part = "" if one.fraction == 1 else f", {one.fraction:g} of the data"
        heading = (
            f"{one.case}: {names.CASES[one.case]}\n{one.fisher}{part}, floor {one.floor:.3g} s"
        )
        rows = [
            Row(r, r.range_over([one.floor]), LOOKS[r.name], r.name not in HOLLOW)
            for r in one.results
        ]
        panels.append(Panel(heading, rows))
    explanation = (
        "Hollow: another quantity, budget or set of parameters. Lines: the range over rounds."
    )
    return _draw(panels, [*title, explanation], "time, as a multiple of the floor")


def draw_training(records: Sequence[Training], title: Sequence[str]) -> Figure:
    """Draw times as multiples of a plain step in the same round; see :func:`draw_estimations`."""
    panels = []
    for one in records:
        step, *others = one.results
        heading = (
            f"{one.case}: {names.STEP_CASES[one.case]}\nbatches of {one.batch}, "
            f"step {1_000 * (step.median or 0):.3g} ms"
        )
        rows = [
            Row(r, r.range_over(step.seconds), _looks_in_training(r.name), "step" not in r.name)
            for r in others
        ]
        panels.append(Panel(heading, rows))
    explanation = (
        "Filled: a penalty and its gradient. Hollow: whole steps. Lines: range over rounds."
    )
    return _draw(panels, [*title, explanation], "time, × that of a plain step")


def _looks_in_training(name: str) -> tuple[str, str]:
    """Colour and marker of a penalty or step."""
    if name in LOOKS:
        return LOOKS[name]
    if "step" in name:
        return STEP_LOOKS
    return PENALTY_LOOKS if name.startswith("penalty") else SEPARATE_LOOKS


def save(figure: Figure, path: Path) -> None:
    """Write an image that is, at every moment, the old one or the new one."""
    image = io.BytesIO()
    figure.savefig(image)
    replace_file(path, image.getvalue())


def _draw(panels: Sequence[Panel], title: Sequence[str], label: str) -> Figure:
    """Draw medians, and the range of all rounds as a line."""
    if not panels:
        raise ValueError("records: got none, expected at least one")
    rows = ceil(len(panels) / COLUMNS)
    most = max(len(panel.rows) for panel in panels)
    height = rows * (most * ROW_INCHES + PANEL_INCHES) + TITLE_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle("\n".join(title), fontsize="small")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    ends = [1.0, *(t for panel in panels for row in panel.rows for t in row.times or ())]
    low, high = min(ends) / ROOM, max(ends) * ROOM
    for axes, panel in zip(grid, panels, strict=False):
        axes.set_xscale("log")
        axes.set_xlim(low, high * (high / low) ** ROOM_FOR_NUMBERS)
        _draw_panel(axes, panel, low)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[: len(panels)][-COLUMNS:]:
        axes.set_xlabel(label, fontsize="small")
    return figure


def _draw_panel(axes: Axes, panel: Panel, left: float) -> None:
    """Draw one panel, whose rows are contenders."""
    labels = [SHORTER.get(row.result.name, row.result.name) for row in panel.rows]
    for place, row in enumerate(panel.rows):
        _draw_row(axes, place, row, left)
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT_POINTS)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if label == names.OURS else "normal")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(panel.heading, fontsize=FONT_POINTS, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=FONT_POINTS)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_row(axes: Axes, place: int, row: Row, left: float) -> None:
    """Draw one contender's times, or why there are none."""
    if row.times is None:
        _write_beside(axes, left, place, row.result.status)
        return
    middle, low, high = row.times
    colour, marker = row.looks
    width = OWN_WIDTH if colour == OWN_COLOUR else OTHER_WIDTH
    wrong = row.result.status == WRONG
    axes.plot([low, high], [place, place], color=colour, linewidth=width, zorder=2)
    axes.plot(
        [middle],
        [place],
        color=colour,
        marker="x" if wrong else marker,
        markersize=5 if width == OWN_WIDTH else 4,
        markerfacecolor=colour if row.filled else "white",
        zorder=2.5,
    )
    message = f" ({row.result.message})" if wrong else ""
    _write_beside(axes, high, place, f"{middle:.3g}{message}")


def _write_beside(axes: Axes, end: float, place: int, text: str) -> None:
    """Write behind the end of a line."""
    axes.annotate(
        text,
        (end, place),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=FONT_POINTS - 1,
        verticalalignment="center",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
