"""The networks that are trained."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.data import ImageData
from benchmarks.models import CHANNELS, convolutions, make_model, multilayer_perceptron
from benchmarks.multi_headed import MultiHeadedNetwork
from benchmarks.scenarios import PermutedImages, SplitImages


@pytest.fixture
def colour_images(tiny_images: ImageData) -> ImageData:
    """Images of three channels, five by seven pixels."""
    return replace(
        tiny_images,
        train_inputs=torch.arange(20 * 105.0).reshape(20, 105),
        test_inputs=torch.arange(8 * 105.0).reshape(8, 105),
        shape=(3, 5, 7),
    )


def test_the_network_has_the_layers_asked_for() -> None:
    model = multilayer_perceptron(6, (5, 4), 3)
    assert [tuple(parameter.shape) for parameter in model.parameters()] == [
        *((5, 6), (5,)),
        *((4, 5), (4,)),
        *((3, 4), (3,)),
    ]
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU"] * 2 + ["Linear"]


@pytest.mark.parametrize("size", [(32, 32), (5, 7), (8, 1)])
def test_convolutions_say_how_many_features_come_out(size: tuple[int, int]) -> None:
    layers, features = convolutions((3, *size))
    outputs = nn.Sequential(*layers)(torch.zeros(2, 3 * size[0] * size[1]))
    assert outputs.shape == (2, features)
    made = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)]
    assert made == list(CHANNELS)


def test_channels_come_first() -> None:
    layers, _ = convolutions((3, 4, 4))
    image = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layers[0](image.flatten(1)), image)


def test_grey_images_get_a_perceptron(tiny_images: ImageData) -> None:
    model = make_model(PermutedImages(tiny_images, tasks=2, seed=0), (4,))
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Linear"]
    assert model(tiny_images.test_inputs).shape == (8, 10)


@pytest.mark.parametrize("hidden", [(4,), (5, 4)])
@pytest.mark.parametrize(("increment", "outputs"), [("domain", 2), ("class", 10)])
def test_images_in_colour_get_convolutions(
    colour_images: ImageData, increment, outputs: int, hidden: tuple[int, ...]
) -> None:
    model = make_model(SplitImages(colour_images, 5, increment), hidden)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds.count("Conv2d") == 3
    assert kinds.count("Linear") == len(hidden) + 1
    assert model(colour_images.test_inputs).shape == (8, outputs)


@pytest.mark.parametrize("colour", [False, True])
def test_a_head_for_every_task(
    tiny_images: ImageData, colour_images: ImageData, colour: bool
) -> None:
    data = colour_images if colour else tiny_images
    model = make_model(SplitImages(data, 5, "task"), (6, 4))
    assert isinstance(model, MultiHeadedNetwork)
    assert [tuple(head.weight.shape) for head in model.heads] == [(2, 4)] * 5
    logits = model(data.test_inputs, torch.arange(8) % 5)
    assert logits.shape == (8, 2)


def test_networks_depend_on_the_random_state_alone(colour_images: ImageData) -> None:
    scenario = SplitImages(colour_images, 5, "task")
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(make_model(scenario, (4,)))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
