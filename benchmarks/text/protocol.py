"""What the commands on texts have in common: search on held-out texts, tests with all seeds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.text.methods import METHODS
from benchmarks.text.records import Record

# Does the run of a method, at a strength (None for what the method finds, or where it has none),
# with a seed, on held-out texts or those of the test.
Run = Callable[[str, float | None, int, bool], Record]


def tested(
    methods: Sequence[str],
    search_values: int,
    seeds: Sequence[int],
    run: Run,
    figures: Callable[[Record], dict[str, float]],
) -> Iterator[Record]:
    """Yield the records of the tests: at a method's default, and at the best strength held out.

    Args:
        methods: Names of the methods.
        search_values: How many strengths are tried of each method that has one.
        seeds: Of the tests; the search has the first.
        run: Returns the record of a run.
        figures: What to print of a record; the first is what strengths are chosen by, larger is
            better.
    """

    def shown(method: str, strength: float | None, seed: int, validate: bool) -> Record:
        told = f"λ {'auto' if strength is None else f'{strength:g}'}"
        print(f"{method}, {told}, seed {seed}{', held out' * validate}: ", end="", flush=True)
        record = run(method, strength, seed, validate)
        found = figures(record).items()
        print(", ".join(f"{name} {value:.4f}" for name, value in found), flush=True)
        return record

    for name in methods:
        kind: Any = METHODS[name]
        merits = {
            strength: next(iter(figures(shown(name, strength, seeds[0], True)).values()))
            for strength in kind.strengths[:search_values]
        }
        best = max(merits, key=merits.__getitem__, default=None)
        for strength in dict.fromkeys((None, best)):
            if strength is not None or not kind.needs_strength:
                for seed in seeds:
                    yield shown(name, strength, seed, False)
