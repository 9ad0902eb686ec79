"""Things that several tests of the benchmarks need."""

import sys

import pytest
import torch

from benchmarks.data import ImageData
from benchmarks.scenarios import loaded


@pytest.fixture(autouse=True)
def forget_images() -> None:
    """Tests have images of their own in the same folders."""
    loaded.cache_clear()


@pytest.fixture
def tiny_images() -> ImageData:
    """Twenty training and eight test images of six pixels, every pixel value different."""
    return ImageData(
        source="digits",
        announcement="Data: tiny.",
        train_inputs=torch.arange(120.0).reshape(20, 6),
        train_labels=torch.arange(20) % 10,
        test_inputs=1_000 + torch.arange(48.0).reshape(8, 6),
        test_labels=torch.arange(8),
        shape=(1, 2, 3),
    )


@pytest.fixture
def learnable_images() -> ImageData:
    """Images of twelve pixels that a small network learns in a moment, in four classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 4
    centres = 2 * torch.randn(4, 12, generator=generator)
    inputs = centres[labels] + torch.randn(160, 12, generator=generator)
    return ImageData(
        source="mnist",
        announcement="Data: learnable.",
        train_inputs=inputs[:120],
        train_labels=labels[:120],
        test_inputs=inputs[120:],
        test_labels=labels[120:],
        shape=(1, 3, 4),
        classes=4,
    )


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to download data chatter and fail, as without a network."""

    def fail(self: object) -> None:
        sys.stdout.write("chatter of a mirror\n")
        raise RuntimeError("Error downloading:\nTried somewhere, got:\n<no network here>\n")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", fail)
