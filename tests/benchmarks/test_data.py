"""MNIST from its files, the digits instead of it, and images of folders."""

import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from benchmarks import data as data_sets
from benchmarks.configuration import Configuration
from benchmarks.data import (
    MNIST_FOLDER,
    DataUnavailableError,
    ImageData,
    _reason,
    load_digits,
    load_folder,
    load_images,
    load_mnist,
)
from benchmarks.scenarios import load_data


def pixels_of(image: int) -> np.ndarray:
    """Image number n of MNIST as bytes; every row and column different."""
    row, column = np.ogrid[:28, :28]
    return ((37 * image + 3 * row + column) % 256).astype(np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes in the format of MNIST's files: magic number, sizes, data."""
    sizes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(struct.pack(">i", 0x0800 + array.ndim) + sizes + array.tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two images in every file of MNIST, numbered throughout."""
    raw = tmp_path / MNIST_FOLDER
    raw.mkdir(parents=True)
    for start, name in ((0, "train"), (2, "t10k")):
        images = np.stack([pixels_of(start + n) for n in range(2)])
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(start, start + 2, dtype=np.uint8))
    return tmp_path


def test_mnist_is_normalised(root: Path) -> None:
    data = load_mnist(root)
    assert (data.source, data.classes, data.shape) == ("mnist", 10, (1, 28, 28))
    assert data.train_inputs.dtype == torch.float32
    assert data.train_labels.dtype == torch.int64
    assert (data.train_labels.tolist(), data.test_labels.tolist()) == ([0, 1], [2, 3])
    for image, found in ((1, data.train_inputs[-1]), (2, data.test_inputs[0])):
        expected = (pixels_of(image) / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(found, torch.tensor(expected).float().flatten())
    assert load_images(root).announcement == (
        f"Data: MNIST (2 training and 2 test images of 28×28) from {root}."
    )


def test_damaged_files_are_called_damaged(root: Path, no_download: None) -> None:
    (root / MNIST_FOLDER / "t10k-images-idx3-ubyte").write_bytes(b"half a fi")
    with pytest.raises(DataUnavailableError, match=f"^in {root} is damaged "):
        load_mnist(root)


def test_a_download_is_announced_as_such(
    root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path_factory.mktemp("root") / "target"

    def succeed(self: object) -> None:
        sys.stdout.write("chatter\n")
        (target / MNIST_FOLDER).parent.mkdir(parents=True, exist_ok=True)
        if not (target / MNIST_FOLDER).exists():
            (target / MNIST_FOLDER).symlink_to(root / MNIST_FOLDER)

    monkeypatch.setattr("torchvision.datasets.MNIST.download", succeed)
    assert load_mnist(target).announcement.endswith(f"downloaded to {target}.")
    assert capsys.readouterr() == ("", "")


def test_without_files_and_network_nothing_is_there(
    tmp_path: Path, no_download: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "absent"
    before = socket.getdefaulttimeout()
    with pytest.raises(DataUnavailableError) as error:
        load_mnist(root)
    assert str(error.value) == f"is not in {root} and could not be downloaded (<no network here>)"
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert socket.getdefaulttimeout() == before


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A folder of three classes with four training images and one test image each, in colour."""
    folder = tmp_path / "birds"
    generator = np.random.default_rng(0)
    for part, images in (("train", 4), ("test", 1)):
        for name in ("crow", "owl", "wren"):
            (folder / part / name).mkdir(parents=True)
            for number in range(images):
                pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")
    return folder


def pixels_in(folder: Path, part: str) -> dict[int, list[torch.Tensor]]:
    """The images of a folder by class, channels first."""
    return {
        label: [
            torch.tensor(np.array(Image.open(path))).permute(2, 0, 1).float()
            for path in sorted((folder / part / name).iterdir())
        ]
        for label, name in enumerate(("crow", "owl", "wren"))
    }


def test_images_of_a_folder_are_normalised_and_in_random_order(birds: Path) -> None:
    data = load_folder(birds)
    assert (data.source, data.classes, data.shape) == ("birds", 3, (3, 32, 32))
    assert data.announcement == (
        f"Data: 3 classes of images (12 training and 3 test images of 32×32×3) from {birds}."
    )
    assert sorted(data.train_labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert data.train_labels.tolist() != sorted(data.train_labels.tolist())
    images = pixels_in(birds, "train")
    everything = torch.stack([image for group in images.values() for image in group])
    means, deviations = (
        one.view(3, 1, 1) for one in (everything.mean((0, 2, 3)), everything.std((0, 2, 3)))
    )
    seen = []
    for row, label in zip(data.train_inputs, data.train_labels.tolist(), strict=True):
        expected = [((image - means) / deviations).flatten() for image in images[label]]
        (place,) = [n for n, one in enumerate(expected) if torch.allclose(row, one, atol=1e-5)]
        seen.append((label, place))
    assert len(set(seen)) == 12
    tests = [(image - means) / deviations for (image,) in pixels_in(birds, "test").values()]
    torch.testing.assert_close(data.test_inputs, torch.stack(tests).flatten(1))
    assert data.test_labels.tolist() == [0, 1, 2]
    again = load_folder(birds)
    assert torch.equal(again.train_inputs, data.train_inputs)


def test_images_of_other_sizes_are_scaled_and_grey_ones_coloured(birds: Path) -> None:
    grey = np.kron(np.arange(16).reshape(4, 4), np.ones((16, 16))).astype(np.uint8) * 16
    Image.fromarray(grey).save(birds / "test" / "crow" / "0.png")
    before = load_folder(birds).test_inputs[0].view(3, 32, 32)
    small = interpolate(torch.tensor(grey).float()[None, None], (32, 32), mode="area")[0, 0]
    for channel in before:
        found = torch.corrcoef(torch.stack([channel.flatten(), small.flatten()]))[0, 1]
        assert found > 0.99


def test_folders_without_such_images_are_refused(birds: Path, tmp_path: Path) -> None:
    expected = "expected train/CLASS and test/CLASS with images for every class"
    with pytest.raises(ValueError, match=f"--images: got {tmp_path / 'none'}, {expected} "):
        load_folder(tmp_path / "none")
    (birds / "test" / "owl").rename(birds / "test" / "eagle")
    with pytest.raises(ValueError, match=r"the classes in train and test differ\)"):
        load_folder(birds)
    (birds / "test" / "eagle").rename(birds / "test" / "owl")
    (birds / "train" / "wren" / "3.png").write_bytes(b"half an im")
    with pytest.raises(ValueError, match=r"cannot identify image file .*3.png"):
        load_folder(birds)


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


@pytest.mark.parametrize("images", [None, Path("birds")])
def test_a_scenario_has_its_data(
    tiny_images: ImageData, monkeypatch: pytest.MonkeyPatch, images: Path | None
) -> None:
    asked: list[object] = []

    def answer(given: str) -> Callable[..., ImageData]:
        return lambda folder: asked.append((given, folder)) or tiny_images

    root = Path("root")
    monkeypatch.setattr(data_sets, "load_images", answer("MNIST"))
    monkeypatch.setattr(data_sets, "load_folder", answer("folder"))
    configuration = Configuration(images=images, training_images=12, validate=True)
    data = load_data(configuration, root)
    assert asked == [("MNIST", root) if images is None else ("folder", images)]
    rows = [(inputs[:, 0] // 6).tolist() for inputs in (data.train_inputs, data.test_inputs)]
    assert rows == [list(range(10)), [10, 11]], "test images begin with 1000"
