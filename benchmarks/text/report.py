"""What the runs on texts reached: rows of a table, and new tasks drawn against forgetting."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from benchmarks.files import replace_file
from benchmarks.report.style import image_of, line_looks, new_figure, styles_of, tidy
from benchmarks.report.tables import MEBIBYTE
from benchmarks.text.records import Record
from benchmarks.text.stream import scores


def rows_of(records: Iterable[Record]) -> Iterator[tuple[str, ...]]:
    """A row for each method and strength, with means and sample standard deviations over seeds."""
    for (name, _), group in groups_of(records).items():
        reached = [scores(record["matrix"]) for record in group]
        average = spread(one["accuracy"] for one in reached)
        row = (name, strength_of(group), average)
        if name == "joint":
            yield (*row, "–", "–", "–", "–", "–")
            continue
        yield (
            *row,
            spread(one["forgetting"] for one in reached),
            spread(one["new"] for one in reached),
            f"{fmean(record['step_seconds'] for record in group):.3f}",
            f"{fmean(record['task_end_seconds'] for record in group):.1f}",
            f"{fmean(record['peak_bytes'] for record in group) / MEBIBYTE:.0f}",
        )


def strength_of(group: Sequence[Record]) -> str:
    """Tell the strength of runs; of one that was found, the median over the seeds."""
    strength = group[0]["run"]["strength"]
    if strength is not None:
        return f"{strength:g}"
    found = [record["strength"] for record in group]
    return f"auto ({median(found):.3g})" if None not in found else "–"


def spread(values: Iterable[float], unit: float = 100, digits: int = 1) -> str:
    """Mean ± sample standard deviation; of fractions in percent, unless told otherwise."""
    found = [unit * value for value in values]
    mean = f"{fmean(found):.{digits}f}"
    return mean + (f" ± {stdev(found):.{digits}f}" if len(found) > 1 else "")


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


def groups_of(records: Iterable[Record]) -> dict[tuple[str, float | None], list[Record]]:
    """The records of each method and strength."""
    groups: dict[tuple[str, float | None], list[Record]] = {}
    for record in records:
        run = record["run"]
        groups.setdefault((run["method"], run["strength"]), []).append(record)
    return groups
