"""Draw the README's picture, from what `make bench` measured: `python docs/pictures/accuracy.py`.

The measurements are in `permuted_mnist.json` next to this file. With the name of another file that
`make bench` has written, such as `results/permuted_mnist.json`, they are replaced first. Then the
numbers of the table in `docs/results.md` are to be changed as well; a test compares them.
"""

import shutil
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.metrics import accuracy_on_seen_tasks  # noqa: E402
from benchmarks.report.style import STYLES, band_looks, line_looks, tidy  # noqa: E402
from benchmarks.results import group_by_label, read_records  # noqa: E402

MEASURED = Path(__file__).with_name("permuted_mnist.json")
NAMES = {"rotated-ewc": "rotate_ewc", "ewc": "EWC, best λ", "naive": "no protection"}


def draw() -> None:
    """Draw accuracy on the tasks seen so far, mean and standard deviation over seeds."""
    groups = group_by_label(read_records(MEASURED)[1])
    mpl.rcParams.update({"figure.constrained_layout.use": True, "font.size": 9})
    figure, axes = plt.subplots(figsize=(7, 3))
    joint = 100 * float(np.mean([record.average_accuracy for record in groups["joint"]]))
    tasks = len(groups["joint"][0].accuracy_matrix)
    axes.plot([0.7, tasks], [joint] * 2, color="black", linestyle=(0, (1, 3)), linewidth=1.5)
    axes.annotate("all tasks at once", (1, joint), (0, 4), textcoords="offset points")
    for label, name in NAMES.items():
        curves = 100 * np.array([accuracy_on_seen_tasks(r.accuracy_matrix) for r in groups[label]])
        mean, spread = curves.mean(axis=0), curves.std(axis=0, ddof=1)
        places, style = np.arange(1, tasks + 1), STYLES[label]
        axes.plot(places, mean, **line_looks(style))
        axes.fill_between(places, mean - spread, mean + spread, **band_looks(style))
        axes.annotate(name, (tasks, mean[-1]), (8, -4), textcoords="offset points")
    axes.set_xlim(0.7, tasks + 2.2)  # room for the names
    axes.set_ylim(45, 101)
    axes.set_xticks(range(1, tasks + 1))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("accuracy on all of them [%]")
    tidy(axes)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    if sys.argv[1:]:
        shutil.copy(sys.argv[1], MEASURED)
    draw()
