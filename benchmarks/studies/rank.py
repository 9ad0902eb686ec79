"""``study-rank``: what thin bases take, and what is stored of wide layers."""

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.command import CommandError, keep, make_folder, print_table, use_threads
from benchmarks.option_types import Folder, Threads
from benchmarks.speed.options import some_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    Problem = tuple[nn.Module, list[tuple[Tensor, Tensor]]]

NAME = "rank"
FORMAT = "rotate_ewc.benchmarks.rank/1"
CASES = ("few-examples", "vocabulary", "lora", "resnet18")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Options:
    """Consolidate wide layers, and compare what is stored with their weights.

    The models are

      few-examples  nn.Linear(8, 1500), 4 examples
      vocabulary    nn.Linear(16, 32000), 256 examples
      lora          adapters of rank 8 on all linear layers of a Llama block of width 1024,
                    16 sequences of 32 tokens
      resnet18      torchvision's, 64 images of 64 x 64 pixels

    with weights and data that are noise. Each has a process of its own. Writes rank.json, and
    prints a table: the file of the penalty over the parameters that it protects; seconds of a
    forward and backward pass of the same data, of consolidating (after a first time that does not
    count), and of the penalty's value and gradient; and the most memory that the process had.

    Attributes:
        cases: Any of few-examples, vocabulary, lora, resnet18.
        rank: auto, full, a whole number, or a part of the trace below 1.
        threads: CPU threads of PyTorch.
        output: Folder for the results.
    """

    cases: Annotated[tuple[str, ...], some_of(CASES)] = CASES
    rank: str = "auto"
    threads: Threads = None
    output: Folder = Path("results")

    @property
    def rank_as_value(self) -> int | float | str:
        """The rank as the package takes it."""
        for kind in (int, float):
            try:
                return kind(self.rank)
            except ValueError:
                continue
        return self.rank


@dataclass(frozen=True)
class Measured:
    """What one case took."""

    case: str
    rank: int | float | str
    parameter_bytes: int
    file_bytes: int
    plain_seconds: float
    consolidate_seconds: float
    penalty_seconds: float
    peak_bytes: int


def run(options: Options) -> int:
    """Measure case after case."""
    from rotate_ewc import EstimationSettings

    try:
        EstimationSettings(rank=options.rank_as_value)
    except ValueError as error:
        raise CommandError(f"--rank: {error}") from error
    make_folder(options.output)
    results = options.output / f"{NAME}.json"
    found = keep(_each_alone(options), results, {"format": FORMAT})
    headings = ("file / weights", "plain [s]", "consolidate", "penalty [s]", "peak [MiB]")
    rows = (
        (
            one.case,
            f"{one.file_bytes / one.parameter_bytes:.2f}",
            f"{one.plain_seconds:.3f}",
            f"{one.consolidate_seconds:.2f} s, {one.consolidate_seconds / one.plain_seconds:.1f} ×",
            f"{one.penalty_seconds:.3f}",
            f"{one.peak_bytes / MIB:.0f}",
        )
        for one in found
    )
    print_table(f"rank {options.rank}", ["case"], headings, rows)
    print(f"Wrote {results}.")
    return 0


def _each_alone(options: Options) -> Iterator[Measured]:
    for case in options.cases:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(measure, case, options.rank_as_value, options.threads).result()


def measure(case: str, rank: int | float | str, threads: int | None = None) -> Measured:
    """Consolidate the model of one case twice, and look at the penalty."""
    import tempfile

    import torch
    from torch import nn

    from rotate_ewc import EKFACPenalty

    use_threads(threads)
    torch.manual_seed(0)
    model, data = PROBLEMS[case]()
    loss = nn.CrossEntropyLoss()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def plain() -> None:
        for x, y in data:
            model.zero_grad()
            loss(model(x), y).backward()

    def consolidated() -> EKFACPenalty:
        penalty = EKFACPenalty(1.0, rank=rank, temperature=1.0)
        penalty.consolidate(model, loss, data)
        return penalty

    plain()
    _, plain_seconds = _timed(plain)
    consolidated()
    penalty, seconds = _timed(consolidated)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    penalty(model).backward()
    _, penalty_seconds = _timed(lambda: penalty(model).backward())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "penalty.safetensors"
        penalty.save(path)
        size = path.stat().st_size
    weights = sum(p.nbytes for p in parameters)
    return Measured(case, rank, weights, size, plain_seconds, seconds, penalty_seconds, peak)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = perf_counter()
    result = work()
    return result, perf_counter() - start


def _linear(d_in: int, d_out: int, examples: int, batch_size: int) -> "Problem":
    import torch
    from torch import nn

    x, y = torch.randn(examples, d_in), torch.randint(d_out, (examples,))
    batches = zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True)
    return nn.Linear(d_in, d_out), list(batches)


def _resnet18() -> "Problem":
    import torch
    from torchvision.models import resnet18

    x, y = torch.randn(64, 3, 64, 64), torch.randint(10, (64,))
    return resnet18(num_classes=10).eval(), [(x, y)]


def _lora() -> "Problem":
    """A block as in Llama, with causal attention; its own weights are frozen."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    width, hidden, heads, rank, classes = 1024, 2816, 16, 8, 10

    class Adapted(nn.Module):
        def __init__(self, d_in: int, d_out: int) -> None:
            super().__init__()
            self.frozen = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
            self.down = nn.Linear(d_in, rank, bias=False)
            self.up = nn.Linear(rank, d_out, bias=False)

        def forward(self, x: "Tensor") -> "Tensor":
            adapted: Tensor = self.frozen(x) + 2 * self.up(self.down(x))
            return adapted

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.output = (
                Adapted(width, width) for _ in range(4)
            )
            self.gate, self.up = Adapted(width, hidden), Adapted(width, hidden)
            self.down = Adapted(hidden, width)
            self.before = nn.RMSNorm(width).requires_grad_(False)
            self.after = nn.RMSNorm(width).requires_grad_(False)
            self.head = nn.Linear(width, classes).requires_grad_(False)

        def forward(self, x: "Tensor") -> "Tensor":
            normal = self.before(x)
            layers = self.query, self.key, self.value
            q, k, v = (one(normal).unflatten(2, (heads, -1)).transpose(1, 2) for one in layers)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.output(mixed.transpose(1, 2).flatten(2))
            normal = self.after(x)
            x = x + self.down(F.silu(self.gate(normal)) * self.up(normal))
            outputs: Tensor = self.head(x)
            return outputs.transpose(1, 2)

    x, y = torch.randn(16, 32, width), torch.randint(classes, (16, 32))
    return Block(), [(x[:8], y[:8]), (x[8:], y[8:])]


PROBLEMS: dict[str, Callable[[], "Problem"]] = {
    "few-examples": lambda: _linear(8, 1500, 4, 4),
    "vocabulary": lambda: _linear(16, 32000, 256, 64),
    "lora": _lora,
    "resnet18": _resnet18,
}
