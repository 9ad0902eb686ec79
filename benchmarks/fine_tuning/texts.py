"""Texts to learn: labelled sentences from files, and docstrings and code of installed packages."""

import ast
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

SETS = ("subj", "trec", "custrev", "rt-polarity")
# One question with two answers for each task: from which package is a docstring?
PACKAGE_PAIRS = (("numpy", "torch"), ("scipy", "matplotlib"), ("sklearn", "transformers"))
FEWEST_WORDS = 6
MOST_DOCSTRINGS = 3_000  # of a package
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")  # of a name such as max_pool or MaxPool

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


class Labelled(NamedTuple):
    """Texts with classes from 0."""

    texts: list[str]
    labels: list[int]


def read_set(folder: Path, name: str) -> tuple[Labelled, Labelled | None]:
    """Read a set of sentences; the second part is its own test part, where it has one.

    Raises:
        ValueError: If a file is missing or is not "label sentence" a line.
    """
    if name == "trec":
        return _read(folder / "TREC.train.txt"), _read(folder / "TREC.test.txt")
    return _read(folder / f"{name}.txt"), None


def _read(path: Path) -> Labelled:
    try:
        # One of the published files is not UTF-8 throughout.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: expected a file of texts: {error.strerror}") from error
    pairs = [line.split(" ", 1) for line in lines if line.strip()]
    if not pairs or not all(len(pair) == 2 and pair[0].isdecimal() for pair in pairs):
        raise ValueError(f"{path}: expected a line 'label sentence' for every text")
    return Labelled([text.strip() for _, text in pairs], [int(label) for label, _ in pairs])


def docstrings_of_pair(pair: tuple[str, str]) -> Labelled:
    """Return as many docstrings of either package, labelled by it."""
    found = [docstrings(package) for package in pair]
    size = min(map(len, found))
    texts = [text for package in found for text in package[:size]]
    return Labelled(texts, [0] * size + [1] * size)


@lru_cache
def docstrings(package: str) -> tuple[str, ...]:
    """Return the first paragraphs of a package's docstrings, each once, without its own name."""
    found: dict[str, None] = {}
    for source in sources(package):
        for node in _documented(source):
            text = ast.get_docstring(node) or ""
            words = text.split("\n\n")[0].replace(package, "this package").split()
            if len(words) >= FEWEST_WORDS:
                found[" ".join(words)] = None
        if len(found) >= MOST_DOCSTRINGS:
            break
    return tuple(found)[:MOST_DOCSTRINGS]


def named_docstrings(packages: Sequence[str], number: int, seed: int) -> list[tuple[str, str]]:
    """Return names of functions and classes, as words, with first lines of their docstrings.

    Raises:
        ValueError: If there are not so many.
    """
    found: dict[str, str] = {}
    for package in packages:
        for source in sources(package):
            for node in _documented(source):
                if not isinstance(node, ast.Module):
                    words = WORDS.findall(node.name)
                    line = (ast.get_docstring(node) or "").split("\n")[0]
                    if len(words) > 1 and len(line.split()) >= FEWEST_WORDS:
                        found.setdefault(" ".join(words), line)
    if len(found) < number:
        raise ValueError(f"got {len(found)} docstrings of functions; expected at least {number}")
    return random.Random(seed).sample(sorted(found.items()), number)


def sources(package: str) -> Iterator[str]:
    """Yield the files of an installed package, without importing it.

    Raises:
        ValueError: If it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package}: expected an installed package whose source code can be read")
    for path in sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py")):
        if "tests" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def _documented(source: str) -> Iterator[Documented]:
    """Yield what has a docstring."""
    for node in ast.walk(_parsed(source)):
        if isinstance(node, Documented) and ast.get_docstring(node):
            yield node


def prose_and_code(packages: Sequence[str], characters: int) -> tuple[str, str]:
    """Return docstrings of packages, and their code without docstrings and comments.

    Args:
        packages: Names of installed packages.
        characters: How many to take of each kind, in equal parts from each package.
    """
    share = characters // len(packages)
    prose, code = [], []
    for package in packages:
        prose.append("\n\n".join(docstrings(package))[:share])
        code.append(_code_of(package, share))
    return "".join(prose), "".join(code)


def _parsed(source: str) -> ast.Module:
    """Return the syntax tree of a file; an empty one of a template, or of a later Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in other people's strings
        try:
            return ast.parse(source)
        except SyntaxError:
            return ast.Module([], [])


def _code_of(package: str, characters: int) -> str:
    parts: list[str] = []
    size = 0
    for source in sources(package):
        if size >= characters:
            break
        tree = _parsed(source)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not _is_text(line)] or [ast.Pass()]  # type: ignore[attr-defined]
        parts.append(ast.unparse(tree) + "\n")  # which leaves comments out
        size += len(parts[-1])
    return "".join(parts)[:characters]


def _is_text(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
