"""Permuted tasks, as tensors and through Avalanche."""

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.data import ImageData
from benchmarks.scenarios import PermutedImages, training_experiences


@pytest.fixture
def scenario(tiny_images: ImageData) -> PermutedImages:
    return PermutedImages(tiny_images, tasks=4, seed=5)


def test_permutations_are_permutations_and_differ(scenario: PermutedImages) -> None:
    assert scenario.permutations.shape == (4, 6)
    for permutation in scenario.permutations:
        assert sorted(permutation.tolist()) == list(range(6))
        assert permutation.tolist() != list(range(6))
    assert len({tuple(permutation.tolist()) for permutation in scenario.permutations}) == 4


def test_permutations_depend_on_the_seed_alone(tiny_images: ImageData) -> None:
    torch.manual_seed(1)
    first = PermutedImages(tiny_images, tasks=4, seed=5).permutations
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = PermutedImages(tiny_images, tasks=4, seed=5).permutations
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, PermutedImages(tiny_images, tasks=4, seed=6).permutations)


def test_more_tasks_begin_with_the_same_tasks(
    tiny_images: ImageData, scenario: PermutedImages
) -> None:
    longer = PermutedImages(tiny_images, tasks=6, seed=5)
    assert torch.equal(longer.permutations[:4], scenario.permutations)


def test_a_task_permutes_all_its_images_alike(
    tiny_images: ImageData, scenario: PermutedImages
) -> None:
    for task, dataset in enumerate(scenario.training_sets()):
        order = scenario.permutations[task].tolist()
        assert len(dataset) == 20
        for index in (0, 7, 19):
            pixels, label = dataset[index]
            original = tiny_images.train_inputs[index].tolist()
            assert pixels.tolist() == [original[column] for column in order]
            assert label == index % 10
        inputs, labels = scenario.test_set(task)
        expected = [tiny_images.test_inputs[3].tolist()[column] for column in order]
        assert inputs[3].tolist() == expected
        assert torch.equal(labels, tiny_images.test_labels)


def test_tasks_may_be_read_in_any_order(scenario: PermutedImages) -> None:
    first, second = scenario.training_sets()[:2]
    before = first[3][0].clone()
    assert not torch.equal(second[3][0], before)
    assert torch.equal(first[3][0], before)


def test_all_images_are_permuted_once_for_each_task(
    scenario: PermutedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    transform = scenario.transform

    def count(inputs: torch.Tensor, task: int) -> torch.Tensor:
        sizes.append((task, len(inputs)))
        return transform(inputs, task)

    monkeypatch.setattr(scenario, "transform", count)
    for dataset in scenario.training_sets()[:2]:
        for index in range(20):
            dataset[index]
    assert sizes == [(0, 20), (1, 20)]


def test_earlier_images_are_permuted_alone_while_a_later_task_is_current(
    scenario: PermutedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, third = scenario.training_sets()[:3]
    expected = [first[index][0].clone() for index in range(20)]
    current = third[0][0]
    sizes: list[int] = []
    transform = scenario.transform

    def count(inputs: torch.Tensor, task: int) -> torch.Tensor:
        sizes.append(len(inputs))
        return transform(inputs, task)

    monkeypatch.setattr(scenario, "transform", count)
    for index in (3, 19, 0):
        assert torch.equal(first[index][0], expected[index])
    assert third[0][0] is current, "the copy of the later task is still there"
    assert sizes == [1, 1, 1]


def test_joint_training_has_every_image_of_every_task(scenario: PermutedImages) -> None:
    joint = scenario.joint_training_set()
    assert len(joint) == 80
    for task, dataset in enumerate(scenario.training_sets()):
        for index in range(20):
            pixels, label = joint[20 * task + index]
            assert torch.equal(pixels, dataset[index][0])
            assert label == dataset[index][1] == joint.targets[20 * task + index]


def test_experiences_hold_the_tasks_in_order(scenario: PermutedImages) -> None:
    experiences = training_experiences(scenario, jointly=False)
    assert len(experiences) == 4
    for experience, dataset in zip(experiences, scenario.training_sets(), strict=True):
        loader = DataLoader(experience.dataset, batch_size=20)
        inputs, labels = next(iter(loader))
        assert torch.equal(inputs, torch.stack([dataset[index][0] for index in range(20)]))
        assert labels.tolist() == list(experience.dataset.targets) == list(dataset.targets)


def test_the_joint_experience_holds_all_tasks(scenario: PermutedImages) -> None:
    (experience,) = training_experiences(scenario, jointly=True)
    assert len(experience.dataset) == 80
    assert torch.equal(experience.dataset[45][0], scenario.joint_training_set()[45][0])
