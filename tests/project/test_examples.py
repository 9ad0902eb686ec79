"""The examples run as they are, and show what they are meant to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def start(
    name: str, folder: Path, *launched: str, arguments: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Run an example in a folder of its own, launched by another module if one is named."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, *launched, str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    """What a program prints until it ends, as it should."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.splitlines()


@pytest.mark.slow
def test_avalanche_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    """One run is killed after its second task, the other is not."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = lines_of(start("avalanche_resume.py", whole))
    assert len(expected) == 5
    killed = start("avalanche_resume.py", parts)
    assert killed.stdout is not None
    found = [killed.stdout.readline().rstrip("\n") for _ in range(2)]
    killed.kill()
    killed.communicate()
    resumed = lines_of(start("avalanche_resume.py", parts))
    found += [line for line in resumed if line.startswith("after task")]  # Avalanche chatters
    done = min(int(re.search(r"\d+", line)[0]) for line in found[2:])
    assert done in (3, 4), "it goes on with the third task, or with the fourth if it was fast"
    assert found == [*expected[:2], *expected[done - 1 :]]
    last = [float(number) for number in re.findall(r"([\d.]+) %", expected[-1])]
    assert min(last) > 70


@pytest.mark.slow
def test_plain_pytorch(tmp_path: Path) -> None:
    lines = lines_of(start("plain_pytorch.py", tmp_path))
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


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_distributed(tmp_path: Path) -> None:
    """Replicas and spread parameters learn, and remember, the same."""
    launched = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    replicas, spread = (
        lines_of(start("distributed.py", tmp_path, *launched, arguments=arguments))
        for arguments in ((), ("--fsdp",))
    )
    assert [line.split("task 1 ")[0].strip() for line in replicas] == [
        "after the first task",
        "after the second",
    ]
    for lines in (replicas, spread):
        (learned,), (kept, second) = (
            [float(n) for n in re.findall(r"([\d.]+) %", line)] for line in lines
        )
        assert learned > 80
        assert kept > learned - 10
        assert second > 75


def test_examples_are_short() -> None:
    for script in (ROOT / "examples").glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < 130, script.name
