"""What the files around the package say of it is so."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import rotate_ewc

ROOT = Path(__file__).parents[2]
MADE_LATER = {"./data", "dist/", "site/", "results/permuted_mnist.json"}
# Imported only when they are asked for.
LAZY_PARTS = {
    "avalanche",
    "command.py",
    "figure.py",
    "lightning",
    "peft.py",
    "tables.py",
    "transformers",
}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def quoted(name: str) -> list[str]:
    """Whatever stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text_of(name))


def is_path(word: str) -> bool:
    return re.fullmatch(r"[\w./]*(/|\.(py|md|cff|png|toml))[\w.]*", word) is not None


def paths_in_the_guide() -> list[str]:
    links = re.findall(r"\]\(([^)#:]+)\)", text_of("CONTRIBUTING.md"))
    words = [word for phrase in quoted("CONTRIBUTING.md") for word in phrase.split()]
    return sorted({*links, *filter(is_path, words)} - MADE_LATER)


def names_in_the_guide() -> list[str]:
    """Classes and tables of the code."""
    found = [n for n in quoted("CONTRIBUTING.md") if re.fullmatch(r"_?[A-Z][A-Za-z_]+", n)]
    return sorted(set(found) - {"ValueError", "TypeError"})


def commands_in_the_guide() -> list[str]:
    return sorted(set(re.findall(r"`make (\w+)", text_of("CONTRIBUTING.md"))))


@pytest.mark.parametrize("path", paths_in_the_guide())
def test_paths_in_the_guide_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", names_in_the_guide())
def test_names_in_the_guide_are_defined(name: str) -> None:
    definition = re.compile(rf"^(class {name}\b|{name}\b.* = )", re.MULTILINE)
    folders = (ROOT / "rotate_ewc", ROOT / "benchmarks", ROOT / "tests")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert any(definition.search(file.read_text(encoding="utf-8")) for file in files)


@pytest.mark.parametrize("command", commands_in_the_guide())
def test_commands_in_the_guide_are_in_the_makefile(command: str) -> None:
    assert re.search(rf"^{command}:", text_of("Makefile"), re.MULTILINE)


def test_the_guide_was_read() -> None:
    """And the three tests before this one have something to look at."""
    assert {"tests/helpers/oracles/", "docs/design.md", ".ci/oldest"} <= set(paths_in_the_guide())
    assert {"RULES", "METHODS", "LayerCall"} <= set(names_in_the_guide())
    assert {"test", "lint", "package"} <= set(commands_in_the_guide())


def test_citation_is_of_this_version() -> None:
    fields = dict(re.findall(r"^([\w-]+): (.+)$", text_of("CITATION.cff"), re.MULTILINE))
    assert fields["version"] == rotate_ewc.__version__
    assert f'license = "{fields["license"]}"' in text_of("pyproject.toml")


def test_whatever_the_core_imports_is_a_dependency() -> None:
    listed = re.search(r"^dependencies = \[(.*?)^\]", text_of("pyproject.toml"), re.M | re.S)
    assert listed is not None
    dependencies = {
        name.replace("-", "_") for name in re.findall(r'^ *"([\w-]+)', listed[1], re.MULTILINE)
    }
    imported = set()
    folder = ROOT / "rotate_ewc"
    for file in folder.rglob("*.py"):
        if not LAZY_PARTS & set(file.relative_to(folder).parts):
            imported |= imported_by(ast.parse(file.read_text(encoding="utf-8")))
    assert {"torch", "einops"} <= imported
    assert imported - dependencies - set(sys.stdlib_module_names) == {"rotate_ewc"}


def imported_by(module: ast.Module) -> set[str]:
    """The first parts of the names that a module imports as soon as it is imported itself."""
    found = set()
    for statement in module.body:
        if isinstance(statement, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            found.add((statement.module or "").partition(".")[0])
    return found


def test_commands_of_the_readme_are_there_and_its_test_is_part_of_ci() -> None:
    commands = re.findall(r"^\$ make (\w+)", text_of("README.md"), re.MULTILINE)
    assert {"bench", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", text_of("Makefile"), re.MULTILINE), command
    assert re.search(r"^make test$", text_of(".ci/run"), re.MULTILINE)
