"""Tables of results, for terminals and for the page."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.methods import is_own
from benchmarks.results import Record, group_by_label
from benchmarks.suite.outcome import (
    POINTS,
    Experiment,
    MethodResult,
    interval_within,
    mean_accuracy,
)

ABSENT = "–"
MEBIBYTE = 2**20
EDGE = "*"
DIVERGED = "†"
NOTES = (
    "Accuracies in percent, differences of accuracies in points, ± the sample standard deviation "
    "over n seeds. The highest accuracy, but for joint training's, is in bold, and so are the "
    "names of this package's methods.",
    f"{EDGE} the smallest or largest λ that was searched: a better one may lie beyond.",
    f"{DIVERGED} in at least one run the parameters became infinite.",
    f"Width: decades of λ in which at most {POINTS:g} points are lost; ≥ where the search ended "
    "sooner.",
    "Regret: points that the default λ loses on held-out images, to the best that was searched.",
    "Training is with the penalty, estimation what is done at the ends of tasks; search: runs, and "
    "their time one after another.",
)
# Options that are told elsewhere, or that the protocol varies.
NOT_SAID = frozenset({"scenario", "replay", "threads", "jobs", "device"})
MACHINE = {
    "processor": "processor",
    "cpu_count": "cores",
    "device": "device",
    "threads": "threads",
    "jobs": "parallel runs",
    "rotate_ewc": "rotate-ewc",
    "python": "Python",
    "torch": "PyTorch",
    "avalanche": "Avalanche",
}


def make_table(
    title: str | None,
    names: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    remarks: Sequence[str] = (),
) -> Table:
    """A table with few lines and little padding, its headings of one word a line at the bottom."""
    table = Table(
        title=None if title is None else escape(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    lines = [heading.split() for heading in (*names, *numbers, *remarks)]
    tallest = max(map(len, lines))
    for place, words in enumerate(lines):
        heading = escape("\n" * (tallest - len(words)) + "\n".join(words))
        if place < len(names):
            table.add_column(heading, overflow="fold", min_width=8)
        elif place < len(names) + len(numbers):
            table.add_column(heading, justify="right", no_wrap=True)
        else:
            table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def mean(values: Iterable[float | None], decimals: int = 2, factor: float = 1.0) -> str:
    """Mean of several seeds; a dash where there are none or one is missing."""
    everything = list(values)
    known = [factor * value for value in everything if value is not None]
    if not known or len(known) < len(everything):
        return ABSENT
    return f"{statistics.fmean(known):.{decimals}f}"


def percent(fractions: Iterable[float | None], decimals: int = 2, factor: float = 100.0) -> str:
    """Mean, and the sample standard deviation of two or more; in percent by default."""
    values = list(fractions)
    text = mean(values, decimals, factor)
    known = [factor * value for value in values if value is not None]
    if text == ABSENT or len(known) == 1:
        return text
    return f"{text} ± {statistics.stdev(known):.{decimals}f}"


CellMaker = Callable[[MethodResult, Experiment], str]


class Column(NamedTuple):
    """A column of the table of an experiment."""

    heading: str
    cell: CellMaker
    in_terminal: bool = True  # whether it is shown where space is scarce


def _mean(field: str, decimals: int, factor: float = 1.0) -> CellMaker:
    return lambda result, _: mean((getattr(r, field) for r in result.tested), decimals, factor)


def _points(field: str) -> CellMaker:
    return lambda result, _: percent((getattr(r, field) for r in result.tested), 1)


def _strength(value: float | str | None) -> str:
    if not isinstance(value, float):
        return value or ABSENT
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")


def _accuracy(result: MethodResult, _: Experiment) -> str:
    text = percent(record.average_accuracy for record in result.tested)
    return text + DIVERGED * any(record.diverged for record in result.tested)


def _at_default(result: MethodResult, _: Experiment) -> str:
    has_strength = result.default is not None
    return percent((r.average_accuracy for r in result.at_default if has_strength), 1)


def _relative_training(result: MethodResult, experiment: Experiment) -> str:
    naive = experiment.tested.get("naive")
    if not naive:
        return ABSENT
    seconds = statistics.fmean(record.training_seconds for record in naive)
    return mean((record.training_seconds for record in result.tested), factor=1 / seconds)


def _search_seconds(result: MethodResult, _: Experiment) -> str:
    total = sum(record.seconds for record in result.searched)
    return f"{total:.0f}" if result.searched else ABSENT


ACCURACY = Column("accuracy [%]", _accuracy)
FORGETTING = Column("forgetting [points]", _points("forgetting"))
TRANSFER = Column("backward transfer [points]", _points("backward_transfer"), in_terminal=False)
TRAINING = Column("training [s]", _mean("training_seconds", 0))
ESTIMATION = Column("estimation [s]", _mean("estimation_seconds", 1))
GIVEN_STRENGTH = (ACCURACY, FORGETTING, TRANSFER, TRAINING, ESTIMATION)
COLUMNS = (
    Column("chosen λ", lambda result, _: _strength(result.strength) + EDGE * result.at_edge),
    ACCURACY,
    Column("n", lambda result, _: str(len(result.tested) or ABSENT), in_terminal=False),
    Column("default λ", lambda result, _: _strength(result.default), in_terminal=False),
    Column("accuracy at default λ [%]", _at_default),
    Column("regret [points]", lambda result, _: mean([result.regret], 1, 100)),
    FORGETTING,
    TRANSFER,
    TRAINING,
    Column("training [× naive]", _relative_training, in_terminal=False),
    ESTIMATION,
    Column("state [MiB]", _mean("state_bytes", 1, 1 / MEBIBYTE)),
    Column("search runs", lambda result, _: str(len(result.searched) or ABSENT), in_terminal=False),
    Column("search [s]", _search_seconds, in_terminal=False),
    Column("width [decades]", lambda result, _: str(interval_within(result.search) or ABSENT)),
)


class Cell(NamedTuple):
    """A cell of a table: what it says, and whether that is in bold."""

    text: str
    bold: bool


def rows_of(experiment: Experiment, columns: Sequence[Column] = COLUMNS) -> list[list[Cell]]:
    """The rows of an experiment's table: the method's name, and a cell for each column."""
    accuracy = {
        result.label: mean_accuracy(result.tested)
        for result in experiment.results
        if result.tested and not result.jointly
    }
    highest = max(accuracy.values(), default=0.0)
    best = {label for label, value in accuracy.items() if 0.0 < value == highest}
    return [
        [
            Cell(result.label, is_own(result.label)),
            *(
                Cell(column.cell(result, experiment), column is ACCURACY and result.label in best)
                for column in columns
            ),
        ]
        for result in experiment.results
    ]


def results_table(records: Sequence[Record], title: str) -> Table:
    """Summarise records of any methods and seeds in a terminal, a row for each method."""
    results = [
        MethodResult(label, {}, group, [], [], None, None)
        for label, group in group_by_label(records).items()
    ]
    return _table(Experiment("", {}, results), GIVEN_STRENGTH, title)


def closing_lines(records: Sequence[Record]) -> list[str]:
    """Say in words what each method keeps, the best first, and how far that is from the optimum."""
    groups = group_by_label(records)
    means = {label: 100 * mean_accuracy(group) for label, group in groups.items()}
    bound = next((means[label] for label, g in groups.items() if g[0].trained_jointly), None)
    inner = [label for label in means if not groups[label][0].trained_jointly]
    ranked = sorted(inner, key=lambda label: -means[label])
    tasks = len(records[0].accuracy_matrix)
    lines = [f"After {tasks} task{'s' * (tasks > 1)}, one after another:"]
    for label in ranked:
        distance = ""
        if bound is not None:
            side = "below" if means[label] <= bound else "above"
            gap = abs(bound - means[label])
            distance = f", {gap:.1f} points {side} training on all tasks at once"
        lost = mean((record.forgetting for record in groups[label]), 1, 100)
        name = "plain training" if label == "naive" else label
        lines.append(f"  {name} keeps {means[label]:.1f} %{distance}; it forgets {lost} points.")
    if len(ranked) > 1:
        best = "plain training" if ranked[0] == "naive" else ranked[0]
        lines.append(f"What was learned is protected best by {best}.")
    return lines if ranked else []


def terminal_table(experiment: Experiment) -> Group:
    """Show an experiment in a terminal of 110 columns: the setting and the table."""
    columns = [column for column in COLUMNS if column.in_terminal]
    title = Text(experiment.scenario, style="bold")
    table = _table(experiment, columns, None)
    return Group(title, *map(Text, setting_lines(experiment)), "", table, "")


def _table(experiment: Experiment, columns: Sequence[Column], title: str | None) -> Table:
    rows = (
        [Text(cell.text, style="bold" * cell.bold) for cell in row]
        for row in rows_of(experiment, columns)
    )
    return make_table(title, ["method"], [column.heading for column in columns], rows)


def terminal_notes() -> Group:
    """What the tables of any number of experiments mean, to print once below them."""
    return Group(*(Text(note, style="dim") for note in NOTES))


def setting_lines(experiment: Experiment) -> list[str]:
    """Say options, seeds, machine and versions, and where they differ between the records."""
    records = experiment.records
    options = [
        f"{name.replace('_', ' ')} {_in_words(value)}"
        for name, value in experiment.setting.items()
        if value is not None
        and name not in NOT_SAID
        and (name != "increment" or experiment.scenario.startswith("split"))
    ]
    tested = {record.seed for record in records if not record.for_validation}
    searched = {record.seed for record in records if record.for_validation}
    lines = [
        f"Setting: {', '.join(options)}.",
        f"Seeds: {_in_words(sorted(tested)) or 'none yet'} on the test images; "
        f"{_in_words(sorted(searched)) or 'none'} in the search for λ on held-out training images.",
    ]
    if records:
        found = [{**record.versions, **record.configuration} for record in records]
        measured = (
            _one_or_several(name, [one.get(key, "unknown") for one in found])
            for key, name in MACHINE.items()
        )
        lines.append(f"Measured with: {', '.join(measured)}.")
    jobs = max((record.configuration.get("jobs") or 1 for record in records), default=1)
    if jobs > 1:
        lines.append(f"Times were measured while other runs went on, up to {jobs} at once.")
    return lines


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _one_or_several(name: str, values: Sequence[Any]) -> str:
    """Say a value, or that it differs between runs and what it can be."""
    distinct = sorted({str(value) for value in values})
    differs = f" (differs between runs: {' / '.join(distinct)})"
    return f"{name} {distinct[0]}" if len(distinct) == 1 else name + differs
