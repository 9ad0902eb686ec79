"""The table of packages: its cells, its document, what it consists of, and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.command import CommandError
from benchmarks.peers.adapters import PEERS, Adapter
from benchmarks.peers.command import FORMAT, PACKAGES, Options, run
from benchmarks.peers.document import BEGIN, END, cell, markdown, replace_between_markers
from benchmarks.peers.exact import exact_matrix
from benchmarks.peers.measure import Record
from benchmarks.peers.problems import PROBLEMS
from benchmarks.peers.row import ROWS, Note, Row, Section
from tests.benchmarks.helpers import refused
from tests.helpers.cases import BY_NAME, LOSSES
from tests.helpers.cases.basic import FEATURES_LAST

ROOT = Path(__file__).parents[2]


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


def test_only_what_is_between_the_markers_is_replaced() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    expected = f"before\n{BEGIN}\nnew\nlines\n{END}\nafter\n"
    assert replace_between_markers(text, "new\nlines") == expected


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_markers_that_are_missing_are_asked_for(text: str) -> None:
    with pytest.raises(ValueError, match="expected one line <!-- peers: begin -->"):
        replace_between_markers(text, "new")


def test_markdown_has_cells_notes_and_messages() -> None:
    package = "curvlinops-for-pytorch"
    note = Note("averages the inputs", by_definition=True)
    row = Row("groups", "a | b", {"helpers/cases/basic.py": ("conv3d", "x")}, {package: note})
    records = [
        wrong(0.5, row="groups", package=package, problem="2d"),
        record(row="groups", package=package, problem="1d", status="refused", message="E: no"),
    ]
    adapters = [adapter for adapter in PEERS if adapter.package == package]
    lines = markdown([Section("S", (row,))], adapters, records, {package: "3"}).splitlines()
    assert lines[:4] == ["### S", "", "|  | curvlinops 3 | tests |", "|---|---|---|"]
    tests = "[conv3d](../tests/helpers/cases/basic.py), [x](../tests/helpers/cases/basic.py)"
    assert lines[4] == rf"| a \| b | 2d: differs ×0.50; 1d: refused [1] | {tests} |"
    assert "1. Averages the inputs." in lines
    assert "* curvlinops refused: `E: no` (groups)" in lines


def test_document_has_every_row() -> None:
    text = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
    assert replace_between_markers(text, "")
    assert [row.title for row in ROWS.values() if f"\n| {row.title} |" not in text] == []
    assert "not installed" not in text


# --------------------------------------------------------------------------- the table


def test_rows_have_problems_and_notes_are_about_packages() -> None:
    assert list(ROWS) == list(PROBLEMS)
    assert tuple(adapter.package for adapter in PEERS) == PACKAGES
    assert {package for row in ROWS.values() for package in row.notes} <= set(PACKAGES)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_are_told_apart_and_have_an_exact_matrix(name: str) -> None:
    problems = PROBLEMS[name]
    labels = [problem.label for problem in problems]
    assert len(set(labels)) == len(labels)
    if ROWS[name].question == "reduction":
        return
    for problem in problems:
        matrix = exact_matrix(problem, "type2").matrix
        assert matrix.isfinite().all()
        assert matrix.diagonal().min() >= 0
        assert len(matrix) < 250


@pytest.mark.parametrize("name", ROWS)
def test_row_is_guarded_by_tests_that_exist(name: str) -> None:
    assert ROWS[name].tests
    for file, names in ROWS[name].tests.items():
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for guard in names:
            if file.startswith("helpers/cases/"):
                assert guard in {*BY_NAME, *LOSSES, FEATURES_LAST.name}
            else:
                assert f"def {guard}(" in text


# --------------------------------------------------------------------------- the command


def test_command_measures_a_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "installed", lambda self: self.package == "rotate-ewc")
    threads = torch.get_num_threads()
    try:
        assert run(Options(output=tmp_path, rows=("linear", "mse", "bce"))) == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "not installed" in shown
    assert f"Wrote {tmp_path / 'peers.json'}." in shown
    document = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert document["format"] == FORMAT
    assert document["versions"]["rotate-ewc"]
    ours = [r for r in document["records"] if r["package"] == "rotate-ewc"]
    assert {r["row"] for r in ours} == {"linear", "mse", "bce"}
    assert {r["status"] for r in ours} == {"right"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows linear none", "--rows: expected one of linear, "),
        ("--packages numpy", "--packages: expected one of rotate-ewc, "),
        ("--rows linear --write x", "--write: the document holds all packages"),
        ("--packages nngeometry --write x", "--write: the document holds all packages"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(f"peers {words}", capsys)


def test_unusable_document_is_noticed_before_measuring(tmp_path: Path) -> None:
    document = tmp_path / "layers.md"
    document.write_text("no markers", encoding="utf-8")
    with pytest.raises(CommandError, match="--write: expected one line <!-- peers: begin -->"):
        run(Options(output=tmp_path, write=document))
    assert not (tmp_path / "peers.json").exists()
