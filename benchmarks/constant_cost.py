"""Measure what the penalty costs after few tasks and after many.

Run ``python -m benchmarks.constant_cost --help`` for the options.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import complain, make_console, obstacle
from benchmarks.configuration import Configuration, check_output, flatten
from benchmarks.option_types import several, whole_number

if TYPE_CHECKING:
    from benchmarks.cost_report import Cost

NAME = "constant_cost"
FORMAT = "rotate_ewc.benchmarks.constant_cost/1"
REFERENCE = 2
FEWEST_ROUNDS = 5
DESCRIPTION = """\
Time what a penalty costs after few tasks and after many, merged and separate: its value and
gradient, the whole training step (a batch of 250, Adam) with it in the loss, the step of
RotatedAdam where tasks are merged, and the size of what is kept; and the training step without a
penalty. The network is 784-100-100-10, or has other hidden layers.

All contenders take turns within one process: in every round each is called some times, of which the
median counts. Times are medians over the rounds. Ratios are to the cost after two tasks in the same
round, and medians over the rounds too. The images are noise: cost depends on shapes alone.

Writes constant_cost.json, and prints a table. Takes some minutes, of a machine with nothing else
to do. Lists are separated by spaces or commas.
"""
REQUIREMENTS = {"rich": "rich", "tqdm": "tqdm"}
EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of one call.

    Attributes:
        hidden: Widths of the hidden layers.
        tasks: Numbers of tasks, rising, :data:`REFERENCE` among them.
        rounds: Number of rounds.
        repetitions: Calls of each contender in a round.
        threads: CPU threads for PyTorch; None leaves its own choice.
        output: Folder of the results.
    """

    hidden: tuple[int, ...] = Configuration.hidden
    tasks: tuple[int, ...] = (1, 2, 10, 50)
    rounds: int = 7
    repetitions: int = 50
    threads: int | None = None
    output: Path = Configuration.output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0, 1 where something needed is missing, or 130 after an interruption.
    """
    options = parse_options(arguments)
    missing = [package for module, package in REQUIREMENTS.items() if not find_spec(module)]
    if problem := obstacle(missing, options.output):
        return complain(NAME, problem)
    try:
        _run(options, options.output / f"{NAME}.json")
    except KeyboardInterrupt:
        print("\nInterrupted; nothing is kept.")
        return EXIT_INTERRUPTED
    return 0


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
        prog=f"python -m benchmarks.{NAME}",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_arguments(parser, Options())
    given = vars(parser.parse_args(arguments))
    for name in ("hidden", "tasks"):
        if name in given:
            given[name] = flatten(name, given[name], parser)
    check_output(given.get("output"), parser)
    options = Options(**given)
    return dataclasses.replace(options, tasks=tuple(sorted({REFERENCE, *options.tasks})))


def _add_arguments(parser: argparse.ArgumentParser, defaults: Options) -> None:
    """Add all options; those that are not given leave no trace."""
    parser.add_argument(
        "--hidden",
        type=several(whole_number(1)),
        nargs="+",
        metavar="WIDTH",
        help=f"widths of the hidden layers (default: {' '.join(map(str, defaults.hidden))})",
    )
    parser.add_argument(
        "--tasks",
        type=several(whole_number(1)),
        nargs="+",
        metavar="T",
        help=f"numbers of tasks (default: {' '.join(map(str, defaults.tasks))}); {REFERENCE} is "
        "always among them",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(FEWEST_ROUNDS),
        metavar="R",
        help=f"rounds, at least {FEWEST_ROUNDS} (default: {defaults.rounds})",
    )
    parser.add_argument(
        "--repetitions",
        type=whole_number(1),
        metavar="N",
        help=f"calls of each contender in a round (default: {defaults.repetitions})",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1),
        metavar="N",
        help="CPU threads of PyTorch (default: PyTorch's choice)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where constant_cost.json goes, replacing that of an earlier call "
        f"(default: {defaults.output})",
    )


def _run(options: Options, results: Path) -> None:
    """Measure, then write and print everything."""
    import torch

    from benchmarks.cost_report import cost_table
    from benchmarks.records import write_document

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    costs = _measure(options)
    write_document(results, _document(options, costs))
    make_console().print(cost_table(costs, _title(options)))
    print(f"Wrote {results}.")


def _measure(options: Options) -> "list[Cost]":
    """Consolidate, and time everything that is there then."""
    import torch

    from benchmarks.contenders import MODES, contenders, network, penalties
    from benchmarks.cost_report import Penalty, summarise
    from benchmarks.rounds import time_in_rounds

    torch.manual_seed(0)
    model = network(options.hidden)
    found = [
        penalty for mode in MODES for penalty in penalties(model, mode, options.tasks).values()
    ]
    medians = time_in_rounds(
        contenders(model, found), rounds=options.rounds, repetitions=options.repetitions
    )
    sizes: dict[Penalty, int] = {
        (penalty.mode, penalty.num_tasks): penalty.nbytes for penalty in found
    }
    return summarise(medians, sizes, REFERENCE)


def _document(options: Options, costs: "Sequence[Cost]") -> dict[str, Any]:
    """What is written: plain values, without the folder that says nothing about the experiment."""
    import torch

    from benchmarks.versions import versions

    configuration = dataclasses.asdict(options)
    del configuration["output"]
    return {
        "format": FORMAT,
        "configuration": {**configuration, "threads": torch.get_num_threads()},
        "reference_tasks": REFERENCE,
        "records": [dataclasses.asdict(cost) for cost in costs],
        "versions": versions(),
    }


def _title(options: Options) -> str:
    """Say what was measured, and how."""
    import torch

    from benchmarks.contenders import CLASSES, FEATURES

    widths = "-".join(map(str, (FEATURES, *options.hidden, CLASSES)))
    threads = torch.get_num_threads()
    return (
        f"{widths}: medians of {options.rounds} rounds of {options.repetitions} calls; ratios to "
        f"{REFERENCE} tasks; {threads} thread{'s' * (threads > 1)}"
    )


if __name__ == "__main__":
    sys.exit(main())
