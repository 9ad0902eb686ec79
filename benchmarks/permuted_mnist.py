"""Permuted MNIST: the same digits, their pixels in a new order in each task.

``python -m benchmarks.permuted_mnist`` is short for ``python -m benchmarks permuted-mnist``.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from benchmarks.command import keep, make_console, start
from benchmarks.configuration import MethodNames, StreamOptions
from benchmarks.methods import AUTO, DEFAULT_METHODS, METHODS, Variant, is_own
from benchmarks.option_types import number, several

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
    from benchmarks import experiment
    from benchmarks.report.accuracy import draw
    from benchmarks.report.tables import closing_lines, results_table
    from benchmarks.results import FORMAT

    configuration, images, streams = start(options)
    results = options.output / f"{NAME}.json"
    runs = (
        experiment.run(variant, stream, configuration, seed=seed)
        for seed, stream in streams
        for variant in variants(options)
    )
    records = keep(runs, results, {"format": FORMAT, "scenario": NAME})
    seeds = f"{len(options.seeds)} seed{'s' * (len(options.seeds) > 1)}"
    title = f"{images}: {configuration.tasks} tasks, {seeds}"
    make_console().print(results_table(records, title))
    picture = results.with_suffix(".png")
    draw(records, title).savefig(picture)
    print(f"Wrote {results} and {picture}.\n", *closing_lines(records), sep="\n")
    return 0


def variants(options: Options) -> list[Variant]:
    """What is to be run, in the order of ``--methods``."""
    baselines = options.baseline_ewc_lambda
    found = []
    for name in options.methods:
        if name == "ewc":
            notes = [f"[λ={value:g}]" if len(baselines) > 1 else "" for value in baselines]
            found += [Variant(name, *pair) for pair in zip(baselines, notes, strict=True)]
        else:
            found.append(Variant(name, strength_of(name, options)))
    return found


def strength_of(name: str, options: StreamOptions) -> float | str | None:
    """The strength of a method: that of ``--ewc-lambda`` where the method is ours and takes it."""
    method, given = METHODS[name], options.ewc_lambda
    takes_it = is_own(name) and (method.attached or given != AUTO)
    return given if takes_it else method.default_strength


if __name__ == "__main__":
    from benchmarks.__main__ import main

    sys.exit(main(["permuted-mnist", *sys.argv[1:]]))
