"""The table of an experiment, for terminals, for Markdown and for the page."""

import re
from collections.abc import Callable, Iterable
from html import escape as escape_html
from typing import NamedTuple

from rich.console import Group
from rich.markup import escape
from rich.text import Text

from benchmarks.report import ABSENT, empty_table
from benchmarks.suite.protocol import Experiment
from benchmarks.suite.setting import setting_lines
from benchmarks.suite.summary import Statistic, SummaryRow, summary_rows
from benchmarks.suite.widths import POINTS

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
    "Training is with the penalty, estimation what is done at the ends of tasks; search: runs, and "
    "their time one after another.",
)
ABBREVIATIONS = "def.: default; est.: estimation; pen.: penalty, its value and gradient."


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        heading: Its heading in a terminal, in lines.
        cell: Makes the text of a cell.
        in_terminal: Whether it is important enough for a terminal, where space is scarce.
        of_accuracy: Whether the best method's cell is bold.
        full: Its heading elsewhere, where that is not the same in one line.
    """

    heading: tuple[str, ...]
    cell: Callable[[SummaryRow], str]
    in_terminal: bool = True
    of_accuracy: bool = False
    full: str = ""

    @property
    def title(self) -> str:
        """The heading in one line."""
        return self.full or " ".join(self.heading)


def _value(number: float | None, decimals: int) -> str:
    return ABSENT if number is None else f"{number:.{decimals}f}"


def _mean(statistic: Statistic | None, decimals: int, factor: float = 1.0) -> str:
    return ABSENT if statistic is None else f"{factor * statistic.mean:.{decimals}f}"


def _percent(statistic: Statistic | None, decimals: int) -> str:
    """Mean and deviation in percent."""
    text = _mean(statistic, decimals, 100)
    if statistic is None or statistic.deviation is None:
        return text
    return f"{text} ± {100 * statistic.deviation:.{decimals}f}"


def _strength(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")


COLUMNS = (
    Column(("chosen", "λ"), lambda row: _strength(row.strength) + (EDGE if row.at_edge else "")),
    Column(
        ("accuracy", "[%]"),
        lambda row: _percent(row.accuracy, 2) + DIVERGED * row.diverged,
        of_accuracy=True,
    ),
    Column(("n",), lambda row: str(row.accuracy.seeds) if row.accuracy else ABSENT),
    Column(("def.", "λ"), lambda row: _strength(row.default), full="default λ"),
    Column(
        ("accuracy", "at def. λ", "[%]"),
        lambda row: _percent(row.accuracy_at_default, 1),
        full="accuracy at default λ [%]",
    ),
    Column(("forgetting", "[points]"), lambda row: _percent(row.forgetting, 1)),
    Column(
        ("backward", "transfer", "[points]"),
        lambda row: _percent(row.backward_transfer, 1),
        in_terminal=False,
    ),
    Column(("train", "[s]"), lambda row: _mean(row.training_seconds, 0), full="training [s]"),
    Column(
        ("training", "[× naive]"), lambda row: _value(row.relative_training, 2), in_terminal=False
    ),
    Column(("est.", "[s]"), lambda row: _mean(row.estimation_seconds, 1), full="estimation [s]"),
    Column(
        ("pen.", "[ms/", "step]"),
        lambda row: _mean(row.penalty_ms_per_step, 2),
        full="penalty [ms/step]",
    ),
    Column(("state", "[MiB]"), lambda row: _mean(row.state_bytes, 1, 1 / MEBIBYTE)),
    Column(("search", "runs"), lambda row: _value(row.search_runs, 0), in_terminal=False),
    Column(("search", "[s]"), lambda row: _value(row.search_seconds, 0), in_terminal=False),
    Column(
        ("width", "[dec.]"),
        lambda row: str(row.width) if row.width else ABSENT,
        full="width [decades]",
    ),
)
# A terminal has room for one column where other tables have two.
TERMINAL_SEARCH = Column(("search", "runs:s"), lambda row: _search(row))


def _search(row: SummaryRow) -> str:
    """Cost of the search, in little space."""
    return ABSENT if row.search_runs is None else f"{row.search_runs}:{row.search_seconds:.0f}"


def terminal_table(experiment: Experiment) -> Group:
    """Show an experiment in a terminal.

    Args:
        experiment: Records sorted by the protocol; any of them may be missing.

    Returns:
        Something for ``rich`` to print in 110 columns: the setting and the table.
    """
    columns = [column for column in COLUMNS if column.in_terminal]
    columns.insert(-1, TERMINAL_SEARCH)
    table = empty_table("")
    table.title = None
    table.padding = (0, 0)  # the lines between columns, which are blank, are space enough
    tallest = max(len(column.heading) for column in columns)
    table.add_column("\n" * (tallest - 1) + "method", overflow="fold", min_width=8)
    for column in columns:
        heading = "\n" * (tallest - len(column.heading)) + "\n".join(column.heading)
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for row in summary_rows(experiment):
        name = escape(row.label)
        cells = [
            f"[bold]{column.cell(row)}[/bold]" if _bold(column, row) else column.cell(row)
            for column in columns
        ]
        table.add_row(f"[bold]{name}[/bold]" if row.own else name, *cells)
    return Group(
        Text(experiment.scenario, style="bold"),
        *(Text(line) for line in setting_lines(experiment)),
        "",
        table,
        "",
    )


def terminal_notes() -> Group:
    """What the tables of any number of experiments mean, to print once below them."""
    return Group(*(Text(note, style="dim") for note in (*NOTES, ABBREVIATIONS)))


def _bold(column: Column, row: SummaryRow) -> bool:
    return column.of_accuracy and row.best


class Cell(NamedTuple):
    """A cell of a table: what it says, and whether that is in bold."""

    text: str
    bold: bool


def headings() -> list[str]:
    """The headings of the full table."""
    return ["method", *(column.title for column in COLUMNS)]


def cells(row: SummaryRow) -> list[Cell]:
    """The cells of one row of the full table."""
    name = Cell(row.label, row.own)
    return [name, *(Cell(column.cell(row), _bold(column, row)) for column in COLUMNS)]


def markdown_table(experiment: Experiment) -> str:
    """Write an experiment in Markdown.

    Args:
        experiment: Records sorted by the protocol; any of them may be missing.

    Returns:
        The setting, the table and notes, without a heading.
    """
    rows = summary_rows(experiment)
    parts = [
        "\n".join(f"- {markdown_escape(line)}" for line in setting_lines(experiment)),
        "\n".join(
            [
                _markdown_row(markdown_escape(heading) for heading in headings()),
                _markdown_row(["---", *("---:" for _ in COLUMNS)]),
                *(_markdown_row(map(_markdown_cell, cells(row))) for row in rows),
            ]
        ),
        "\n\n".join(markdown_escape(note) for note in NOTES),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _markdown_cell(cell: Cell) -> str:
    text = markdown_escape(cell.text)
    return f"**{text}**" if cell.bold else text


def markdown_escape(text: str) -> str:
    """Keep text from being taken for Markdown or HTML, and in one line."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape_html(one_line, quote=False))
