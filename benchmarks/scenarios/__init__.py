"""Streams of tasks, as PyTorch data sets and as Avalanche experiences."""

from pathlib import Path
from typing import cast

from benchmarks import data as data_sets
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.scenarios.base import LabelledDataset, Scenario, training_experiences
from benchmarks.scenarios.split import Increment, SplitImages
from benchmarks.scenarios.transformed import PermutedImages, RotatedImages

__all__ = [
    "LabelledDataset",
    "PermutedImages",
    "RotatedImages",
    "Scenario",
    "SplitImages",
    "load_data",
    "make_scenario",
    "training_experiences",
]


def load_data(configuration: Configuration, data_root: Path) -> ImageData:
    """Load the images of a scenario, as many of them as are to be used.

    Args:
        configuration: The options.
        data_root: Folder of the data sets.

    Returns:
        The images; for validation, held-out ones take the place of the test images.

    Raises:
        DataUnavailableError: If CIFAR is not to be had.
    """
    kinds = {"split_cifar10": data_sets.CIFAR10, "split_cifar100": data_sets.CIFAR100}
    kind = kinds.get(configuration.scenario)
    data = data_sets.load(kind, data_root) if kind else data_sets.load_images(data_root)
    data = data.limited(configuration.training_images)
    return data.for_validation() if configuration.validate else data


def make_scenario(configuration: Configuration, data: ImageData, seed: int) -> Scenario:
    """Make a stream of tasks.

    Args:
        configuration: The options.
        data: The images.
        seed: Seed of permutations and angles; split streams are the same for all seeds.

    Returns:
        The stream.

    Raises:
        ValueError: If the classes cannot be split into so many tasks.
    """
    if configuration.scenario == "permuted_mnist":
        return PermutedImages(data, configuration.tasks, seed)
    if configuration.scenario == "rotated_mnist":
        return RotatedImages(data, configuration.tasks, seed)
    increment = cast(Increment, configuration.increment)
    return SplitImages(data, configuration.tasks, increment, configuration.scenario)
