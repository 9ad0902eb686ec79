"""What the penalty costs: ratios of made-up times, and one whole run; no time is judged."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.speed.penalty import names, peers
from benchmarks.speed.penalty.__main__ import main
from benchmarks.speed.penalty.cases import build
from benchmarks.speed.penalty.comparisons import Comparison, compare, relative_range
from benchmarks.speed.penalty.contenders import enter
from benchmarks.speed.penalty.figure import draw
from benchmarks.speed.penalty.history import History, live
from benchmarks.speed.penalty.options import Options, parse_options
from benchmarks.speed.penalty.report import comparisons_table, verdict
from benchmarks.speed.penalty.results import Duration, Record

QUICK = "--quick --cases small --threads 1"

ROUNDS = {
    "step": [2.0, 4.0, 10.0],
    "step with penalty, 1 task": [3.0, 5.0, 12.0],
    "step with tangent, k=20": [2.2, 5.0, 11.0],
    "RotatedAdam step": [2.5, 5.0, 12.5],
    "penalty, 1 task": [1.0, 3.0, 5.0],
    "penalty, 50 tasks": [1.0, 6.0, 5.5],
    "curvlinops": [3.0, 9.0, 5.0],
    "separate penalty, 10 tasks": [2.0, 2.0, 2.0],
    "10 penalties one by one": [3.0, 5.0, 1.0],
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The threads of the process are what they were in the end."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages are not there, whatever is installed."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


@pytest.fixture(scope="module")
def history() -> History:
    return live(build("small", quick=True), (1, 2), 2)


def compared(case: str) -> dict[str, Comparison]:
    return {one.label: one for one in compare(case, ROUNDS, (1, 50), 10)}


def record(case: str = "a") -> Record:
    return Record(
        case=case,
        parameters=7,
        batch=3,
        repetitions=2,
        rounds=ROUNDS,
        statuses={"curvlinops": "wrong", "nngeometry": "not installed"},
        messages={"curvlinops": "wrong ×2"},
        values={},
        comparisons=compare(case, ROUNDS, (1, 50), 10),
    )


def test_ratios_are_medians_over_rounds_of_ratios_within_a_round() -> None:
    found = compared("a")
    assert found["penalty, 1 task / step"].value == 0.5  # of 1/2, 3/4, 5/10
    assert found["penalty, 50 / 1 tasks"].value == 1.1  # of 1, 2, 5.5/5
    assert found["curvlinops / penalty, 1 task"].value == 3.0  # of 3, 3, 1
    assert found["10 penalties one by one / separate penalty, 10 tasks"].value == 1.5
    # Of 1/2, 1/4, 2/10, and of 2/20, 1/4, 1/10, and always 1/4.
    assert found["step with penalty, 1 task: overhead"].value == pytest.approx(25)
    assert found["step with tangent, k=20: overhead"].value == pytest.approx(10)
    assert found["RotatedAdam step: overhead"].value == pytest.approx(25)
    assert found["step, and a proximal one every 10th: overhead"].value is None
    assert found["penalty, 1 task / nngeometry"].value is None
    assert relative_range(ROUNDS, "penalty, 1 task") == (0.5, 0.5, 0.75)


def test_targets() -> None:
    found = compared("a")
    assert {label: one.met for label, one in found.items() if one.target is not None} == {
        "penalty, 50 / 1 tasks": True,
        "penalty, 1 task / nngeometry": None,
        "curvlinops / penalty, 1 task": True,
        "10 penalties one by one / separate penalty, 10 tasks": False,
        "step with tangent, k=20: overhead": True,
    }
    transformer = compared("e")
    assert transformer["step with penalty, 1 task: overhead"].target == 25
    assert "curvlinops / penalty of known layers, 1 task" in transformer
    assert not any("one by one" in label or "Adam" in label for label in transformer)
    assert [verdict(met) for met in (None, True, False)] == ["", "met", "missed"]


@pytest.mark.parametrize(
    ("relation", "value", "met"),
    [("≤", 2.0, True), ("≤", 2.1, False), ("≥", 2.0, True), ("≥", 1.9, False)],
)
def test_a_target_is_met_if_it_is_just_reached(relation: str, value: float, met: bool) -> None:
    assert Comparison("", value, "×", relation, 2.0).met is met


def test_a_duration_is_to_be_below_its_target_or_what_is_beside_it() -> None:
    one = Duration("a", [0.1, 0.3, 0.2], "b", [0.4, 0.1, 0.25])
    assert (one.median, one.other_median, one.met) == (0.2, 0.25, True)
    assert not replace(one, target=0.2).met


def test_the_figure_has_a_panel_for_each_case() -> None:
    figure = draw([record("a"), record("c"), record("e")], "A machine", quick=True)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left").partition(":")[0] for axes in panels] == ["a", "c", "e"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == [*list(ROUNDS)[1:], "nngeometry"]
    texts = [text.get_text() for text in panels[0].texts]
    assert "0.5" in texts
    assert "1.5 (wrong ×2)" in texts
    assert "not installed" in texts
    with pytest.raises(ValueError, match="records: got none"):
        draw([], "")


def test_the_table_says_what_was_missed() -> None:
    table = comparisons_table(record())
    columns = [list(column.cells) for column in table.columns]
    row = columns[0].index("10 penalties one by one / separate penalty, 10 tasks")
    assert [column[row] for column in columns[1:]] == ["1.50", "≥ 2.00", "missed"]
    assert columns[1][columns[0].index("penalty, 1 task / nngeometry")] == "–"


@pytest.mark.usefixtures("no_peers")
def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK.split(), "--output", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / "speed_penalty.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == "rotate_ewc.benchmarks.speed.penalty/1"
    assert document["configuration"]["threads"] == 1
    assert document["configuration"]["tasks"] == [1, 2]
    assert "output" not in document["configuration"]
    assert {"torch", "nngeometry", "curvlinops"} <= set(document["versions"])
    (found,) = document["records"]
    assert (found["case"], found["batch"], found["parameters"]) == ("small", 4, 89_610)
    assert list(found["rounds"]) == [
        "step",
        "step with penalty, 1 task",
        "step with penalty, 2 tasks",
        "step with tangent, k=20",
        "step, and a proximal one every 10th",
        "RotatedAdam step",
        "penalty, 1 task",
        "penalty, 2 tasks",
        "separate penalty, 2 tasks",
        "2 penalties one by one",
    ]
    assert all(len(times) == 2 and min(times) > 0 for times in found["rounds"].values())
    assert found["statuses"] == dict.fromkeys(("nngeometry", "curvlinops"), "not installed")
    assert all(one["met"] in (True, False, None) for one in found["comparisons"])
    loading, importing = document["durations"]
    assert (len(loading["seconds"]), len(importing["seconds"])) == (2, 1)
    assert loading["other_label"] == "one eigh of 1000 × 1000"
    assert importing["target"] == 0.2
    assert path.with_suffix(".png").stat().st_size > 1_000

    out = capsys.readouterr().out
    assert "PyTorch with 1 thread\nA smoke test" in out
    assert "not installed" in out
    assert out.splitlines()[-1] == f"Wrote {path} and {path.with_suffix('.png')}."


def test_the_same_tasks_have_the_same_penalty_in_every_form(history: History) -> None:
    model = history.problem.model
    assert [penalty.num_tasks for penalty in history.merged.values()] == [1, 2]
    assert history.separate is not None
    assert history.separate.num_tasks == len(history.single) == 2
    torch.testing.assert_close(history.known(model), history.merged[1](model))
    single = torch.stack([penalty(model) for penalty in history.single]).sum()
    # Another seed of the sampled labels for the second task.
    torch.testing.assert_close(history.separate(model), single, rtol=0.5, atol=0)


@pytest.mark.usefixtures("no_peers")
def test_every_contender_works_more_than_once(history: History) -> None:
    before = [parameter.clone() for parameter in history.problem.model.parameters()]
    found = enter("small", history)
    for work in found.works.values():
        work()
        work()
    after = history.problem.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert found.calls == {names.TANGENT: 20, names.PROXIMAL: 10}


def test_a_peer_that_fails_is_out_and_says_why(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(problem: object) -> peers.Form:
        raise NotImplementedError("no such layer")

    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "FORMS", dict.fromkeys(names.PEERS, refuse))
    found = enter("small", history)
    assert found.remarks == dict.fromkeys(
        names.PEERS, ("refused", "NotImplementedError: no such layer")
    )
    assert not set(names.PEERS) & set(found.works)


@pytest.mark.parametrize(("factor", "out"), [(1.0, False), (1.005, False), (1.02, True)])
def test_a_peer_with_another_value_is_wrong(
    factor: float, out: bool, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    def like_ours(problem: object) -> peers.Form:
        anchor = [one.detach() for one in history.first.known_parameters]
        names_ = [name for name, _ in history.first.model.named_parameters()]

        def form(deltas: object) -> torch.Tensor:
            there = [a + d for a, d in zip(anchor, deltas, strict=True)]  # type: ignore[call-overload]
            return factor * history.known(dict(zip(names_, there, strict=True)))

        return form

    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "FORMS", dict.fromkeys(names.PEERS, like_ours))
    found = enter("small", history)
    assert ("curvlinops" in found.remarks) is out
    assert "nngeometry" not in found.remarks
    assert set(names.PEERS) <= set(found.works)


@pytest.mark.parametrize("peer", names.PEERS)
@pytest.mark.filterwarnings("ignore")
def test_peers_have_a_differentiable_form(peer: str) -> None:
    pytest.importorskip(peer)
    problem = build("small", quick=True)
    form: Callable[..., torch.Tensor] = peers.FORMS[peer](problem)
    deltas = [torch.randn_like(one).requires_grad_() for one in problem.known_parameters]
    value = form(deltas)
    gradients = torch.autograd.grad(value, deltas)
    half = 0.5 * torch.stack([(d * g).sum() for d, g in zip(deltas, gradients, strict=True)]).sum()
    torch.testing.assert_close(value, half, rtol=1e-4, atol=0)
    assert value > 0


def test_defaults() -> None:
    options = parse_options([])
    assert options == Options()
    assert options.cases == ("small", "a", "c", "e")
    assert (options.tasks, options.rounds, options.separate_tasks) == ((1, 10, 50), 7, 10)
    quick = parse_options(["--quick"])
    assert (quick.tasks, quick.rounds, quick.separate_tasks) == ((1, 2), 2, 2)
    assert parse_options(["--tasks", "20,3"]).tasks == (1, 3, 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases b", "argument --cases: expected one of small, a, c, e, got 'b'"),
        ("--cases a a", "argument --cases: expected every value once, got a more than once"),
        ("--tasks 0", "argument --tasks: expected a whole number ≥ 1, got '0'"),
        ("--tasks ,", "argument --tasks: expected at least one value, got none"),
        ("--rounds 4", "argument --rounds: expected a whole number ≥ 5 without --quick, got '4'"),
        ("--rounds 0 --quick", "argument --rounds: expected a whole number ≥ 1, got '0'"),
        ("--threads 0", "argument --threads: expected a whole number ≥ 1, got '0'"),
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
    monkeypatch.setattr("benchmarks.speed.penalty.__main__.find_spec", lambda name: name != "rich")
    assert main(["--output", str(tmp_path)]) == 1
    assert "benchmarks.speed_penalty: error: something is missing" in capsys.readouterr().err


def test_an_interruption_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.speed.penalty.measure.measure", interrupted)
    assert main([*QUICK.split(), "--output", str(tmp_path)]) == 130
    assert "cases that were finished are kept" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_avalanche() -> None:
    program = (
        "import sys; from benchmarks.speed.penalty.__main__ import parse_options as parse; "
        "parse([]); print(sorted({'torch', 'avalanche', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
