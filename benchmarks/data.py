"""Images in memory: MNIST where it can be had, scikit-learn's digits where it cannot.

Both come as flat, normalised ``float32`` tensors. The digits (8 by 8 pixels) need no download, so
that every benchmark runs on a machine without a network; their figures are not comparable with
MNIST's, which is why :class:`ImageData` carries a line to announce its origin.
"""

import contextlib
import dataclasses
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MNIST_MEAN = 0.1307
MNIST_STANDARD_DEVIATION = 0.3081
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
NETWORK_TIMEOUT_SECONDS = 10.0
DIGITS_TEST_IMAGES = 300
VALIDATION_PART = 6


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of images.

    Attributes:
        source: ``"mnist"`` or ``"digits"``.
        announcement: One line that tells a reader which data these are and where they are from.
        train_inputs: Normalised pixels, ``float32`` ``[N, D]``.
        train_labels: Classes, ``int64`` ``[N]``.
        test_inputs: Normalised pixels, ``float32`` ``[M, D]``.
        test_labels: Classes, ``int64`` ``[M]``.
        classes: Number of classes.
    """

    source: str
    announcement: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
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


class MNISTUnavailableError(Exception):
    """MNIST can be neither read nor downloaded; the message completes "MNIST ..."."""


def load_images(data_root: Path) -> ImageData:
    """Load MNIST from a folder or the network, or else the digits.

    Args:
        data_root: Folder that has, or is to have, ``MNIST/raw`` with the four data files.

    Returns:
        The images. Nothing has been printed: printing the announcement is up to the caller.
    """
    try:
        return load_mnist(data_root)
    except MNISTUnavailableError as error:
        return load_digits(reason=str(error))


def load_mnist(data_root: Path) -> ImageData:
    """Load MNIST, downloading it where it is missing.

    Args:
        data_root: Folder that has, or is to have, ``MNIST/raw`` with the four data files.

    Returns:
        The images.

    Raises:
        MNISTUnavailableError: If the files are damaged, or missing and cannot be downloaded.
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
        raise MNISTUnavailableError(f"in {data_root} is damaged ({_reason(error)})") from error
    return ImageData(
        source="mnist",
        announcement=f"Data: MNIST {_sizes(len(training), len(test), 28)} {origin}.",
        train_inputs=_normalised(training.data / 255, MNIST_MEAN, MNIST_STANDARD_DEVIATION),
        train_labels=training.targets.long(),
        test_inputs=_normalised(test.data / 255, MNIST_MEAN, MNIST_STANDARD_DEVIATION),
        test_labels=test.targets.long(),
    )


def load_digits(reason: str = "was not asked for") -> ImageData:
    """Load the handwritten digits that come with scikit-learn, split the same way every time.

    Args:
        reason: Why these and not MNIST, completing "MNIST ...".

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
        announcement=f"Data: scikit-learn digits {_sizes(len(train_pixels), len(test_pixels), 8)}: "
        f"MNIST {reason}. The figures below are not comparable with MNIST's.",
        train_inputs=_normalised(train_inputs, mean, deviation),
        train_labels=torch.from_numpy(train_classes).long(),
        test_inputs=_normalised(torch.from_numpy(test_pixels), mean, deviation),
        test_labels=torch.from_numpy(test_classes).long(),
    )


def _download_mnist(data_root: Path) -> None:
    """Download the four files of MNIST in silence, or raise within about twenty seconds."""
    from torchvision.datasets import MNIST

    raw = data_root / "MNIST" / "raw"
    missing_folders = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        with _silence(), _network_timeout(NETWORK_TIMEOUT_SECONDS):
            MNIST(data_root, download=True)
    # No network, a full disk, a folder that cannot be written: the digits help with all of them.
    except Exception as error:
        for folder in missing_folders:
            with contextlib.suppress(OSError):  # one that holds something is kept
                folder.rmdir()
        raise MNISTUnavailableError(
            f"is not in {data_root} and could not be downloaded ({_reason(error)})"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep progress bars and mirror lists from preceding the announcement."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """Give up on connections that hang, torchvision having no option for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    """The last line of an error's message, which for torchvision is the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _sizes(training: int, test: int, side: int) -> str:
    """Describe the size of a data set of square images."""
    return f"({training:,} training and {test:,} test images of {side}×{side})"


def _normalised(pixels: Tensor, mean: float, deviation: float) -> Tensor:
    """Flatten images ``[N, ...]`` to ``float32`` ``[N, D]``, shifted and scaled."""
    return ((pixels.flatten(1) - mean) / deviation).float()
