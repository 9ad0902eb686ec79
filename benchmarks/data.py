"""Images in memory: MNIST, or scikit-learn's digits where it cannot be had, and those of folders.

All come as flat, normalised ``float32`` tensors. The digits (8 by 8 pixels) need no download, so
that every benchmark runs on a machine without a network; their figures are not comparable with
MNIST's, which is why :class:`ImageData` carries a line to announce its origin.
"""

import contextlib
import dataclasses
import io
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NETWORK_TIMEOUT_SECONDS = 10.0
DIGITS_TEST_IMAGES = 300
VALIDATION_PART = 6
FOLDER_SHAPE = (3, 32, 32)

MNIST_FOLDER = "MNIST/raw"  # below that of all data
MNIST_FILES = tuple(
    f"{part}-{content}-ubyte"
    for part in ("train", "t10k")
    for content in ("images-idx3", "labels-idx1")
)
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081  # of the training pixels, from 0 to 1


class DataUnavailableError(Exception):
    """MNIST can be neither read nor downloaded; the message completes "MNIST ..."."""


@dataclass(frozen=True)
class ImageData:
    """A training and a test set of images."""

    source: str  # ``"mnist"``, ``"digits"``, or the name of a folder
    announcement: str  # one line that tells a reader which data these are and where they are from
    train_inputs: Tensor  # normalised pixels, ``float32`` ``[N, D]``
    train_labels: Tensor  # classes, ``int64`` ``[N]``
    test_inputs: Tensor  # normalised pixels, ``float32`` ``[M, D]``
    test_labels: Tensor  # classes, ``int64`` ``[M]``
    shape: tuple[int, ...]  # channels, height and width of an image; their product is ``D``
    classes: int = 10

    def for_validation(self) -> "ImageData":
        """Hold out the last sixth of the training images, in place of the test images."""
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
        """Keep the first training images only; 0 keeps all."""
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
    """Load MNIST from a folder or the network, or else the digits; nothing is printed."""
    try:
        return load_mnist(data_root)
    except DataUnavailableError as error:
        return load_digits(why=str(error))


def load_mnist(data_root: Path) -> ImageData:
    """Load or download MNIST; ``DataUnavailableError`` if it is damaged or cannot be had."""
    from torchvision.datasets import MNIST

    folder = data_root / MNIST_FOLDER
    origin = f"from {data_root}"
    if not all((folder / name).exists() for name in MNIST_FILES):
        _download(lambda: MNIST(data_root, download=True), folder, data_root)
        origin = f"downloaded to {data_root}"
    try:
        training, test = MNIST(data_root, train=True), MNIST(data_root, train=False)
    # Damaged files fail in a check or in a parser, in whatever way their bytes make them fail.
    except Exception as error:
        raise DataUnavailableError(f"in {data_root} is damaged ({_reason(error)})") from error
    shape = (1, 28, 28)
    inputs = (one.data.float() / 255 for one in (training, test))
    train_inputs, test_inputs = (
        (pixels.flatten(1) - MNIST_MEAN) / MNIST_DEVIATION for pixels in inputs
    )
    return ImageData(
        source="mnist",
        announcement=f"Data: MNIST {_sizes(len(training), len(test), shape)} {origin}.",
        train_inputs=train_inputs,
        train_labels=training.targets.long(),
        test_inputs=test_inputs,
        test_labels=test.targets.long(),
        shape=shape,
    )


class FolderImages(NamedTuple):
    """Images in colour as they are in a folder, scaled to one size: ``uint8`` ``[N, 3, H, W]``."""

    train_pixels: Tensor
    train_labels: Tensor  # ``int64`` ``[N]``
    test_pixels: Tensor
    test_labels: Tensor
    classes: int


def read_folder(folder: Path, shape: tuple[int, int, int] = FOLDER_SHAPE) -> FolderImages:
    """Read ``train/CLASS`` and ``test/CLASS``; ``ValueError`` if there are no such images."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, PILToTensor, Resize

    prepare = Compose([Resize(shape[1:]), PILToTensor()])
    try:
        training, test = (ImageFolder(folder / part, prepare) for part in ("train", "test"))
        if training.classes != test.classes:
            raise ValueError("the classes in train and test differ")
        train_pixels, test_pixels = (
            torch.stack([image for image, _ in one]) for one in (training, test)
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--images: got {folder}, expected train/CLASS and test/CLASS with images for every "
            f"class ({_reason(error)})"
        ) from error
    train_labels, test_labels = (torch.tensor(one.targets) for one in (training, test))
    return FolderImages(train_pixels, train_labels, test_pixels, test_labels, len(training.classes))


def load_folder(folder: Path) -> ImageData:
    """Load images in colour from ``train/CLASS`` and ``test/CLASS`` below a folder.

    They are scaled to one size, training images put into a random order that is always the same,
    and channels normalised by their training pixels. ``ValueError`` if there are no such images.
    """
    images = read_folder(folder)
    number = len(images.train_labels)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0))
    train_inputs, test_inputs = images.train_pixels[order].float(), images.test_pixels.float()
    deviation, mean = torch.std_mean(train_inputs, dim=(0, 2, 3), keepdim=True)
    sizes = _sizes(number, len(test_inputs), FOLDER_SHAPE)
    return ImageData(
        source=folder.resolve().name,
        announcement=f"Data: {images.classes} classes of images {sizes} from {folder}.",
        train_inputs=train_inputs.sub_(mean).div_(deviation).flatten(1),
        train_labels=images.train_labels[order],
        test_inputs=test_inputs.sub_(mean).div_(deviation).flatten(1),
        test_labels=images.test_labels,
        shape=FOLDER_SHAPE,
        classes=images.classes,
    )


def load_digits(why: str = "was not asked for") -> ImageData:
    """Load scikit-learn's digits, always split alike; ``why`` completes "MNIST ..."."""
    from sklearn.datasets import load_digits as load_them
    from sklearn.model_selection import train_test_split

    pixels, classes = load_them(return_X_y=True)
    train_pixels, test_pixels, train_classes, test_classes = train_test_split(
        pixels, classes, test_size=DIGITS_TEST_IMAGES, stratify=classes, random_state=0
    )
    train_inputs = torch.from_numpy(train_pixels).float()
    mean, deviation = train_inputs.mean().item(), train_inputs.std().item()
    shape = (1, 8, 8)
    return ImageData(
        source="digits",
        announcement="Data: scikit-learn digits "
        f"{_sizes(len(train_pixels), len(test_pixels), shape)}: "
        f"MNIST {why}. The figures below are not comparable with MNIST's.",
        train_inputs=(train_inputs - mean) / deviation,
        train_labels=torch.from_numpy(train_classes).long(),
        test_inputs=((torch.from_numpy(test_pixels) - mean) / deviation).float(),
        test_labels=torch.from_numpy(test_classes).long(),
        shape=shape,
    )


def _sizes(training: int, test: int, shape: tuple[int, ...]) -> str:
    """Describe the size of a data set of images ``[channels, height, width]``."""
    channels, height, width = shape
    colours = f"×{channels}" if channels > 1 else ""
    return f"({training:,} training and {test:,} test images of {height}×{width}{colours})"


def _download(make_dataset: Callable[[], object], folder: Path, data_root: Path) -> None:
    """Download in silence, or raise ``DataUnavailableError`` soon and leave no new folder."""
    missing_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with _quiet_network():
            make_dataset()
    # No network, a full disk, a folder that cannot be written: other data help with all of them.
    except Exception as error:
        for parent in missing_folders:
            with contextlib.suppress(OSError):  # one that holds something is kept
                parent.rmdir()
        raise DataUnavailableError(
            f"is not in {data_root} and could not be downloaded ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """The last line of an error's message, which for torchvision is the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def _quiet_network() -> Iterator[None]:
    """Keep torchvision from printing, and from waiting for connections that hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
