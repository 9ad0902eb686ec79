"""What the documentation of the suite says of methods and scenarios is what there is."""

import re
from pathlib import Path

from benchmarks.configuration import SCENARIO_DEFAULTS
from benchmarks.methods import METHODS

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table in a section, without those of its head."""
    text = DOCUMENT.read_text(encoding="utf-8")
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_method_is_described_with_its_numbers() -> None:
    found = {cells[0].strip("`"): cells[3:] for cells in rows("Methods")}
    assert list(found) == list(METHODS)
    for name, method in METHODS.items():
        expected = [""] * 2
        if method.default_strength is not None:
            default = method.default_strength
            shown = default if isinstance(default, str) else f"{default:g}"
            expected = [shown, f"{method.centre:g}"]
        assert found[name] == expected, name


def test_every_scenario_is_described() -> None:
    named = {re.findall(r"\w+", cells[0])[0] for cells in rows("Scenarios")}
    assert named == set(SCENARIO_DEFAULTS)
