"""``text-language``: a small language model learns prose, and then code."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.fine_tuning.protocol import Record, TextOptions, present
from benchmarks.option_types import Count, Folder, Positive, some_of, whole_number

if TYPE_CHECKING:
    from benchmarks.fine_tuning.networks import LanguageModel
    from benchmarks.fine_tuning.tasks import Task

METHOD_NAMES = ("naive", "l2", "ewc", "rotated-ewc", "joint")
PACKAGES = ("numpy", "scipy", "sklearn", "torch")


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Train a GPT on docstrings of installed packages, byte by byte, and then on their code.

    Strengths are chosen by the mean of both losses on held-out texts. Writes language.jsonl (after
    every finished run), and prints a table of losses in nats per byte.

    Attributes:
        characters: How much of each kind of text.
        layers: Layers of the network.
        width: Its width.
        length: Bytes of a sequence; other options count sequences where they say texts.
    """

    methods: Annotated[tuple[str, ...], some_of(METHOD_NAMES)] = METHOD_NAMES
    characters: Count = 1_200_000
    layers: Count = 2
    width: Annotated[int, whole_number(4)] = 128
    steps: Count = 400
    learning_rate: Positive = 1e-3
    length: Annotated[int, whole_number(2)] = 64
    output: Folder = Path("results/language")


def run(options: Options) -> int:
    """Search strengths, run all methods with all seeds, and present the results."""

    def figures(record: Record) -> dict[str, float]:
        matrix = record["matrix"]
        prose, code = matrix[-1]
        merit = -(prose + code) / 2
        return {"merit": merit, "prose": prose, "code": code, "before": matrix[0][0]}

    columns = {
        "prose before": ("before", 1, 3),
        "prose": ("prose", 1, 3),
        "code": ("code", 1, 3),
        "step [s]": ("step_seconds", 1, 3),
        "end [s]": ("task_end_seconds", 1, 1),
    }
    title, of_joint = "Prose, then code", ("prose", "code")
    present(options, "language", _work, figures, columns, title=title, of_joint=of_joint)
    return 0


def _work(
    options: Options, name: str, strength: float | None, seed: int, validate: bool
) -> dict[str, Any]:
    """Do one run."""
    from benchmarks.fine_tuning.stream import learned

    return learned(_start, options, name, strength, seed, validate=validate, measure=_loss)


def _loss(model: Any, task: "Task", validate: bool) -> float:
    """Mean loss of a byte on a kind of text's test part, or on what is held out."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks.fine_tuning.stream import EVALUATION_BATCH

    part = task.held_out if validate else task.test
    with torch.no_grad():
        losses = [
            float(cross_entropy(model(ids), labels, reduction="sum"))
            for ids, labels in part.batches(EVALUATION_BATCH)
        ]
    return sum(losses) / part.labels.numel()


def _start(options: Options, seed: int) -> "tuple[LanguageModel, list[Task]]":
    """Make the network and the tasks of a seed: prose, and code."""
    import torch

    from benchmarks.fine_tuning.networks import LanguageModel
    from benchmarks.fine_tuning.tasks import language_task
    from benchmarks.fine_tuning.texts import prose_and_code

    texts = prose_and_code(PACKAGES, options.characters)
    size = options.test_size
    tasks = [
        language_task(name, text, options.length, size, seed)
        for name, text in zip(("prose", "code"), texts, strict=True)
    ]
    torch.manual_seed(seed)
    return LanguageModel(options.layers, options.width, options.length), tasks
