"""Figures of accuracy: as tasks are learned, and every task's own fate."""

from collections.abc import Mapping, Sequence
from math import ceil, floor
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from benchmarks.methods import is_own
from benchmarks.metrics import accuracy_on_seen_tasks
from benchmarks.report.style import (
    band_looks,
    line_looks,
    new_figure,
    percent_tick,
    styles_of,
    task_ticks,
    tidy,
)
from benchmarks.results import Record, group_by_label
from benchmarks.suite.outcome import Experiment

Array = npt.NDArray[np.float64]
Groups = Mapping[str, Sequence[Record]]

CURVES_INCHES = 3.2
LEGEND_ROW_INCHES = 0.17
# Up to two rows of heat maps are as large as they can be; many are smaller.
LARGE_PER_ROW, LARGE_INCHES = 4, 2.1
SMALL_PER_ROW, SMALL_INCHES = 5, 1.55
COLUMN_LABEL_INCHES = 0.3  # below the lowest heat maps
MOST_IN_AXES = 8  # methods whose legend has room next to the curves
MOST_IN_LINE = 16  # characters above a heat map
NOT_YET_SEEN_OPACITY = 0.15
HEADROOM = 0.04
# Lines that would take half the height for themselves are cut off, if they are this few.
CUT_FRACTION = 1 / 3
WORTH_CUTTING = 0.5


def draw(records: Sequence[Record], title: str = "") -> Figure:
    """Draw the results of a benchmark: curves above, heat maps below."""
    lengths = {len(record.accuracy_matrix) for record in records}
    if len(lengths) != 1:
        raise ValueError(
            f"records: got {len(records)} with {sorted(lengths)} tasks, "
            "expected at least one record and the same number of tasks in all"
        )
    groups = group_by_label(records)
    heights = [CURVES_INCHES, _grid(len(groups))[2]]
    figure = new_figure(sum(heights))
    figure.suptitle(title)
    curves, maps = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = curves.subplots()
    _draw_curves(axes, groups)
    looks: dict[str, Any] = {"frameon": False, "fontsize": "small", "handlelength": 3.5}
    if len(groups) <= MOST_IN_AXES:
        axes.legend(**looks)
    else:
        curves.legend(loc="outside right center", **looks)
    _draw_heat_maps(maps, groups)
    return figure


def accuracy_curves(experiment: Experiment) -> Figure | None:
    """Draw accuracy on the tasks seen so far against the number of tasks learned.

    The legend names methods in the order in which their lines end. Methods that are far worse than
    all others leave the figure at the bottom, so that the others can be told apart.
    """
    ends = {
        label: float(_curves(group)[:, -1].mean()) for label, group in experiment.tested.items()
    }
    groups = {label: experiment.tested[label] for label in sorted(ends, key=lambda one: -ends[one])}
    if not groups:
        return None
    figure = new_figure(max(CURVES_INCHES, LEGEND_ROW_INCHES * len(groups)))
    axes = figure.subplots()
    _draw_curves(axes, groups)
    bottom, top = _accuracy_range(groups)
    axes.set_ylim(bottom, top)
    legend = figure.legend(loc="outside right center", frameon=False, handlelength=4, fontsize=7)
    for text, label in zip(legend.get_texts(), groups, strict=True):
        text.set_fontweight("bold" if is_own(label) else "normal")
        if ends[label] < bottom:
            text.set_text(f"{label} ({100 * ends[label]:.1f}%) ↓")
    return figure


def _curves(group: Sequence[Record]) -> Array:
    """Accuracies on tasks seen so far, ``[seeds, T]``; of joint training, on all tasks."""
    curves = np.array([accuracy_on_seen_tasks(record.accuracy_matrix) for record in group])
    return curves[:, -1:].repeat(curves.shape[1], 1) if group[0].trained_jointly else curves


def _draw_curves(axes: Axes, groups: Groups) -> None:
    """Draw means over seeds with bands of one sample standard deviation, joint training a level."""
    styles = styles_of(groups)
    tasks = 1
    for label, group in groups.items():
        style, curves = styles[label], _curves(group)
        tasks = curves.shape[1]
        places = np.arange(1.0, tasks + 1)
        if group[0].trained_jointly:
            places, curves = np.array([0.5, tasks + 0.5]), curves[:, [0, -1]]
        mean = curves.mean(axis=0)
        axes.plot(places, mean, label=label, **line_looks(style))
        if len(curves) > 1:
            deviation = curves.std(axis=0, ddof=1)
            axes.fill_between(places, mean - deviation, mean + deviation, **band_looks(style))
    axes.set_xlabel("number of tasks learned")
    axes.set_ylabel("average accuracy on tasks seen")
    axes.set_xlim(0.5, tasks + 0.5)
    task_ticks(axes.xaxis, most=20)
    axes.yaxis.set_major_formatter(percent_tick)
    tidy(axes)


def _accuracy_range(groups: Groups) -> tuple[float, float]:
    """The range of an axis, without a few methods that would take most of it for themselves."""
    means = [_curves(group).mean(axis=0) for group in groups.values()]
    lowest = sorted(float(mean.min()) for mean in means)
    highest = max(float(mean.max()) for mean in means)
    spans = [highest - low for low in lowest]
    most = int(len(lowest) * CUT_FRACTION)
    cut = next(
        (number for number in range(1, most + 1) if spans[number] <= WORTH_CUTTING * spans[0]), 0
    )
    margin = HEADROOM * max(spans[cut], 0.01)
    return lowest[cut] - margin, highest + margin


def heat_maps(experiment: Experiment) -> Figure | None:
    """Draw each method's accuracies on all tasks after each task; None if nothing was tested."""
    if not experiment.tested:
        return None
    figure = new_figure(_grid(len(experiment.tested))[2] + COLUMN_LABEL_INCHES)
    _draw_heat_maps(figure, experiment.tested)
    return figure


def _grid(methods: int) -> tuple[int, int, float]:
    """Rows and columns of so many heat maps, and the height of all."""
    large = methods <= 2 * LARGE_PER_ROW
    rows = ceil(methods / (LARGE_PER_ROW if large else SMALL_PER_ROW))
    columns = LARGE_PER_ROW if rows == 1 else ceil(methods / rows)
    return rows, columns, rows * (LARGE_INCHES if large else SMALL_INCHES)


def _draw_heat_maps(panel: Figure | SubFigure, groups: Groups) -> None:
    """Draw accuracy matrices in rows, on one scale that spans what was measured on seen tasks."""
    matrices = {
        label: np.mean([record.accuracy_matrix for record in group], axis=0)
        for label, group in groups.items()
    }
    seen = {label: _seen(group[0]) for label, group in groups.items()}
    worst = min(float(matrix[seen[label]].min()) for label, matrix in matrices.items())
    lowest = floor(10 * min(worst, 0.99)) / 10
    rows, columns, _ = _grid(len(groups))
    grid = panel.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    cells = list(grid.flatten())
    images = [
        _draw_heat_map(axes, label, matrix, seen[label], lowest)
        for axes, (label, matrix) in zip(cells, matrices.items(), strict=False)
    ]
    for axes in cells[len(images) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("after task", fontsize="small")
    # The lowest map of each column: the last row need not be full.
    for axes in cells[: len(images)][-columns:]:
        axes.set_xlabel("accuracy on task", fontsize="small")
        axes.tick_params(labelbottom=True)
    panel.colorbar(
        images[0],
        ax=cells[: len(images)],
        label="accuracy\n(paler: not yet seen)",
        format=percent_tick,
        aspect=20 * rows,
        extend="min" if min(float(matrix.min()) for matrix in matrices.values()) < lowest else None,
    ).ax.yaxis.label.set_fontsize("small")


def _seen(record: Record) -> npt.NDArray[np.bool_]:
    """Which tasks (columns) had been seen after which (rows), ``[T, T]``."""
    tasks = len(record.accuracy_matrix)
    everything = np.ones((tasks, tasks), dtype=bool)
    return everything if record.trained_jointly else np.tril(everything)


def _draw_heat_map(
    axes: Axes, label: str, matrix: Array, seen: npt.NDArray[np.bool_], lowest: float
) -> AxesImage:
    """Draw one accuracy matrix ``[T, T]``, paler on tasks not yet seen."""
    tasks = len(matrix)
    extent = (0.5, tasks + 0.5, tasks + 0.5, 0.5)  # count tasks from 1
    looks: dict[str, Any] = {"cmap": "viridis", "vmin": lowest, "vmax": 1.0, "extent": extent}
    axes.imshow(np.ma.masked_array(matrix, seen), alpha=NOT_YET_SEEN_OPACITY, **looks)
    image = axes.imshow(np.ma.masked_array(matrix, ~seen), **looks)
    # In greyscale the palest and the highest accuracies are close, so a line parts them.
    if not seen.all():
        edges = np.arange(tasks + 1) + 0.5
        axes.plot(np.repeat(edges[1:], 2)[:-1], np.repeat(edges[:-1], 2)[1:], "k", linewidth=0.6)
    axes.set_title(
        _in_lines(label),
        fontsize="small" if len(label) <= MOST_IN_LINE else "x-small",
        fontweight="bold" if is_own(label) else "normal",
    )
    axes.tick_params(labelsize="small")
    for axis in (axes.xaxis, axes.yaxis):
        task_ticks(axis, most=5)
    return image


def _in_lines(label: str) -> str:
    """Break a label that is too long for one line above a heat map."""
    if len(label) <= MOST_IN_LINE:
        return label
    if " + " in label:
        return label.replace(" + ", "\n+ ")
    first, dash, second = label.rpartition("-")
    return f"{first}{dash}\n{second}" if first else label
