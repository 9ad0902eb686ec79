"""The plan of the house: which room may import from which, and what the rooms offer."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rotate_ewc

PACKAGE = Path(rotate_ewc.__file__).parent

# The plan, from the ground up. A room imports from the floors below it, never from its own floor.
FLOORS = (
    # What everything stands on.
    ("errors", "version"),
    ("_utils",),
    # Several processes.
    ("distributed",),
    # What users may choose, and what is written down of a run.
    ("options",),
    ("provenance",),
    # Matrices and blocks, without a model.
    ("linalg",),
    # What is known of each loss and layer; blocks in files.
    ("losses", "layers", "io"),
    # One forward pass, then all the data.
    ("tracing",),
    ("estimation",),
    # What was estimated, as an operator, and what a penalty makes of it.
    ("curvature",),
    ("penalty",),
    # What only uses the rest.
    ("inspection", "integrations"),
    ("__init__", "__main__"),
)
FRAMEWORKS = ("accelerate", "avalanche", "lightning", "peft", "transformers")
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _files() -> Iterator[tuple[str, Path]]:
    """Every file of the package with its room: a folder, or a file that lies on top."""
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        yield first.removesuffix(".py"), path


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports of the package, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            # What is named may be a module, and is then imported too.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _room(name: str) -> str | None:
    """The room that a dotted name belongs to; None if it is not the package's."""
    head, *rest = name.split(".")
    if head != "rotate_ewc":
        return None
    return rest[0] if rest and rest[0] in FLOOR_OF else "__init__"


def test_every_file_is_in_a_room() -> None:
    assert {room for room, _ in _files()} == set(FLOOR_OF)


def test_imports_go_down() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for room, path in _files()
        for line, name in _imported(path)
        if (other := _room(name)) is not None
        and other != room
        and FLOOR_OF[other] >= FLOOR_OF[room]
    ]
    assert upwards == []


def test_rooms_have_no_circles_inside() -> None:
    modules = {_dotted(path): path for _, path in _files()}
    below = {
        module: {
            known for _, name in _imported(path) if (known := _module(name, modules)) is not None
        }
        - {module}
        for module, path in modules.items()
    }
    while leaves := [module for module, names in below.items() if not names]:
        for leaf in leaves:
            del below[leaf]
        for names in below.values():
            names.difference_update(leaves)
    assert sorted(below) == []


def test_only_the_integration_imports_its_framework() -> None:
    for room, path in _files():
        for _, name in _imported(path):
            if name.split(".")[0] in FRAMEWORKS:
                assert room == "integrations"


@pytest.mark.parametrize("room", [r for r in FLOOR_OF if (PACKAGE / r).is_dir()])
def test_every_room_says_what_it_is_for(room: str) -> None:
    """In its own words: an idea, then what comes in, what goes out, and what it may not do."""
    module = ast.parse((PACKAGE / room / "__init__.py").read_text())
    documentation = ast.get_docstring(module) or ""
    idea, _, rest = documentation.partition("\n\n")
    assert idea.endswith("."), f"{room} says nothing of itself"
    form = r"In come .+[;,] out goe?s? .+\. (.+\. )?Nothing here may .+\."
    assert re.match(form, " ".join(rest.split())), (
        f"rotate_ewc/{room}/__init__.py says {rest!r}; expected sentences of the form "
        "'In come …; out go …. Nothing here may ….'"
    )


@pytest.mark.parametrize(
    "name",
    [
        module.name
        for module in pkgutil.walk_packages(rotate_ewc.__path__, "rotate_ewc.")
        if not module.name.endswith("__main__")
    ],
)
def test_public_names_of_every_module_are_there(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ lists {public}, which is not there"


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module(name: str, modules: dict[str, Path]) -> str | None:
    """The module of the package that an imported name is, or is in."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None
