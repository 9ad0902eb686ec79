"""The figures of an experiment, by name.

Made for print: as wide as a page, in colours that colour-blind readers can tell apart, and readable
without colour. A figure that has nothing to show (yet) is None, because reports are also made from
half a sweep.
"""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.suite.bars import cost_bars, forgetting_bars
from benchmarks.suite.curves import accuracy_curves, heat_maps, spectra
from benchmarks.suite.protocol import Experiment
from benchmarks.suite.strength_figure import strength_curves
from benchmarks.suite.widths import POINTS, Width, width_within

__all__ = [
    "DRAWINGS",
    "Drawing",
    "Width",
    "accuracy_curves",
    "cost_bars",
    "forgetting_bars",
    "heat_maps",
    "spectra",
    "strength_curves",
    "width_within",
]


class Drawing(NamedTuple):
    """A kind of figure.

    Attributes:
        name: Part of the names of its files.
        draw: Makes the figure; None if there is nothing to show.
        title: Its title.
        caption: What is to be seen.
    """

    name: str
    draw: Callable[[Experiment], Figure | None]
    title: str
    caption: str


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
        "forgetting",
        forgetting_bars,
        "Accuracy and forgetting",
        "Average accuracy over all tasks at the end, and the mean drop from the best accuracy that "
        "a task ever had, with the chosen λ; ± the sample standard deviation over seeds. Hatched: "
        "this package's methods; dotted: the upper bound.",
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
    Drawing(
        "cost",
        cost_bars,
        "Cost",
        "Time of training, time of what is done at the ends of tasks, and memory for what is kept "
        "from one task to the next, with the chosen λ; ± the sample standard deviation over seeds.",
    ),
    Drawing(
        "spectra",
        spectra,
        "Spectra",
        "Eigenvalues of the blocks of the snapshot after the last task, at some ranks.",
    ),
)
