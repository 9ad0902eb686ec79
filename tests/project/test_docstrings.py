"""Examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import rotate_ewc

PACKAGE = Path(rotate_ewc.__file__).parent


def modules_with_examples() -> list[str]:
    paths = [path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")]
    dotted = [path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in paths]
    return sorted(name.replace("/", ".").removesuffix(".__init__") for name in dotted)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0, capsys.readouterr().out


def test_there_are_examples() -> None:
    assert {"rotate_ewc.penalty.penalty", "rotate_ewc.curvature.operator"} <= {
        *modules_with_examples()
    }
