"""Figures that stand in several places are the same everywhere, and those that were measured."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.results import group_by_label, read_records

ROOT = Path(__file__).parents[2]
MEASURED = group_by_label(read_records(ROOT / "docs" / "pictures" / "permuted_mnist.json")[1])


def rows(document: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table below a heading, by their first cell."""
    text = (ROOT / document).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    table = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    assert table is not None, f"{document} has no table below {heading!r}"
    lines = table[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def shown(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def test_readme_has_the_figures_of_the_results() -> None:
    results, readme = (
        rows("docs/results.md", "With nothing but defaults"),
        rows("README.md", "Results"),
    )
    assert len(readme) > 3
    for stream, (accuracy,) in readme.items():
        assert results[stream][0] == accuracy, stream


def test_results_of_each_method_are_those_measured() -> None:
    found = rows("docs/results.md", "Ten permuted tasks, method by method")
    names = {re.findall(r"`([\w-]+)`", first)[0]: cells for first, cells in found.items()}
    assert list(names) == list(MEASURED)
    for name, records in MEASURED.items():
        accuracy, forgetting = names[name]
        assert accuracy == shown([record.average_accuracy for record in records]), name
        losses = [record.forgetting for record in records if record.forgetting is not None]
        assert forgetting == (shown(losses) if losses else ""), name


def test_readme_describes_its_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    alternative = re.search(r"!\[(.*?)\]\(docs/pictures/accuracy.png\)", text)
    assert alternative is not None
    for name in ("naive", "ewc", "rotated-ewc"):
        mean = fmean(record.average_accuracy for record in MEASURED[name])
        assert f"{100 * mean:.0f} %" in alternative[1], name
