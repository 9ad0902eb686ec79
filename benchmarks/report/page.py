"""The report of one or more experiments: a page for a browser, and Markdown with its figures."""

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.files import replace_file
from benchmarks.report.figures import DRAWINGS
from benchmarks.report.style import image_of
from benchmarks.report.tables import COLUMNS, NOTES, rows_of, setting_lines
from benchmarks.suite.outcome import Experiment

TITLE = "Continual learning with elastic weight consolidation in a rotated basis"
ABOUT = (
    "Each method's λ is the one with the highest mean accuracy on training images that are held "
    "out, from as many values as every other method's. Only then the test images are looked at."
)


def write_report(experiments: Sequence[Experiment], folder: Path) -> list[Path]:
    """Write a page that needs nothing but a browser, and Markdown with figures next to it."""
    # The templates are ours, and everything put into them is not.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: (name or "").endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = markdown_escape
    names = unique_names([experiment.scenario for experiment in experiments])
    context = {
        "title": TITLE,
        "about": ABOUT,
        "notes": NOTES,
        "headings": ["method", *(column.heading for column in COLUMNS)],
        "sections": [_section(*pair) for pair in zip(names, experiments, strict=True)],
    }
    written = [
        replace_file(folder / name, environment.get_template(f"{name}.j2").render(context))
        for name in ("report.html", "report.md")
    ]
    return written + write_figures(experiments, folder)


def write_figures(experiments: Sequence[Experiment], folder: Path) -> list[Path]:
    """Write all figures that there are records for as ``<scenario>-<drawing>.png``."""
    names = unique_names([experiment.scenario for experiment in experiments])
    return [
        replace_file(folder / f"{name}-{drawing.name}.png", image_of(figure, "png"))
        for name, experiment in zip(names, experiments, strict=True)
        for drawing in DRAWINGS
        if (figure := drawing.draw(experiment)) is not None
    ]


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


def _section(name: str, experiment: Experiment) -> dict[str, Any]:
    """What the templates need to know of an experiment; figures without records are left out.

    Each figure is an image of its own rather than part of the page's tree: identifiers that all
    SVGs of Matplotlib have in common would clash.
    """
    methods = ", ".join(result.label for result in experiment.results)
    figures = [
        {
            "title": drawing.title,
            "caption": drawing.caption,
            "alternative": f"{drawing.title} on {experiment.scenario}: {methods}. The table has "
            "the numbers.",
            "source": f"data:image/svg+xml;base64,{b64encode(image_of(figure, 'svg')).decode()}",
            "file": f"{name}-{drawing.name}.png",
        }
        for drawing in DRAWINGS
        if (figure := drawing.draw(experiment)) is not None
    ]
    return {
        "name": name,
        "scenario": experiment.scenario,
        "setting": setting_lines(experiment),
        "rows": rows_of(experiment),
        "figures": figures,
    }
