"""Images in memory: MNIST where it can be had, scikit-learn's digits where it cannot.

Both come as flat, normalised ``float32`` tensors. The digits (8 by 8 pixels) need no download, so
that every benchmark runs on a machine without a network; their figures are not comparable with
MNIST's, which is why :class:`ImageData` carries a line to announce its origin.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.download import DataUnavailableError, download, reason

MNIST_MEAN = 0.1307
MNIST_STANDARD_DEVIATION = 0.3081
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
MNIST_SHAPE = (1, 28, 28)
DIGITS_SHAPE = (1, 8, 8)
DIGITS_TEST_IMAGES = 300
VALIDATION_PART = 6


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of images.

    Attributes:
        source: ``"mnist"``, ``"digits"``, ``"cifar10"`` or ``"cifar100"``.
        announcement: One line that tells a reader which data these are and where they are from.
        train_inputs: Normalised pixels, ``float32`` ``[N, D]``.
        train_labels: Classes, ``int64`` ``[N]``.
        test_inputs: Normalised pixels, ``float32`` ``[M, D]``.
        test_labels: Classes, ``int64`` ``[M]``.
        shape: Channels, height and width of an image; their product is ``D``.
        classes: Number of classes.
    """

    source: str
    announcement: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    shape: tuple[int, ...]
    classes: int = 10

    def for_validation(self) -> "ImageData":
        """Hold out the last sixth of the training images, in place of the test images.

        Returns:
            Images of which none is a test image, to choose options by.
        """
        held_out = len(self.train_inputs) // VALIDATION_PART
        kept = len(self.train_inputs) - held_out
        return dataclasses.replace(
            self,
            announcement=f"{self.announcement} Accuracies are those on the last {held_out:,} "
            f"training images, which are not trained on.",
            train_inputs=self.train_inputs[:kept],
            train_labels=self.train_labels[:kept],
            test_inputs=self.train_inputs[kept:],
            test_labels=self.train_labels[kept:],
        )

    def limited(self, training_images: int) -> "ImageData":
        """Keep the first training images only.

        Args:
            training_images: How many; 0 keeps all.
        """
        if not 0 < training_images < len(self.train_inputs):
            return self
        return dataclasses.replace(
            self,
            announcement=f"{self.announcement} Of the training images, the first "
            f"{training_images:,} are used.",
            train_inputs=self.train_inputs[:training_images],
            train_labels=self.train_labels[:training_images],
        )


def load_images(data_root: Path) -> ImageData:
    """Load MNIST from a folder or the network, or else the digits.

    Args:
        data_root: Folder that has, or is to have, ``MNIST/raw`` with the four data files.

    Returns:
        The images. Nothing has been printed: printing the announcement is up to the caller.
    """
    try:
        return load_mnist(data_root)
    except DataUnavailableError as error:
        return load_digits(why=str(error))


def load_mnist(data_root: Path) -> ImageData:
    """Load MNIST, downloading it where it is missing.

    Args:
        data_root: Folder that has, or is to have, ``MNIST/raw`` with the four data files.

    Returns:
        The images.

    Raises:
        DataUnavailableError: If the files are damaged, or missing and cannot be downloaded.
    """
    from torchvision.datasets import MNIST

    origin = f"from {data_root}"
    if not all((data_root / "MNIST" / "raw" / name).is_file() for name in MNIST_FILES):
        _download_mnist(data_root)
        origin = f"downloaded to {data_root}"
    try:
        training, test = MNIST(data_root, train=True), MNIST(data_root, train=False)
    # Truncated files fail in the parser, in whatever way their bytes make it fail.
    except Exception as error:
        raise DataUnavailableError(f"in {data_root} is damaged ({reason(error)})") from error
    return ImageData(
        source="mnist",
        announcement=f"Data: MNIST {sizes(len(training), len(test), MNIST_SHAPE)} {origin}.",
        train_inputs=_normalised(training.data / 255, MNIST_MEAN, MNIST_STANDARD_DEVIATION),
        train_labels=training.targets.long(),
        test_inputs=_normalised(test.data / 255, MNIST_MEAN, MNIST_STANDARD_DEVIATION),
        test_labels=test.targets.long(),
        shape=MNIST_SHAPE,
    )


def load_digits(why: str = "was not asked for") -> ImageData:
    """Load the handwritten digits that come with scikit-learn, split the same way every time.

    Args:
        why: Why these and not MNIST, completing "MNIST ...".

    Returns:
        1,497 training and 300 test images, each class alike in both.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, classes = load(return_X_y=True)
    train_pixels, test_pixels, train_classes, test_classes = train_test_split(
        pixels, classes, test_size=DIGITS_TEST_IMAGES, stratify=classes, random_state=0
    )
    train_inputs = torch.from_numpy(train_pixels).float()
    mean, deviation = train_inputs.mean().item(), train_inputs.std().item()
    return ImageData(
        source="digits",
        announcement="Data: scikit-learn digits "
        f"{sizes(len(train_pixels), len(test_pixels), DIGITS_SHAPE)}: "
        f"MNIST {why}. The figures below are not comparable with MNIST's.",
        train_inputs=_normalised(train_inputs, mean, deviation),
        train_labels=torch.from_numpy(train_classes).long(),
        test_inputs=_normalised(torch.from_numpy(test_pixels), mean, deviation),
        test_labels=torch.from_numpy(test_classes).long(),
        shape=DIGITS_SHAPE,
    )


def _download_mnist(data_root: Path) -> None:
    """Download the four files of MNIST, or raise."""
    from torchvision.datasets import MNIST

    download(lambda: MNIST(data_root, download=True), data_root / "MNIST" / "raw", data_root)


def sizes(training: int, test: int, shape: tuple[int, ...]) -> str:
    """Describe the size of a data set of images ``[channels, height, width]``."""
    channels, height, width = shape
    colours = f"×{channels}" if channels > 1 else ""
    return f"({training:,} training and {test:,} test images of {height}×{width}{colours})"


def _normalised(pixels: Tensor, mean: float, deviation: float) -> Tensor:
    """Flatten images ``[N, ...]`` to ``float32`` ``[N, D]``, shifted and scaled."""
    return ((pixels.flatten(1) - mean) / deviation).float()
