"""The studies, from command line to file; that of stored snapshots with small images."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import data as data_sets
from benchmarks.__main__ import main
from benchmarks.data import ImageData


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch, learnable_images: ImageData) -> ImageData:
    """Have small images loaded, whatever the folder."""
    monkeypatch.setattr(data_sets, "load_images", lambda root: learnable_images)
    return learnable_images


def call(name: str, words: str, folder: Path) -> Any:
    """Run a study, and return the document that it wrote."""
    assert main([f"study-{name}", *words.split(), "--output", str(folder)]) == 0
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_both_precisions_are_stored(images: ImageData, tmp_path: Path, capsys: Any) -> None:
    words = "--epochs 2 --hidden 6 --batch-size 20 --lr 0.01 --fisher-samples 40 --tasks 3"
    words += " --methods rotated-ewc rotated-ewc-loss --seeds 3"
    records = call("storage", words, tmp_path)["records"]
    found = {(one["record"]["method"], one["precision"]): one for one in records}
    assert len(found) == 4
    for method in ("rotated-ewc", "rotated-ewc-loss"):
        whole, half = found[method, "float32"], found[method, "bfloat16"]
        # Two tasks follow a first one, and nothing changes where all bits are stored.
        assert whole["penalty_errors"] == [0.0, 0.0]
        assert all(0 < error < 0.05 for error in half["penalty_errors"])
        assert half["file_bytes"] < whole["file_bytes"]
    assert main(["permuted-mnist", *words.split(), "--output", str(tmp_path)]) == 0
    plain = json.loads((tmp_path / "permuted_mnist.json").read_text(encoding="utf-8"))["records"]
    stored = found["rotated-ewc", "float32"]["record"]
    assert stored["accuracy_matrix"] == plain[0]["accuracy_matrix"]
    assert "bfloat16" in capsys.readouterr().out


def test_wide_layers_are_consolidated(tmp_path: Path, capsys: Any) -> None:
    (one,) = call("rank", "--cases few-examples --rank auto --threads 1", tmp_path)["records"]
    # The parameters themselves are the anchor, and four rows are not zero.
    assert one["parameter_bytes"] == 4 * (8 * 1500 + 1500)
    assert one["parameter_bytes"] < one["file_bytes"] <= 2 * one["parameter_bytes"]
    assert "few-examples" in capsys.readouterr().out
    assert main(["study-rank", "--rank", "0", "--output", str(tmp_path)]) == 1
    assert "--rank: rank is 0; expected a positive integer" in capsys.readouterr().err
