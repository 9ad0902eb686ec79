"""``speed-penalty``: what the penalty costs in a training step, here and in other packages."""

from dataclasses import dataclass
from typing import Annotated

from benchmarks.command import make_console, use_threads
from benchmarks.option_types import Count, several, some_of, whole_number
from benchmarks.speed import names
from benchmarks.speed.command import MeasuringOptions

SEPARATE_TASKS, QUICK_TASKS = 10, 2


@dataclass(frozen=True, kw_only=True)
class Options(MeasuringOptions):
    """Time what the penalty costs in a training step, here and in other packages.

    Its value and gradient, and whole steps of Adam: plain, with the penalty in the loss, and with
    the penalty attached to the optimizer. The models are

      small   MLP 784-100-100-10, batches of 250
      a       MLP 784-400-400-10, batches of 250
      c       CNN with four convolutions and two linear layers, batches of 250 images
      e       Transformer of four blocks of width 256, batches of 16 sequences of 128 tokens

    Merged penalties after some numbers of tasks, and, but for e, tasks kept separate. Peers have
    the matrix of one task, over linear layers and convolutions. Attached steps are after the most
    tasks, with a strength that is given, and while it is found. Last, how long it takes to load a
    snapshot, and to import the package.

    All contenders of a case take turns within one process; the median of each turn counts. Ratios
    are within a round, and medians over rounds. The data are noise: cost depends on shapes alone.

    Writes speed_penalty.json and speed_penalty.png after every case. Results of earlier calls with
    as many threads stay in them; those of the same case are replaced. Takes about half an hour, of
    a machine with nothing else to do.

    Attributes:
        cases: Any of small, a, c, e.
        tasks: Numbers of tasks of the merged penalties; 1 is always among them, for the peers.
        quick: A smoke test with a few examples, and at most 2 rounds and tasks, whose figures mean
            nothing.
    """

    cases: Annotated[tuple[str, ...], some_of(names.STEP_CASES)] = tuple(names.STEP_CASES)
    tasks: Annotated[tuple[int, ...], several(whole_number(1), repeated=True)] = (1, 10, 50)
    rounds: Count = 7

    def __post_init__(self) -> None:
        """Check the number of rounds, and put the numbers of tasks in order."""
        super().__post_init__()
        most = QUICK_TASKS if self.quick else max(self.tasks)
        object.__setattr__(self, "tasks", tuple(sorted({1, *(min(t, most) for t in self.tasks)})))

    @property
    def separate_tasks(self) -> int:
        """Number of tasks that are kept separate."""
        return QUICK_TASKS if self.quick else SEPARATE_TASKS


def run(options: Options) -> int:
    """Measure case by case; what is finished is written and printed at once."""
    import torch

    from benchmarks.speed.book import Book
    from benchmarks.speed.report import comparisons_table, durations_table, training_table
    from benchmarks.speed.results import Training
    from benchmarks.speed.training import measure, time_imports, time_loading

    use_threads(options.threads)
    threads, console = torch.get_num_threads(), make_console()
    path = options.output / "speed_penalty.json"
    book = Book(path, Training, threads=threads, quick=options.quick)
    for case in options.cases:
        record = measure(case, options)
        book.add(record)
        console.print("", training_table(record, threads), "", comparisons_table(record))
    durations = [
        time_loading(options.rounds, quick=options.quick),
        time_imports(quick=options.quick),
    ]
    book.write(durations=durations)
    console.print("", durations_table(durations))
    book.close()
    return 0
