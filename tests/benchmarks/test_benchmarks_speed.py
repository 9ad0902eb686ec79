"""``speed``: its options, a whole run of a few examples, and who takes part; no time is judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.command import CommandError
from benchmarks.peers.adapters import Curvlinops
from benchmarks.speed import names
from benchmarks.speed.book import read
from benchmarks.speed.cases import build
from benchmarks.speed.command import Options, run
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.floor import describe_layers, necessary
from benchmarks.speed.measuring import WARM_UPS, median_ratio, time_in_rounds, turns
from benchmarks.speed.names import combinations, contenders_of
from benchmarks.speed.results import Estimation
from rotate_ewc.linalg.truncation import truncation_of
from tests.benchmarks.helpers import refused


@pytest.mark.slow  # four processes, each of which imports all contenders
def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Curvlinops, "installed", lambda self: False)
    chosen = (names.OURS, names.CURVLINOPS, names.PLAIN)
    options = Options(
        cases=("a",),
        fisher=("mc",),
        contenders=chosen,
        rounds=2,
        quick=True,
        threads=1,
        output=tmp_path / "new",
    )
    assert run(options) == 0
    path = tmp_path / "new" / "speed.json"
    configuration = json.loads(path.read_text(encoding="utf-8"))["configuration"]
    assert configuration["threads"] == 1
    assert {"quick", "processor", "cpu_count"} < set(configuration)
    (record,) = read(path, Estimation, configuration)
    assert (record.case, record.fisher, record.examples, record.batch) == ("a", "mc", 4, 4)
    assert {len(rates) for rates in record.rates.values()} == {2}
    # No factor has more vectors than there are examples.
    assert {size: len(times) for size, times in record.eigh.items()} == {"4": 2}
    ours, missing, plain = record.results
    assert tuple(result.name for result in record.results) == chosen
    assert [ours.status, missing.status, plain.status] == ["measured", "not installed", "measured"]
    assert (ours.ratio, missing.seconds, plain.ratio) == (1.0, [], None)
    assert len(ours.values) == 3
    assert len(set(ours.values)) > 1, "every round has labels of its own"
    assert len(ours.seconds) == len(plain.seconds) == 2
    assert ours.memory is not None
    assert ours.memory > 2**20
    assert path.with_suffix(".png").stat().st_size > 1_000

    out = capsys.readouterr().out
    assert "PyTorch with 1 thread\nA smoke test" in out
    assert "a: MLP 784-400-400-10, mc, 4 examples in batches of 4; medians of 2 rounds" in out
    assert "not installed" in out
    assert out.splitlines()[-1] == f"Wrote {path} and {path.with_suffix('.png')}."


def test_results_of_another_configuration_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    earlier = json.dumps({"format": Estimation.format, "configuration": {"threads": 9}})
    path.write_text(earlier)
    with pytest.raises(CommandError, match="cannot be combined with"):
        run(Options(threads=1, output=tmp_path))
    assert path.read_text() == earlier


def test_contenders_take_turns_and_every_other_round_is_backwards() -> None:
    assert list(turns("ab", 2)) == [(1, "a"), (1, "b"), (2, "b"), (2, "a")]
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_in_rounds(contenders, rounds=3, repetitions=2)
    assert calls == [name for name in "abc" + "cba" + "abc" for _ in range(WARM_UPS + 2)]
    assert list(times) == list("abc")
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in times.values())


def test_a_round_is_the_median_of_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([[0.5, 0.1, 0.2], [1.0, 9.0, 1.0]])
    monkeypatch.setattr("benchmarks.speed.measuring.timeit.repeat", lambda *_, **__: next(found))
    assert time_in_rounds({"work": bool}, rounds=2, repetitions=3) == {"work": [0.2, 1.0]}


def test_ratios_are_taken_within_rounds() -> None:
    # The ratio of the medians would be 10 / 10.
    assert median_ratio([30.0, 10.0, 2.0], [10.0, 20.0, 1.0]) == 2.0


def test_the_importances_of_avalanche_leave_the_model_as_it_was() -> None:
    workload = build("d-batchnorm", quick=True)
    before = {name: value.clone() for name, value in workload.model.state_dict().items()}
    assert BY_NAME[names.AVALANCHE].prepare(workload, "mc")(0) is None
    assert not any(module.training for module in workload.model.modules())
    after = workload.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_small_budget_changes_nothing_and_more_parameters_have_a_larger_trace() -> None:
    own = (names.OURS, names.LEAN, names.EVERYTHING)
    full, lean, everything = (
        BY_NAME[name].prepare(build("d-batchnorm", quick=True), "mc")(0) for name in own
    )
    assert full is not None
    assert everything is not None
    assert lean == pytest.approx(full, rel=1e-6)
    assert everything > full > 0


@pytest.mark.parametrize("case", ["a", "c"])
def test_the_default_rank_keeps_less_than_all(case: str) -> None:
    sides = set()
    for layer in describe_layers(build(case, quick=True)):
        if layer.estimated:
            sides |= {(layer.d_in, layer.d_out), (layer.d_out, layer.d_in)}
            sides |= {(layer.d_out, 1)} if layer.bias else set()
    assert any(truncation_of("auto", *side) is not None for side in sides)


@pytest.mark.parametrize("fisher", names.FISHERS)
def test_thin_bases_have_the_trace_of_whole_ones(fisher: str) -> None:
    whole, thin = (
        BY_NAME[name].prepare(build("c", quick=True), fisher)(3)
        for name in (names.OURS, names.THIN)
    )
    assert thin == pytest.approx(whole, rel=1e-5)


def test_a_vocabulary_head_is_run_and_not_estimated() -> None:
    workload = build("f", quick=True)
    workload.freeze_other_parameters()
    head = workload.model.get_submodule("head")
    assert head in workload.layers
    assert head not in workload.known_layers
    assert not any(parameter.shape[0] == 50_257 for parameter in workload.trained_parameters)
    (described,) = [one for one in describe_layers(workload) if not one.estimated]
    assert (described.d_in, described.d_out, described.backward) == (768, 50_257, True)
    assert max(necessary(workload, "mc").sizes) <= 3072


def test_what_is_measured_by_default() -> None:
    everything = combinations(Options().cases, None)
    assert len(everything) == 2 * len(names.CASES) - 2
    assert not {("e", "type2"), ("f", "type2")} & set(everything)
    assert combinations(("e", "a"), ("type2",)) == [("e", "type2"), ("a", "type2")]
    small = contenders_of("a", Options().contenders)
    assert names.CURVLINOPS in small
    assert names.EVERYTHING not in small
    assert names.THIN in small
    assert contenders_of("d-groupnorm", Options().contenders) == list(names.CONTENDERS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases z", "--cases: expected one of a, b, c, d-groupnorm, d-batchnorm, e, f, got 'z'"),
        ("--cases a a", "--cases: expected every value once, got a more than once"),
        ("--cases", "--cases: expected at least one value, got none"),
        ("--fisher empirical", "--fisher: expected one of mc, type2, got 'empirical'"),
        ("--contenders backpack", "--contenders: expected one of rotate-ewc"),
        ("--rounds 4", "--rounds: expected a whole number ≥ 5, got 4"),
        ("--rounds 0 --quick", "--rounds: expected a whole number ≥ 1, got '0'"),
        ("--threads 0", "--threads: expected a whole number ≥ 1, got '0'"),
        ("--fraction 0", "--fraction: expected a finite number > 0 and ≤ 1, got '0'"),
        ("--fraction 2", "--fraction: expected a finite number > 0 and ≤ 1, got '2'"),
        (f"--output {__file__}", "--output: expected a folder, got"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(f"speed {words}", capsys)


def test_options_import_nothing_heavy_and_come_from_a_command_line() -> None:
    program = """
import sys
import tyro
from benchmarks.peers.command import Options as Peers
from benchmarks.speed.command import Options as Speed
from benchmarks.speed.penalty_command import Options as Penalty
print(tyro.cli(Speed, args="--cases a c --fraction 0.5 --threads 2".split()).cases)
print(tyro.cli(Penalty, args="--cases e --tasks 4 1 --rounds 5".split()).tasks)
print(tyro.cli(Peers, args="--rows linear mse".split()).rows)
print(sorted({"torch", "avalanche", "matplotlib", "rich"} & set(sys.modules)))
"""
    pytest.importorskip("tyro")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "('a', 'c')",
        "(1, 4)",
        "('linear', 'mse')",
        "[]",
    ]
