"""The plan of the tests: where what they share lies, and what their README says of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
README = TESTS / "README.md"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of whatever a file imports, names out of modules included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def test_nothing_imports_from_a_test_module() -> None:
    """What two test files need lies in `tests/helpers`."""
    found = [
        f"{path.relative_to(TESTS)}:{line} imports {name}"
        for path in sorted(TESTS.rglob("*.py"))
        for line, name in imported(path)
        if path.parent.name != "benchmarks" and re.match(r"tests\..*\btest_", name)
    ]
    assert found == []


def test_helpers_stand_alone() -> None:
    """They import other helpers, and nothing else of the tests."""
    found = [
        f"{path.relative_to(TESTS)}:{line} imports {name}"
        for path in sorted((TESTS / "helpers").rglob("*.py"))
        for line, name in imported(path)
        if name.startswith("tests.") and not name.startswith("tests.helpers.")
    ]
    assert found == []


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in TESTS.glob("*/__init__.py")))
def test_readme_names_every_folder(folder: str) -> None:
    assert f"`{folder}/`" in README.read_text(encoding="utf-8")


def test_readme_names_every_marker() -> None:
    settings = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")
    markers = re.search(r"^markers = \[(.*?)\]$", settings, re.MULTILINE | re.DOTALL)
    assert markers is not None
    names = re.findall(r'^ *"(\w+):', markers[1], re.MULTILINE)
    assert "slow" in names
    for name in names:
        assert f"| `{name}` |" in README.read_text(encoding="utf-8")


def test_readme_names_no_folder_that_is_not_there() -> None:
    named = re.findall(r"`(\w+)/`", README.read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if not (TESTS / name).is_dir()] == []
