"""CIFAR-10 and CIFAR-100 in memory, where torchvision finds them or can download them."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import ImageData, sizes
from benchmarks.download import DataUnavailableError, download, reason

MEANS = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}
STANDARD_DEVIATIONS = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}
FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
SHAPE = (3, 32, 32)


def load_cifar(data_root: Path, classes: int) -> ImageData:
    """Load CIFAR, downloading it where it is missing. Nothing can take its place.

    Args:
        data_root: Folder that has, or is to have, torchvision's folder for it.
        classes: 10 or 100.

    Returns:
        The images.

    Raises:
        DataUnavailableError: If the files are damaged, or missing and cannot be downloaded.
    """
    from torchvision import datasets

    make = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    origin = f"from {data_root}"
    if not (data_root / FOLDERS[classes]).is_dir():
        download(lambda: make(data_root, download=True), data_root / FOLDERS[classes], data_root)
        origin = f"downloaded to {data_root}"
    try:
        training, test = make(data_root, train=True), make(data_root, train=False)
    # Damaged files fail in the check or in the parser, in whatever way their bytes make them fail.
    except Exception as error:
        raise DataUnavailableError(f"in {data_root} is damaged ({reason(error)})") from error
    return ImageData(
        source=f"cifar{classes}",
        announcement=f"Data: CIFAR-{classes} {sizes(len(training), len(test), SHAPE)} {origin}.",
        train_inputs=_normalised(torch.from_numpy(training.data), classes),
        train_labels=torch.tensor(training.targets),
        test_inputs=_normalised(torch.from_numpy(test.data), classes),
        test_labels=torch.tensor(test.targets),
        shape=SHAPE,
        classes=classes,
    )


def _normalised(pixels: Tensor, classes: int) -> Tensor:
    """Bring images ``uint8`` ``[N, 32, 32, 3]`` to ``float32`` ``[N, 3072]``, channels first."""
    scaled = pixels.float().div_(255).sub_(torch.tensor(MEANS[classes]))
    return scaled.div_(torch.tensor(STANDARD_DEVIATIONS[classes])).permute(0, 3, 1, 2).flatten(1)
