"""The networks that are trained."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import avalanche_forward
from benchmarks.data import ImageData
from benchmarks.models import MultiHeadedNetwork, convolutions, make_model
from benchmarks.scenarios import PermutedImages, SplitImages, training_experiences


@pytest.fixture
def colour_images(tiny_images: ImageData) -> ImageData:
    """Images of three channels, five by seven pixels."""
    return replace(
        tiny_images,
        train_inputs=torch.arange(20 * 105.0).reshape(20, 105),
        test_inputs=torch.arange(8 * 105.0).reshape(8, 105),
        shape=(3, 5, 7),
    )


@pytest.fixture
def network() -> MultiHeadedNetwork:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    return MultiHeadedNetwork(trunk, features=5, classes=3, tasks=4)


@pytest.mark.parametrize("size", [(32, 32), (5, 7), (8, 1)])
def test_convolutions_say_how_many_features_come_out(size: tuple[int, int]) -> None:
    layers, features = convolutions((3, *size))
    outputs = nn.Sequential(*layers)(torch.zeros(2, 3 * size[0] * size[1]))
    assert outputs.shape == (2, features)
    made = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    assert made == [32, 64, 64]


def test_channels_come_first() -> None:
    layers, _ = convolutions((3, 4, 4))
    image = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layers[0](image.flatten(1)), image)


def test_grey_images_get_a_perceptron(tiny_images: ImageData) -> None:
    model = make_model(PermutedImages(tiny_images, tasks=2, seed=0), (5, 4))
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Linear", "ReLU"] * 2 + ["Linear"]
    widths = [layer.weight.shape for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [(5, 6), (4, 5), (10, 4)]


@pytest.mark.parametrize(("increment", "outputs"), [("domain", 2), ("class", 10)])
def test_images_in_colour_get_convolutions(
    colour_images: ImageData, increment: str, outputs: int
) -> None:
    model = make_model(SplitImages(colour_images, 5, increment), (5, 4))
    kinds = [type(layer).__name__ for layer in model]
    assert (kinds.count("Conv2d"), kinds.count("Linear")) == (3, 3)
    assert model(colour_images.test_inputs).shape == (8, outputs)


def test_a_head_for_every_task(colour_images: ImageData) -> None:
    model = make_model(SplitImages(colour_images, 5, "task"), (6, 4))
    assert isinstance(model, MultiHeadedNetwork)
    assert [tuple(head.weight.shape) for head in model.heads] == [(2, 4)] * 5
    assert model(colour_images.test_inputs, torch.arange(8) % 5).shape == (8, 2)


@pytest.mark.parametrize("tasks", [[3] * 9, [3, 1, 3, 0, 0, 3, 1, 0, 1]])
def test_each_example_has_the_logits_of_its_own_head(
    network: MultiHeadedNetwork, tasks: list[int]
) -> None:
    inputs = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [network.heads[t](network.trunk(x[None]))[0] for x, t in zip(inputs, tasks, strict=True)]
    )
    labels = torch.tensor(tasks)
    torch.testing.assert_close(network(inputs, labels), expected)
    torch.testing.assert_close(avalanche_forward(network, inputs, labels), expected)
    found: Tensor = network(inputs, labels)
    found.sum().backward()
    have = [head.weight.grad is not None for head in network.heads]
    assert have == [task in tasks for task in range(4)]


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
