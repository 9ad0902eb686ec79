"""``speed-penalty``: ratios of made-up times, and one whole run; no time is judged."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.table import Table

from benchmarks.peers.adapters import Adapter, Curvlinops, NNGeometry
from benchmarks.speed import names
from benchmarks.speed.cases import Form, Workload, build_step
from benchmarks.speed.contenders import BY_NAME
from benchmarks.speed.figure import draw
from benchmarks.speed.penalty_command import Options, run
from benchmarks.speed.report import compare, comparisons_table, durations_table
from benchmarks.speed.results import MEASURED, MISSING, WRONG, Duration, Result, Training
from benchmarks.speed.training import History, enter, live
from tests.benchmarks.helpers import refused

ROUNDS = {
    "step": [2.0, 4.0, 10.0],
    "step with penalty, 1 task": [3.0, 5.0, 12.0],
    "step, attached": [2.5, 5.0, 12.5],
    "step, attached, tangent, k=20": [2.2, 5.0, 11.0],
    "penalty, 1 task": [1.0, 3.0, 5.0],
    "penalty, 50 tasks": [1.0, 6.0, 5.5],
    "curvlinops": [3.0, 9.0, 5.0],
    "separate penalty, 10 tasks": [2.0, 2.0, 2.0],
}
ABSENT = Result("nngeometry", MISSING)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The threads of the process are what they were in the end."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packages are not there, whatever is installed."""
    for adapter in (Curvlinops, NNGeometry):
        monkeypatch.setattr(adapter, "installed", lambda self: False)


@pytest.fixture(scope="module")
def history() -> History:
    return live(build_step("small", quick=True), (1, 2), (2,))


def record(case: str = "a", *wrong: str) -> Training:
    results = [
        Result(name, WRONG, "wrong ×2", times)
        if name in wrong
        else Result(name, MEASURED, "", times)
        for name, times in ROUNDS.items()
    ]
    return Training(
        case=case,
        batch=3,
        rounds=3,
        results=[*results, ABSENT],
        versions={},
        parameters=7,
        repetitions=2,
        tasks=[1, 50],
    )


def compared(case: str, *wrong: str) -> dict[str, str]:
    return compare(record(case, *wrong))


def test_ratios_are_medians_over_rounds_of_ratios_within_a_round() -> None:
    found = compared("a")
    assert found["penalty, 1 task / step"] == "0.50"  # of 1/2, 3/4, 5/10
    assert found["penalty, 50 / 1 tasks"] == "1.10"  # of 1, 2, 5.5/5
    assert found["curvlinops / penalty, 1 task"] == "3.00"  # of 3, 3, 1
    # Of 1/2, 1/4, 2/10.
    assert found["step with penalty, 1 task: overhead"] == "25.0 %"
    assert found["step, attached / step (to be at most 4)"] == "1.25"
    assert found["step, attached, tangent, k=20 / step"] == "1.10"
    assert found["step, attached, gradient / step"] == "–"
    assert found["penalty, 1 task / nngeometry"] == "–"


def test_what_is_wrong_is_not_compared() -> None:
    assert compared("a", "curvlinops")["curvlinops / penalty, 1 task"] == "–"


def test_cases_are_compared_by_what_they_have() -> None:
    transformer = compared("e")
    assert "curvlinops / penalty of known layers, 1 task" in transformer
    assert "step, attached / step (to be at most 1.4)" in transformer
    assert "step, attached / step" in compared("small")


def cells(table: Table) -> list[tuple[str, ...]]:
    return list(zip(*(map(str, column.cells) for column in table.columns), strict=True))


def test_durations_are_medians() -> None:
    one = Duration("a", [0.1, 0.3, 0.2], "b", [0.4, 0.1, 0.25])
    assert cells(durations_table([one])) == [("a", "0.2000", "b: 0.2500")]


def test_the_figure_has_a_panel_for_each_case() -> None:
    records = [record(case, "curvlinops") for case in ("a", "c", "e")]
    figure = draw(records, ["A machine"])
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left").partition(":")[0] for axes in panels] == ["a", "c", "e"]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels == [*list(ROUNDS)[1:], "nngeometry"]
    texts = {text.get_text() for text in panels[0].texts}
    assert {"0.5", "1.5 (wrong ×2)", "not installed"} <= texts


def test_the_table_has_a_row_for_each_comparison() -> None:
    assert dict(cells(comparisons_table(record()))) == compared("a")


@pytest.mark.usefixtures("no_peers")
@pytest.mark.slow
def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(
        cases=("small",), tasks=(2,), rounds=2, quick=True, threads=1, output=tmp_path / "new"
    )
    assert run(options) == 0
    path = tmp_path / "new" / "speed_penalty.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["format"] == Training.format
    assert document["configuration"]["threads"] == 1
    (found,) = document["records"]
    assert (found["case"], found["batch"], found["parameters"]) == ("small", 4, 89_610)
    assert found["tasks"] == [1, 2]
    *timed, first, second = found["results"]
    assert [one["name"] for one in timed] == [
        "step",
        "step, attached",
        "step, attached, finding λ",
        "step, attached, gradient",
        "step, attached, tangent, k=20",
        "step with penalty, 1 task",
        "step with penalty, 2 tasks",
        "penalty, 1 task",
        "penalty, 2 tasks",
        "separate penalty, 2 tasks",
    ]
    assert all(len(one["seconds"]) == 2 and min(one["seconds"]) > 0 for one in timed)
    assert [first["name"], second["name"]] == list(names.PEERS)
    assert first["status"] == second["status"] == "not installed"
    loading, importing = document["durations"]
    assert (len(loading["seconds"]), len(importing["seconds"])) == (2, 1)
    assert loading["other_label"] == "one eigh of 1000 × 1000"
    assert importing["other_label"] == "importing torch before"
    assert path.with_suffix(".png").stat().st_size > 1_000
    out = capsys.readouterr().out
    assert "PyTorch with 1 thread\nA smoke test" in out
    assert out.splitlines()[-1] == f"Wrote {path} and {path.with_suffix('.png')}."


def test_the_same_tasks_have_the_same_penalty_in_every_form(history: History) -> None:
    model = history.workload.model
    assert [penalty.num_tasks for penalty in history.merged.values()] == [1, 2]
    assert history.separate[2].num_tasks == 2
    torch.testing.assert_close(history.known(model), history.merged[1](model))
    # The second task adds a term of its own.
    assert history.separate[2](model) > history.merged[1](model) > 0


@pytest.mark.usefixtures("no_peers")
def test_every_contender_works_more_than_once(history: History) -> None:
    before = [parameter.clone() for parameter in history.workload.model.parameters()]
    for work in enter("small", history)[0].values():
        work()
        work()
    after = history.workload.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def form_of_peers(monkeypatch: pytest.MonkeyPatch, form: object) -> None:
    for adapter in (Curvlinops, NNGeometry):
        monkeypatch.setattr(adapter, "installed", lambda self: True)
        monkeypatch.setattr(adapter, "quadratic_form", form)


def test_a_peer_that_fails_is_out_and_says_why(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(adapter: Adapter, workload: Workload) -> Form:
        raise NotImplementedError("no such layer")

    form_of_peers(monkeypatch, refuse)
    works, results = enter("small", history)
    for peer in names.PEERS:
        result = results[peer]
        assert (result.status, result.message) == ("refused", "NotImplementedError: no such layer")
    assert not set(names.PEERS) & set(works)


@pytest.mark.parametrize(("factor", "out"), [(1.0, False), (1.005, False), (1.02, True)])
def test_a_peer_with_another_value_is_wrong(
    factor: float, out: bool, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    def like_ours(adapter: Adapter, workload: Workload) -> Form:
        anchor = [one.detach() for one in history.first.known_parameters]
        own = [name for name, _ in history.first.model.named_parameters()]

        def form(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
            there = [a + d for a, d in zip(anchor, deltas, strict=True)]
            return factor * history.known(dict(zip(own, there, strict=True)))

        return form

    form_of_peers(monkeypatch, like_ours)
    works, results = enter("small", history)
    assert (results["curvlinops"].status == WRONG) is out
    assert results["nngeometry"].status == MEASURED
    assert set(names.PEERS) <= set(works)


@pytest.mark.parametrize("peer", names.PEERS)
@pytest.mark.filterwarnings("ignore")
def test_peers_have_a_differentiable_form(peer: str) -> None:
    pytest.importorskip(peer)
    workload = build_step("small", quick=True)
    form = BY_NAME[peer].adapter.quadratic_form(workload)
    deltas = [torch.randn_like(one).requires_grad_() for one in workload.known_parameters]
    value = form(deltas)
    gradients = torch.autograd.grad(value, deltas)
    half = 0.5 * torch.stack([(d * g).sum() for d, g in zip(deltas, gradients, strict=True)]).sum()
    torch.testing.assert_close(value, half, rtol=1e-4, atol=0)
    assert value > 0


def test_options() -> None:
    options = Options()
    assert options.cases == ("small", "a", "c", "e")
    assert (options.tasks, options.rounds, options.separate_tasks) == ((1, 10, 50), 7, 10)
    quick = Options(quick=True)
    assert (quick.tasks, quick.rounds, quick.separate_tasks) == ((1, 2), 2, 2)
    assert Options(tasks=(20, 3)).tasks == (1, 3, 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases b", "--cases: expected one of small, a, c, e, got 'b'"),
        ("--tasks 0", "--tasks: expected a whole number ≥ 1, got '0'"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(f"speed-penalty {words}", capsys)
