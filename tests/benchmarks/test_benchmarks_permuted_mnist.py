"""The whole benchmark, from command line to files, on the digits."""

import json
from pathlib import Path

import numpy as np
import pytest

import benchmarks.runner
from benchmarks.data import ImageData
from benchmarks.permuted_mnist import main

pytestmark = [pytest.mark.usefixtures("no_download")]


def call(output: Path, words: str) -> tuple[int, list[dict]]:
    """Run the benchmark on the digits; return its exit code and what it recorded."""
    root = output / "absent"
    code = main([*words.split(), "--data-root", str(root), "--output", str(output)])
    results = output / "permuted_mnist.json"
    return code, json.loads(results.read_text(encoding="utf-8"))["records"]


def test_naive_and_joint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, records = call(tmp_path, "--methods naive joint --tasks 2 --epochs 1 --hidden 20")
    assert code == 0
    naive, joint = records
    assert (naive["method"], joint["method"]) == ("naive", "joint")
    assert (naive["trained_jointly"], joint["trained_jointly"]) == (False, True)

    matrix = np.array(naive["accuracy_matrix"])
    assert matrix.shape == (2, 2)
    assert matrix[0, 0] > 0.3, "one epoch is enough to be better than chance"
    assert naive["average_accuracy"] == pytest.approx(matrix[1].mean())
    assert naive["forgetting"] == pytest.approx(matrix[0, 0] - matrix[1, 0])
    assert naive["backward_transfer"] == pytest.approx(matrix[1, 0] - matrix[0, 0])

    assert joint["accuracy_matrix"][0] == joint["accuracy_matrix"][1]
    assert joint["average_accuracy"] == pytest.approx(np.mean(joint["accuracy_matrix"][0]))
    assert min(joint["accuracy_matrix"][0]) > 0.3, "both tasks were trained on"
    assert joint["forgetting"] is joint["backward_transfer"] is None

    for record in records:
        assert record["training_seconds"] > 0
        assert record["estimation_seconds"] == record["penalty_ms_per_step"] == 0
        assert record["configuration"]["data"] == "digits"
        assert record["configuration"]["hidden"] == [20]
        assert record["configuration"]["epochs"] == 1
        assert record["configuration"]["batch_size"] == 32
        assert record["configuration"]["threads"] >= 1
        assert {"python", "torch", "avalanche", "rotate_ewc"} <= set(record["versions"])

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Data: scikit-learn digits (1,497 training")
    assert "--epochs 1 --batch-size 32" in lines[1]
    assert lines[-1].startswith("Wrote ")
    assert lines[-1].count(str(tmp_path)) == 2
    assert sum(line.startswith("naive, seed 0, task ") for line in lines) == 2
    assert (tmp_path / "permuted_mnist.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {
        "permuted_mnist.json",
        "permuted_mnist.png",
    }


def test_methods_start_alike_and_strengths_make_a_difference(tmp_path: Path) -> None:
    _, records = call(
        tmp_path,
        "--methods naive,ewc --tasks 2 --epochs 2 --hidden 20 --seeds 3 "
        "--baseline-ewc-lambda 1 10000",
    )
    assert [record["label"] for record in records] == ["naive", "ewc[λ=1]", "ewc[λ=10000]"]
    assert [record["configuration"]["strength"] for record in records] == [None, 1, 10000]
    first_rows = [record["accuracy_matrix"][0] for record in records]
    assert first_rows[0] == first_rows[1] == first_rows[2]
    naive, _, strong = records
    assert strong["forgetting"] < naive["forgetting"] - 0.05
    for record in records[1:]:
        assert record["estimation_seconds"] > 0
        assert record["penalty_ms_per_step"] > 0


def test_rotated_methods_forget_less(tmp_path: Path) -> None:
    pytest.importorskip("rotate_ewc.integrations.avalanche")
    _, records = call(
        tmp_path,
        "--methods naive rotated-ewc rotated-ewc-separate --tasks 3 --epochs 5 --hidden 30 "
        "--fisher-samples 500",
    )
    naive, merged, separate = records
    assert (merged["method"], separate["method"]) == ("rotated-ewc", "rotated-ewc-separate")
    for record in (merged, separate):
        assert record["accuracy_matrix"][0] == naive["accuracy_matrix"][0]
        assert record["forgetting"] < naive["forgetting"] - 0.05
        assert record["average_accuracy"] > naive["average_accuracy"] + 0.05
        assert record["estimation_seconds"] > 0
        assert record["penalty_ms_per_step"] > 0
    assert merged["accuracy_matrix"][2] != separate["accuracy_matrix"][2]


def test_validation_looks_at_no_test_image(
    tmp_path: Path, learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnable_images.test_inputs.fill_(np.nan)
    monkeypatch.setattr("benchmarks.data.load_images", lambda root: learnable_images)
    words = "--methods naive --tasks 1 --epochs 20 --hidden 8 --batch-size 8 --lr 0.01"
    _, (record,) = call(tmp_path, f"{words} --validate")
    assert record["average_accuracy"] > 0.9
    assert record["configuration"]["validate"] is True
    _, (record,) = call(tmp_path, words)
    assert record["average_accuracy"] < 0.5, "there is nothing to be seen on the test images"
    assert record["configuration"]["validate"] is False


def test_the_same_seed_gives_the_same_results(tmp_path: Path) -> None:
    words = "--methods naive --tasks 2 --epochs 1 --hidden 8 --seeds 0 1"
    _, first = call(tmp_path, words)
    _, second = call(tmp_path, words)
    matrices = [[record["accuracy_matrix"] for record in records] for records in (first, second)]
    assert matrices[0] == matrices[1]
    assert matrices[0][0] != matrices[0][1]


def test_an_interruption_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = benchmarks.runner.run

    def interrupted(variant, *arguments, **keywords):
        if variant.name == "joint":
            raise KeyboardInterrupt
        return original(variant, *arguments, **keywords)

    monkeypatch.setattr(benchmarks.runner, "run", interrupted)
    code, records = call(tmp_path, "--methods naive joint --tasks 1 --epochs 1 --hidden 8")
    assert code == 130
    assert [record["method"] for record in records] == ["naive"]
    assert f"kept in {tmp_path / 'permuted_mnist.json'}: 1." in capsys.readouterr().out


def test_an_interruption_before_the_first_result_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.data.load_images", interrupted)
    assert main(["--output", str(tmp_path)]) == 130
    assert "nothing is kept" in capsys.readouterr().out


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.permuted_mnist.find_spec", lambda name: name != "avalanche")
    assert main(["--output", str(tmp_path)]) == 1
    assert "pip install avalanche-lib\n" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file" / "below")]) == 1
    assert "--output: cannot make the folder" in capsys.readouterr().err
