"""The table of packages: its cells, its document, what it consists of, and the command."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import __main__ as command
from benchmarks.peers.adapters.adapter import Adapter
from benchmarks.peers.cells import cell
from benchmarks.peers.document import BEGIN, END, markdown, replace_between_markers, write_document
from benchmarks.peers.exact import exact_matrix
from benchmarks.peers.measure import Record
from benchmarks.peers.notes import NOTES
from benchmarks.peers.row import Row, Section
from benchmarks.peers.table import ADAPTERS, SECTIONS
from benchmarks.peers.tested_by import TESTED_BY
from tests.helpers.cases import BY_NAME, LOSSES
from tests.helpers.cases.basic import FEATURES_LAST

ROOT = Path(__file__).parents[2]
ROWS = [row for section in SECTIONS for row in section.rows]


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "row": "row",
        "problem": "",
        "package": "package",
        "mode": "type2",
        "fallback": False,
        "status": "right",
        "trace_ratio": 1.0,
        "error": 0.0,
        "message": "",
    }
    return Record(**(fields | changes))


def wrong(ratio: float, **changes: Any) -> Record:
    return record(**({"status": "wrong", "trace_ratio": ratio, "error": 0.4} | changes))


# --------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "not measured"),
        ([record(), record(mode="empirical")], "right"),
        ([wrong(0.831)], "wrong ×0.83"),
        ([wrong(1.2), wrong(0.8, mode="empirical")], "wrong ×0.80 to ×1.20"),
        ([wrong(1.01)], "wrong, eigenvalues off by 40 %"),
        ([wrong(2.0), record(mode="empirical")], "type2: wrong ×2.00; empirical: right"),
        ([wrong(2.0, problem="1d"), record(problem="2d")], "1d: wrong ×2.00; 2d: right"),
        ([record(status="refused", message="Error: no")], "refused"),
        ([wrong(None, message="needs pickle")], "needs pickle"),  # type: ignore[arg-type]
    ],
)
def test_cells(records: list[Record], expected: str) -> None:
    assert cell(records) == expected


def test_deviation_by_definition_differs() -> None:
    assert cell([wrong(0.5)], by_definition=True) == "differs ×0.50"


def test_fall_back_is_shown_only_where_it_helps() -> None:
    refused = [record(status="refused"), record(status="refused", mode="empirical")]
    helps = record(mode="diagonal", fallback=True)
    assert cell([*refused, helps]) == "EKFAC: refused; diagonal: right"
    assert cell([*refused, record(mode="diagonal", fallback=True, status="fails")]) == "refused"
    assert cell([record(), record(mode="empirical"), helps]) == "right"
    here = [dataclasses.replace(r, problem="2d") for r in (*refused, helps)]
    there = [dataclasses.replace(r, problem="3d") for r in refused]
    assert cell([*here, *there]) == "EKFAC: refused; 2d diagonal: right"


# --------------------------------------------------------------------------- the document


def test_only_what_is_between_the_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "layers.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    write_document(path, "new\nlines")
    assert path.read_text(encoding="utf-8") == f"before\n{BEGIN}\nnew\nlines\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_markers_that_are_missing_are_asked_for(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line <!-- peers: begin -->"):
        replace_between_markers(text, "new")


def test_markdown_has_cells_notes_and_messages() -> None:
    row = Row("groups", "a | b", ())
    package = "curvlinops-for-pytorch"
    records = [
        wrong(0.5, row="groups", package=package, problem="2d"),
        record(row="groups", package=package, problem="1d", status="refused", message="E: no"),
    ]
    adapters = [adapter for adapter in ADAPTERS if adapter.package == package]
    lines = markdown([Section("S", (row,))], adapters, records, {package: "3"}).splitlines()
    assert lines[:4] == ["### S", "", "|  | curvlinops 3 | tests |", "|---|---|---|"]
    assert lines[4].startswith(r"| a \| b | 2d: differs ×0.50; 1d: refused [1] | [conv1d-groups-")
    assert any(line.startswith("1. Averages the inputs over the groups") for line in lines)
    assert "* curvlinops refused: `E: no` (groups)" in lines


def test_document_has_every_row() -> None:
    text = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    assert replace_between_markers(text, "")
    assert [row.title for row in ROWS if f"\n| {row.title} |" not in text] == []
    assert "not installed" not in text


# --------------------------------------------------------------------------- the table


def test_names_of_rows_differ_and_notes_are_about_them() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    packages = {adapter.package for adapter in ADAPTERS}
    assert packages == set(command.PACKAGES)
    assert {row for row, _ in NOTES} <= set(names)
    assert {package for _, package in NOTES} <= packages


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_problems_are_told_apart_and_have_an_exact_matrix(row: Row) -> None:
    labels = [problem.label for problem in row.problems]
    assert len(set(labels)) == len(labels)
    if row.question == "reduction":
        return
    for problem in row.problems:
        matrix = exact_matrix(problem, "type2").matrix
        assert matrix.isfinite().all()
        assert matrix.diagonal().min() >= 0
        assert len(matrix) < 250


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_guarded_by_tests_that_exist(row: Row) -> None:
    assert TESTED_BY[row.name]
    for reference in TESTED_BY[row.name]:
        file, _, name = reference.partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        if file.startswith("cases/"):
            assert name in {*BY_NAME, *LOSSES, FEATURES_LAST.name}
        else:
            assert f"def {name}(" in text


# --------------------------------------------------------------------------- the command


def test_command_measures_a_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "installed", lambda self: self.package == "rotate-ewc")
    threads = torch.get_num_threads()
    try:
        code = command.main(["--output", str(tmp_path), "--rows", "linear,mse", "bce"])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    shown = capsys.readouterr().out
    assert "not installed" in shown
    assert f"Wrote {tmp_path / 'peers.json'}." in shown
    document = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert document["format"] == command.FORMAT
    assert document["versions"]["rotate-ewc"]
    ours = [r for r in document["records"] if r["package"] == "rotate-ewc"]
    assert {r["row"] for r in ours} == {"linear", "mse", "bce"}
    assert {r["status"] for r in ours} == {"right"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "linear,none"], "--rows: expected some of linear, .*, got 'none'"),
        (["--rows", "linear", "--write", "x.md"], "--write: the document holds all packages"),
        (["--packages", "nngeometry", "--write", "x.md"], "--write: the document holds all"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_unusable_document_is_noticed_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "layers.md").write_text("no markers", encoding="utf-8")
    assert command.main(["--output", str(tmp_path), "--write", str(tmp_path / "layers.md")]) == 1
    assert "expected one line <!-- peers: begin -->" in capsys.readouterr().err
    assert not (tmp_path / "peers.json").exists()
