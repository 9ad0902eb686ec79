"""Accuracy against counting by hand."""

import torch
from torch import nn

from benchmarks.data import ImageData
from benchmarks.evaluation import EVALUATION_BATCH_SIZE, accuracies, accuracy
from benchmarks.scenarios import PermutedImages

CPU = torch.device("cpu")


def test_accuracy_is_the_fraction_of_right_answers_over_all_batches() -> None:
    size = EVALUATION_BATCH_SIZE + 3  # an uneven second batch
    inputs = torch.eye(4)[torch.arange(size) % 4]
    labels = torch.arange(size) % 4
    labels[:5] = 3 - labels[:5]  # five wrong
    assert accuracy(nn.Identity(), inputs, labels, CPU) == (size - 5) / size


def test_accuracy_is_measured_in_evaluation_mode_which_is_left_again() -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout(p=1.0))
    assert accuracy(model, torch.eye(4), torch.arange(4), CPU) == 1.0
    assert model.training


def test_every_task_is_tested_with_its_own_permutation(tiny_images: ImageData) -> None:
    scenario = PermutedImages(tiny_images, tasks=3, seed=0)

    class Tell(nn.Module):
        """Right if the pixels are in the order of task 1, else wrong."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            right = bool((x[0] == scenario.test_set(1)[0][0]).all())
            answers = torch.arange(len(x)) if right else (torch.arange(len(x)) + 1)
            return torch.eye(10)[answers]

    assert accuracies(Tell(), scenario, CPU) == [0.0, 1.0, 0.0]
