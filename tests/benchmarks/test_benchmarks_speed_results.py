"""Agreement, files, tables and figures, from results made up; and processes that fail."""

import dataclasses
import io
import json
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.speed import names
from benchmarks.speed.agreement import compare, tolerance_for
from benchmarks.speed.contenders import BY_NAME, Kind
from benchmarks.speed.figure import draw
from benchmarks.speed.measure import Entry, _result, _turns
from benchmarks.speed.memory import peak_growth
from benchmarks.speed.report import cell_table, floor_line
from benchmarks.speed.results import (
    MEASURED,
    MISSING,
    REFUSED,
    WRONG,
    Cell,
    Result,
    merge,
    read_cells,
    write_cells,
)
from benchmarks.speed.worker import Job, Reply, Worker, finite, in_one_line, serve_estimations

CONFIGURATION = {"threads": 2, "quick": False, "processor": "P", "cpu_count": 2}


def result(name: str, seconds: list[float], trace: float | None, **changes: object) -> Result:
    kind = BY_NAME[name].kind.value
    traces = [] if trace is None else [trace]
    made = Result(name, kind, "1", MEASURED, "", seconds, traces, 2**20)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def cell() -> Cell:
    results = [
        result(names.OURS, [1.0, 2.0, 4.0], 10.0),
        result(names.EVERYTHING, [2.0, 2.0, 2.0], 12.0),
        result(names.CURVLINOPS, [2.0, 6.0, 4.0], 10.05, memory=2**19),
        result(names.NNGEOMETRY, [0.1, 0.1, 0.1], 5.0, memory=1),
        Result(names.KRONFLUENCE, Kind.SAME.value, "1", REFUSED, "TypeError: no [such] thing"),
        Result(names.LAPLACE, Kind.OTHER.value, "", MISSING),
        result(names.PLAIN, [0.5, 0.5, 0.5], None),
    ]
    return Cell(
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


def test_only_equal_results_have_ratios(cell: Cell) -> None:
    assert {one.name: one.ratio for one in cell.results} == {
        names.OURS: 1.0,
        names.EVERYTHING: None,
        names.CURVLINOPS: 2.0,  # the median of 2, 3 and 1
        names.NNGEOMETRY: None,
        names.KRONFLUENCE: None,
        names.LAPLACE: None,
        names.PLAIN: None,
    }


def test_a_wrong_trace_is_said_and_its_times_are_kept(cell: Cell) -> None:
    wrong = cell.results[3]
    assert (wrong.status, wrong.message) == (WRONG, "wrong ×0.5")
    assert wrong.seconds == [0.1, 0.1, 0.1]


def test_the_exact_matrix_must_agree_more_closely() -> None:
    assert tolerance_for("mc", quick=False) == 1e-2
    assert tolerance_for("type2", quick=False) == tolerance_for("type2", quick=True) == 1e-4
    both = [result(names.OURS, [1.0], 10.0), result(names.CURVLINOPS, [1.0], 10.05)]
    assert [one.status for one in compare(both, 1e-4)] == [MEASURED, WRONG]


def test_traces_of_all_estimations_are_averaged() -> None:
    both = [
        result(names.OURS, [1.0], None, traces=[9.0, 11.0]),
        result(names.CURVLINOPS, [1.0], None, traces=[12.0, 8.01]),
    ]
    assert [one.status for one in compare(both, 1e-2)] == [MEASURED, MEASURED]


def test_nothing_is_compared_without_this_package() -> None:
    alone = [result(names.CURVLINOPS, [1.0], 10.0)]
    assert compare(alone, 1e-2) == alone


def test_new_cells_take_the_place_of_old_ones(cell: Cell) -> None:
    exact = dataclasses.replace(cell, fisher="type2")
    part = dataclasses.replace(cell, fraction=0.25)
    first = dataclasses.replace(cell, case="a")
    again = dataclasses.replace(cell, rounds=7)
    assert merge([cell, exact], [part, first, again]) == [first, again, part, exact]


def test_what_is_written_can_be_read(cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    assert read_cells(path, CONFIGURATION) == []
    write_cells(path, CONFIGURATION, [cell])
    assert read_cells(path, CONFIGURATION) == [cell]
    plain = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert plain["floor"] == 1.0
    assert plain["results"][0]["median"] == plain["results"][0]["times_floor"] == 2.0
    with pytest.raises(ValueError, match="cannot be combined"):
        read_cells(path, {**CONFIGURATION, "threads": 1})
    path.write_text("[]")
    with pytest.raises(ValueError, match="has the format None, expected"):
        read_cells(path, CONFIGURATION)


def test_the_table_shows_everybody(cell: Cell) -> None:
    console = Console(width=130, file=io.StringIO())
    console.print(cell_table(cell, 2))
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
    assert rows[names.KRONFLUENCE] == [*"–––––", *refused]
    assert rows[names.LAPLACE] == [*"–––––", "not", "installed"]
    assert rows[names.PLAIN] == ["0.500", "–", "–", "1", "–"]
    assert floor_line(cell) == "Floor: 1.000 s (forward 0.250, eigh 0.750)."


def test_the_figure_has_a_panel_for_each_cell(cell: Cell) -> None:
    exact = dataclasses.replace(cell, fisher="type2")
    part = dataclasses.replace(cell, fraction=0.25)
    figure = draw([cell, part, exact], "title", quick=True)
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 3
    texts = [text.get_text() for text in panels[0].texts]
    assert texts == ["2", "2", "4", "0.1 (wrong ×0.5)", "refused", "not installed", "0.5"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()][1] == "all parameters"
    assert "figures mean nothing" in figure.get_suptitle()
    assert "0.25 of the data" in panels[1].get_title(loc="left")
    with pytest.raises(ValueError, match="cells: got none"):
        draw([], "title")


def test_every_other_round_is_backwards() -> None:
    one, two = Entry(BY_NAME[names.OURS]), Entry(BY_NAME[names.PLAIN])
    assert list(_turns([one, two], 2)) == [
        (1, None),
        (1, one),
        (1, two),
        (2, two),
        (2, one),
        (2, None),
    ]


def test_whoever_fails_is_refused_with_the_reason() -> None:
    entry = Entry(BY_NAME[names.CURVLINOPS], replies=[Reply(trace=1.0)], problem="ValueError: no")
    refused = _result(entry.contender, entry)
    assert (refused.status, refused.message, refused.seconds) == (REFUSED, "ValueError: no", [])


def test_a_process_that_dies_is_noticed() -> None:
    worker = Worker(divmod, None)  # which raises at once
    with pytest.raises(RuntimeError, match="died with exit code 1"):
        worker.answer()
    with pytest.raises(RuntimeError, match="died with exit code 1"):
        worker.ask(1)
    worker.close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], float]], object]]:
    """A function that has an estimation served in a thread, and returns the other end."""
    monkeypatch.setattr("benchmarks.speed.worker._settle", lambda threads: None)
    ends = []

    def start(estimate: Callable[[int], float]) -> object:
        contender = SimpleNamespace(prepare=lambda problem, fisher: estimate)
        monkeypatch.setitem(BY_NAME, "someone", contender)
        here, there = Pipe()
        job = Job("a", "mc", "someone", 0.05, True, 1)
        thread = threading.Thread(target=serve_estimations, args=(there, job))
        thread.start()
        ends.append((here, thread))
        return here

    yield start
    for end, thread in ends:
        end.close()
        thread.join(10)


def test_an_estimation_is_done_once_for_memory_and_then_for_every_seed(
    serve: Callable[[Callable[[int], float]], object],
) -> None:
    line = serve(float)
    first = line.recv()
    assert (first.trace, first.problem) == (0.0, None)
    assert first.memory is not None
    line.send(7)
    second = line.recv()
    assert (second.trace, second.memory) == (7.0, None)
    assert second.seconds > 0


def test_what_an_estimation_raises_is_its_answer(
    serve: Callable[[Callable[[int], float]], object],
) -> None:
    def fail(seed: int) -> float:
        raise KeyError("no layer\nand more")

    assert serve(fail).recv().problem == r"KeyError: 'no layer\nand more'"
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
