"""The whole calibration, from command line to file."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch

import benchmarks.calibration
from benchmarks.calibrate import main
from benchmarks.calibration import Calibration
from benchmarks.data import ImageData

QUICK = "--epochs 10 --hidden 6 --batch-size 8 --lr 0.01 --fisher-samples 40"


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch, learnable_images: ImageData) -> ImageData:
    """Have small images loaded, whatever the folder."""
    monkeypatch.setattr("benchmarks.data.load_images", lambda root: learnable_images)
    return learnable_images


def test_every_method_and_seed_and_their_median(
    images: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{QUICK} --methods rotated-ewc rotated-adam --seeds 3 4"
    assert main([*words.split(), "--output", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "calibrate.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == "rotate_ewc.benchmarks.calibrate/1"
    records = document["records"]
    assert [(record["seed"], record["method"]) for record in records] == [
        *((3, "rotated-ewc"), (3, "rotated-adam")),
        *((4, "rotated-ewc"), (4, "rotated-adam")),
    ]
    for record in records:
        assert record["strength"] > 0
        assert len(record["accuracies"]) == 2
        assert record["old_images"] == 120
        assert record["configuration"]["strength"] == 1.0
        assert record["configuration"]["tasks"] == 2
        assert {"torch", "avalanche", "processor"} <= set(record["versions"])
    medians = {
        method: median(record["strength"] for record in records if record["method"] == method)
        for method in ("rotated-ewc", "rotated-adam")
    }
    assert document["median_strengths"] == pytest.approx(medians)
    assert [found.name for found in path.parent.iterdir()] == ["calibrate.json"]

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Data: learnable."
    assert lines[-1] == f"Wrote {path}."
    rows = [line.split() for line in lines[-7:-1]]
    assert [row[:2] for row in rows] == [
        [method, label] for method in medians for label in ("3", "4", "median")
    ]
    for row, record in zip((rows[0], rows[3], rows[1], rows[4]), records, strict=True):
        accuracies = [f"{100 * accuracy:.2f}" for accuracy in record["accuracies"]]
        assert row[2:] == [f"{record['strength']:.2f}", *accuracies]
    assert [float(row[2]) for row in rows[2::3]] == pytest.approx(list(medians.values()), abs=0.006)
    seen = [record["accuracies"][0] for record in records if record["method"] == "rotated-ewc"]
    assert float(rows[2][3]) == pytest.approx(100 * median(seen), abs=0.006)


def test_one_seed_has_no_median(
    images: ImageData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK.split(), "--seeds", "3", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "two tasks, the second with λ = 1" in out
    assert not [line for line in out.splitlines() if line.split()[1:2] == ["median"]]
    assert "rotated-ewc, seed 3, task 2/2" in out, "rotated-ewc is the default"


def test_training_images_can_be_held_out(
    images: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no test image has a part in anything."""
    images.test_inputs.fill_(torch.nan)
    images.test_labels.fill_(3)
    words = f"{QUICK} --seeds 3 --validate --output {tmp_path}"
    assert main(words.split()) == 0
    (record,) = json.loads((tmp_path / "calibrate.json").read_text())["records"]
    assert record["old_images"] == 100
    assert max(record["accuracies"]) > 0.5
    assert record["configuration"]["validate"] is True


def test_without_mnist_the_digits_are_used(
    no_download: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--epochs 3 --hidden 20 --ewc-lambda 0 --lr 0.005"
    root = str(tmp_path / "absent")
    assert main([*words.split(), "--data-root", root, "--output", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "calibrate.json").read_text())["records"]
    assert record["configuration"]["data"] == "digits"
    assert record["configuration"]["batch_size"] == 32
    assert record["configuration"]["strength"] == 0.0
    assert record["strength"] > 0, "harm is measured without a penalty, too"
    assert record["old_images"] == 1497
    assert "Permuted digits (not MNIST): two tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods naive", "--methods: expected one of rotated-ewc, rotated-ewc-proximal, rot"),
        ("--methods rotated-ewc-separate", "got 'rotated-ewc-separate'"),
        ("--tasks 3", "unrecognized arguments: --tasks 3"),
        ("--baseline-ewc-lambda 3", "unrecognized arguments: --baseline-ewc-lambda 3"),
        ("--ewc-lambda -1", "--ewc-lambda: expected a finite number ≥ 0, got '-1'"),
    ],
)
def test_what_makes_no_sense_here_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interruption_keeps_what_is_finished(
    images: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(variant, *arguments, **keywords) -> Calibration:
        if variant.name == "rotated-adam":
            raise KeyboardInterrupt
        return Calibration(variant.name, 0, 2.0, 10, [0.5, 0.5], {}, {})

    monkeypatch.setattr(benchmarks.calibration, "calibrate", interrupted)
    words = f"--methods rotated-ewc rotated-adam --output {tmp_path}"
    assert main(words.split()) == 130
    document = json.loads((tmp_path / "calibrate.json").read_text())
    assert document["median_strengths"] == {"rotated-ewc": 2.0}
    assert f"kept in {tmp_path / 'calibrate.json'}: 1." in capsys.readouterr().out
    assert main(["--methods", "rotated-adam", "--output", str(tmp_path)]) == 130
    assert "nothing is kept" in capsys.readouterr().out


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.calibrate.find_spec", lambda name: name != "avalanche")
    assert main(["--output", str(tmp_path)]) == 1
    assert "benchmarks.calibrate: error: something is missing" in capsys.readouterr().err
