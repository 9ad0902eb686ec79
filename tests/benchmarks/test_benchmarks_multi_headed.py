"""A network with a head for every task, against one example after another."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import avalanche_forward
from benchmarks.data import ImageData
from benchmarks.multi_headed import MultiHeadedNetwork
from benchmarks.scenarios import SplitImages, training_experiences


@pytest.fixture
def network() -> MultiHeadedNetwork:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    return MultiHeadedNetwork(trunk, features=5, classes=3, tasks=4)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "tasks",
    [
        [0] * 9,
        [3] * 9,
        [0, 1, 2, 3, 0, 1, 2, 3, 0],
        [3, 1, 3, 0, 0, 3, 1, 0, 1],
        [2, 2, 2, 2, 0, 2, 2, 2, 2],
    ],
)
def test_each_example_has_the_logits_of_its_own_head(
    network: MultiHeadedNetwork, inputs: Tensor, tasks: list[int]
) -> None:
    expected = torch.stack(
        [
            network.heads[task](network.trunk(x[None]))[0]
            for x, task in zip(inputs, tasks, strict=True)
        ]
    )
    torch.testing.assert_close(network(inputs, torch.tensor(tasks)), expected)


def test_gradients_reach_the_heads_of_the_batch_alone(
    network: MultiHeadedNetwork, inputs: Tensor
) -> None:
    network(inputs, torch.tensor([1, 3, 1, 1, 3, 3, 1, 1, 1])).sum().backward()
    have = [head.weight.grad is not None for head in network.heads]
    assert have == [False, True, False, True]
    torch.testing.assert_close(network.heads[1].bias.grad, torch.full((3,), 6.0))


def test_without_task_labels_all_trained_heads_answer(
    network: MultiHeadedNetwork, tiny_images: ImageData
) -> None:
    assert network(tiny_images.test_inputs, None) == {}
    for experience in training_experiences(SplitImages(tiny_images, 5, "task"), jointly=False)[:2]:
        network.adaptation(experience)
    logits = network(tiny_images.test_inputs, None)
    assert sorted(logits) == [0, 1]
    for task, found in logits.items():
        expected = network(tiny_images.test_inputs, torch.full((8,), task))
        assert torch.equal(found, expected)


def test_avalanche_hands_on_the_task_labels(network: MultiHeadedNetwork, inputs: Tensor) -> None:
    tasks = torch.tensor([2, 0, 1, 1, 2, 0, 3, 0, 0])
    assert torch.equal(avalanche_forward(network, inputs, tasks), network(inputs, tasks))
