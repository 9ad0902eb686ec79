"""The report of one or more experiments: a page for a browser, and Markdown with its figures."""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.files import replace_file
from benchmarks.suite.figures import DRAWINGS, Drawing
from benchmarks.suite.files import png_of, svg_of, unique_names
from benchmarks.suite.protocol import Experiment
from benchmarks.suite.setting import setting_lines
from benchmarks.suite.summary import summary_rows
from benchmarks.suite.tables import NOTES, cells, headings, markdown_escape, markdown_table

TEMPLATE = "report.html.j2"
TITLE = "Continual learning with elastic weight consolidation in a rotated basis"

ABOUT = (
    "Each method's λ is the one with the highest mean accuracy on training images that are held "
    "out, from as many values as every other method's. Only then the test images are looked at."
)


def write_report(experiments: Sequence[Experiment], folder: Path) -> list[Path]:
    """Write a page that needs nothing but a browser, and Markdown with figures next to it.

    Args:
        experiments: What to report; any records may be missing from them.
        folder: Folder of the report; it is made if need be, and older files of the same names are
            replaced.

    Returns:
        The files: ``report.html``, ``report.md`` and the figures.

    Raises:
        ValueError: If there is no experiment.
    """
    check_not_empty(experiments)
    pictures = write_figures(experiments, folder)
    names = unique_names([experiment.scenario for experiment in experiments])
    page = replace_file(folder / "report.html", html_report(experiments))
    existing = {picture.name for picture in pictures}
    text = "\n".join(_markdown_report(experiments, names, existing))
    return [page, replace_file(folder / "report.md", text), *pictures]


def write_figures(experiments: Sequence[Experiment], folder: Path) -> list[Path]:
    """Write all figures as PNG.

    Args:
        experiments: What to draw; figures for which records are missing are left out.
        folder: Folder of the files; it is made if need be.

    Returns:
        The files: ``<scenario>-<name>.png`` with the names of
        :data:`benchmarks.suite.figures.DRAWINGS`, the scenarios numbered where they are the same.

    Raises:
        ValueError: If there is no experiment.
    """
    check_not_empty(experiments)
    folder.mkdir(parents=True, exist_ok=True)
    names = unique_names([experiment.scenario for experiment in experiments])
    return [
        replace_file(folder / _picture(name, drawing), png_of(figure))
        for name, experiment in zip(names, experiments, strict=True)
        for drawing in DRAWINGS
        if (figure := drawing.draw(experiment)) is not None
    ]


def check_not_empty(experiments: Sequence[Experiment]) -> None:
    """Refuse to report nothing.

    Raises:
        ValueError: If there is no experiment.
    """
    if not experiments:
        raise ValueError(
            "experiments: got none, expected at least one; "
            "make results first, with: python -m benchmarks run SCENARIO"
        )


def _picture(name: str, drawing: Drawing) -> str:
    return f"{name}-{drawing.name}.png"


def html_report(experiments: Sequence[Experiment]) -> str:
    """Make the page; whatever comes from records is escaped.

    Args:
        experiments: What to report.

    Returns:
        The text of the page, which loads nothing from anywhere.
    """
    # The template is ours, and everything put into it is not.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = unique_names([experiment.scenario for experiment in experiments])
    sections = [_section(*pair) for pair in zip(names, experiments, strict=True)]
    template = environment.get_template(TEMPLATE)
    return template.render(
        title=TITLE, about=ABOUT, headings=headings(), notes=NOTES, sections=sections
    )


def _section(name: str, experiment: Experiment) -> dict[str, Any]:
    """What the template needs to know of an experiment."""
    return {
        "name": name,
        "scenario": experiment.scenario,
        "setting": setting_lines(experiment),
        "rows": [(row, cells(row)) for row in summary_rows(experiment)],
        "figures": list(_figures(experiment)),
    }


def _figures(experiment: Experiment) -> Iterator[dict[str, str]]:
    """The figures for which there are records.

    Each is an image of its own rather than part of the page's tree: identifiers that all SVGs of
    Matplotlib have in common would clash.
    """
    for drawing in DRAWINGS:
        figure = drawing.draw(experiment)
        if figure is not None:
            yield {
                "title": drawing.title,
                "caption": drawing.caption,
                "alternative": alternative(drawing, experiment),
                "source": f"data:image/svg+xml;base64,{b64encode(svg_of(figure)).decode()}",
            }


def alternative(drawing: Drawing, experiment: Experiment) -> str:
    """Text for readers who do not see the figure; the caption is next to it anyhow."""
    labels = ", ".join(result.label for result in experiment.results)
    return f"{drawing.title} on {experiment.scenario}: {labels}. The table has the numbers."


def _markdown_report(
    experiments: Sequence[Experiment], names: Sequence[str], pictures: set[str]
) -> Iterator[str]:
    """The parts of the Markdown report."""
    yield f"# {TITLE}\n\n{ABOUT}\n"
    for name, experiment in zip(names, experiments, strict=True):
        yield f"## {markdown_escape(experiment.scenario)}\n"
        yield markdown_table(experiment)
        for drawing in DRAWINGS:
            if (picture := _picture(name, drawing)) in pictures:
                text = markdown_escape(alternative(drawing, experiment))
                yield f"### {drawing.title}\n\n![{text}]({picture})\n\n{drawing.caption}\n"
