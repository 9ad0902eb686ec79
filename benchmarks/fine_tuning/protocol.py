"""What commands have in common: search on held-out examples, tests with all seeds.

A record is a line of JSON, so that a call which is repeated goes on where it was.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from benchmarks.command import CommandError, make_folder, print_table, use_threads
from benchmarks.option_types import (
    Count,
    CountOrZero,
    Folder,
    Positive,
    Seeds,
    Threads,
    whole_number,
)

Record = dict[str, Any]
Figures = Callable[[Record], dict[str, float]]

# Of a stream of tasks, in the order of the tables.
METHOD_NAMES = (
    "naive",
    "l2",
    "ewc",
    "lwf",
    "replay",
    "rotated-ewc",
    "rotated-ewc-lean",
    "rotated-ewc-plastic",
    "rotated-ewc-tangent",
    "joint",
)

# Options on which the outcome of a run does not depend.
_OF_THE_CALL = ("methods", "search_values", "seeds", "output", "texts", "images", "threads")


@dataclass(frozen=True, kw_only=True)
class TuningOptions:
    """Options of every command that fine-tunes a network.

    Attributes:
        methods: Which methods.
        steps: Steps for each task.
        batch_size: Examples in a step.
        learning_rate: Of Adam.
        fisher_samples: Examples of a task that a penalty looks at.
        test_size: Examples of each task to test with, and as many to choose by.
        search_values: Strengths to try for each method that has one; 0 for defaults alone.
        seeds: Seeds of the runs; strengths are searched with the first.
        threads: Threads of PyTorch.
        output: Folder of the results.
    """

    methods: tuple[str, ...] = ()
    steps: Count = 150
    batch_size: Count = 16
    learning_rate: Positive = 5e-5
    fisher_samples: Count = 256
    test_size: Count = 500
    search_values: CountOrZero = 3
    seeds: Seeds = (0, 1, 2)
    threads: Threads = None
    output: Folder = Path("results")


@dataclass(frozen=True, kw_only=True)
class TextOptions(TuningOptions):
    """Those of commands on texts.

    Attributes:
        length: Tokens of a text at most.
    """

    length: Annotated[int, whole_number(4, 512)] = 32


# What is to be recorded of a run: from the options of a command, a method, its strength (None for
# what the method finds, or where it has none), a seed, and whether held-out examples are measured.
Work = Callable[[Any, str, float | None, int, bool], dict[str, Any]]


def present(
    options: TuningOptions,
    name: str,
    work: Work,
    figures: Figures,
    columns: Mapping[str, tuple[str, float, int]],
    *,
    title: str,
    of_joint: Collection[str] = (),
    **told: Any,
) -> list[Record]:
    """Do the tests, at a method's default and at the best strength held out, and print a table.

    Args:
        options: Those of the command; the search has the first of the seeds.
        name: That of the file of records, NAME.jsonl in the folder of the results. Runs that are in
            it already are not done again.
        work: Does a run.
        figures: What to print of a record; the first is what strengths are chosen by, larger is
            better.
        columns: By heading the name of a figure or of what a record has, its unit, and decimals.
        title: Of the table, which has means and deviations over the seeds.
        of_joint: Names of what learning all tasks at once has too.
        told: What a run depends on besides the options, or in place of one.

    Returns:
        The records of the tests.

    Raises:
        CommandError: If there is no folder for the results, or an option is refused in a run.
    """
    make_folder(options.output)
    use_threads(options.threads)
    records = Records(options.output / f"{name}.jsonl")
    try:
        found = list(_tested(options, records, work, figures, told))
    except ValueError as error:
        raise CommandError(str(error)) from error
    rows = (
        [method, strength_of(group), *_cells(method, group, figures, columns, of_joint)]
        for (method, _), group in groups_of(found).items()
    )
    print_table(title, ["method", "λ"], list(columns), rows)
    print(f"Wrote {records.path}.")
    return found


def _tested(
    options: TuningOptions,
    records: "Records",
    work: Work,
    figures: Figures,
    told: Mapping[str, Any],
) -> Iterator[Record]:
    from benchmarks.fine_tuning.methods import METHODS

    shared = {key: value for key, value in asdict(options).items() if key not in _OF_THE_CALL}
    shared |= told

    def shown(method: str, strength: float | None, seed: int, validate: bool) -> Record:
        found = f"λ {'auto' if strength is None else f'{strength:g}'}"
        print(f"{method}, {found}, seed {seed}{', held out' * validate}: ", end="", flush=True)
        own = {"method": method, "strength": strength, "seed": seed, "validate": validate}
        record = records.get(
            {**shared, **own}, lambda: work(options, method, strength, seed, validate)
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


class Records:
    """The lines of a file, and runs that are not in it yet."""

    def __init__(self, path: Path) -> None:
        """Read what there is; a last line that was cut off counts as not there."""
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, _ = text.rpartition("\n")
        if text != f"{whole}\n" and text:
            path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self._found: dict[str, Record] = {}
        for line in whole.splitlines():
            record = json.loads(line)
            self._found[_name(record["run"])] = record

    def get(self, run: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> Record:
        """Return the record of a run, doing the work if there is none."""
        name = _name(run)
        if name not in self._found:
            record = {"run": dict(run), **work()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._found[name] = record
        return self._found[name]


def _name(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


def _cells(
    method: str,
    group: Sequence[Record],
    figures: Figures,
    columns: Mapping[str, tuple[str, float, int]],
    of_joint: Collection[str],
) -> Iterator[str]:
    from benchmarks.report.tables import ABSENT, mean, percent

    for key, unit, decimals in columns.values():
        values = [{**record, **figures(record)}[key] for record in group]
        show = mean if key.endswith(("_seconds", "_bytes")) else percent
        absent = method == "joint" and key not in of_joint
        yield ABSENT if absent else show(values, decimals, unit)


def groups_of(records: Iterable[Record]) -> dict[tuple[str, float | None], list[Record]]:
    """The records of each method and strength."""
    groups: dict[tuple[str, float | None], list[Record]] = {}
    for record in records:
        run = record["run"]
        groups.setdefault((run["method"], run["strength"]), []).append(record)
    return groups


def strength_of(group: Sequence[Record]) -> str:
    """Tell the strength of runs; of one that was found, the median over the seeds."""
    strength = group[0]["run"]["strength"]
    if strength is not None:
        return f"{strength:g}"
    found = [record["strength"] for record in group]
    return f"auto ({median(found):.3g})" if None not in found else "–"
