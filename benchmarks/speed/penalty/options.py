"""The options of the command; nothing here imports anything heavy."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.configuration import Configuration, check_output, flatten
from benchmarks.option_types import one_of, several, whole_number
from benchmarks.speed.penalty import names

NAME = "speed_penalty"
FEWEST_ROUNDS = 5
QUICK_ROUNDS = 2
QUICK_TASKS = (1, 2)
SEPARATE_TASKS = 10
QUICK_SEPARATE_TASKS = 2
DESCRIPTION = f"""\
Time what the penalty costs in a training step: its value and gradient, here and in other packages,
and whole steps (Adam) with and without it. The models are

  small   MLP 784-100-100-10, batches of 250
  a       MLP 784-400-400-10, batches of 250
  c       CNN with four convolutions and two linear layers, batches of 250 images
  e       Transformer of four blocks of width 256, batches of 16 sequences of 128 tokens

Merged penalties after some numbers of tasks, and, but for e, tasks kept separate beside as many
penalties called one by one. Peers have the matrix of one task, over linear layers and
convolutions. After the most tasks also steps with the penalty's tangent plane; for the MLPs steps
with a proximal one now and then, and those of RotatedAdam. Last, how long it takes to load a
snapshot, and to import the package.

All contenders of a case take turns within one process; the median of each turn counts. Ratios are
within a round, and medians over rounds. The data are noise: cost depends on shapes alone. Targets
are marked as met or missed; nothing fails.

Writes {NAME}.json and {NAME}.png after every case, in place of those of an earlier call. Takes
about half an hour, of a machine with nothing else to do. Lists are separated by spaces or commas.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of one call.

    Attributes:
        cases: Cases, in the order in which they are measured.
        tasks: Numbers of tasks of the merged penalties, rising; 1 is always among them, for peers.
        rounds: Number of rounds.
        threads: CPU threads of PyTorch; None leaves its own choice.
        quick: Whether to run a smoke test with a few examples.
        output: Folder of the results.
    """

    cases: tuple[str, ...] = tuple(names.CASES)
    tasks: tuple[int, ...] = (1, 10, 50)
    rounds: int = 7
    threads: int | None = None
    quick: bool = False
    output: Path = Configuration.output

    @property
    def separate_tasks(self) -> int:
        """Number of tasks that are kept separate."""
        return QUICK_SEPARATE_TASKS if self.quick else SEPARATE_TASKS


def parse_options(arguments: Sequence[str] | None) -> Options:
    """Turn a command line into options, or leave with a message that says what is wrong.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The options.

    Raises:
        SystemExit: With code 2 after a message on standard error, or code 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.penalty",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_arguments(parser, Options())
    given = vars(parser.parse_args(arguments))
    for name in ("cases", "tasks"):
        if name in given:
            given[name] = flatten(name, given[name], parser)
    check_output(given.get("output"), parser)
    if given.get("quick", False):
        given = {"rounds": QUICK_ROUNDS, "tasks": QUICK_TASKS, **given}
    elif given.get("rounds", FEWEST_ROUNDS) < FEWEST_ROUNDS:
        parser.error(
            f"argument --rounds: expected a whole number ≥ {FEWEST_ROUNDS} without --quick, "
            f"got '{given['rounds']}'"
        )
    options = Options(**given)
    return dataclasses.replace(options, tasks=tuple(sorted({1, *options.tasks})))


def _add_arguments(parser: argparse.ArgumentParser, defaults: Options) -> None:
    """Add all options; those that are not given leave no trace."""
    parser.add_argument(
        "--cases",
        type=several(one_of(names.CASES)),
        nargs="+",
        metavar="CASE",
        help=f"any of {', '.join(names.CASES)} (default: all)",
    )
    parser.add_argument(
        "--tasks",
        type=several(whole_number(1)),
        nargs="+",
        metavar="T",
        help=f"numbers of tasks (default: {' '.join(map(str, defaults.tasks))}); 1 is always "
        "among them",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(1),
        metavar="R",
        help=f"rounds, at least {FEWEST_ROUNDS} without --quick (default: {defaults.rounds})",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads of PyTorch (default: PyTorch's choice)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a smoke test with a few examples, few tasks and {QUICK_ROUNDS} rounds, whose "
        "figures mean nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"where {NAME}.json and {NAME}.png go (default: {defaults.output})",
    )
