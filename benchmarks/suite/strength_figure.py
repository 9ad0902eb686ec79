"""The figure that shows how exactly each method's strength has to be chosen."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plots import (
    Style,
    band_looks,
    is_own,
    line_looks,
    styles_of,
    tidy,
)
from benchmarks.suite.curves import new_figure
from benchmarks.suite.labels import FONT_POINTS
from benchmarks.suite.protocol import Experiment, MethodResult
from benchmarks.suite.widths import POINTS, Interval, Search, interval_within, points_from_best

CURVES_INCHES = 2.9
ROW_INCHES = 0.16
MARGIN_INCHES = 0.6
LARGEST_LOSS = 20.0  # points; what is lower is as bad as can be
HEADROOM = 0.03
ARROWS = {-1: "◀", 1: "▶"}
ARROW_POINTS = 6.0  # away from the marker, should the best strength be at the edge


def strength_curves(experiment: Experiment) -> Figure | None:
    """Draw what each method loses when its strength is not the best one.

    Above, percentage points from the method's own best mean accuracy on held-out images, with bands
    of one sample standard deviation where the search had several seeds. Below, the interval in
    which at most three points are lost, an arrow where it goes on beyond the search; its rows serve
    as the legend.

    Args:
        experiment: Records sorted by the protocol.

    Returns:
        The figure; None if no method was searched with several strengths.
    """
    searched = {
        result.label: result
        for result in experiment.results
        if len(points_from_best(result.search)) > 1
    }
    if not searched:
        return None
    rows = ROW_INCHES * len(searched) + MARGIN_INCHES
    figure = new_figure(CURVES_INCHES + rows)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(CURVES_INCHES, rows))
    styles = styles_of(searched)
    _draw_losses(above, searched, styles)
    _draw_intervals(below, searched, styles)
    return figure


def _draw_losses(
    axes: Axes, searched: Mapping[str, MethodResult], styles: Mapping[str, Style]
) -> None:
    """Draw points from the best against decades from the best."""
    lowest = 0.0
    for label, result in searched.items():
        decades, points = np.transpose(points_from_best(result.search))
        lowest = min(lowest, float(points.min()))
        axes.plot(10.0**decades, points, label=label, **line_looks(styles[label]))
        deviations = _deviations(result.search)
        if deviations is not None:
            low, high = points - deviations, points + deviations
            axes.fill_between(10.0**decades, low, high, **band_looks(styles[label]))
    axes.axhline(-POINTS, color="black", linewidth=0.8, linestyle=(0, (6, 3)), zorder=1.5)
    axes.annotate(
        f"-{POINTS:g} points",
        (0, -POINTS),
        xycoords=axes.get_yaxis_transform(),
        xytext=(3, 2),
        textcoords="offset points",
        fontsize=FONT_POINTS,
    )
    axes.set_xscale("log")
    bottom = -min(LARGEST_LOSS, max(-lowest, 2 * POINTS))
    axes.set_ylim(bottom * (1 + HEADROOM), -bottom * HEADROOM)
    axes.set_ylabel("accuracy, points from own best")
    tidy(axes)


def _deviations(search: Search) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None":
    """Deviation over seeds at each strength, in points; None if some have but one seed."""
    groups = [search[strength] for strength in sorted(search) if strength > 0 and search[strength]]
    if any(len(group) < 2 for group in groups):
        return None
    accuracies = [[100 * record.average_accuracy for record in group] for group in groups]
    return np.array([np.std(values, ddof=1) for values in accuracies])


def _draw_intervals(
    axes: Axes, searched: Mapping[str, MethodResult], styles: Mapping[str, Style]
) -> None:
    """Draw a row for each method: the strengths that are nearly as good as its best."""
    for row, (label, result) in enumerate(searched.items()):
        interval = interval_within(result.search)
        assert interval is not None
        _draw_interval(axes, row, interval, styles[label])
        axes.text(
            1.01,
            row,
            f"{interval.width}",
            transform=axes.get_yaxis_transform(),
            fontsize=FONT_POINTS,
            fontweight="bold" if is_own(label) else "normal",
            verticalalignment="center",
        )
    axes.text(
        1.01,
        -1,
        "decades",
        transform=axes.get_yaxis_transform(),
        fontsize=FONT_POINTS,
        verticalalignment="center",
    )
    name_rows(axes, list(searched))
    axes.set_xlabel(f"λ / best λ  (below: at most {POINTS:g} points lost)")
    axes.axvline(1, color="black", linewidth=0.5, zorder=1)
    tidy(axes)


def _draw_interval(axes: Axes, row: int, interval: Interval, style: Style) -> None:
    """Draw one interval, with arrow heads where it goes on."""
    low, high = 10.0**interval.low, 10.0**interval.high
    axes.plot([low, 1, high], [row] * 3, markevery=[1], **line_looks(style))
    ends = ((low, interval.open_low, -1), (high, interval.open_high, 1))
    for end, goes_on, direction in ends:
        axes.annotate(
            ARROWS[direction] if goes_on else "|",
            (end, row),
            xytext=(ARROW_POINTS * direction * goes_on, 0),
            textcoords="offset points",
            color=style.colour,
            fontsize=FONT_POINTS,
            horizontalalignment="center",
            verticalalignment="center",
        )


def name_rows(axes: Axes, labels: list[str]) -> None:
    """Name the rows of a panel, the first on top, this package's methods in bold."""
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT_POINTS)
    for tick, label in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if is_own(label) else "normal")
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
