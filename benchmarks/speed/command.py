"""``speed``: how long the estimation of Fisher matrices takes, here and in other packages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from benchmarks.command import make_console
from benchmarks.option_types import Count, Folder, Threads, default, number, some_of
from benchmarks.speed import names

FEWEST_ROUNDS, QUICK_ROUNDS = 5, 2
BY_CASE = default("both, but for e and f mc alone")


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """Options of both commands.

    Attributes:
        rounds: Number of rounds, at least 5 without --quick.
        quick: A smoke test with a few examples and at most 2 rounds, whose figures mean nothing.
        threads: CPU threads of PyTorch.
        output: Folder of the results.
    """

    rounds: Count = FEWEST_ROUNDS
    quick: bool = False
    threads: Threads = None
    output: Folder = Path("results")

    def __post_init__(self) -> None:
        """Refuse few rounds, of which a smoke test takes no more than two."""
        if self.quick:
            object.__setattr__(self, "rounds", min(self.rounds, QUICK_ROUNDS))
        elif self.rounds < FEWEST_ROUNDS:
            raise ValueError(
                f"--rounds: expected a whole number ≥ {FEWEST_ROUNDS}, got {self.rounds}"
            )


@dataclass(frozen=True, kw_only=True)
class Options(MeasuringOptions):
    """Time the estimation of Fisher matrices in EKFAC form, here and in other packages.

    For scale also a forward and backward pass of the same data. The models are

      a             MLP 784-400-400-10, 10,000 examples
      b             MLP 784-1000-1000-10, 10,000 examples
      c             CNN with four convolutions and two linear layers, 2,000 images of 32 x 32 pixels
      d-groupnorm   ResNet-18 of width 16 with GroupNorm, 512 images
      d-batchnorm   the same with BatchNorm, frozen
      e             Transformer of four blocks of width 256, 256 sequences of 128 tokens
      f             GPT-2 small with four of its blocks, 16 sequences of 128 tokens; without the
                    head, whose factor of 50,257 x 50,257 other packages cannot make

    each with sampled labels (mc) and with the exact Fisher matrix (type2). Everybody estimates the
    weights and biases of linear layers and convolutions, which all packages know. The data are
    noise: cost depends on shapes alone.

    Other packages keep whole bases, and so does this one where it is compared with them. Thin bases
    (those of the default rank, and 64 directions of each side) are contenders of their own, which
    must have the same trace up to 0.01 %.

    Each contender has a process of its own; they take turns, and only one works at any time. Every
    other round is backwards, and times are medians over rounds. Who has another trace than this
    package is marked as wrong, and not compared. The floor is what the necessary products and
    `eigh` take, at the rates that this machine shows for large ones in the same rounds.

    Writes speed.json and speed.png after every case. Results of earlier calls with as many threads
    stay in them; those of the same case, Fisher type and fraction are replaced. Wants a machine
    with nothing else to do, and takes an hour or more.

    Attributes:
        cases: Any of a, b, c, d-groupnorm, d-batchnorm, e, f.
        fisher: mc, type2 or both. The exact matrix of e takes a backward pass for each of 64
            classes of each of 128 tokens, that of f for each of 50,257.
        contenders: Who is measured; names with blanks are written in quotes.
        fraction: Part of every case's examples, in whole batches and at least one.
    """

    cases: Annotated[tuple[str, ...], some_of(names.CASES)] = tuple(names.CASES)
    fisher: Annotated[tuple[str, ...] | None, some_of(names.FISHERS), BY_CASE] = None
    contenders: Annotated[tuple[str, ...], some_of(names.CONTENDERS)] = names.CONTENDERS
    fraction: Annotated[float, number(zero=False, largest=1)] = 1.0


def run(options: Options) -> int:
    """Measure case by case; what is finished is written and printed at once."""
    import torch

    from benchmarks.speed.book import Book
    from benchmarks.speed.estimation import measure
    from benchmarks.speed.report import estimation_table, floor_line
    from benchmarks.speed.results import Estimation

    threads, console = options.threads or torch.get_num_threads(), make_console()
    book = Book(options.output / "speed.json", Estimation, threads=threads, quick=options.quick)
    for combination in names.combinations(options.cases, options.fisher):
        record = measure(combination, options, threads)
        book.add(record)
        console.print("", estimation_table(record, threads))
        print(floor_line(record), flush=True)
    book.close()
    return 0
