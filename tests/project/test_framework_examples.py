"""The examples with other frameworks run as they are, and show what they are meant to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each imports a framework, and trains twice
ROOT = Path(__file__).parents[2]
# `accelerate launch`
LAUNCHER = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


def lines_of(name: str, folder: Path, *launcher: str) -> list[str]:
    """What an example prints of its own, in a folder of its own, without a network."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / name)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    return [line for line in found.stdout.splitlines() if line and not line.startswith("{")]


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_trainer(tmp_path: Path) -> None:
    protected, free = map(numbers, lines_of("transformers_trainer.py", tmp_path, *LAUNCHER))
    learned, kept, second = protected
    assert learned == free[0]
    assert kept - learned < 0.4 * (free[1] - learned)
    assert second < free[2] + 0.1
    assert not list(tmp_path.iterdir())


def test_lora(tmp_path: Path) -> None:
    base, free, protected, merged = map(numbers, lines_of("peft_lora.py", tmp_path))
    assert protected[0] - base[0] < 0.5 * (free[0] - base[0])
    assert protected[1] < free[1] + 0.1 < base[1]
    assert merged[0] > 0


def test_lightning(tmp_path: Path) -> None:
    protected, free = map(numbers, lines_of("lightning_module.py", tmp_path))
    assert protected[0] > free[0] + 8
    assert protected[1] > free[1] - 4


def test_accelerate(tmp_path: Path) -> None:
    first, second, last = lines_of("accelerate_loop.py", tmp_path, *LAUNCHER)
    (learned, _), (kept, other) = numbers(first), numbers(second)
    assert learned > 90
    assert kept > learned - 10
    assert other > 85
    assert last == "the penalty is what it was: True"
