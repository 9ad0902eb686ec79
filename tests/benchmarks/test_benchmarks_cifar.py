"""CIFAR from files in torchvision's form."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from benchmarks.cifar import FOLDERS, MEANS, STANDARD_DEVIATIONS, load_cifar
from benchmarks.configuration import Configuration
from benchmarks.download import DataUnavailableError
from benchmarks.scenarios import load_data

KINDS = {10: CIFAR10, 100: CIFAR100}
IMAGES_PER_FILE = 2


def pixels_of(image: int) -> np.ndarray:
    """Image number n as ``[3, 32, 32]`` bytes, every channel, row and column different."""
    channel, row, column = np.ogrid[:3, :32, :32]
    return ((37 * image + 80 * channel + 3 * row + column) % 256).astype(np.uint8)


def write_part(path: Path, entry: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(entry))


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with two images in every file of both kinds of CIFAR, numbered throughout."""
    for classes, kind in KINDS.items():
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
        folder = tmp_path / FOLDERS[classes]
        folder.mkdir()
        names = [name for name, _ in kind.train_list + kind.test_list]
        for number, name in enumerate(names):
            images = [IMAGES_PER_FILE * number + one for one in range(IMAGES_PER_FILE)]
            data = np.stack([pixels_of(image).flatten() for image in images])
            labels = {"labels" if classes == 10 else "fine_labels": [n % classes for n in images]}
            write_part(folder / name, {"data": data, **labels})
        meta = kind.meta
        monkeypatch.setitem(meta, "md5", None)
        write_part(folder / meta["filename"], {meta["key"]: [str(n) for n in range(classes)]})
    return tmp_path


def plainly(image: int, classes: int) -> list[float]:
    """An image as it should be, pixel by pixel: channels, rows, columns."""
    pixels = pixels_of(image)
    return [
        (int(pixels[channel, row, column]) / 255 - MEANS[classes][channel])
        / STANDARD_DEVIATIONS[classes][channel]
        for channel in range(3)
        for row in range(32)
        for column in range(32)
    ]


@pytest.mark.parametrize(("classes", "training"), [(10, 10), (100, 2)])
def test_images_are_normalised_with_channels_first(
    cifar_root: Path, classes: int, training: int
) -> None:
    data = load_cifar(cifar_root, classes)
    assert (data.source, data.classes, data.shape) == (f"cifar{classes}", classes, (3, 32, 32))
    assert data.train_inputs.dtype == torch.float32
    assert data.train_inputs.shape == (training, 3 * 32 * 32)
    for row in (0, training - 1):
        torch.testing.assert_close(data.train_inputs[row], torch.tensor(plainly(row, classes)))
    expected = torch.tensor(plainly(training + 1, classes))
    torch.testing.assert_close(data.test_inputs[1], expected)
    assert data.train_labels.tolist() == [row % classes for row in range(training)]
    assert data.test_labels.tolist() == [row % classes for row in (training, training + 1)]
    assert data.train_labels.dtype == torch.int64


def test_it_says_what_it_is_and_where_from(cifar_root: Path) -> None:
    announcement = load_cifar(cifar_root, 10).announcement
    assert announcement == (
        f"Data: CIFAR-10 (10 training and 2 test images of 32×32×3) from {cifar_root}."
    )


def test_damaged_files_are_called_damaged(cifar_root: Path) -> None:
    (cifar_root / FOLDERS[10] / "data_batch_3").write_bytes(b"half a fi")
    with pytest.raises(DataUnavailableError, match=f"^in {cifar_root} is damaged "):
        load_cifar(cifar_root, 10)


def test_files_that_are_not_what_they_should_be_are_damaged(tmp_path: Path) -> None:
    (tmp_path / FOLDERS[100]).mkdir()
    with pytest.raises(DataUnavailableError, match=r"is damaged .*not found or corrupted"):
        load_cifar(tmp_path, 100)


@pytest.mark.parametrize("classes", [10, 100])
def test_without_files_and_network_nothing_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    def fail(self: object) -> None:
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(CIFAR10, "download", fail)
    root = tmp_path / "absent"
    configuration = Configuration(scenario=f"split_cifar{classes}", data_root=root)
    with pytest.raises(DataUnavailableError) as error:
        load_data(configuration)
    assert str(error.value) == (
        f"is not in {root} and could not be downloaded (<urlopen error no network>)"
    )
    assert not root.exists()


def test_a_download_is_announced_as_such(
    cifar_root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path_factory.mktemp("root") / "target"

    def succeed(self: CIFAR10) -> None:
        Path(self.root).mkdir(exist_ok=True)
        (Path(self.root) / FOLDERS[10]).symlink_to(cifar_root / FOLDERS[10])

    monkeypatch.setattr(CIFAR10, "download", succeed)
    assert load_cifar(target, 10).announcement.endswith(f"downloaded to {target}.")
