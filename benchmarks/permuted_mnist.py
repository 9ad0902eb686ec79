"""Permuted MNIST: the same digits, their pixels in a new order in each task.

``python -m benchmarks.permuted_mnist`` is short for ``python -m benchmarks permuted-mnist``.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from benchmarks.command import keep, make_console, start, title_of
from benchmarks.configuration import Configuration, MethodNames, StreamOptions
from benchmarks.methods import DEFAULT_METHODS, METHODS, Variant, is_own
from benchmarks.option_types import number, several

if TYPE_CHECKING:
    from benchmarks.data import ImageData
    from benchmarks.results import Record

NAME = "permuted_mnist"


@dataclass(frozen=True, kw_only=True)
class Options(StreamOptions):
    """Learn one permuted-MNIST task after another with several methods, and compare what is left.

    Each task shows all images with their pixels in a new order, drawn for every task, the first
    included. Writes permuted_mnist.json (after every finished run) and permuted_mnist.png, and
    prints a table. Where MNIST is neither found nor to be downloaded, scikit-learn's digits take
    its place.

    Attributes:
        methods: Which to run.
        baseline_ewc_lambda: Strength of Avalanche's EWC; with several values, one run for each.
    """

    methods: MethodNames = DEFAULT_METHODS
    baseline_ewc_lambda: Annotated[tuple[float, ...], several(number(zero=True))] = (100.0,)


def run(options: Options) -> int:
    """Run every method at every seed, and present the results."""
    from benchmarks.report.accuracy import draw
    from benchmarks.report.tables import results_table
    from benchmarks.results import FORMAT

    configuration, data = start(options)
    results = options.output / f"{NAME}.json"
    document = {"format": FORMAT, "scenario": NAME}
    records = keep(_records(options, configuration, data), results, document)
    seeds = f"{len(options.seeds)} seed{'s' * (len(options.seeds) > 1)}"
    title = f"{title_of(data)}: {configuration.tasks} tasks, {seeds}"
    make_console().print(results_table(records, title))
    picture = results.with_suffix(".png")
    draw(records, title).savefig(picture)
    print(f"Wrote {results} and {picture}.")
    return 0


def _records(
    options: Options, configuration: Configuration, data: "ImageData"
) -> "Iterator[Record]":
    """Run all methods at one seed before the next."""
    from benchmarks import experiment
    from benchmarks.scenarios import PermutedImages

    for seed in options.seeds:
        scenario = PermutedImages(data, configuration.tasks, seed)
        for variant in variants(options):
            yield experiment.run(variant, scenario, configuration, seed=seed)


def variants(options: Options) -> list[Variant]:
    """What is to be run, in the order of ``--methods``."""
    found = []
    for name in options.methods:
        if name == "ewc":
            noted = len(options.baseline_ewc_lambda) > 1
            found += [
                Variant(name, value, f"[λ={value:g}]" if noted else "")
                for value in options.baseline_ewc_lambda
            ]
        else:
            found.append(
                Variant(
                    name, options.ewc_lambda if is_own(name) else METHODS[name].default_strength
                )
            )
    return found


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["permuted-mnist", *sys.argv[1:]]))
