"""Tasks of a stream: texts or images, split into training, held-out and test parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import FolderImages
from benchmarks.fine_tuning.texts import PACKAGE_PAIRS, Labelled, docstrings_of_pair, read_set

Encode = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Part:
    """Examples: token ids ``[n, length]`` or pixels ``[n, 3, H, W]``, and classes ``[n]``."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.inputs)

    def part(self, chosen: Tensor | slice) -> "Part":
        """Return some of the examples."""
        return Part(self.inputs[chosen], self.labels[chosen])

    def cut(self, size: int) -> tuple["Part", "Part"]:
        """Return the first examples, and the others."""
        return self.part(slice(size)), self.part(slice(size, None))

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return all examples in their order."""
        return list(
            zip(torch.split(self.inputs, size), torch.split(self.labels, size), strict=True)
        )


@dataclass(frozen=True)
class Task:
    """One task, and the number of the head that answers it."""

    name: str
    head: int
    classes: int
    train: Part
    held_out: Part
    test: Part


def sentence_tasks(
    folder: Path, names: Sequence[str], encode: Encode, *, test_size: int, seed: int
) -> list[Task]:
    """Make a task with a head of its own of each set of sentences in a folder.

    Raises:
        ValueError: If a file is missing or not what it should be, or has too few sentences.
    """
    found = []
    for number, name in enumerate(names):
        train, test = read_set(folder, name)
        if len(train.texts) < 5:
            raise ValueError(
                f"{folder}: got {len(train.texts)} sentences in {name!r}, expected at least 5, of "
                f"which one is held out; take more sentences, or other --sets"
            )
        found.append(_task(name, number, train, test, encode, test_size, seed))
    return found


def docstring_tasks(encode: Encode, *, test_size: int, seed: int) -> list[Task]:
    """Make a task of each pair of packages; all have the same head (domain-incremental)."""
    return [
        _task(" or ".join(pair), 0, docstrings_of_pair(pair), None, encode, test_size, seed)
        for pair in PACKAGE_PAIRS
    ]


def image_tasks(images: FolderImages, number: int, *, test_size: int, seed: int) -> list[Task]:
    """Share classes out to tasks, in their order, each with a head of its own.

    Raises:
        ValueError: If that cannot be done evenly, or a task has too few images to hold one out.
    """
    if images.classes % number:
        raise ValueError(
            f"--tasks: got {number}, expected a number by which {images.classes} classes can be "
            f"divided"
        )
    each = images.classes // number
    generator = torch.Generator().manual_seed(seed)

    def part(pixels: Tensor, labels: Tensor, task: int) -> Part:
        rows = torch.nonzero(labels // each == task).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        return Part(pixels[rows], labels[rows] % each)

    found = []
    for task in range(number):
        whole = part(images.train_pixels, images.train_labels, task)
        if len(whole) < 5:
            raise ValueError(
                f"--images: got {len(whole)} training images for task {task + 1} of {number}, "
                f"expected at least 5; take more images, or a smaller --tasks"
            )
        tested = part(images.test_pixels, images.test_labels, task).part(slice(test_size))
        held_out, train = whole.cut(min(test_size, len(whole) // 5))
        found.append(Task(f"classes {task * each + 1} on", task, each, train, held_out, tested))
    return found


def _task(
    name: str,
    head: int,
    data: Labelled,
    test: Labelled | None,
    encode: Encode,
    test_size: int,
    seed: int,
) -> Task:
    """Split; the parts for test and choice are a fifth of the data each at most."""
    generator = torch.Generator().manual_seed(seed)
    whole = _part(data, encode, generator)
    size = min(test_size, len(whole) // 5)
    held_out, train = whole.cut(size)
    if test is None:
        tested, train = train.cut(size)
    else:
        tested = _part(test, encode, generator).part(slice(test_size))
    return Task(name, head, max(data.labels) + 1, train, held_out, tested)


def _part(data: Labelled, encode: Encode, generator: torch.Generator) -> Part:
    order = torch.randperm(len(data.texts), generator=generator)
    return Part(encode(data.texts)[order], torch.tensor(data.labels)[order])


def language_task(name: str, text: str, length: int, test_size: int, seed: int) -> Task:
    """Cut a text into sequences of bytes, each to be predicted from those before it.

    The parts are drawn at random from all sequences, which do not overlap.
    """
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    number = len(data) // (length + 1)
    if number < 5:
        raise ValueError(
            f"{name}: got {len(data)} bytes of text; expected at least five sequences of {length}"
        )
    sequences = data[: number * (length + 1)].view(number, length + 1)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    sequences = sequences[order]
    size = min(test_size, number // 5)
    parts = torch.split(sequences, [size, size, number - 2 * size])
    held_out, test, train = (Part(part[:, :-1], part[:, 1:]) for part in parts)
    return Task(name, 0, 256, train, held_out, test)
