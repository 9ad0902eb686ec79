"""Images from files in torchvision's forms, and the digits instead of MNIST."""

import pickle
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from benchmarks import data as data_sets
from benchmarks.configuration import Configuration
from benchmarks.data import (
    CIFAR10,
    CIFAR100,
    MNIST,
    DataUnavailableError,
    ImageData,
    Kind,
    _reason,
    load,
    load_digits,
    load_images,
)
from benchmarks.scenarios import load_data

kinds = pytest.mark.parametrize("kind", [MNIST, CIFAR10, CIFAR100], ids=lambda kind: kind.name)


def pixels_of(image: int, kind: Kind) -> np.ndarray:
    """Image number n as bytes, channels first; every channel, row and column different."""
    channel, row, column = np.ogrid[tuple(slice(size) for size in kind.shape)]
    return ((37 * image + 80 * channel + 3 * row + column) % 256).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes in the format of MNIST's files: magic number, sizes, data."""
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(struct.pack(">i", 0x0800 + array.ndim) + sizes + array.tobytes())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two images in every file of each kind, numbered throughout."""
    raw = tmp_path / MNIST.folder
    raw.mkdir(parents=True)
    for start, name in ((0, "train"), (2, "t10k")):
        images = np.concatenate([pixels_of(start + n, MNIST) for n in range(2)])
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(start, start + 2, dtype=np.uint8))
    for kind, made in ((CIFAR10, datasets.CIFAR10), (CIFAR100, datasets.CIFAR100)):
        monkeypatch.setattr(made, "_check_integrity", lambda self: True)
        folder = tmp_path / kind.folder
        folder.mkdir()
        for number, (name, _) in enumerate(made.train_list + made.test_list):
            numbers = [2 * number, 2 * number + 1]
            data = np.stack([pixels_of(image, kind).flatten() for image in numbers])
            labels = "labels" if kind is CIFAR10 else "fine_labels"
            (folder / name).write_bytes(pickle.dumps({"data": data, labels: numbers}))
        monkeypatch.setitem(made.meta, "md5", None)
        names = {made.meta["key"]: [str(n) for n in range(kind.classes)]}
        (folder / made.meta["filename"]).write_bytes(pickle.dumps(names))
    return tmp_path


@kinds
def test_images_are_normalised_with_channels_first(root: Path, kind: Kind) -> None:
    data = load(kind, root)
    training = 10 if kind is CIFAR10 else 2
    assert (data.classes, data.shape) == (kind.classes, kind.shape)
    assert data.source == kind.name.replace("-", "").lower()
    assert data.train_inputs.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert data.train_labels.tolist() == list(range(training))
    assert data.test_labels.tolist() == [training, training + 1]
    for image, found in ((training - 1, data.train_inputs[-1]), (training, data.test_inputs[0])):
        scaled = [
            (channel / 255 - mean) / deviation
            for channel, mean, deviation in zip(
                pixels_of(image, kind), kind.means, kind.deviations, strict=True
            )
        ]
        torch.testing.assert_close(found, torch.tensor(np.stack(scaled)).float().flatten())


def test_it_says_what_it_is_and_where_from(root: Path) -> None:
    assert load(CIFAR10, root).announcement == (
        f"Data: CIFAR-10 (10 training and 2 test images of 32×32×3) from {root}."
    )
    assert load_images(root).announcement == (
        f"Data: MNIST (2 training and 2 test images of 28×28) from {root}."
    )


@kinds
def test_damaged_files_are_called_damaged(root: Path, kind: Kind, no_download: None) -> None:
    name = {"MNIST": "t10k-images-idx3-ubyte", "CIFAR-10": "data_batch_3"}.get(kind.name, "train")
    (root / kind.folder / name).write_bytes(b"half a fi")
    with pytest.raises(DataUnavailableError, match=f"^in {root} is damaged "):
        load(kind, root)


@kinds
def test_a_download_is_announced_as_such(
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path_factory.mktemp("root") / "target"

    def succeed(self: object) -> None:
        sys.stdout.write("chatter\n")
        (target / kind.folder).parent.mkdir(parents=True, exist_ok=True)
        if not (target / kind.folder).exists():
            (target / kind.folder).symlink_to(root / kind.folder)

    monkeypatch.setattr(f"torchvision.datasets.{kind.name.replace('-', '')}.download", succeed)
    assert load(kind, target).announcement.endswith(f"downloaded to {target}.")
    assert capsys.readouterr() == ("", "")


@kinds
def test_without_files_and_network_nothing_is_there(
    tmp_path: Path, no_download: None, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "absent"
    before = socket.getdefaulttimeout()
    with pytest.raises(DataUnavailableError) as error:
        load(kind, root)
    assert str(error.value) == f"is not in {root} and could not be downloaded (<no network here>)"
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert socket.getdefaulttimeout() == before


def test_downloads_may_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = []

    def fail(self: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise TimeoutError

    monkeypatch.setattr("torchvision.datasets.MNIST.download", fail)
    assert "(TimeoutError)" in load_images(tmp_path).announcement
    assert timeouts == [10.0]


def test_reasons_are_the_last_line_or_the_kind() -> None:
    assert _reason(OSError("first\n second \n\n")) == "second"
    assert _reason(TimeoutError()) == "TimeoutError"


def test_digits_take_the_place_of_mnist(tmp_path: Path, no_download: None) -> None:
    data, again = load_images(tmp_path / "absent"), load_digits()
    assert data.source == "digits"
    assert data.announcement.startswith(
        "Data: scikit-learn digits (1,497 training and 300 test images of 8×8): MNIST is not in "
        f"{tmp_path / 'absent'} and could not be downloaded (<no network here>). "
    )
    assert data.train_inputs.shape == (1497, 64)
    assert data.train_inputs.dtype == data.test_inputs.dtype == torch.float32
    assert data.train_inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert data.train_inputs.std().item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(data.train_inputs, again.train_inputs)
    assert torch.equal(data.test_labels, again.test_labels)
    shares = torch.bincount(data.train_labels) / 1497 - torch.bincount(data.test_labels) / 300
    assert len(shares) == 10
    assert shares.abs().max() < 0.005


def test_validation_holds_out_the_last_sixth_of_the_training_images(tiny_images: ImageData) -> None:
    held_out = tiny_images.for_validation()
    assert torch.equal(held_out.train_inputs, tiny_images.train_inputs[:17])
    assert torch.equal(held_out.train_labels, tiny_images.train_labels[:17])
    assert torch.equal(held_out.test_inputs, tiny_images.train_inputs[17:])
    assert torch.equal(held_out.test_labels, tiny_images.train_labels[17:])
    assert held_out.announcement == (
        "Data: tiny. Accuracies are those on the last 3 training images, which are not trained on."
    )


def test_a_limit_keeps_the_first_training_images_and_all_test_images(
    tiny_images: ImageData,
) -> None:
    limited = tiny_images.limited(7)
    assert torch.equal(limited.train_inputs, tiny_images.train_inputs[:7])
    assert torch.equal(limited.train_labels, tiny_images.train_labels[:7])
    assert torch.equal(limited.test_inputs, tiny_images.test_inputs)
    assert limited.announcement.endswith("the first 7 are used.")
    for images in (0, 20, 21):
        assert tiny_images.limited(images) is tiny_images


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [("permuted_mnist", None), ("split_cifar10", CIFAR10), ("split_cifar100", CIFAR100)],
)
def test_a_scenario_has_its_data(
    tiny_images: ImageData, monkeypatch: pytest.MonkeyPatch, scenario: str, kind: Kind | None
) -> None:
    asked: list[object] = []

    def answer(given: object) -> Callable[..., ImageData]:
        return lambda *arguments: asked.append((given, *arguments)) or tiny_images

    root = Path("root")
    monkeypatch.setattr(data_sets, "load_images", answer("MNIST"))
    monkeypatch.setattr(data_sets, "load", answer("CIFAR"))
    configuration = Configuration(scenario=scenario, training_images=12, validate=True)
    data = load_data(configuration, root)
    assert asked == [("MNIST", root) if kind is None else ("CIFAR", kind, root)]
    rows = [(inputs[:, 0] // 6).tolist() for inputs in (data.train_inputs, data.test_inputs)]
    assert rows == [list(range(10)), [10, 11]], "test images begin with 1000"
