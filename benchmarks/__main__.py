"""The benchmark suite: ``python -m benchmarks run``, ``compare``, ``plot`` and ``report``."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from benchmarks.command import complain, make_console, obstacle, prepare
from benchmarks.configuration import Configuration
from benchmarks.permuted_mnist import EXIT_INTERRUPTED, REQUIREMENTS
from benchmarks.suite.options import RunOptions, ShowOptions, parse

if TYPE_CHECKING:
    from benchmarks.suite.pool import Pool
    from benchmarks.suite.protocol import Experiment
    from benchmarks.suite.sweep import Search

NAME = "suite"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or present benchmarks.

    Args:
        arguments: Words of the command line; None for those of the process.

    Returns:
        The exit code: 0; 1 where something is missing, a run failed, or methods are not in the
        order that was to be checked; 130 after an interruption.
    """
    options = parse(arguments)
    missing = [package for module, package in REQUIREMENTS.items() if not find_spec(module)]
    if problem := obstacle(missing, options.output):
        return complain(NAME, problem)
    try:
        return _run(options) if isinstance(options, RunOptions) else _show(options)
    except KeyboardInterrupt:
        print("\nInterrupted; finished runs are kept, and the same command goes on from there.")
        return EXIT_INTERRUPTED


def _run(options: RunOptions) -> int:
    """Run all experiments, print their tables, and return the exit code."""
    from benchmarks.download import DataUnavailableError
    from benchmarks.suite.pool import Pool

    experiments: list[Experiment] = []
    with Pool(options.output, options.jobs, options.configurations[0].threads) as pool:
        for configuration in options.configurations:
            try:
                experiments += _run_one(configuration, options.search, pool)
            except DataUnavailableError as error:
                problem = f"{configuration.scenario}: its data set {error}"
                if len(options.configurations) == 1:
                    return complain(NAME, problem)
                print(f"Left out {problem}.")
            except ValueError as error:
                return complain(NAME, f"{configuration.scenario}: {error}")
    _print_tables(experiments)
    print(f"Records of all runs are in {options.output}.")
    return _verdict(options, experiments, pool)


def _run_one(configuration: Configuration, search: "Search", pool: "Pool") -> "list[Experiment]":
    """Search and test all methods on one scenario; without a result if all runs fail."""
    from benchmarks.scenarios import make_scenario
    from benchmarks.suite.protocol import experiments
    from benchmarks.suite.sweep import Sweep

    configuration, data = prepare(configuration)
    scenario = make_scenario(configuration, data, seed=0)
    sweep = Sweep(configuration, search, scenario.name, data.source)
    records = sweep.run(pool.execute)
    return experiments((scenario.name, record) for record in records)


def _print_tables(found: "Sequence[Experiment]") -> None:
    """Print a table for each experiment."""
    from benchmarks.suite.tables import terminal_notes, terminal_table

    console = make_console()
    for experiment in found:
        console.print(terminal_table(experiment))
    console.print(terminal_notes())


def _verdict(options: RunOptions, found: "Sequence[Experiment]", pool: "Pool") -> int:
    """Say what failed and, if that was asked for, what is out of order."""
    from benchmarks.suite.orderings import orderings

    comparisons = orderings(found) if options.check else []
    for comparison in comparisons:
        print(comparison)
    for trace in dict.fromkeys(pool.failures.values()):  # many runs fail for the same reason
        jobs = [job for job, other in pool.failures.items() if other == trace]
        print(f"\nFailed: {'; '.join(jobs)}\n{trace}", file=sys.stderr)
    in_order = all(comparison.holds for comparison in comparisons)
    return 0 if in_order and not pool.failures else 1


def _show(options: ShowOptions) -> int:
    """Present what earlier runs left behind."""
    from benchmarks.suite.page import write_figures, write_report
    from benchmarks.suite.protocol import experiments
    from benchmarks.suite.store import load_all

    try:
        found = experiments(load_all(options.folders))
    except ValueError as error:
        return complain(NAME, str(error))
    if options.output is None:
        _print_tables(found)
        return 0
    write = write_report if options.command == "report" else write_figures
    for path in write(found, options.output):
        print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
