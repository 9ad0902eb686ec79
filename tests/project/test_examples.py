"""The examples run as they are, print what the gallery shows, and show what they are meant to.

Each runs once: what it prints is compared with the gallery, but for numbers, which differ between
machines, and then looked at.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def _runner() -> Any:
    found = importlib.util.spec_from_file_location("gallery_runner", GALLERY / "run.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


GALLERY_RUNNER = _runner()


def words(lines: list[str]) -> list[str]:
    """Lines without their numbers, and the spaces and signs that belong to these."""
    return [re.sub(r"[\s-]*\d+(\.\d+)?(e[-+]?\d+)?", " #", line) for line in lines]


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def check_accelerate(lines: list[str], folder: Path) -> None:
    (learned, _), (kept, other) = numbers(lines[0]), numbers(lines[1])
    assert learned > 90
    assert kept > learned - 10
    assert other > 85
    assert lines[2] == "the penalty is what it was: True"


def check_avalanche(lines: list[str], folder: Path) -> None:
    """A run that is killed after its second task, and resumed, ends in the same bits."""
    assert len(lines) == 5
    parts = folder / "parts"
    parts.mkdir()
    killed = GALLERY_RUNNER.start("avalanche_resume", parts)
    found = [killed.stdout.readline().rstrip("\n") for _ in range(2)]
    killed.kill()
    killed.communicate()
    resumed = GALLERY_RUNNER.run("avalanche_resume", parts)
    found += [line for line in resumed if line.startswith("after task")]  # Avalanche chatters
    done = min(int(re.search(r"\d+", line)[0]) for line in found[2:])
    assert done in (3, 4), "it goes on with the third task, or with the fourth if it was fast"
    assert found == [*lines[:2], *lines[done - 1 :]]
    last = [float(number) for number in re.findall(r"([\d.]+) %", lines[-1])]
    assert min(last) > 70


def check_snapshots(lines: list[str], folder: Path) -> None:
    (same,), (other,) = map(numbers, lines[-3:-1])
    assert same > other
    first, second, both = numbers(lines[-1])
    assert abs(first + second - both) < 1e-3 * both


def check_distributed(lines: list[str], folder: Path) -> None:
    """Replicas and spread parameters learn, and remember, the same."""
    for found in (lines, GALLERY_RUNNER.run("distributed", folder, "--fsdp")):
        (learned,), (kept, second) = (
            [float(n) for n in re.findall(r"([\d.]+) %", line)] for line in found
        )
        assert learned > 80
        assert kept > learned - 10
        assert second > 75


def check_images(lines: list[str], folder: Path) -> None:
    _, protected, learned, free = map(numbers, lines)
    assert sum(protected[:-1]) > sum(free[:-1])
    assert sum(learned) > 4 * 55


def check_laplace(lines: list[str], folder: Path) -> None:
    (_, inside), (_, gap), (_, outside) = map(numbers, lines)
    assert inside < min(gap, outside) / 2


def check_lightning(lines: list[str], folder: Path) -> None:
    protected, free = map(numbers, lines)
    assert protected[0] > free[0] + 8
    assert protected[1] > free[1] - 4


def check_own_parts(lines: list[str], folder: Path) -> None:
    (kept_low, before), (kept_after, after) = map(numbers, lines[-2:])
    assert kept_after < kept_low + 0.1
    assert after < before - 0.5


def check_lora(lines: list[str], folder: Path) -> None:
    base, free, protected, merged = map(numbers, lines)
    assert protected[0] - base[0] < 0.5 * (free[0] - base[0])
    assert protected[1] < free[1] + 0.1 < base[1]
    assert merged[0] > 0


def check_plain(lines: list[str], folder: Path) -> None:
    found = [[float(n) for n in re.findall(r"([\d.]+) %", line)] for line in lines]
    (learned,), (kept, second), (forgotten, second_alone) = found
    assert learned > 90
    assert kept > forgotten + 10
    assert kept > learned - 10
    assert second > second_alone - 5
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert set(state) == {"model", "penalty"}


def check_trainer(lines: list[str], folder: Path) -> None:
    protected, free = map(numbers, lines)
    learned, kept, second = protected
    assert learned == free[0]
    assert kept - learned < 0.5 * (free[1] - learned)
    assert second < free[2] + 0.1
    assert not list(folder.iterdir())


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "accelerate_loop": check_accelerate,
    "avalanche_resume": check_avalanche,
    "compare_snapshots": check_snapshots,
    "distributed": check_distributed,
    "image_folder": check_images,
    "laplace_uncertainty": check_laplace,
    "lightning_module": check_lightning,
    "own_parts": check_own_parts,
    "peft_lora": check_lora,
    "plain_pytorch": check_plain,
    "transformers_trainer": check_trainer,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.distributed if name == "distributed" else ())
        for name in CHECKS
    ],
)
def test_program(name: str, tmp_path: Path) -> None:
    if name == "distributed" and not dist.is_gloo_available():
        pytest.skip("needs gloo")
    found = GALLERY_RUNNER.run(name, tmp_path)
    kept = (GALLERY / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert words(found) == words(kept)
    CHECKS[name](found, tmp_path)


def test_every_example_is_in_the_gallery() -> None:
    index = (GALLERY / "index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"examples/(\w+)\.py", index)) == EXAMPLES
    assert sorted(set(re.findall(r"gallery/(?!index)(\w+)\.md", navigation))) == EXAMPLES
    assert sorted(path.stem for path in GALLERY.glob("*.txt")) == EXAMPLES
    assert sorted(CHECKS) == EXAMPLES


def test_examples_are_short() -> None:
    for script in (ROOT / "examples").glob("*.py"):
        assert len(script.read_text(encoding="utf-8").splitlines()) < 130, script.name
