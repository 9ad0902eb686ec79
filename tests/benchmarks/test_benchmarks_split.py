"""Streams of tasks with classes of their own."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.scenarios import SplitImages, make_scenario, training_experiences
from benchmarks.scenarios.split import INCREMENTS

# Labels of a tiny image of class 7, and the number of outputs, when ten classes make five tasks.
OF_CLASS_SEVEN = {"task": (1, 2), "domain": (1, 2), "class": (7, 10)}


def row_of(pixels: torch.Tensor) -> int:
    """The number of a tiny training image, whose first pixel is six times that."""
    return int(pixels[0]) // 6


@pytest.mark.parametrize("increment", INCREMENTS)
def test_every_image_is_in_the_task_of_its_class(tiny_images: ImageData, increment) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    found = []
    for task, dataset in enumerate(scenario.training_sets()):
        rows = [row_of(pixels) for pixels, _ in dataset]
        assert {row % 10 // 2 for row in rows} == {task}
        assert rows == sorted(rows), "in the order of the images"
        found += rows
    assert sorted(found) == list(range(20))


@pytest.mark.parametrize("increment", INCREMENTS)
def test_what_the_network_is_to_answer(tiny_images: ImageData, increment) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    label, outputs = OF_CLASS_SEVEN[increment]
    assert scenario.classes == outputs
    assert scenario.multi_headed == (increment == "task")
    answers = {row_of(pixels): answer for pixels, answer in scenario.training_sets()[3]}
    assert sorted(answers) == [6, 7, 16, 17]
    assert answers[7] == answers[17] == label
    assert answers[6] == answers[16] == label - 1


@pytest.mark.parametrize("increment", INCREMENTS)
def test_tests_have_the_labels_of_training(tiny_images: ImageData, increment) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    inputs, labels = scenario.test_set(3)
    assert torch.equal(inputs, tiny_images.test_inputs[6:8])
    label = OF_CLASS_SEVEN[increment][0]
    assert labels.tolist() == [label - 1, label]
    assert [len(scenario.test_set(task)[0]) for task in range(4)] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"none of 8 images is for task 5 of 5"):
        scenario.test_set(4)


@pytest.mark.parametrize("increment", INCREMENTS)
def test_the_joint_set_is_all_training_sets(tiny_images: ImageData, increment) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    joint = scenario.joint_training_set()
    separate = [example for dataset in scenario.training_sets() for example in dataset]
    assert len(joint) == len(separate) == 20
    for (pixels, label), (other, expected) in zip(joint, separate, strict=True):
        assert torch.equal(pixels, other)
        assert label == expected
    told = [task for task in range(5) for _ in range(4)]
    assert joint.task_labels == (told if increment == "task" else None)


@pytest.mark.parametrize("jointly", [False, True])
def test_task_labels_are_in_the_batches_of_many_heads(
    tiny_images: ImageData, jointly: bool
) -> None:
    scenario = SplitImages(tiny_images, 5, "task")
    seen = []
    for number, experience in enumerate(training_experiences(scenario, jointly=jointly)):
        assert experience.task_labels == (list(range(5)) if jointly else [number])
        for pixels, labels, tasks in DataLoader(experience.dataset, batch_size=3):
            for image, label, task in zip(pixels, labels, tasks, strict=True):
                row = row_of(image)
                assert (label, task) == (row % 2, row % 10 // 2)
                seen.append(row)
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("increment", ["domain", "class"])
def test_no_task_labels_where_the_task_is_not_given(tiny_images: ImageData, increment) -> None:
    scenario = SplitImages(tiny_images, 5, increment)
    for experience in training_experiences(scenario, jointly=False):
        (batch,) = DataLoader(experience.dataset, batch_size=4)
        assert len(batch) == 2


@pytest.mark.parametrize(("tasks", "per_task"), [(1, 10), (2, 5), (10, 1)])
def test_any_even_share(tiny_images: ImageData, tasks: int, per_task: int) -> None:
    scenario = SplitImages(tiny_images, tasks, "domain")
    assert scenario.classes == per_task
    assert [len(dataset) for dataset in scenario.training_sets()] == [20 // tasks] * tasks


@pytest.mark.parametrize("tasks", [3, 4, 11, 20])
def test_uneven_shares_are_refused(tiny_images: ImageData, tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"tasks: got {tasks}, .*10 classes"):
        SplitImages(tiny_images, tasks, "task")


@pytest.mark.parametrize("name", ["split_mnist", "split_cifar10", "split_cifar100"])
def test_the_registry_names_and_splits(tiny_images: ImageData, name: str) -> None:
    data = replace(tiny_images, classes=100) if name.endswith("100") else tiny_images
    configuration = Configuration(scenario=name, increment="domain", tasks=5)
    scenario = make_scenario(configuration, data, seed=3)
    assert scenario.name == f"{name}_domain"
    assert (scenario.tasks, scenario.classes) == (5, data.classes // 5)
