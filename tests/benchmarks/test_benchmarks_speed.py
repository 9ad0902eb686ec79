"""The command: its options, and one whole run of a few examples; no time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed import names
from benchmarks.speed.__main__ import main
from benchmarks.speed.cases import build
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.names import Combination, combinations, contenders_of
from benchmarks.speed.options import Options, parse_options
from benchmarks.speed.results import read_cells

QUICK = "--quick --cases a --fisher mc --threads 1"
CHOSEN = ("rotate-ewc", "curvlinops", "plain pass")


@pytest.fixture
def no_curvlinops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package is not there, whatever is installed."""
    monkeypatch.setattr(
        "benchmarks.speed.contenders.find_spec",
        lambda name: None if name == "curvlinops" else object(),
    )


@pytest.mark.usefixtures("no_curvlinops")
def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK.split(), "--contenders", *CHOSEN, "--output", str(tmp_path / "new")]
    assert main(words) == 0
    path = tmp_path / "new" / "speed.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == "rotate_ewc.benchmarks.speed/1"
    assert document["configuration"]["threads"] == 1
    assert document["configuration"]["quick"] is True
    assert {"processor", "cpu_count"} < set(document["configuration"])
    (cell,) = document["cells"]
    assert (cell["case"], cell["fisher"], cell["examples"]) == ("a", "mc", 4)
    assert {len(rates) for rates in cell["rates"].values()} == {2}
    # No factor has more vectors than there are examples.
    assert {size: len(times) for size, times in cell["eigh"].items()} == {"4": 2}
    assert cell["floor"] == pytest.approx(sum(cell["floor_seconds"].values()))
    ours, missing, plain = cell["results"]
    assert [result["name"] for result in cell["results"]] == list(CHOSEN)
    assert [ours["status"], missing["status"]] == ["measured", "not installed"]
    assert (ours["ratio"], missing["seconds"], plain["ratio"]) == (1.0, [], None)
    assert len(ours["traces"]) == 3
    assert len(set(ours["traces"])) > 1, "every round has labels of its own"
    for result in (ours, plain):
        assert len(result["seconds"]) == 2
        assert result["times_floor"] == pytest.approx(result["median"] / cell["floor"])
        assert result["memory"] >= 0
    assert ours["memory"] > 2**20
    assert path.with_suffix(".png").stat().st_size > 1_000

    out = capsys.readouterr().out
    assert "PyTorch with 1 thread\nA smoke test" in out
    assert "a: MLP 784-400-400-10, mc, 4 examples in batches of 4; medians of 2 rounds" in out
    assert "not installed" in out
    assert out.splitlines()[-1] == f"Wrote {path} and {path.with_suffix('.png')}."
    (read,) = read_cells(path, document["configuration"])
    assert read.results[1].status == "not installed"


def test_the_importances_of_avalanche_leave_the_model_as_it_was() -> None:
    problem = build("d-batchnorm", quick=True)
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    contender = BY_NAME["avalanche"]
    assert contender.installed
    assert contender.remark.startswith("another quantity")
    assert contender.prepare(problem, "mc")(0) is None
    assert not any(module.training for module in problem.model.modules())
    after = problem.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_small_budget_changes_nothing() -> None:
    full, lean = (
        BY_NAME[name].prepare(build("a", quick=True), "mc")(0) for name in (names.OURS, names.LEAN)
    )
    assert full is not None
    assert lean == pytest.approx(full, rel=1e-6)


def test_more_parameters_have_a_larger_trace() -> None:
    small, large = (
        BY_NAME[name].prepare(build("d-batchnorm", quick=True), "mc")(0)
        for name in (names.OURS, names.EVERYTHING)
    )
    assert small is not None
    assert large is not None
    assert large > small > 0


def test_defaults() -> None:
    assert parse_options([]) == Options()
    assert parse_options([]).rounds == 5
    assert parse_options(["--quick"]).rounds == 2
    assert parse_options(["--quick", "--rounds", "1"]).rounds == 1


def test_tokens_have_no_exact_matrix_unless_it_is_asked_for() -> None:
    everything = combinations(None, None)
    assert len(everything) == 2 * len(names.CASES) - 1
    assert Combination("e", "type2") not in everything
    assert combinations(("e",), None) == [Combination("e", "mc")]
    assert combinations(("e", "a"), ("type2",)) == [("e", "type2"), ("a", "type2")]


def test_who_takes_part() -> None:
    small = contenders_of(Combination("a", "mc"), None)
    assert "kronfluence" not in small
    assert "curvlinops" in small
    assert "kronfluence" in contenders_of(Combination("c", "mc"), ("kronfluence",))
    assert names.EVERYTHING not in small
    assert names.EVERYTHING in contenders_of(Combination("d-groupnorm", "mc"), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases z", "argument --cases: expected one of a, b, c, d-groupnorm"),
        ("--cases a a", "argument --cases: expected every value once, got a more than once"),
        ("--fisher empirical", "argument --fisher: expected one of mc, type2, got 'empirical'"),
        ("--contenders ,", "argument --contenders: expected at least one value, got none"),
        ("--contenders backpack", "argument --contenders: expected one of rotate-ewc"),
        ("--rounds 4", "argument --rounds: expected a whole number ≥ 5 without --quick, got '4'"),
        ("--rounds 0 --quick", "argument --rounds: expected a whole number ≥ 1, got '0'"),
        ("--threads 0", "argument --threads: expected a whole number ≥ 1, got '0'"),
        ("--fraction 0", "argument --fraction: expected a finite number > 0 and ≤ 1, got '0'"),
        ("--fraction 2", "argument --fraction: expected a finite number > 0 and ≤ 1, got '2'"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.speed.__main__.find_spec", lambda name: name != "rich")
    assert main(["--output", str(tmp_path)]) == 1
    assert "benchmarks.speed: error: something is missing" in capsys.readouterr().err


def test_results_of_another_configuration_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "speed.json"
    document = {"format": "rotate_ewc.benchmarks.speed/1", "configuration": {"threads": 9}}
    earlier = json.dumps(document)
    path.write_text(earlier)
    assert main([*QUICK.split(), "--output", str(tmp_path)]) == 1
    assert "cannot be combined with" in capsys.readouterr().err
    assert path.read_text() == earlier


def test_an_interruption_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.speed.measure.measure", interrupted)
    assert main([*QUICK.split(), "--output", str(tmp_path)]) == 130
    assert "cases that were finished are kept" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_avalanche() -> None:
    program = (
        "import sys; from benchmarks.speed.__main__ import parse_options as parse; parse([]); "
        "print(sorted({'torch', 'avalanche', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
