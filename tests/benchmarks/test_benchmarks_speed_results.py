"""Agreement, files, tables and figures, from results made up; and processes that fail."""

import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.command import CommandError
from benchmarks.speed import book as book_module
from benchmarks.speed import estimation, names
from benchmarks.speed.book import Book
from benchmarks.speed.cases import Estimate, Workload
from benchmarks.speed.contenders import BY_NAME, Contender, Kind
from benchmarks.speed.estimation import (
    QUICK_TOLERANCES,
    TOLERANCES,
    Entry,
    Reply,
    compare,
    finite,
    in_one_line,
    new_process,
    result_of,
)
from benchmarks.speed.figure import draw
from benchmarks.speed.measuring import peak_growth
from benchmarks.speed.report import estimation_table, floor_line
from benchmarks.speed.results import (
    MEASURED,
    MISSING,
    REFUSED,
    WRONG,
    Estimation,
    Result,
)


def result(name: str, seconds: list[float], *traces: float, memory: int = 2**20) -> Result:
    kind = BY_NAME[name].kind
    return Result(name, MEASURED, "", seconds, list(traces), "1", kind, memory)


@pytest.fixture
def record() -> Estimation:
    results = [
        result(names.OURS, [1.0, 2.0, 4.0], 10.0),
        result(names.EVERYTHING, [2.0, 2.0, 2.0], 12.0),
        result(names.CURVLINOPS, [2.0, 6.0, 4.0], 10.05, memory=2**19),
        result(names.NNGEOMETRY, [0.1, 0.1, 0.1], 5.0, memory=1),
        Result(names.LAPLACE, REFUSED, "TypeError: no [such] thing", kind=Kind.OTHER),
        Result(names.AVALANCHE, MISSING, kind=Kind.OTHER),
        result(names.PLAIN, [0.5, 0.5, 0.5]),
    ]
    return Estimation(
        case="c",
        fisher="mc",
        fraction=1.0,
        examples=2_000,
        batch=250,
        rounds=3,
        tolerance=0.01,
        rates={"1x1x1": [1.0]},
        eigh={"4": [0.5]},
        gigaflop={"forward": 1.0},
        floor_seconds={"forward": 0.25, "eigh": 0.75},
        results=compare(results, 0.01),
        versions={"torch": "2"},
    )


def test_only_equal_results_have_ratios(record: Estimation) -> None:
    assert {one.name: one.ratio for one in record.results} == {
        names.OURS: 1.0,
        names.EVERYTHING: None,
        names.CURVLINOPS: 2.0,  # the median of 2, 3 and 1
        names.NNGEOMETRY: None,
        names.LAPLACE: None,
        names.AVALANCHE: None,
        names.PLAIN: None,
    }


def test_a_wrong_trace_is_said_and_its_times_are_kept(record: Estimation) -> None:
    wrong = record.results[3]
    assert (wrong.status, wrong.message) == (WRONG, "wrong ×0.5")
    assert wrong.seconds == [0.1, 0.1, 0.1]


def test_the_exact_matrix_must_agree_more_closely() -> None:
    assert TOLERANCES == {"mc": 1e-2, "type2": 1e-4}
    assert QUICK_TOLERANCES["type2"] == 1e-4
    both = [result(names.OURS, [1.0], 10.0), result(names.CURVLINOPS, [1.0], 10.05)]
    assert [one.status for one in compare(both, 1e-4)] == [MEASURED, WRONG]


def test_thin_bases_have_the_same_trace_whatever_the_labels() -> None:
    both = [result(names.OURS, [2.0], 10.0), result(names.THIN, [1.0], 10.0005, memory=1)]
    _, thin = compare(both, 0.5)
    assert (thin.status, thin.ratio) == (MEASURED, 0.5)
    thin.values = [10.002]
    assert [one.status for one in compare(both, 0.5)] == [MEASURED, WRONG]


def test_traces_of_all_estimations_are_averaged() -> None:
    both = [
        result(names.OURS, [1.0], 9.0, 11.0),
        result(names.CURVLINOPS, [1.0], 12.0, 8.01),
    ]
    assert [one.status for one in compare(both, 1e-2)] == [MEASURED, MEASURED]


def test_nothing_is_compared_without_this_package() -> None:
    alone = [result(names.CURVLINOPS, [1.0], 10.0)]
    assert compare(alone, 1e-2) == alone


def test_new_records_take_the_place_of_old_ones(
    record: Estimation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book_module, "draw", lambda records, title: None)
    monkeypatch.setattr(book_module, "image_of", lambda figure: b"")
    exact = dataclasses.replace(record, fisher="type2")
    part = dataclasses.replace(record, fraction=0.25)
    first = dataclasses.replace(record, case="a")
    again = dataclasses.replace(record, rounds=7)

    def opened(threads: int = 2) -> Book:
        return Book(tmp_path / "new" / "speed.json", Estimation, threads=threads, quick=False)

    book = opened()
    assert book.records == []
    for one in (record, exact):
        book.add(one)
    book = opened()
    assert book.records == [record, exact]
    for one in (part, first, again):
        book.add(one)
    assert opened().records == [first, again, part, exact]
    with pytest.raises(CommandError, match="cannot be combined"):
        opened(threads=1)
    book.path.write_text("[]")
    with pytest.raises(CommandError, match="has the format None, expected"):
        opened()


def test_the_table_shows_everybody(record: Estimation) -> None:
    console = Console(width=130, file=io.StringIO())
    console.print(estimation_table(record, 2))
    lines = console.file.getvalue().splitlines()
    assert lines[0].strip() == (
        "c: CNN with four convolutions, mc, 2000 examples in batches of 250; medians of 3 rounds, "
        "2 threads"
    )
    rows = {line[:27].strip(): line[27:].split() for line in lines[4:]}
    assert rows[names.OURS] == ["2.000", "1.00", "2.00", "1", "10"]
    assert rows[names.EVERYTHING] == ["2.000", "–", "2.00", "1", "12"]
    assert rows[names.CURVLINOPS] == ["4.000", "2.00", "4.00", "0", "10.05", "leanest"]
    assert rows[names.NNGEOMETRY] == ["0.100", "–", "0.10", "0", "5", "wrong", "×0.5"]
    refused = ["refused:", "TypeError:", "no", "[such]", "thing"]
    assert rows[names.LAPLACE] == [*"–––––", *refused]
    assert rows[names.AVALANCHE] == [*"–––––", "not", "installed"]
    assert rows[names.PLAIN] == ["0.500", "–", "–", "1", "–"]
    assert floor_line(record) == "Floor: 1.000 s (forward 0.250, eigh 0.750)."


def test_the_figure_has_a_panel_for_each_cell(record: Estimation) -> None:
    exact = dataclasses.replace(record, fisher="type2")
    part = dataclasses.replace(record, fraction=0.25)
    figure = draw([record, part, exact], ["title", "and more"])
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 3
    texts = [text.get_text() for text in panels[0].texts]
    assert texts == ["2", "2", "4", "0.1 (wrong ×0.5)", "refused", "not installed", "0.5"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()][1] == "all parameters"
    assert figure.get_suptitle().startswith("title\nand more\nHollow: ")
    assert "0.25 of the data" in panels[1].get_title(loc="left")
    with pytest.raises(ValueError, match="records: got none"):
        draw([], ["title"])


@pytest.fixture
def entry() -> Iterator[Entry]:
    """A contender with a process."""
    with new_process(1) as process:
        yield Entry(BY_NAME[names.CURVLINOPS], process)


def test_whoever_fails_is_refused_with_the_reason(entry: Entry) -> None:
    entry.replies.extend([Reply(trace=1.0), Reply(problem="ValueError: no")])
    refused = result_of(entry.contender, entry)
    assert (refused.status, refused.message, refused.seconds) == (REFUSED, "ValueError: no", [])
    entry.ask(estimation.estimate, 1)
    assert len(entry.replies) == 2, "who is out is not asked again"


def test_a_process_that_dies_is_noticed(entry: Entry) -> None:
    entry.ask(os._exit, 1)
    assert entry.problem is not None
    assert entry.problem.startswith("BrokenProcessPool: ")


def served(monkeypatch: pytest.MonkeyPatch, estimate: Estimate) -> Reply:
    """What the process of a contender with some estimation says first."""

    def prepare(contender: Contender, workload: Workload, fisher: str) -> Estimate:
        return estimate

    monkeypatch.setattr(Contender, "prepare", prepare)
    return estimation.answer(estimation.start, names.OURS, ("a", "mc"), 0.05, True)


def test_an_estimation_is_done_once_for_memory_and_then_for_every_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = served(monkeypatch, float)
    assert (first.trace, first.problem) == (0.0, None)
    assert first.memory is not None
    second = estimation.estimate(7)
    assert (second.trace, second.memory) == (7.0, None)
    assert second.seconds > 0


def test_what_an_estimation_raises_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> float:
        raise KeyError("no layer\nand more")

    assert served(monkeypatch, fail).problem == r"KeyError: 'no layer\nand more'"
    assert in_one_line(ValueError("one\ntwo")) == "ValueError: one"
    assert in_one_line(ValueError()) == "ValueError"


def test_a_trace_must_be_a_number() -> None:
    assert finite(None) is None
    with pytest.raises(ValueError, match="the trace is nan"):
        finite(float("nan"))


def test_memory_is_that_of_the_work() -> None:
    size, growth = peak_growth(lambda: len(bytes(bytearray(b"x" * 2**26))))
    assert size == 2**26
    assert growth > 2**25
