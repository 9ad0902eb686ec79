"""The figure of a benchmark: accuracy as tasks are learned, and every task's own fate.

Made for print: it fits a page's width, and methods differ in line style and marker as well as in
colours that colour-blind readers can tell apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, cycle
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from benchmarks.metrics import accuracy_on_seen_tasks
from benchmarks.records import Record, group_by_label

Array = npt.NDArray[np.float64]

HEAT_MAPS_PER_ROW = 4
MOST_HEAT_MAPS_PER_ROW = 5
WIDTH_INCHES = 7.0
CURVES_INCHES = 3.2
HEAT_MAP_INCHES = 2.1
SMALL_HEAT_MAP_INCHES = 1.55
MOST_IN_LINE = 16  # characters above a heat map
NOT_YET_SEEN_OPACITY = 0.15
BAND_OPACITY = 0.2
DOTS_PER_INCH = 200


class Style(NamedTuple):
    """How a method's line looks."""

    colour: str
    line: str | tuple[int, tuple[int, ...]]
    marker: str
    filled: bool = True
    width: float = 1.1


OWN_WIDTH = 2.0

# Known methods look alike in every figure, whatever else is in it. Those of this package have heavy
# lines in colours of Okabe and Ito; the others are thin, some in colours of Tol's muted scheme.
STYLES = {
    "naive": Style("#E69F00", (0, (1, 1)), "v"),
    "ewc": Style("#56B4E9", (0, (5, 2)), "s"),
    "ewc-online": Style("#332288", (0, (5, 1, 1, 1)), "s", filled=False),
    "si": Style("#999933", (0, (3, 2)), "X"),
    "mas": Style("#777777", (0, (7, 1)), "<"),
    "lwf": Style("#661100", (0, (2, 1)), "*"),
    "r-ewc": Style("#882255", (0, (4, 1, 1, 1, 1, 1)), "p", filled=False),
    "kronecker-laplace": Style("#117733", (0, (9, 2)), "h", filled=False),
    "diagonal-ewc": Style("#44AA99", (0, (1, 2)), ">"),
    "rotated-ewc": Style("#D55E00", "-", "o", width=OWN_WIDTH),
    "rotated-ewc-separate": Style("#0072B2", (0, (6, 2, 1, 2)), "D", filled=False, width=OWN_WIDTH),
    "rotated-ewc-tangent": Style("#56B4E9", (0, (5, 1, 1, 1)), "D", width=OWN_WIDTH),
    "rotated-ewc-proximal": Style("#009E73", (0, (3, 1, 1, 1)), "^", width=OWN_WIDTH),
    "rotated-adam": Style("#CC79A7", (0, (8, 2)), "P", width=OWN_WIDTH),
    "joint": Style("#000000", (0, (1, 3)), "", width=1.5),
}
OTHER_STYLES = (
    Style("#009E73", (0, (3, 1, 1, 1, 1, 1)), "*"),
    Style("#CC79A7", (0, (5, 1)), "p", filled=False),
    Style("#999999", (0, (2, 2)), "X"),
    Style("#56B4E9", (0, (8, 3)), "<", filled=False),
    Style("#D55E00", (0, (1, 2, 3, 2)), ">", filled=False),
    Style("#0072B2", "-", "d"),
    Style("#000000", (0, (1, 1)), "D", filled=False),
    Style("#E69F00", (0, (6, 1, 1, 1)), "s"),
    Style("#332288", (0, (10, 2)), "v", filled=False),
    Style("#999933", (0, (4, 2)), "h"),
)


def method_of(label: str) -> str:
    """Name of the method in a label such as ``ewc[λ=3]`` or ``ewc + replay 500``."""
    return label.partition(" + ")[0].partition("[")[0].strip()


def is_own(label: str) -> bool:
    """Whether a label is that of one of this package's own methods."""
    return label.startswith("rotated-")


def styles_of(labels: Iterable[str]) -> dict[str, Style]:
    """Choose how methods look.

    Args:
        labels: Labels of all methods in a figure.

    Returns:
        For known methods the same in every figure. A method with replay has the colour and the
        marker of the same method without, the marker being hollow rather than filled or the other
        way round. Anything else takes the next of :data:`OTHER_STYLES`.
    """
    others = cycle(OTHER_STYLES)
    found: dict[str, Style] = {}
    for label in labels:
        style = STYLES.get(label)
        known = STYLES.get(method_of(label))
        if style is None and known is not None and " + " in label:
            style = known._replace(filled=not known.filled)
            style = None if style in found.values() else style
        found[label] = style or next(others)
    return found


def draw(records: Sequence[Record], title: str = "") -> Figure:
    """Draw the results of a benchmark.

    The upper panel shows, after each task, the mean accuracy over the tasks seen so far, with a
    band of one sample standard deviation where there are several seeds. Below is a heat map of each
    method's accuracy matrix, averaged over seeds, paler on tasks not yet seen. Joint training sees
    all tasks at once: a line above, and the same row throughout below.

    Args:
        records: Results of any methods and seeds, with the same number of tasks in all.
        title: Stands above the figure.

    Returns:
        A figure that belongs to no window; save it with ``savefig``.

    Raises:
        ValueError: If there is nothing to draw, or numbers of tasks differ.
    """
    lengths = {len(record.accuracy_matrix) for record in records}
    if len(lengths) != 1:
        raise ValueError(
            f"records: got {len(records)} with {sorted(lengths)} tasks, "
            "expected at least one record and the same number of tasks in all"
        )
    groups = group_by_label(records)
    heights = [CURVES_INCHES, heat_maps_inches(len(groups))]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title)
    curves, heat_maps = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = curves.subplots()
    draw_curves(axes, groups)
    axes.legend(frameon=False, fontsize="small", handlelength=3.5)
    draw_heat_maps(heat_maps, groups)
    return figure


def draw_curves(axes: Axes, groups: Mapping[str, Sequence[Record]]) -> None:
    """Draw accuracy on the tasks seen so far, a line per method and no legend.

    Args:
        axes: Where to draw.
        groups: Records of one method by label, with the same number of tasks in all.
    """
    styles = styles_of(groups)
    tasks = 1
    for label, group in groups.items():
        curves = np.array([accuracy_on_seen_tasks(record.accuracy_matrix) for record in group])
        tasks = curves.shape[1]
        if group[0].trained_jointly:
            _draw_level(axes, label, styles[label], curves[:, -1])
        else:
            _draw_curve(axes, label, styles[label], curves)
    axes.set_xlabel("number of tasks learned")
    axes.set_ylabel("average accuracy on tasks seen")
    axes.set_xlim(0.5, tasks + 0.5)
    axes.set_xticks(task_ticks(tasks, most=20))
    axes.yaxis.set_major_formatter(percent_tick)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """Take away from axes what is not needed, and add a pale grid."""
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def line_looks(style: Style) -> dict[str, Any]:
    """The looks of a line, as keyword arguments of Matplotlib."""
    return {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": style.width,
        "marker": style.marker,
        "markersize": 5 if style.width >= OWN_WIDTH else 4,
        "markerfacecolor": style.colour if style.filled else "white",
        "zorder": 2.5 if style.width >= OWN_WIDTH else 2.0,
    }


def _draw_curve(axes: Axes, label: str, style: Style, curves: Array) -> None:
    """Draw the mean of curves ``[seeds, T]``, and a band where there are several."""
    tasks = np.arange(1, curves.shape[1] + 1)
    mean = curves.mean(axis=0)
    axes.plot(tasks, mean, label=label, **line_looks(style))
    if len(curves) > 1:
        deviation = curves.std(axis=0, ddof=1)
        axes.fill_between(tasks, mean - deviation, mean + deviation, **band_looks(style))


def band_looks(style: Style) -> dict[str, Any]:
    """The looks of the band around a line, as keyword arguments of Matplotlib."""
    return {"color": style.colour, "alpha": BAND_OPACITY, "linewidth": 0}


def _draw_level(axes: Axes, label: str, style: Style, values: Array) -> None:
    """Draw the mean of values ``[seeds]`` across all tasks, and a band where there are several."""
    mean = float(values.mean())
    looks: dict[str, Any] = {"color": style.colour, "linestyle": style.line}
    axes.axhline(mean, linewidth=style.width, label=label, **looks)
    if len(values) > 1:
        deviation = float(values.std(ddof=1))
        axes.axhspan(mean - deviation, mean + deviation, **band_looks(style))


def heat_maps_inches(methods: int) -> float:
    """Height of a panel with the heat maps of so many methods."""
    small = _heat_maps_per_row(methods) == MOST_HEAT_MAPS_PER_ROW
    return _heat_map_rows(methods) * (SMALL_HEAT_MAP_INCHES if small else HEAT_MAP_INCHES)


def _heat_map_rows(methods: int) -> int:
    return ceil(methods / _heat_maps_per_row(methods))


def _heat_maps_per_row(methods: int) -> int:
    """Up to two rows of maps are as large as they can be; many maps are smaller."""
    return HEAT_MAPS_PER_ROW if methods <= 2 * HEAT_MAPS_PER_ROW else MOST_HEAT_MAPS_PER_ROW


def draw_heat_maps(panel: Figure | SubFigure, groups: Mapping[str, Sequence[Record]]) -> None:
    """Draw accuracy matrices in rows, on one scale that spans what was measured on seen tasks.

    Args:
        panel: Where to draw.
        groups: Records of one method by label.
    """
    rows = _heat_map_rows(len(groups))
    matrices = {
        label: np.mean([record.accuracy_matrix for record in group], axis=0)
        for label, group in groups.items()
    }
    seen = {label: _seen(group[0]) for label, group in groups.items()}
    worst = min(float(matrix[seen[label]].min()) for label, matrix in matrices.items())
    lowest = floor(10 * min(worst, 0.99)) / 10
    columns = HEAT_MAPS_PER_ROW if rows == 1 else ceil(len(groups) / rows)
    grid = panel.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    cells = grid.flatten()
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
        ax=list(cells[: len(images)]),
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
    ticks = task_ticks(tasks, most=5)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    return image


def _in_lines(label: str) -> str:
    """Break a label that is too long for one line above a heat map."""
    if len(label) <= MOST_IN_LINE:
        return label
    if " + " in label:
        return label.replace(" + ", "\n+ ")
    first, dash, second = label.rpartition("-")
    return f"{first}{dash}\n{second}" if first else label


def task_ticks(tasks: int, most: int) -> list[int]:
    """Choose round task numbers to label on an axis from 1 to the number of tasks.

    Args:
        tasks: Number of tasks.
        most: Largest number of labels.

    Returns:
        The multiples of the smallest of 1, 2, 5, 10, 20, ... of which there are few enough.
    """
    steps = (factor * 10**power for power in count() for factor in (1, 2, 5))
    step = next(step for step in steps if tasks // step <= most)
    return list(range(step, tasks + 1, step))


def percent_tick(fraction: float, position: float = 0) -> str:
    """Label of a tick, with no more decimals than it needs."""
    return f"{100 * fraction:.4g}%"
