"""Penalties that go through files between tasks, from command line to file."""

import json
from pathlib import Path

import pytest

from benchmarks.data import ImageData
from benchmarks.storage import main

QUICK = "--epochs 10 --hidden 6 --batch-size 8 --lr 0.01 --fisher-samples 40 --tasks 3"


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch, learnable_images: ImageData) -> ImageData:
    """Have small images loaded, whatever the folder."""
    monkeypatch.setattr("benchmarks.data.load_images", lambda root: learnable_images)
    return learnable_images


def test_both_precisions_of_every_method(
    images: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{QUICK} --methods rotated-ewc rotated-adam --seeds 3"
    assert main([*words.split(), "--output", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "storage.json").read_text(encoding="utf-8"))
    records = {(r["method"], r["precision"]): r for r in document["records"]}
    assert len(records) == 4
    for method in ("rotated-ewc", "rotated-adam"):
        whole, half = records[method, "float32"], records[method, "bfloat16"]
        # Two tasks follow a first one, and nothing changes where all bits are stored.
        assert whole["penalty_errors"] == [0.0, 0.0]
        assert all(0 < error < 0.05 for error in half["penalty_errors"])
        assert half["file_bytes"] < whole["file_bytes"]
        assert len(whole["save_seconds"]) == len(whole["load_seconds"]) == 2
        assert all(seconds > 0 for seconds in whole["load_seconds"] + whole["save_seconds"])
        assert 0 < half["average_accuracy"] <= 1
    shown = capsys.readouterr().out
    assert "bfloat16" in shown
    assert shown.splitlines()[-1] == f"Wrote {tmp_path / 'storage.json'}."


def test_storing_all_bits_changes_nothing(images: ImageData, tmp_path: Path) -> None:
    """The same run without a file ends with the same accuracies."""
    from benchmarks.permuted_mnist import main as permuted

    words = f"{QUICK} --methods rotated-ewc --seeds 3"
    assert main([*words.split(), "--output", str(tmp_path)]) == 0
    assert permuted([*words.split(), "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "storage.json").read_text(encoding="utf-8"))["records"]
    plain = json.loads((tmp_path / "permuted_mnist.json").read_text(encoding="utf-8"))["records"]
    last = plain[0]["accuracy_matrix"][-1]
    assert stored[0]["average_accuracy"] == pytest.approx(sum(last) / len(last), abs=1e-12)


def test_one_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--tasks", "1"])
    assert "--tasks: expected at least 2" in capsys.readouterr().err
