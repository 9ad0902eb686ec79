"""One calibration, followed from outside."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.calibration
from benchmarks.calibrate import METHODS
from benchmarks.calibration import OLD_IMAGES, calibrate, first_images
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.methods import Variant
from benchmarks.scenarios import PermutedImages
from rotate_ewc import EKFACPenalty, calibrated_strength

CONFIGURATION = Configuration(
    tasks=2, epochs=10, hidden=(6,), batch_size=8, learning_rate=1e-2, fisher_samples=40
)


@pytest.fixture
def scenario(learnable_images: ImageData) -> PermutedImages:
    return PermutedImages(learnable_images, tasks=2, seed=3)


@pytest.mark.parametrize("name", METHODS)
def test_the_strength_is_that_of_the_second_solution_before_it_is_consolidated(
    name: str, scenario: PermutedImages, learnable_images: ImageData, monkeypatch
) -> None:
    seen: list[tuple[EKFACPenalty, nn.Module]] = []

    def spy(penalty: EKFACPenalty, model: nn.Module, *arguments: Any) -> float:
        seen.append((copy.deepcopy(penalty), copy.deepcopy(model)))
        return calibrated_strength(penalty, model, *arguments)

    monkeypatch.setattr(benchmarks.calibration, "calibrated_strength", spy)
    variant = Variant(name, name, 1.0)
    result = calibrate(variant, scenario, CONFIGURATION, seed=3, data_source="tiny")
    ((penalty, model),) = seen
    assert penalty.num_tasks == 1
    assert penalty.strength == 1.0
    old = learnable_images.train_inputs[:, scenario.permutations[0]]
    expected = calibrated_strength(
        penalty, model, nn.CrossEntropyLoss(), [(old, learnable_images.train_labels)]
    )
    assert result.strength == pytest.approx(expected, rel=1e-5)
    assert result.strength > 0
    assert result.old_images == 120
    assert (result.method, result.seed) == (name, 3)
    assert result.configuration["strength"] == 1.0
    assert result.configuration["data"] == "tiny"
    for task, accuracy in enumerate(result.accuracies):
        inputs, labels = scenario.test_set(task)
        right = (model.eval()(inputs).argmax(1) == labels).float().mean().item()
        # A last part of a proximal step may follow the measurement.
        assert accuracy == pytest.approx(right, abs=0.03 if "proximal" in name else 1e-6)


def test_the_same_seed_gives_the_same_strength(scenario: PermutedImages) -> None:
    variant = Variant("rotated-ewc", "rotated-ewc", 1.0)
    strengths = [
        calibrate(variant, scenario, CONFIGURATION, seed=seed, data_source="tiny").strength
        for seed in (3, 3, 4)
    ]
    assert strengths[0] == strengths[1] != strengths[2]


def test_measuring_changes_nothing(scenario: PermutedImages) -> None:
    """The second task ends where it would have ended, and so would a third begin."""
    variant = Variant("rotated-ewc", "rotated-ewc", 1.0)
    result = calibrate(variant, scenario, CONFIGURATION, seed=3, data_source="tiny")
    state = torch.get_rng_state()
    record = benchmarks.calibration.run(
        variant, scenario, CONFIGURATION, seed=3, data_source="tiny"
    )
    assert record.accuracy_matrix[-1] == result.accuracies
    assert torch.equal(torch.get_rng_state(), state)


def test_old_data_are_the_first_images_of_the_first_task(
    scenario: PermutedImages, learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OLD_IMAGES == 10_000
    monkeypatch.setattr(benchmarks.calibration, "OLD_IMAGES", 50)
    monkeypatch.setattr(benchmarks.calibration, "OLD_BATCH_SIZE", 30)
    data = first_images(scenario)
    assert [len(labels) for _, labels in data] == [30, 20]
    permuted = learnable_images.train_inputs[:50, scenario.permutations[0]]
    assert torch.equal(torch.cat([inputs for inputs, _ in data]), permuted)
    assert torch.equal(
        torch.cat([labels for _, labels in data]), learnable_images.train_labels[:50]
    )
