"""What is shown of methods on a stream of tasks: a table, and the new against the forgotten."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.command import replace_file
from benchmarks.fine_tuning.protocol import Record, TuningOptions, Work, groups_of, present


def present_stream(
    options: TuningOptions, name: str, work: Work, *, title: str, **told: Any
) -> None:
    """Do the runs of a stream, print a table and draw a figure, both with everything in it.

    Args:
        options: Those of the command.
        name: That of the file of records and of the figure.
        work: Does a run.
        title: Of the table.
        told: What a run depends on besides the options.
    """
    from benchmarks.fine_tuning.stream import scores

    def figures(record: Record) -> dict[str, float]:
        return scores(record["matrix"])

    columns = {
        "accuracy [%]": ("accuracy", 100, 1),
        "forgetting": ("forgetting", 100, 1),
        "new tasks [%]": ("new", 100, 1),
        "step [s]": ("step_seconds", 1, 3),
        "end [s]": ("task_end_seconds", 1, 1),
        "peak [MiB]": ("peak_bytes", 2**-20, 0),
    }
    found = present(
        options, name, work, figures, columns, title=title, of_joint=["accuracy"], **told
    )
    print(f"Wrote {_draw(found, options.output / f'{name}.png')}.")


def _draw(records: Sequence[Record], path: Path) -> Path:
    """Draw accuracy on new tasks against forgetting; the best corner is the upper left."""
    from benchmarks.fine_tuning.stream import scores
    from benchmarks.report.style import image_of, line_looks, new_figure, styles_of, tidy

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
