"""The figures that compare methods by single numbers: bars, with the numbers at their ends."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import styles_of, tidy
from benchmarks.report import ABSENT
from benchmarks.suite.curves import new_figure
from benchmarks.suite.labels import FONT_POINTS
from benchmarks.suite.protocol import Experiment
from benchmarks.suite.strength_figure import name_rows
from benchmarks.suite.summary import Statistic, SummaryRow, summary_rows

ROW_INCHES = 0.2
MARGIN_INCHES = 0.65
OWN_HATCH = "////"
JOINT_HATCH = "...."
ROOM_FOR_NUMBERS = 1.45
MEBIBYTE = 2**20


class Panel(NamedTuple):
    """One of the panels of a figure.

    Attributes:
        heading: Label of the axis.
        value: Picks what the bars show; None leaves a dash.
        form: Format of the numbers.
        most: Largest value there can be, beyond which the axis has no ticks.
    """

    heading: str
    value: Callable[[SummaryRow], Statistic | None]
    form: str
    most: float | None = None


def _scaled(statistic: Statistic | None, factor: float) -> Statistic | None:
    """The same in another unit."""
    if statistic is None:
        return None
    deviation = None if statistic.deviation is None else factor * statistic.deviation
    return Statistic(factor * statistic.mean, deviation, statistic.seeds)


def _relative_training(row: SummaryRow) -> Statistic | None:
    if row.relative_training is None or row.training_seconds is None:
        return None
    return _scaled(row.training_seconds, row.relative_training / row.training_seconds.mean)


ACCURACY_PANELS = (
    Panel("average accuracy at the end [%]", lambda row: _scaled(row.accuracy, 100), ".1f", 100.0),
    Panel("forgetting [points]", lambda row: _scaled(row.forgetting, 100), ".1f"),
)
ESTIMATION = Panel("estimation [s]", lambda row: row.estimation_seconds, ".3g")
STATE = Panel("state kept [MiB]", lambda row: _scaled(row.state_bytes, 1 / MEBIBYTE), ".3g")
RELATIVE = Panel("training [× naive]", _relative_training, ".2f")
ABSOLUTE = Panel("training [s]", lambda row: row.training_seconds, ".3g")


def forgetting_bars(experiment: Experiment) -> Figure | None:
    """Draw average accuracy at the end and forgetting side by side, with the chosen strength.

    Args:
        experiment: Records sorted by the protocol.

    Returns:
        The figure; None if nothing was tested.
    """
    return _bars(_tested(experiment), ACCURACY_PANELS)


def cost_bars(experiment: Experiment) -> Figure | None:
    """Draw what each method costs: time of training and of estimation, and memory.

    Args:
        experiment: Records sorted by the protocol. Without naive training among them, training
            time is in seconds.

    Returns:
        The figure; None if nothing was tested.
    """
    rows = _tested(experiment)
    relative = any(row.relative_training is not None for row in rows)
    return _bars(rows, (RELATIVE if relative else ABSOLUTE, ESTIMATION, STATE))


def _tested(experiment: Experiment) -> list[SummaryRow]:
    return [row for row in summary_rows(experiment) if row.accuracy is not None]


def _bars(rows: Sequence[SummaryRow], panels: Sequence[Panel]) -> Figure | None:
    """Draw panels side by side whose rows are methods."""
    if not rows:
        return None
    figure = new_figure(ROW_INCHES * len(rows) + MARGIN_INCHES)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw_bars(axes, rows, panel)
    name_rows(grid[0], [row.label for row in rows])
    for axes in grid[1:]:
        axes.tick_params(axis="y", length=0)
    return figure


def _draw_bars(axes: Axes, rows: Sequence[SummaryRow], panel: Panel) -> None:
    """Draw the bars of one panel, with error bars and numbers."""
    styles = styles_of(row.label for row in rows)
    values = [panel.value(row) for row in rows]
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            _write(axes, 0.0, place, ABSENT)
        else:
            _draw_bar(axes, place, row, value, styles[row.label].colour)
            _write(axes, _end(value), place, _number(value, panel.form))
    known = [value for value in values if value is not None]
    reach = max(map(_end, known), default=0.0)
    lowest = min((value.mean for value in known), default=0.0)
    axes.set_xlim(min(ROOM_FOR_NUMBERS * lowest, 0.0), ROOM_FOR_NUMBERS * reach or 1.0)
    if panel.most is not None:
        axes.set_xticks(np.linspace(0, panel.most, 6))
    axes.set_xlabel(panel.heading, fontsize="small")
    axes.tick_params(axis="x", labelsize=FONT_POINTS)
    tidy(axes)
    axes.grid(False, axis="y")


def _draw_bar(axes: Axes, place: int, row: SummaryRow, value: Statistic, colour: str) -> None:
    """Draw one bar with its error bar."""
    axes.barh(
        place,
        value.mean,
        xerr=value.deviation or None,
        height=0.7,
        color="white" if row.joint else colour,
        hatch=OWN_HATCH if row.own else JOINT_HATCH if row.joint else None,
        edgecolor="black",
        linewidth=0.5,
        error_kw={"elinewidth": 0.8, "capsize": 1.5},
    )


def _end(value: Statistic) -> float:
    """Where a bar and its error bar end on the right."""
    return max(value.mean, 0.0) + (value.deviation or 0.0)


def _number(value: Statistic, form: str) -> str:
    deviation = "" if not value.deviation else f" ± {value.deviation:{form}}"
    return f"{value.mean:{form}}{deviation}"


def _write(axes: Axes, end: float, place: int, text: str) -> None:
    """Write a number behind the end of a bar."""
    axes.annotate(
        text,
        (end, place),
        xytext=(3, 0),
        textcoords="offset points",
        fontsize=FONT_POINTS - 1,
        verticalalignment="center",
    )
