"""Guards the published result: ten tasks are remembered. Slow: real training."""

import json
from pathlib import Path

import pytest

from benchmarks.configuration import default_data_root
from benchmarks.data import load_images
from benchmarks.permuted_mnist import main

# Average accuracy over ten tasks: at least this for the rotated penalty, in the loss and in Adam's
# steps, at most that for plain fine-tuning. Measured over three seeds: MNIST 95.3, 95.6 and 51 %.
BOUNDS = {"mnist": (0.948, 0.953, 0.65), "digits": (0.80, 0.80, 0.60)}
METHODS = ("rotated-ewc", "rotated-adam", "naive")


@pytest.mark.slow
def test_ten_tasks_are_remembered(tmp_path: Path) -> None:
    source = load_images(default_data_root()).source
    _check(tmp_path, source)


@pytest.mark.slow
def test_ten_tasks_are_remembered_on_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The road without a network gives a result worth looking at too."""
    monkeypatch.setattr("benchmarks.data.load_mnist", _unavailable)
    _check(tmp_path, "digits")


def _check(output: Path, source: str) -> None:
    """Run the benchmark, and compare what it recorded with the bounds."""
    assert main(["--methods", *METHODS, "--output", str(output)]) == 0
    records = json.loads((output / "permuted_mnist.json").read_text())["records"]
    assert {record["configuration"]["data"] for record in records} == {source}
    accuracy = {record["method"]: record["average_accuracy"] for record in records}
    in_loss, in_steps, forgotten = BOUNDS[source]
    assert accuracy["rotated-ewc"] >= in_loss
    assert accuracy["rotated-adam"] >= in_steps
    assert accuracy["naive"] <= forgotten


def _unavailable(root: Path) -> None:
    from benchmarks.download import DataUnavailableError

    raise DataUnavailableError("was left aside")
