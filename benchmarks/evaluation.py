"""Accuracy on the test sets, by plain forward passes.

Avalanche's evaluation loop would load every test image by itself, which takes longer than training.
"""

import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import avalanche_forward
from benchmarks.scenarios import Scenario

EVALUATION_BATCH_SIZE = 2_000


@torch.inference_mode()
def accuracy(
    model: nn.Module, inputs: Tensor, labels: Tensor, device: torch.device, task: int = 0
) -> float:
    """Fraction of examples whose largest logit is that of their class.

    Args:
        model: The network; it is left in the mode it was in.
        inputs: Inputs ``[M, ...]``.
        labels: Classes ``[M]``.
        device: Where the network is.
        task: What a network with a head for every task is told.

    Returns:
        A fraction between 0 and 1.
    """
    was_training = model.training
    model.eval()
    batches = zip(
        torch.split(inputs, EVALUATION_BATCH_SIZE),
        torch.split(labels, EVALUATION_BATCH_SIZE),
        strict=True,
    )
    correct = 0
    for x, y in batches:
        logits = avalanche_forward(model, x.to(device), torch.full((len(x),), task))
        correct += int((logits.argmax(1) == y.to(device)).sum().item())
    model.train(was_training)
    return correct / len(labels)


def accuracies(model: nn.Module, scenario: Scenario, device: torch.device) -> list[float]:
    """Accuracy on the test set of every task, learned already or not.

    Args:
        model: The network.
        scenario: The tasks.
        device: Where the network is.

    Returns:
        ``T`` fractions, one row of an accuracy matrix.
    """
    return [
        accuracy(model, *scenario.test_set(task), device, task) for task in range(scenario.tasks)
    ]
