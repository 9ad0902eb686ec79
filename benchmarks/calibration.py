"""One run of two tasks, in which λ is measured where the second ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from benchmarks.avalanche_names import SupervisedPlugin
from benchmarks.configuration import Configuration
from benchmarks.methods import Variant
from benchmarks.runner import run
from benchmarks.scenarios import Scenario
from rotate_ewc import calibrated_strength
from rotate_ewc.integrations.avalanche import RotatedEWCPlugin

OLD_IMAGES = 10_000
OLD_BATCH_SIZE = 2_000

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Calibration:
    """The results of one method at one seed.

    Attributes:
        method: Name of the method, as given to ``--methods``.
        seed: Seed of the initial weights, the order of the batches and the tasks.
        strength: The calibrated λ.
        old_images: Training images of the first task that it was measured on.
        accuracies: Accuracies on both tasks after the second, fractions.
        configuration: The options of the run, data source and thread count; ``"strength"`` is the
            λ of the calibration itself.
        versions: Versions of the software, and the processor.
    """

    method: str
    seed: int
    strength: float
    old_images: int
    accuracies: list[float]
    configuration: dict[str, Any]
    versions: dict[str, Any]


class CalibrationPlugin(SupervisedPlugin, supports_distributed=True):  # type: ignore[misc, call-arg]
    """Measures λ after the second task; to be called before the plugin that then consolidates it.

    What is left of proximal steps, where their interval does not divide the number of steps, is
    taken by that plugin, and so after the measurement.

    Attributes:
        strength: The calibrated λ; None before the end of the second task.
    """

    def __init__(self, old_data: Batches) -> None:
        """Wait for the second task.

        Args:
            old_data: Images of the first.
        """
        super().__init__()
        self.strength: float | None = None
        self._old_data = old_data

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Measure, if one task has been consolidated and this is the end of another."""
        (plugin,) = (found for found in strategy.plugins if isinstance(found, RotatedEWCPlugin))
        if plugin.penalty.num_tasks == 1:
            self.strength = calibrated_strength(
                plugin.penalty, strategy.model, strategy._criterion, self._old_data
            )


def calibrate(
    variant: Variant,
    scenario: Scenario,
    configuration: Configuration,
    *,
    seed: int,
    data_source: str,
) -> Calibration:
    """Train two tasks and measure λ at the end of the second, before it is consolidated.

    Args:
        variant: A rotated method, and the λ to train the second task with.
        scenario: Two tasks, made with the same seed.
        configuration: The options.
        seed: Seed of PyTorch's global random state, which is set.
        data_source: Where the images are from, for the record.

    Returns:
        The results.
    """
    old_data = first_images(scenario)
    measurement = CalibrationPlugin(old_data)
    record = run(
        variant,
        scenario,
        configuration,
        seed=seed,
        data_source=data_source,
        extra_plugins=[measurement],
    )
    assert measurement.strength is not None  # there were two tasks
    return Calibration(
        method=variant.name,
        seed=seed,
        strength=measurement.strength,
        old_images=sum(len(labels) for _, labels in old_data),
        accuracies=record.accuracy_matrix[-1],
        configuration=record.configuration,
        versions=record.versions,
    )


def first_images(scenario: Scenario) -> Batches:
    """The first :data:`OLD_IMAGES` training images of the first task, or all, in batches."""
    dataset: Any = scenario.training_sets()[0]
    rows: Sequence[int] = range(min(OLD_IMAGES, len(dataset)))
    loader = DataLoader(Subset(dataset, rows), batch_size=OLD_BATCH_SIZE)
    return [(inputs, torch.as_tensor(labels)) for inputs, labels in loader]
