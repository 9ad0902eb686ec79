"""What the runs on a stream of texts reached: new tasks drawn against forgetting."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.command import replace_file
from benchmarks.report.style import image_of, line_looks, new_figure, styles_of, tidy
from benchmarks.text.protocol import Record, groups_of
from benchmarks.text.stream import scores


def draw(records: Sequence[Record], path: Path) -> Path:
    """Draw accuracy on new tasks against forgetting; the best corner is the upper left."""
    groups = {key: group for key, group in groups_of(records).items() if key[0] != "joint"}
    labels = {key: key[0] + (f", λ = {key[1]:g}" if key[1] is not None else "") for key in groups}
    styles = styles_of(labels.values())
    figure = new_figure(3.2)
    axes = figure.subplots()
    for key, group in groups.items():
        reached = [scores(record["matrix"]) for record in group]
        x = [100 * one["forgetting"] for one in reached]
        y = [100 * one["new"] for one in reached]
        looks = {**line_looks(styles[labels[key]]), "linestyle": "none"}
        errors = [stdev(values) if len(values) > 1 else 0.0 for values in (x, y)]
        axes.errorbar(
            fmean(x),
            fmean(y),
            xerr=errors[0],
            yerr=errors[1],
            elinewidth=0.6,
            label=labels[key],
            **looks,
        )
    axes.set_xlabel("forgetting [points]")
    axes.set_ylabel("new tasks [%]")
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes)
    return replace_file(path, image_of(figure))
