"""The gallery shows what the examples print now, but for numbers, which differ between machines."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def runner() -> ModuleType:
    found = importlib.util.spec_from_file_location("gallery_runner", GALLERY / "run.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def words(lines: list[str]) -> list[str]:
    """Lines without their numbers, and the spaces and signs that belong to these."""
    return [re.sub(r"[\s-]*\d+(\.\d+)?(e[-+]?\d+)?", " #", line) for line in lines]


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


def test_every_example_is_in_the_gallery() -> None:
    index = (GALLERY / "index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"examples/(\w+)\.py", index)) == EXAMPLES
    assert sorted(set(re.findall(r"gallery/(?!index)(\w+)\.md", navigation))) == EXAMPLES
    assert sorted(path.stem for path in GALLERY.glob("*.txt")) == EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_output_is_that_of_the_program(name: str, tmp_path: Path) -> None:
    if name == "distributed" and not dist.is_gloo_available():
        pytest.skip("needs gloo")
    found = runner().run(name, tmp_path)
    kept = (GALLERY / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert words(found) == words(kept)
    if name == "image_folder":
        _, protected, learned, free = map(numbers, found)
        assert sum(protected[:-1]) > sum(free[:-1])
        assert sum(learned) > 4 * 55
    if name == "compare_snapshots":
        (same,), (other,) = map(numbers, found[-3:-1])
        assert same > other
        first, second, both = numbers(found[-1])
        assert abs(first + second - both) < 1e-3 * both
    if name == "laplace_uncertainty":
        (_, inside), (_, gap), (_, outside) = map(numbers, found)
        assert inside < min(gap, outside) / 2
    if name == "own_parts":
        (kept_low, before), (kept_after, after) = map(numbers, found[-2:])
        assert kept_after < kept_low + 0.1
        assert after < before - 0.5
