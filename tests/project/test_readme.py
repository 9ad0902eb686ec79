"""The README's code runs as it stands there, one block after another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks():
        exec(compile(block, str(README), "exec"), namespace)
    assert len(blocks()) == 4
    assert (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "task.safetensors").exists()
    assert namespace["penalty"].num_tasks == 3


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) >= 3
    for link in links:
        assert (README.parent / link).exists(), link
