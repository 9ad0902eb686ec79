"""The figures that show accuracies task by task, and the eigenvalues of a snapshot."""

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.metrics import accuracy_on_seen_tasks
from benchmarks.plots import (
    CURVES_INCHES,
    DOTS_PER_INCH,
    OTHER_STYLES,
    WIDTH_INCHES,
    draw_curves,
    draw_heat_maps,
    heat_maps_inches,
    is_own,
    line_looks,
    styles_of,
    tidy,
)
from benchmarks.records import Record
from benchmarks.suite.labels import (
    FONT_POINTS,
    LINE_SPACING,
    POINTS_PER_INCH,
    LineLabel,
    label_lines,
)
from benchmarks.suite.protocol import Experiment

MARGIN_INCHES = 0.7  # of a panel of curves: tick labels and the axis label below
COLUMN_LABEL_INCHES = 0.3  # below the lowest heat maps
HEADROOM = 0.04
# Lines that would take half the height for themselves are cut off, if they are this few.
CUT_FRACTION = 1 / 3
WORTH_CUTTING = 0.5
EIGENVALUE_DECADES = 12
MARKERS = 10  # on the line of a spectrum, about
SPECTRA_INCHES = 2.8


def new_figure(height: float, width: float = WIDTH_INCHES) -> Figure:
    """A figure that belongs to no window."""
    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def tested_records(experiment: Experiment) -> dict[str, Sequence[Record]]:
    """The records with each method's chosen strength, of methods that were tested."""
    return {result.label: result.tested for result in experiment.results if result.tested}


def accuracy_curves(experiment: Experiment) -> Figure | None:
    """Draw accuracy on the tasks seen so far against the number of tasks learned.

    Means over seeds with the chosen strength, in bands of one sample standard deviation. Joint
    training is a level. Lines are named where they end. Methods that are far worse than all others
    leave the figure at the bottom, so that the others can be told apart.

    Args:
        experiment: Records sorted by the protocol.

    Returns:
        The figure; None if nothing was tested.
    """
    groups = tested_records(experiment)
    if not groups:
        return None
    height = max(CURVES_INCHES, MARGIN_INCHES + len(groups) * _label_inches())
    figure = new_figure(height)
    axes = figure.subplots()
    draw_curves(axes, groups)
    bottom, top = _accuracy_range(groups)
    axes.set_ylim(bottom, top)
    ends = {label: float(np.mean(_curves(group)[:, -1])) for label, group in groups.items()}
    # The labels' threads begin at the right border, and so should the lines end there.
    axes.set_xlim(0.7, _curves(next(iter(groups.values()))).shape[1] + 0.15)
    styles = styles_of(groups)
    label_lines(
        axes,
        [
            LineLabel(
                label if end >= bottom else f"{label} ({100 * end:.1f}%) ↓",
                styles[label],
                (max(end, bottom) - bottom) / (top - bottom),
                is_own(label),
            )
            for label, end in ends.items()
        ],
        height - MARGIN_INCHES,
    )
    return figure


def _label_inches() -> float:
    return FONT_POINTS * LINE_SPACING / POINTS_PER_INCH


def _curves(group: Sequence[Record]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Accuracies on tasks seen so far, ``[seeds, T]``; of joint training, on all tasks."""
    curves = np.array([accuracy_on_seen_tasks(record.accuracy_matrix) for record in group])
    return curves[:, -1:].repeat(curves.shape[1], 1) if group[0].trained_jointly else curves


def _accuracy_range(groups: Mapping[str, Sequence[Record]]) -> tuple[float, float]:
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
    """Draw each method's accuracies on all tasks after each task, with the chosen strength.

    Args:
        experiment: Records sorted by the protocol.

    Returns:
        The figure; None if nothing was tested.
    """
    groups = tested_records(experiment)
    if not groups:
        return None
    figure = new_figure(heat_maps_inches(len(groups)) + COLUMN_LABEL_INCHES)
    draw_heat_maps(figure, groups)
    return figure


def spectra(experiment: Experiment) -> Figure | None:
    """Draw the eigenvalues of a snapshot against their rank, a line for each block.

    Those of the first of this package's methods that has any. Eigenvalues of zero have no place on
    a logarithmic axis; the legend says from which rank on there are only those.

    Args:
        experiment: Records sorted by the protocol.

    Returns:
        The figure; None if no record has spectra.
    """
    record = _record_with_spectra(experiment)
    if record is None:
        return None
    figure = new_figure(SPECTRA_INCHES + _label_inches() * len(record.spectra))
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    largest = 0.0
    for number, (block, spectrum) in enumerate(record.spectra.items()):
        largest = max(largest, *spectrum["eigenvalues"], 0.0)
        _draw_spectrum(axes, block, spectrum, number)
    _show_upper_decades(axes, largest)
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue")
    tidy(axes)
    figure.legend(
        loc="outside lower center",
        frameon=False,
        fontsize="x-small",
        handlelength=3.5,
        title=f"{record.label}, seed {record.seed}",
        title_fontsize="small",
    )
    return figure


def _record_with_spectra(experiment: Experiment) -> Record | None:
    """The first record of an own method that has eigenvalues, tests before the search."""
    own = [result for result in experiment.results if is_own(result.label)]
    for result in own:
        for record in (*result.tested, *result.at_default, *chain(*result.search.values())):
            if any(len(one["eigenvalues"]) > 0 for one in record.spectra.values()):
                return record
    return None


def _draw_spectrum(
    axes: Axes, block: str, spectrum: Mapping[str, Sequence[float]], number: int
) -> None:
    """Draw the positive eigenvalues of one block."""
    style = OTHER_STYLES[number % len(OTHER_STYLES)]
    pairs = list(zip(spectrum["ranks"], spectrum["eigenvalues"], strict=True))
    positive = [(rank, value) for rank, value in pairs if value > 0]
    zero_from = min((rank for rank, value in pairs if value <= 0), default=None)
    name = block + "".join(
        f" (dimension {size:,.0f})" for size in spectrum.get("dimension", [])[:1]
    )
    if zero_from is not None:
        name += f", zero from rank {zero_from:,.0f}"
    looks = line_looks(style) | {"markevery": max(len(positive) // MARKERS, 1)}
    axes.plot(*np.reshape(positive, (-1, 2)).T, label=name, **looks)


def _show_upper_decades(axes: Axes, largest: float) -> None:
    """Leave out what is only rounding: eigenvalues far below the largest."""
    if largest <= 0:
        return
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, largest * 10.0**-EIGENVALUE_DECADES), top)
