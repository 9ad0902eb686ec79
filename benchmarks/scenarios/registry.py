"""The scenarios by their names on the command line."""

from typing import cast

from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.scenarios.base import Scenario
from benchmarks.scenarios.split import Increment, SplitImages
from benchmarks.scenarios.transformed import PermutedImages, RotatedImages


def load_data(configuration: Configuration) -> ImageData:
    """Load the images of a scenario, as many of them as are to be used.

    Args:
        configuration: The options.

    Returns:
        The images; for validation, held-out ones take the place of the test images.

    Raises:
        DataUnavailableError: If CIFAR is not to be had.
    """
    from benchmarks.cifar import load_cifar
    from benchmarks.data import load_images

    if "cifar" in configuration.scenario:
        classes = 100 if configuration.scenario.endswith("100") else 10
        data = load_cifar(configuration.data_root, classes)
    else:
        data = load_images(configuration.data_root)
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
