"""The figures of an experiment, by name; the numbers that a bar would show are in its table.

A figure that has nothing to show (yet) is None, because reports are also made from half a sweep.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.methods import is_own
from benchmarks.report.accuracy import accuracy_curves, heat_maps
from benchmarks.report.style import (
    FONT_POINTS,
    Style,
    band_looks,
    line_looks,
    name_rows,
    new_figure,
    styles_of,
    tidy,
)
from benchmarks.suite.outcome import (
    POINTS,
    Experiment,
    Interval,
    MethodResult,
    Search,
    interval_within,
    points_from_best,
)

MARGIN_INCHES = 0.65
LOSSES_INCHES = 2.9
INTERVAL_INCHES = 0.16
LARGEST_LOSS = 20.0  # points; what is lower is as bad as can be


def strength_curves(experiment: Experiment) -> Figure | None:
    """Draw what each method loses when its strength is not the best one.

    Above, percentage points from the method's own best mean accuracy on held-out images, with bands
    of one sample standard deviation where the search had several seeds. Below, the interval in
    which at most three points are lost, an arrow where it goes on beyond the search; its rows serve
    as the legend.
    """
    searched = {
        result.label: result
        for result in experiment.results
        if len(points_from_best(result.search)) > 1
    }
    if not searched:
        return None
    rows = INTERVAL_INCHES * len(searched) + MARGIN_INCHES
    figure = new_figure(LOSSES_INCHES + rows)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(LOSSES_INCHES, rows))
    styles = styles_of(searched)
    _draw_losses(above, searched, styles)
    for row, (label, result) in enumerate(searched.items()):
        if (interval := interval_within(result.search)) is not None:
            _draw_interval(below, row, interval, styles[label])
    name_rows(below, list(searched), map(is_own, searched))
    below.set_xlabel(f"λ / best λ  (below: at most {POINTS:g} points lost; width in decades)")
    below.axvline(1, color="black", linewidth=0.5, zorder=1)
    tidy(below)
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
    axes.set_xscale("log")
    bottom = -min(LARGEST_LOSS, max(-lowest, 2 * POINTS))
    axes.set_ylim(1.03 * bottom, -0.03 * bottom)
    axes.set_ylabel("accuracy, points from own best")
    tidy(axes)


def _deviations(search: Search) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None":
    """Deviation over seeds at each strength, in points; None if some have but one seed."""
    groups = [search[strength] for strength in sorted(search) if strength > 0]
    if any(len(group) < 2 for group in groups):
        return None
    accuracies = [[100 * record.average_accuracy for record in group] for group in groups]
    return np.array([np.std(values, ddof=1) for values in accuracies])


def _draw_interval(axes: Axes, row: int, interval: Interval, style: Style) -> None:
    """Draw the strengths that are nearly as good as the best, with arrows where they go on."""
    low, high = 10.0**interval.low, 10.0**interval.high
    axes.plot([low, 1, high], [row] * 3, markevery=[1], **line_looks(style))
    for end, goes_on, arrow in ((low, interval.open_low, "◀"), (high, interval.open_high, "▶")):
        axes.annotate(
            arrow if goes_on else "|",
            (end, row),
            color=style.colour,
            fontsize=FONT_POINTS,
            horizontalalignment="center",
            verticalalignment="center",
        )
    axes.text(
        1.01,
        row,
        str(interval),
        transform=axes.get_yaxis_transform(),
        fontsize=FONT_POINTS,
        verticalalignment="center",
    )


class Drawing(NamedTuple):
    """A kind of figure."""

    name: str  # part of the names of its files
    draw: Callable[[Experiment], Figure | None]  # None if there is nothing to show
    title: str
    caption: str  # what is to be seen


DRAWINGS = (
    Drawing(
        "accuracy",
        accuracy_curves,
        "Accuracy as tasks are learned",
        "Mean accuracy on the test images of the tasks seen so far, with the chosen λ. Bands are "
        "one sample standard deviation over seeds. Heavy lines are this package's methods; joint "
        "training, on all tasks at once, is an upper bound. An arrow marks methods that leave the "
        "figure below.",
    ),
    Drawing(
        "strength",
        strength_curves,
        "Sensitivity to λ",
        "What is lost on held-out training images when λ is not the best one, each method compared "
        f"with its own best. Below, the interval around it in which at most {POINTS:g} points are "
        "lost, and its width in decades: linear in log λ between the values searched, ≥ and an "
        "arrow where the search ended sooner.",
    ),
    Drawing(
        "tasks",
        heat_maps,
        "Every task's own fate",
        "Accuracy on each task (columns) after learning each task (rows), with the chosen λ, mean "
        "over seeds; paler on tasks not yet seen.",
    ),
)
