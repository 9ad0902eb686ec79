"""Rotated tasks, against another library's rotation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.scenarios import RotatedImages, make_scenario

BACKGROUND = -0.5
SIZE = 9


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
def scenario(drawn_images: ImageData) -> RotatedImages:
    return RotatedImages(drawn_images, tasks=4, seed=5)


def rotated(flat: torch.Tensor, angle: float) -> torch.Tensor:
    """Another library's bilinear rotation of flat images."""
    images = flat.reshape(-1, SIZE, SIZE).double().numpy()
    turned = ndimage.rotate(
        images, angle, axes=(2, 1), reshape=False, order=1, mode="grid-constant", cval=BACKGROUND
    )
    return torch.from_numpy(np.ascontiguousarray(turned)).float().flatten(1)


def test_angles_depend_on_the_seed_alone(drawn_images: ImageData) -> None:
    torch.manual_seed(1)
    first = RotatedImages(drawn_images, tasks=4, seed=5).angles
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = RotatedImages(drawn_images, tasks=4, seed=5).angles
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert first != RotatedImages(drawn_images, tasks=4, seed=6).angles


def test_more_tasks_begin_with_the_same_angles(
    drawn_images: ImageData, scenario: RotatedImages
) -> None:
    longer = RotatedImages(drawn_images, tasks=60, seed=5).angles
    assert longer[:4] == scenario.angles
    assert 0 <= min(longer) < 30
    assert 150 < max(longer) <= 180


def test_images_are_rotated_as_elsewhere(drawn_images: ImageData, scenario: RotatedImages) -> None:
    for task, dataset in enumerate(scenario.training_sets()):
        expected = rotated(drawn_images.train_inputs, scenario.angles[task])
        found = torch.stack([pixels for pixels, _ in dataset])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        inputs, labels = scenario.test_set(task)
        expected = rotated(drawn_images.test_inputs, scenario.angles[task])
        torch.testing.assert_close(inputs, expected, atol=1e-4, rtol=0)
        assert torch.equal(labels, drawn_images.test_labels)
        assert [label for _, label in dataset] == drawn_images.train_labels.tolist()


def test_what_comes_in_from_outside_is_background(
    drawn_images: ImageData, scenario: RotatedImages
) -> None:
    blank = torch.full((1, SIZE * SIZE), BACKGROUND)
    for task in range(4):
        torch.testing.assert_close(scenario.transform(blank, task), blank)


def test_a_quarter_turn_is_exact(drawn_images: ImageData, scenario: RotatedImages) -> None:
    scenario.angles[0] = 90.0
    (image,) = scenario.transform(drawn_images.train_inputs[:1], 0).reshape(1, SIZE, SIZE)
    original = drawn_images.train_inputs[0].reshape(SIZE, SIZE)
    torch.testing.assert_close(image, torch.rot90(original), atol=1e-4, rtol=0)


def test_earlier_tasks_can_be_read_while_a_later_one_is_current(scenario: RotatedImages) -> None:
    first, second = scenario.training_sets()[:2]
    expected = [first[index][0].clone() for index in range(20)]
    later = second[7][0].clone()
    for index in (7, 0, 19):
        torch.testing.assert_close(first[index][0], expected[index])
        torch.testing.assert_close(second[7][0], later)
    assert not torch.allclose(later, expected[7])


def test_joint_training_has_every_image_at_every_angle(scenario: RotatedImages) -> None:
    joint = scenario.joint_training_set()
    assert len(joint) == 80
    for task, dataset in enumerate(scenario.training_sets()):
        for index in (0, 13):
            pixels, label = joint[20 * task + index]
            torch.testing.assert_close(pixels, dataset[index][0])
            assert label == dataset[index][1]


def test_the_registry_makes_it_with_its_seed(drawn_images: ImageData) -> None:
    configuration = Configuration(scenario="rotated_mnist", tasks=4)
    made = make_scenario(configuration, drawn_images, seed=5)
    assert isinstance(made, RotatedImages)
    assert made.name == "rotated_mnist"
    assert made.angles == RotatedImages(drawn_images, tasks=4, seed=5).angles
