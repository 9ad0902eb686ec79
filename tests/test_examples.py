"""The examples run as they are, and show what they are meant to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_plain_pytorch(tmp_path: Path) -> None:
    script = ROOT / "examples" / "plain_pytorch.py"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split("task 1 ")[0].strip() for line in lines] == [
        "after the first task",
        "task 2, with the penalty",
        "task 2, without it",
    ]
    numbers = [[float(n) for n in re.findall(r"([\d.]+) %", line)] for line in lines]
    (learned,), (kept, second), (forgotten, second_alone) = numbers
    assert learned > 90
    assert kept > forgotten + 10
    assert kept > learned - 10
    assert second > second_alone - 5
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(state) == {"model", "penalty"}


def test_examples_are_short() -> None:
    for script in (ROOT / "examples").glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60, script.name
