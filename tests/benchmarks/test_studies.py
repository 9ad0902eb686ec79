"""The studies: what they measure, and from command line to file with small images."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import rotate_ewc
from benchmarks import data as data_sets
from benchmarks import experiment
from benchmarks.__main__ import main
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.methods import Variant
from benchmarks.scenarios import PermutedImages
from benchmarks.studies import calibrate as study
from benchmarks.studies.calibrate import Calibration, calibrate, first_images, rows_of
from benchmarks.studies.oracles import OldTasks, exact_penalty
from rotate_ewc import EKFACPenalty, calibrated_strength
from tests.benchmarks.helpers import DOUBLE, make_record

CONFIGURATION = Configuration(
    tasks=2, epochs=5, hidden=(6,), batch_size=8, learning_rate=1e-2, fisher_samples=40
)


@pytest.fixture
def scenario(learnable_images: ImageData) -> PermutedImages:
    return PermutedImages(learnable_images, tasks=2, seed=3)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch, learnable_images: ImageData) -> ImageData:
    """Have small images loaded, whatever the folder."""
    monkeypatch.setattr(data_sets, "load_images", lambda root: learnable_images)
    return learnable_images


def call(name: str, words: str, folder: Path) -> Any:
    """Run a study, and return the document that it wrote."""
    assert main([f"study-{name}", *words.split(), "--output", str(folder)]) == 0
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", study.METHODS)
def test_the_strength_is_that_of_the_second_solution_before_it_is_consolidated(
    name: str, scenario: PermutedImages, learnable_images: ImageData, monkeypatch: Any
) -> None:
    seen: list[tuple[EKFACPenalty, nn.Module]] = []

    def spy(penalty: EKFACPenalty, model: nn.Module, *arguments: Any) -> float:
        seen.append((copy.deepcopy(penalty), copy.deepcopy(model)))
        return calibrated_strength(penalty, model, *arguments)

    monkeypatch.setattr(rotate_ewc, "calibrated_strength", spy)
    variant = Variant(name, 1.0)
    found = calibrate(variant, scenario, CONFIGURATION, seed=3)
    ((penalty, model),) = seen
    assert (penalty.num_tasks, penalty.strength) == (1, 1.0)
    old = learnable_images.train_inputs[:, scenario.permutations[0]]
    expected = calibrated_strength(
        penalty, model, nn.CrossEntropyLoss(), [(old, learnable_images.train_labels)]
    )
    assert found.strength == pytest.approx(expected, rel=1e-5)
    assert found.strength > 0
    assert found.old_images == 120
    assert (found.record.method, found.record.seed, found.record.strength) == (name, 3, 1.0)
    # Measuring changes nothing.
    plain = experiment.run(variant, scenario, CONFIGURATION, seed=3, quiet=True)
    assert plain.accuracy_matrix == found.record.accuracy_matrix


def test_old_data_are_the_first_images_of_the_first_task(
    scenario: PermutedImages, learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "OLD_IMAGES", 50)
    monkeypatch.setattr(study, "OLD_BATCH_SIZE", 30)
    data = first_images(scenario)
    assert [len(labels) for _, labels in data] == [30, 20]
    permuted = learnable_images.train_inputs[:50, scenario.permutations[0]]
    assert torch.equal(torch.cat([inputs for inputs, _ in data]), permuted)
    labels = torch.cat([labels for _, labels in data])
    assert torch.equal(labels, learnable_images.train_labels[:50])


def test_calibrations_are_tabulated_with_their_medians() -> None:
    record = make_record("rotated-ewc", [[0.9, 0.1], [0.8, 0.6]])
    found = [Calibration(s, 9, replace(record, seed=n)) for n, s in enumerate((1.0, 7.0, 2.0))]
    rows = list(
        rows_of([*found, Calibration(3.0, 9, make_record("rotated-adam", [[0.5] * 2] * 2))])
    )
    assert rows[0] == ("rotated-ewc", "0", "1.00", "80.00", "60.00")
    assert rows[3] == ("rotated-ewc", "median", "2.00", "80.00", "60.00")
    assert rows[4:] == [("rotated-adam", "0", "3.00", "50.00", "50.00")]


def test_both_precisions_are_stored(images: ImageData, tmp_path: Path, capsys: Any) -> None:
    words = "--epochs 2 --hidden 6 --batch-size 20 --lr 0.01 --fisher-samples 40 --tasks 3"
    words += " --methods rotated-ewc rotated-adam --seeds 3"
    records = call("storage", words, tmp_path)["records"]
    found = {(one["record"]["method"], one["precision"]): one for one in records}
    assert len(found) == 4
    for method in ("rotated-ewc", "rotated-adam"):
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


def test_exact_penalty_is_the_dense_one() -> None:
    """`½ Δᵀ (Σ_n J_nᵀ (diag(p_n) - p_n p_nᵀ) J_n) Δ / N`, from Jacobians written out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(7, 6, dtype=DOUBLE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    delta = torch.cat([(p - anchor[name]).flatten() for name, p in model.named_parameters()])
    expected = torch.zeros((), dtype=DOUBLE)
    for image in images:

        def logits(parameters: dict[str, Tensor], x: Tensor = image) -> Tensor:
            found: Tensor = functional_call(model, parameters, (x,))
            return found

        derivative = jacrev(logits)(anchor)
        change = torch.cat([derivative[name].flatten(1) for name in anchor], dim=1) @ delta
        p = logits(anchor).softmax(0)
        expected = expected + 3 / 2 * change @ (torch.diag(p) - torch.outer(p, p)) @ change / 7
    found = exact_penalty(model, anchor, images, tasks=3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        rtol=1e-10,
        atol=1e-14,
    )


def test_old_images_are_those_of_old_tasks(tiny_images: ImageData) -> None:
    scenario = PermutedImages(tiny_images, tasks=4, seed=1)
    old = OldTasks(scenario, tiny_images.train_inputs, tiny_images.train_labels)
    known = [tiny_images.train_inputs[:, scenario.permutations[task]] for task in range(4)]
    owners = {
        tuple(bool((image == known[task]).all(dim=1).any()) for task in range(4))
        for image in old.sample(2, 60)
    }
    assert owners == {(True, False, False, False), (False, True, False, False)}
    ((images, labels),) = old.batches(3, 12)
    assert len(images) == len(labels) == 12
    for image, label in zip(images, labels, strict=True):
        (row,) = (image == known[3]).all(dim=1).nonzero().flatten().tolist()
        assert label == tiny_images.train_labels[row]


def test_causes_of_every_combination(images: ImageData, tmp_path: Path, capsys: Any) -> None:
    words = "--tasks 2 --epochs 6 --batch-size 20 --hidden 8 --exact-samples 50 --seeds 3"
    document = call("causes", f"{words} --lr 0.02 --fisher-samples 100", tmp_path)
    records = document["records"]
    assert [(r["curvature"], r["optimizer"], r["seed"]) for r in records] == [
        (curvature, optimizer, 3)
        for curvature in ("stored", "refreshed", "exact")
        for optimizer in ("adam", "rotated-adam")
    ]
    assert all(min(record["accuracies"]) > 0.5 for record in records)
    assert document["settings"]["hidden"] == [8]
    assert document["settings"]["learning_rate"] == 0.02
    printed = capsys.readouterr().out
    assert "Accuracies are those on the last 20 training images" in printed
    assert "rotated-adam  refreshed" in printed
