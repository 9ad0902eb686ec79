"""The command line of the suite: four commands, one of which runs and three of which present."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.configuration import (
    INCREMENTS,
    SCENARIO_DEFAULTS,
    Configuration,
    add_arguments,
    check_output,
    configuration_from,
    flatten,
)
from benchmarks.methods import METHODS
from benchmarks.option_types import LARGEST_SEED, one_of, several, whole_number
from benchmarks.suite.sweep import Search

PROGRAM = "python -m benchmarks"
ALL = "all"
NOT_IN_THE_SUITE = ("--ewc-lambda", "--baseline-ewc-lambda", "--validate")
# Small enough for a check of everything in a few minutes, large enough for methods to differ.
QUICK_DEFAULTS = {"training_images": 6_000, "epochs": 2, "batch_size": 50, "fisher_samples": 1_000}
QUICK_TASKS = {"permuted_mnist": 3, "rotated_mnist": 3}
QUICK_SEARCH = Search(values=3, refine=False)
DESCRIPTION = """\
Compare methods of continual learning by one protocol: the strength of each is chosen on training
images that are held out, by a search of the same size for all, and then tested on the test images.
"""
RUN_DESCRIPTION = """\
Search the strength of every method on held-out training images, then test it with several seeds,
at the strength found and at its default. Every run is kept in a file of its own: a call that was
interrupted goes on where it stopped when it is repeated, and a call with more seeds or methods adds
to what is there.
"""


@dataclass(frozen=True)
class RunOptions:
    """What ``run`` is to do.

    Attributes:
        configurations: One for each experiment.
        search: How strengths are chosen.
        jobs: Number of processes.
        check: Whether to fail where the methods are not in the expected order.
    """

    configurations: Sequence[Configuration]
    search: Search
    jobs: int
    check: bool

    @property
    def output(self) -> Path:
        """Folder of the results, the same for all experiments."""
        return self.configurations[0].output


@dataclass(frozen=True)
class ShowOptions:
    """What ``compare``, ``plot`` or ``report`` is to do.

    Attributes:
        command: Which of them.
        folders: Folders of results.
        output: Folder of what is written; None for ``compare``.
    """

    command: str
    folders: Sequence[Path]
    output: Path | None


def parse(arguments: Sequence[str] | None = None) -> RunOptions | ShowOptions:
    """Turn a command line into options, or leave with a message that says what is wrong.

    Args:
        arguments: Words of the command line; None for those of the process.

    Raises:
        SystemExit: With code 2 after a message on standard error, or code 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{PROGRAM} COMMAND --help tells more of each.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = _add_run(commands)
    for name, help_text, default in (
        ("compare", "print a table of what the runs in some folders reached", None),
        ("plot", "draw what they reached", "plots"),
        ("report", "write one page with all tables and figures, as HTML and Markdown", "report"),
    ):
        _add_presentation(commands, name, help_text, default)
    namespace = parser.parse_args(arguments)
    if namespace.command == "run":
        return _run_options(namespace, run)
    output = getattr(namespace, "output", None)
    check_output(output, parser)
    return ShowOptions(namespace.command, namespace.folders, output)


def _add_run(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> argparse.ArgumentParser:
    """The parser of ``run``."""
    run = commands.add_parser(
        "run",
        help="search and test methods on a scenario",
        description=RUN_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scenarios = (*SCENARIO_DEFAULTS, ALL)
    run.add_argument(
        "scenario",
        type=one_of(scenarios),
        metavar="SCENARIO",
        help=f"one of {', '.join(scenarios)}",
    )
    protocol = run.add_argument_group("protocol")
    protocol.add_argument(
        "--increment",
        type=several(one_of(INCREMENTS)),
        nargs="+",
        metavar="KIND",
        help="what the network is to tell in split streams: which class of a given task (task), of "
        "a task that is not given (domain), or of all (class) (default: all three, one after "
        "another, for split_mnist; task for CIFAR)",
    )
    protocol.add_argument(
        "--search-values",
        type=whole_number(0),
        metavar="N",
        help="powers of ten to try as strength of each method before the best is refined, an odd "
        f"number; 0 for the default strength alone (default: {Search.values})",
    )
    protocol.add_argument(
        "--search-seeds",
        type=several(whole_number(0, LARGEST_SEED)),
        nargs="+",
        metavar="SEED",
        help="every strength is tried with each (default: 0)",
    )
    protocol.add_argument(
        "--no-refinement",
        action="store_true",
        help="leave out the second stage of the search, half a power of ten around the best",
    )
    protocol.add_argument(
        "--quick",
        action="store_true",
        help="a small version of everything, in minutes: few images, few tasks, a coarse search; "
        "fails where the methods are not in the expected order",
    )
    protocol.add_argument(
        "--replay",
        type=whole_number(0),
        default=argparse.SUPPRESS,
        metavar="N",
        help="give every method a replay buffer of so many examples besides (default: 0)",
    )
    protocol.add_argument(
        "--training-images",
        type=whole_number(0),
        default=argparse.SUPPRESS,
        metavar="N",
        help="use the first N training images only, 0 for all (default: 0)",
    )
    protocol.add_argument(
        "--jobs",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="runs at the same time, each with its share of the processors; times are then those "
        "of a busy machine (default: 1)",
    )
    defaults = Configuration(methods=tuple(METHODS), seeds=(0, 1, 2))
    add_arguments(run, defaults, leave_out=NOT_IN_THE_SUITE)
    return run


def _add_presentation(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    help_text: str,
    output: str | None,
) -> None:
    """The parser of a command that presents results."""
    parser = commands.add_parser(name, help=help_text, description=help_text.capitalize() + ".")
    parser.add_argument(
        "folders",
        type=Path,
        nargs="*",
        default=[Path("results")],
        metavar="FOLDER",
        help="folders of results, with all folders in them (default: results)",
    )
    if output is not None:
        parser.add_argument(
            "--output",
            type=Path,
            default=Path(output),
            metavar="FOLDER",
            help=f"where to write (default: {output})",
        )


def _run_options(namespace: argparse.Namespace, parser: argparse.ArgumentParser) -> RunOptions:
    """The options of ``run``."""
    defaults = Configuration(methods=tuple(METHODS), seeds=(0,) if namespace.quick else (0, 1, 2))
    scenario = namespace.scenario
    del namespace.scenario
    given = flatten("increment", namespace.increment, parser) if namespace.increment else ()
    del namespace.increment
    if given and scenario in SCENARIO_DEFAULTS and not scenario.startswith("split"):
        parser.error(f"argument --increment: expected a split stream, got {scenario}")
    configuration = configuration_from(namespace, parser, defaults)
    names = list(SCENARIO_DEFAULTS) if scenario == ALL else [scenario]
    configurations = [
        _for_scenario(configuration, name, increment, quick=namespace.quick)
        for name in names
        for increment in _increments(name, given)
    ]
    return RunOptions(configurations, _search(namespace, parser), namespace.jobs, namespace.quick)


def _increments(scenario: str, given: Sequence[str]) -> Sequence[str]:
    """What the network is to tell in a scenario; streams that are not split know only one."""
    if not scenario.startswith("split"):
        return (Configuration.increment,)
    return given or (INCREMENTS if scenario == "split_mnist" else ("task",))


def _for_scenario(
    configuration: Configuration, name: str, increment: str, *, quick: bool
) -> Configuration:
    """The options with the defaults of a scenario."""
    fitted = configuration.with_defaults(SCENARIO_DEFAULTS[name])
    if quick:
        tasks = {"tasks": QUICK_TASKS[name]} if name in QUICK_TASKS else {}
        fitted = fitted.with_defaults({**QUICK_DEFAULTS, **tasks})
    return dataclasses.replace(fitted, scenario=name, increment=increment)


def _search(namespace: argparse.Namespace, parser: argparse.ArgumentParser) -> Search:
    """How strengths are chosen."""
    search = QUICK_SEARCH if namespace.quick else Search()
    values = search.values if namespace.search_values is None else namespace.search_values
    if values and values % 2 == 0:
        parser.error(
            f"argument --search-values: expected an odd number or 0, got {values}: as many powers "
            "of ten below the middle as above"
        )
    seeds = flatten("search_seeds", namespace.search_seeds or [list(search.seeds)], parser)
    return Search(values, search.refine and not namespace.no_refinement, seeds)
