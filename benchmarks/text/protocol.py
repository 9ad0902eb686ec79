"""What the commands on texts have in common: search on held-out texts, tests with all seeds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks.command import CommandError, make_folder, use_threads
from benchmarks.text.records import Record, Records

# Options on which the outcome of a run does not depend.
_OF_THE_CALL = ("methods", "search_values", "seeds", "output", "texts", "threads")


class Work(Protocol):
    """Does the run of a method."""

    def __call__(
        self, options: Any, name: str, strength: float | None, seed: int, *, validate: bool
    ) -> dict[str, Any]:
        """Return what is to be recorded.

        Args:
            options: Those of the command.
            name: The method's.
            strength: None for what the method finds, or where it has none.
            seed: Of the run.
            validate: Whether it is measured on held-out texts, and not on those of the test.
        """


def tested(
    options: Any,
    name: str,
    work: Work,
    figures: Callable[[Record], dict[str, float]],
    **told: Any,
) -> list[Record]:
    """Return the records of the tests: at a method's default, and at the best strength held out.

    Args:
        options: Those of the command, a dataclass; the search has the first of the seeds.
        name: That of the file of records, NAME.jsonl in the folder of the results. Runs that are in
            it already are not done again.
        work: Does a run.
        figures: What to print of a record; the first is what strengths are chosen by, larger is
            better.
        told: What a run depends on besides the options, or in place of one.

    Raises:
        CommandError: If there is no folder for the results, or an option is refused in a run.
    """
    make_folder(options.output)
    use_threads(options.threads)
    try:
        return list(_tested(options, name, work, figures, told))
    except ValueError as error:
        raise CommandError(str(error)) from error


def _tested(
    options: Any,
    name: str,
    work: Work,
    figures: Callable[[Record], dict[str, float]],
    told: Mapping[str, Any],
) -> Iterator[Record]:
    from benchmarks.text.methods import METHODS

    records = Records(options.output / f"{name}.jsonl")
    shared = {key: value for key, value in asdict(options).items() if key not in _OF_THE_CALL}
    shared |= told

    def shown(method: str, strength: float | None, seed: int, validate: bool) -> Record:
        found = f"λ {'auto' if strength is None else f'{strength:g}'}"
        print(f"{method}, {found}, seed {seed}{', held out' * validate}: ", end="", flush=True)
        own = {"method": method, "strength": strength, "seed": seed, "validate": validate}
        record = records.get(
            {**shared, **own}, lambda: work(options, method, strength, seed, validate=validate)
        )
        values = figures(record).items()
        print(", ".join(f"{name} {value:.4f}" for name, value in values), flush=True)
        return record

    for method in options.methods:
        kind: Any = METHODS[method]
        merits = {
            strength: next(iter(figures(shown(method, strength, options.seeds[0], True)).values()))
            for strength in kind.strengths[: options.search_values]
        }
        best = max(merits, key=merits.__getitem__, default=None)
        for strength in dict.fromkeys((None, best)):
            if strength is not None or not kind.needs_strength:
                for seed in options.seeds:
                    yield shown(method, strength, seed, False)
