"""Streams of tasks, as tensors and through Avalanche."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.configuration import INCREMENTS, Configuration
from benchmarks.data import ImageData
from benchmarks.scenarios import (
    PermutedImages,
    RotatedImages,
    SplitImages,
    make_scenario,
    training_experiences,
)

BACKGROUND = -0.5
SIZE = 9
# Labels of a tiny image of class 7, and the number of outputs, when ten classes make five tasks.
OF_CLASS_SEVEN = {"task": (1, 2), "domain": (1, 2), "class": (7, 10)}

increments = pytest.mark.parametrize("increment", INCREMENTS)


@pytest.fixture
def permuted(tiny_images: ImageData) -> PermutedImages:
    return PermutedImages(tiny_images, tasks=4, seed=5)


@pytest.fixture
def drawn_images(tiny_images: ImageData) -> ImageData:
    """Images of nine by nine pixels, with something in the middle of a background."""
    generator = torch.Generator().manual_seed(0)
    images = torch.full((28, SIZE, SIZE), BACKGROUND)
    images[:, 3:6, 3:6] = torch.rand(28, 3, 3, generator=generator)
    flat = images.flatten(1)
    return replace(
        tiny_images, train_inputs=flat[:20], test_inputs=flat[20:], shape=(1, SIZE, SIZE)
    )


@pytest.fixture
def rotated(drawn_images: ImageData) -> RotatedImages:
    return RotatedImages(drawn_images, tasks=4, seed=5)


def test_permutations_are_permutations_and_depend_on_the_seed_alone(
    tiny_images: ImageData, permuted: PermutedImages
) -> None:
    assert permuted.permutations.shape == (4, 6)
    for permutation in permuted.permutations:
        assert sorted(permutation.tolist()) == list(range(6))
        assert permutation.tolist() != list(range(6))
    state = torch.get_rng_state()
    longer = PermutedImages(tiny_images, tasks=6, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(longer.permutations[:4], permuted.permutations)
    other = PermutedImages(tiny_images, tasks=4, seed=6)
    assert not torch.equal(permuted.permutations, other.permutations)


def test_a_task_permutes_all_its_images_alike(
    tiny_images: ImageData, permuted: PermutedImages
) -> None:
    for task, dataset in enumerate(permuted.training_sets()):
        order = permuted.permutations[task].tolist()
        assert len(dataset) == 20
        for index in (0, 7, 19):
            pixels, label = dataset[index]
            original = tiny_images.train_inputs[index].tolist()
            assert pixels.tolist() == [original[column] for column in order]
            assert label == index % 10
        inputs, labels = permuted.test_set(task)
        expected = [tiny_images.test_inputs[3].tolist()[column] for column in order]
        assert inputs[3].tolist() == expected
        assert torch.equal(labels, tiny_images.test_labels)


def test_all_images_are_transformed_once_for_each_task_and_earlier_ones_alone(
    permuted: PermutedImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    transform = permuted.transform

    def count(inputs: Tensor, task: int) -> Tensor:
        sizes.append((task, len(inputs)))
        return transform(inputs, task)

    monkeypatch.setattr(permuted, "transform", count)
    first, second = permuted.training_sets()[:2]
    expected = [first[index][0].clone() for index in range(20)]
    current = second[0][0]
    for index in (3, 19, 0):
        assert torch.equal(first[index][0], expected[index])
    assert second[0][0] is current, "the copy of the later task is still there"
    assert sizes == [(0, 20), (1, 20), (0, 1), (0, 1), (0, 1)]


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_joint_training_has_every_image_of_every_task(
    kind: str, request: pytest.FixtureRequest
) -> None:
    scenario = request.getfixturevalue(kind)
    joint = scenario.training_sets(jointly=True)[0]
    assert len(joint) == 80
    for task, dataset in enumerate(scenario.training_sets()):
        for index in range(20):
            pixels, label = joint[20 * task + index]
            torch.testing.assert_close(pixels, dataset[index][0])
            assert label == dataset[index][1] == joint.targets[20 * task + index]


def test_experiences_hold_the_tasks_in_order(permuted: PermutedImages) -> None:
    experiences = training_experiences(permuted, jointly=False)
    assert len(experiences) == 4
    for experience, dataset in zip(experiences, permuted.training_sets(), strict=True):
        inputs, labels = next(iter(DataLoader(experience.dataset, batch_size=20)))
        assert torch.equal(inputs, torch.stack([dataset[index][0] for index in range(20)]))
        assert labels.tolist() == list(experience.dataset.targets) == list(dataset.targets)
    (joint,) = training_experiences(permuted, jointly=True)
    assert len(joint.dataset) == 80
    assert torch.equal(joint.dataset[45][0], permuted.training_sets(jointly=True)[0][45][0])


def test_angles_depend_on_the_seed_alone(drawn_images: ImageData, rotated: RotatedImages) -> None:
    state = torch.get_rng_state()
    longer = RotatedImages(drawn_images, tasks=60, seed=5).angles
    assert torch.equal(torch.get_rng_state(), state)
    assert longer[:4] == rotated.angles
    assert 0 <= min(longer) < 30
    assert 150 < max(longer) <= 180
    assert rotated.angles != RotatedImages(drawn_images, tasks=4, seed=6).angles


def test_images_are_rotated_as_elsewhere(drawn_images: ImageData, rotated: RotatedImages) -> None:
    """By SciPy's bilinear rotation."""

    def expected(flat: Tensor, angle: float) -> Tensor:
        images = flat.reshape(-1, SIZE, SIZE).double().numpy()
        options = {"reshape": False, "order": 1, "mode": "grid-constant", "cval": BACKGROUND}
        turned = ndimage.rotate(images, angle, axes=(2, 1), **options)
        return torch.from_numpy(np.ascontiguousarray(turned)).float().flatten(1)

    for task, dataset in enumerate(rotated.training_sets()):
        angle = rotated.angles[task]
        found = torch.stack([pixels for pixels, _ in dataset])
        turned = expected(drawn_images.train_inputs, angle)
        torch.testing.assert_close(found, turned, atol=1e-4, rtol=0)
        inputs, labels = rotated.test_set(task)
        turned = expected(drawn_images.test_inputs, angle)
        torch.testing.assert_close(inputs, turned, atol=1e-4, rtol=0)
        assert torch.equal(labels, drawn_images.test_labels)
        assert [label for _, label in dataset] == drawn_images.train_labels.tolist()
        blank = torch.full((1, SIZE * SIZE), BACKGROUND)
        torch.testing.assert_close(rotated.transform(blank, task), blank)


def row_of(pixels: Tensor) -> int:
    """The number of a tiny training image, whose first pixel is six times that."""
    return int(pixels[0]) // 6


@increments
def test_every_image_is_in_the_task_of_its_class(tiny_images: ImageData, increment: str) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    label, outputs = OF_CLASS_SEVEN[increment]
    assert scenario.classes == outputs
    assert scenario.multi_headed == (increment == "task")
    found = []
    for task, dataset in enumerate(scenario.training_sets()):
        rows = [row_of(pixels) for pixels, _ in dataset]
        assert {row % 10 // 2 for row in rows} == {task}
        assert rows == sorted(rows), "in the order of the images"
        found += rows
    assert sorted(found) == list(range(20))
    answers = {row_of(pixels): answer for pixels, answer in scenario.training_sets()[3]}
    assert answers == {7: label, 17: label, 6: label - 1, 16: label - 1}
    inputs, labels = scenario.test_set(3)
    assert torch.equal(inputs, tiny_images.test_inputs[6:8])
    assert labels.tolist() == [label - 1, label]
    with pytest.raises(ValueError, match=r"none of 8 images is for task 5 of 5"):
        scenario.test_set(4)


@increments
def test_the_joint_set_is_all_training_sets(tiny_images: ImageData, increment: str) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    joint = scenario.training_sets(jointly=True)[0]
    separate = [example for dataset in scenario.training_sets() for example in dataset]
    assert len(joint) == len(separate) == 20
    for (pixels, label), (other, expected) in zip(joint, separate, strict=True):
        assert torch.equal(pixels, other)
        assert label == expected
    told = [task for task in range(5) for _ in range(4)]
    assert joint.task_labels == (told if increment == "task" else None)


@pytest.mark.parametrize("jointly", [False, True])
@increments
def test_task_labels_are_in_the_batches_of_many_heads_alone(
    tiny_images: ImageData, jointly: bool, increment: str
) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    seen = []
    for experience in training_experiences(scenario, jointly=jointly):
        for pixels, labels, *tasks in DataLoader(experience.dataset, batch_size=3):
            assert len(tasks) == (increment == "task")
            for place, image in enumerate(pixels):
                row = row_of(image)
                assert labels[place] == (row % 10 if increment == "class" else row % 2)
                assert not tasks or tasks[0][place] == row % 10 // 2
                seen.append(row)
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("tasks", [3, 4, 11, 20])
def test_uneven_shares_are_refused(tiny_images: ImageData, tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"tasks: got {tasks}, .*10 classes"):
        SplitImages(tiny_images, tasks, "task")


def test_scenarios_are_made_by_name(tiny_images: ImageData) -> None:
    for name, kind in (("permuted_mnist", PermutedImages), ("rotated_mnist", RotatedImages)):
        made = make_scenario(Configuration(scenario=name, tasks=4), tiny_images, seed=5)
        assert (type(made), made.name, made.tasks) == (kind, name, 4)
    configuration = Configuration(scenario="split_mnist", increment="domain", tasks=5)
    made = make_scenario(configuration, tiny_images, seed=3)
    assert (made.name, made.tasks, made.classes) == ("split_mnist_domain", 5, 2)
    configuration = replace(configuration, scenario="split_images", images=Path("a/birds"))
    made = make_scenario(configuration, replace(tiny_images, source="birds"), seed=3)
    assert (made.name, made.tasks, made.classes) == ("split_birds_domain", 5, 2)
