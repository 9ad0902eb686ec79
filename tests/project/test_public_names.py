"""Whatever a public signature or attribute mentions can be imported from the top of the package."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest

import rotate_ewc
from rotate_ewc.integrations import avalanche, lightning, peft, transformers

MODULES = (rotate_ewc, avalanche, lightning, peft, transformers)
PUBLIC = {id(getattr(module, n)) for module in MODULES for n in module.__all__}


def _mentioned(hint: Any) -> Iterator[type]:
    """The package's classes in an annotation."""
    if inspect.isclass(hint) and hint.__module__.startswith("rotate_ewc"):
        yield hint
    for part in typing.get_args(hint):
        yield from _mentioned(part)


def _annotations(owner: Any) -> Iterator[tuple[str, Any]]:
    """The annotations of a function, or of the public attributes and methods of a class."""
    if not inspect.isclass(owner):
        if callable(owner):
            yield from typing.get_type_hints(owner).items()
        return
    for base in owner.__mro__:
        if not base.__module__.startswith("rotate_ewc"):
            continue
        for name, hint in typing.get_type_hints(base).items():
            if not name.startswith("_"):
                yield name, hint
        for name, member in vars(base).items():
            if name.startswith("_") and name not in ("__init__", "__call__", "__matmul__"):
                continue
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function):
                for argument, hint in typing.get_type_hints(function).items():
                    yield f"{name}.{argument}", hint


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in MODULES for name in module.__all__],
)
def test_what_a_public_name_mentions_is_public(module: Any, name: str) -> None:
    hidden = {
        f"{where} mentions {kind.__qualname__}"
        for where, hint in _annotations(getattr(module, name))
        for kind in _mentioned(hint)
        if id(kind) not in PUBLIC
    }
    assert hidden == set()


def test_the_walk_finds_something() -> None:
    found = {
        kind.__name__
        for _, hint in _annotations(rotate_ewc.EKFACPenalty)
        for kind in _mentioned(hint)
    }
    assert {"EstimationSettings", "EstimationOptions", "Mode", "Term", "Weighting"} <= found
