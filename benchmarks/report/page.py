"""``report``: what runs have reached, as tables, and as Markdown with figures next to it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from benchmarks.command import CommandError, make_console, make_folder, replace_file
from benchmarks.option_types import Folder
from benchmarks.report.figures import DRAWINGS, Drawing
from benchmarks.report.style import image_of
from benchmarks.report.tables import (
    COLUMNS,
    NOTES,
    Cell,
    rows_of,
    setting_lines,
    terminal_notes,
    terminal_table,
)
from benchmarks.results import load_all
from benchmarks.suite.outcome import Experiment, experiments

TITLE = "Continual learning with elastic weight consolidation in a rotated basis"
ABOUT = (
    "Each method's λ is the one with the highest mean accuracy on training images that are held "
    "out, from as many values as every other method's. Only then the test images are looked at."
)

Figures = Mapping[str, tuple[Drawing, Figure]]


@dataclass(frozen=True)
class Options:
    """Print tables of what the runs in some folders have reached, and draw it.

    Writes one page with all tables and figures, as Markdown with PNG files.

    Attributes:
        folders: Folders of results, with all folders in them.
        output: Where to write.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("results"),)
    output: Folder = Path("report")


def run(options: Options) -> int:
    """Present the results."""
    try:
        found = experiments(load_all(options.folders or (Path("results"),)))
    except ValueError as error:
        raise CommandError(str(error)) from error
    make_folder(options.output)
    make_console().print(*map(terminal_table, found), terminal_notes())
    for path in write_report(found, options.output):
        print(f"Wrote {path}")
    return 0


def write_report(found: Sequence[Experiment], folder: Path) -> list[Path]:
    """Write ``report.md``, and all figures that there are records for."""
    paragraphs, images = [f"# {TITLE}", ABOUT], {}
    names = unique_names([experiment.scenario for experiment in found])
    for name, experiment in zip(names, found, strict=True):
        figures = {
            f"{name}-{drawing.name}.png": (drawing, figure)
            for drawing in DRAWINGS
            if (figure := drawing.draw(experiment)) is not None
        }
        paragraphs += _section(experiment, figures)
        images.update({file: image_of(figure) for file, (_, figure) in figures.items()})
    report = replace_file(folder / "report.md", "\n\n".join(paragraphs) + "\n")
    return [report, *(replace_file(folder / file, image) for file, image in images.items())]


def unique_names(scenarios: Sequence[str]) -> list[str]:
    """One name of plain characters for each experiment, unique even where case is ignored."""
    names: list[str] = []
    for scenario in scenarios:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", scenario).strip("-.") or "experiment"
        name, number = plain, 1
        while name.lower() in {other.lower() for other in names}:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def markdown_escape(text: str) -> str:
    """Keep text from being taken for Markdown or HTML, and in one line."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(one_line, quote=False))


def _section(experiment: Experiment, figures: Figures) -> Iterator[str]:
    """The paragraphs of an experiment: its setting, its table, notes, and figures by file."""
    yield f"## {markdown_escape(experiment.scenario)}"
    yield "\n".join(f"- {markdown_escape(line)}" for line in setting_lines(experiment))
    headings = ["method", *(column.heading for column in COLUMNS)]
    rule = ["---", *["---:"] * len(COLUMNS)]
    rows = [list(map(_shown, row)) for row in rows_of(experiment)]
    lines = (list(map(markdown_escape, headings)), rule, *rows)
    yield "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    yield from map(markdown_escape, NOTES)
    methods = ", ".join(result.label for result in experiment.results)
    for file, (drawing, _) in figures.items():
        on = f"{drawing.title} on {experiment.scenario}: {methods}. The table has the numbers."
        yield f"### {drawing.title}"
        yield f"![{markdown_escape(on)}]({file})"
        yield drawing.caption


def _shown(cell: Cell) -> str:
    text = markdown_escape(cell.text)
    return f"**{text}**" if cell.bold else text
