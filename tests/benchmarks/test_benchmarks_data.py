"""MNIST from files, and the digits instead of it."""

import socket
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.configuration import Configuration
from benchmarks.data import (
    MNIST_MEAN,
    MNIST_STANDARD_DEVIATION,
    ImageData,
    load_digits,
    load_images,
)
from benchmarks.scenarios import load_data

TRAINING_IMAGES = 6
TEST_IMAGES = 4


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes in the format of MNIST's files: magic number, sizes, data."""
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(struct.pack(">i", 0x0800 + array.ndim) + sizes + array.tobytes())


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """A data root with a very small MNIST, whose image n has the value 10 n everywhere."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in (("train", TRAINING_IMAGES), ("t10k", TEST_IMAGES)):
        values = 10 * np.arange(size, dtype=np.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", np.tile(values[:, None, None], (1, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(size, dtype=np.uint8))
    return tmp_path


def test_mnist_is_read_flattened_and_normalised(mnist_folder: Path, no_download: None) -> None:
    data = load_images(mnist_folder)
    assert data.source == "mnist"
    values = 10 * torch.arange(TRAINING_IMAGES) / 255
    expected = ((values - MNIST_MEAN) / MNIST_STANDARD_DEVIATION)[:, None].expand(-1, 784)
    torch.testing.assert_close(data.train_inputs, expected)
    assert data.train_inputs.dtype == torch.float32
    assert data.test_inputs.shape == (TEST_IMAGES, 784)
    assert data.train_labels.tolist() == list(range(TRAINING_IMAGES))
    assert data.test_labels.dtype == torch.int64


def test_mnist_says_where_it_is_from(mnist_folder: Path) -> None:
    announcement = load_images(mnist_folder).announcement
    assert announcement.startswith("Data: MNIST (6 training and 4 test images of 28")
    assert announcement.endswith(f"from {mnist_folder}.")


def test_without_network_the_digits_are_used(
    tmp_path: Path, no_download: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_images(tmp_path / "absent")
    assert data.source == "digits"
    assert "\n" not in data.announcement
    assert "1,497 training and 300 test images" in data.announcement
    assert f"MNIST is not in {tmp_path / 'absent'} and could not be downloaded" in data.announcement
    assert "(<no network here>)" in data.announcement
    assert "not comparable" in data.announcement
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_failed_download_leaves_no_folders(tmp_path: Path, monkeypatch) -> None:
    def fail(self) -> None:
        Path(self.raw_folder).mkdir(parents=True)
        raise OSError("disk is full")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", fail)
    assert "(disk is full)" in load_images(tmp_path / "new" / "root").announcement
    assert list(tmp_path.iterdir()) == []


def test_downloads_may_not_hang(tmp_path: Path, monkeypatch) -> None:
    timeouts = []

    def fail(self) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise TimeoutError

    monkeypatch.setattr("torchvision.datasets.MNIST.download", fail)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(3.0)
    try:
        announcement = load_images(tmp_path).announcement
        after = socket.getdefaulttimeout()
    finally:
        socket.setdefaulttimeout(before)
    assert "(TimeoutError)" in announcement
    assert timeouts == [10.0]
    assert after == 3.0


def test_a_download_is_announced_as_such(
    tmp_path: Path, mnist_folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"

    def succeed(self) -> None:
        if not Path(self.raw_folder).exists():
            sys.stderr.write("100%\n")
            Path(self.raw_folder).parent.mkdir(parents=True)
            Path(self.raw_folder).symlink_to(mnist_folder / "MNIST" / "raw")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", succeed)
    data = load_images(target)
    assert data.source == "mnist"
    assert data.announcement.endswith(f"downloaded to {target}.")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_damaged_files_are_called_damaged(mnist_folder: Path, no_download: None) -> None:
    (mnist_folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"half a fi")
    data = load_images(mnist_folder)
    assert data.source == "digits"
    assert f"MNIST in {mnist_folder} is damaged" in data.announcement


def test_digits_are_normalised_and_split_alike_every_time() -> None:
    data, again = load_digits(), load_digits()
    assert data.train_inputs.shape == (1497, 64)
    assert data.test_inputs.shape == (300, 64)
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.float32
    assert data.train_inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_inputs.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(data.train_inputs, again.train_inputs)
    assert torch.equal(data.test_labels, again.test_labels)


def test_digits_have_all_classes_alike_in_both_parts() -> None:
    data = load_digits()
    shares = torch.bincount(data.train_labels) / 1497 - torch.bincount(data.test_labels) / 300
    assert len(shares) == 10
    assert shares.abs().max() < 0.005


def test_validation_holds_out_the_last_sixth_of_the_training_images(tiny_images: ImageData) -> None:
    held_out = tiny_images.for_validation()
    assert torch.equal(held_out.train_inputs, tiny_images.train_inputs[:17])
    assert torch.equal(held_out.train_labels, tiny_images.train_labels[:17])
    assert torch.equal(held_out.test_inputs, tiny_images.train_inputs[17:])
    assert torch.equal(held_out.test_labels, tiny_images.train_labels[17:])
    assert (held_out.source, held_out.classes) == (tiny_images.source, tiny_images.classes)
    assert len(tiny_images.train_inputs) == 20, "the original is as it was"


def test_validation_is_announced_in_the_same_line() -> None:
    data = load_digits()
    announcement = data.for_validation().announcement
    assert announcement.startswith(data.announcement)
    assert announcement.endswith("the last 249 training images, which are not trained on.")
    assert "\n" not in announcement


def test_a_limit_keeps_the_first_training_images_and_all_test_images(
    tiny_images: ImageData,
) -> None:
    limited = tiny_images.limited(7)
    assert torch.equal(limited.train_inputs, tiny_images.train_inputs[:7])
    assert torch.equal(limited.train_labels, tiny_images.train_labels[:7])
    assert torch.equal(limited.test_inputs, tiny_images.test_inputs)
    assert limited.announcement.endswith("the first 7 are used.")
    assert (limited.shape, limited.classes) == (tiny_images.shape, tiny_images.classes)


@pytest.mark.parametrize("images", [0, 20, 21])
def test_without_a_limit_that_matters_nothing_changes(tiny_images: ImageData, images) -> None:
    assert tiny_images.limited(images) is tiny_images


def test_validation_after_a_limit_has_no_image_beyond_it_and_no_test_image(
    tiny_images: ImageData,
) -> None:
    data = tiny_images.limited(12).for_validation()
    rows = [(inputs[:, 0] // 6).tolist() for inputs in (data.train_inputs, data.test_inputs)]
    assert rows == [list(range(10)), [10, 11]], "test images begin with 1000"


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("scenario", "classes"),
    [("permuted_mnist", 10), ("split_cifar10", 10), ("split_cifar100", 100)],
)
def test_a_scenario_has_its_data(
    tiny_images: ImageData, monkeypatch: pytest.MonkeyPatch, scenario, classes, validate
) -> None:
    asked: list[tuple[object, ...]] = []

    def load(*arguments: object) -> ImageData:
        asked.append(arguments)
        return tiny_images

    root = Path("root")
    monkeypatch.setattr("benchmarks.data.load_images", load)
    monkeypatch.setattr("benchmarks.cifar.load_cifar", load)
    configuration = Configuration(
        scenario=scenario, data_root=root, training_images=12, validate=validate
    )
    data = load_data(configuration)
    assert asked == [(root, classes) if "cifar" in scenario else (root,)]
    assert (len(data.train_inputs), len(data.test_inputs)) == ((10, 2) if validate else (12, 8))
