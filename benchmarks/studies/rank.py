"""``study-rank``: what thin bases take, and what is stored of wide layers."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Annotated, Any

from benchmarks.command import CommandError, keep, make_folder, print_table, use_threads
from benchmarks.option_types import Folder, Threads, some_of

NAME = "rank"
FORMAT = "rotate_ewc.benchmarks.rank/2"
CASES = ("few-examples", "vocabulary", "lora", "resnet18", "crepe", "gpt2", "decoder")
MIB = 2**20
# Of which nothing is gained by a first time that does not count.
_SECONDS_OF_A_LARGE_ONE = 5.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Consolidate wide layers, and compare what is stored with their weights.

    The models are

      few-examples  nn.Linear(8, 1500), 4 examples
      vocabulary    nn.Linear(16, 32000), 256 examples
      lora          adapters of rank 8 on all linear layers of a Llama block of width 1024,
                    16 sequences of 32 tokens
      resnet18      torchvision's, 64 images of 64 x 64 pixels
      crepe         the convolutions of torchcrepe's "tiny", one of 8,192 inputs, 256 frames
      gpt2          GPT-2 small with its tied head (needs transformers), 32 sequences of 64 tokens
      decoder       Llama 3.2 with one billion parameters at an eighth of the width, 16 of 64

    with weights and data that are noise; only the first four if nothing is said. Each has a process
    of its own. Writes rank.json, and prints a table: the file of the penalty over the parameters
    that it protects; seconds of all processors for a forward and backward pass of the same data,
    for consolidating, and for the penalty's value and gradient; and the most memory that the
    process had, over what it had before the model was made, also as a multiple of the model and its
    gradients.

    Attributes:
        cases: Any of few-examples, vocabulary, lora, resnet18, crepe, gpt2, decoder.
        rank: auto, full, a whole number, or a part of the trace below 1.
        memory_budget: Bytes, as consolidate takes them.
        threads: CPU threads of PyTorch.
        output: Folder for the results.
    """

    cases: Annotated[tuple[str, ...], some_of(CASES)] = CASES[:4]
    rank: int | float | str = "auto"
    memory_budget: int = 2**30
    threads: Threads = None
    output: Folder = Path("results")


@dataclass(frozen=True)
class Measured:
    """What one case took."""

    case: str
    rank: int | float | str
    memory_budget: int
    parameter_bytes: int
    model_bytes: int
    file_bytes: int
    plain_seconds: float
    consolidate_seconds: float
    penalty_seconds: float
    peak_bytes: int


def run(options: Options) -> int:
    """Measure case after case."""
    from rotate_ewc import EstimationSettings

    try:
        EstimationSettings(rank=options.rank)
    except ValueError as error:
        raise CommandError(f"--rank: {error}") from error
    make_folder(options.output)
    results = options.output / f"{NAME}.json"
    found = keep(_each_alone(options), results, {"format": FORMAT})
    headings = (
        "file / weights",
        "plain [s]",
        "consolidate",
        "penalty [s]",
        "peak [MiB]",
        "/ model",
    )
    rows = (
        (
            one.case,
            f"{one.file_bytes / one.parameter_bytes:.2f}",
            f"{one.plain_seconds:.3f}",
            f"{one.consolidate_seconds:.2f} s, {one.consolidate_seconds / one.plain_seconds:.1f} ×",
            f"{one.penalty_seconds:.3f}",
            f"{one.peak_bytes / MIB:.0f}",
            f"{one.peak_bytes / one.model_bytes:.1f}",
        )
        for one in found
    )
    print_table(f"rank {options.rank}", ["case"], headings, rows)
    print(f"Wrote {results}.")
    return 0


def _each_alone(options: Options) -> Iterator[Measured]:
    for case in options.cases:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(measure, case, options).result()


def measure(case: str, options: Options) -> Measured:
    """Consolidate the model of one case, small ones a second time, and look at the penalty."""
    import tempfile

    import torch
    from torch import nn

    from benchmarks.speed.measuring import peak_since_start
    from benchmarks.studies.networks import PROBLEMS
    from rotate_ewc import EKFACPenalty

    use_threads(options.threads)
    rank, memory_budget = options.rank, options.memory_budget
    torch.manual_seed(0)
    if case == "gpt2":
        import transformers  # noqa: F401
    before = peak_since_start()
    problem = PROBLEMS[case]()
    model, data, loss = problem.model, problem.data, nn.CrossEntropyLoss()
    parameters = [p for p in model.parameters() if p.requires_grad]
    forward = problem.forward or model

    def plain() -> None:
        for x, y in data:
            model.zero_grad()
            loss(forward(x), y).backward()

    def consolidated() -> EKFACPenalty:
        penalty = EKFACPenalty(1.0, rank=rank, memory_budget=memory_budget, temperature=1.0)
        penalty.consolidate(model, loss, data, forward=problem.forward)
        return penalty

    plain()
    _, plain_seconds = _timed(plain)
    if plain_seconds < _SECONDS_OF_A_LARGE_ONE:
        consolidated()
    penalty, seconds = _timed(consolidated)
    peak = peak_since_start() - before
    penalty(model).backward()
    _, penalty_seconds = _timed(lambda: penalty(model).backward())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "penalty.safetensors"
        penalty.save(path)
        size = path.stat().st_size
    weights = sum(p.nbytes for p in parameters)
    # With the gradients of those that have any.
    held = weights + sum(p.nbytes for p in model.parameters())
    return Measured(
        *(case, rank, memory_budget, weights, held, size),
        *(plain_seconds, seconds, penalty_seconds, peak),
    )


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = process_time()
    result = work()
    return result, process_time() - start
