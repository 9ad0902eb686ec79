"""``study-constant-cost``: what is timed, ratios of made-up times, and one whole run."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.speed.cases import Case, build_case
from benchmarks.speed.networks import perceptron
from benchmarks.speed.steps import History, live
from benchmarks.studies.constant_cost import (
    MODES,
    PENALTY,
    ROTATED_STEP,
    TRAINING_STEP,
    Cost,
    Options,
    contenders,
    penalties,
    rows_of,
    run,
)
from rotate_ewc import EKFACPenalty
from tests.benchmarks.helpers import refused

TASKS = (1, 2, 5)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few inputs instead of 784; and the threads of the process are what they were in the end."""
    monkeypatch.setattr("benchmarks.studies.constant_cost.FEATURES", 6)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def history() -> History:
    case = Case(lambda: perceptron(6, 5, 10), (6,), 8, 8)
    return live(build_case(case), TASKS, TASKS)


def test_everything_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    options = Options(hidden=(4,), tasks=(3,), rounds=5, repetitions=1, threads=1, output=output)
    assert run(options) == 0
    document = json.loads((output / "constant_cost.json").read_text(encoding="utf-8"))
    assert document["configuration"] == {
        "hidden": [4],
        "tasks": [2, 3],
        "rounds": 5,
        "repetitions": 1,
        "threads": 1,
    }
    plain, *costs = document["records"]
    assert set(plain["rounds"]) == {TRAINING_STEP}
    assert [(cost["mode"], cost["tasks"]) for cost in costs] == [
        (mode, tasks) for mode in MODES for tasks in (2, 3)
    ]
    for cost in costs:
        rotated = {ROTATED_STEP} if cost["mode"] == "merged" else set()
        assert set(cost["rounds"]) == {PENALTY, TRAINING_STEP} | rotated
        assert all(len(times) == 5 and min(times) > 0 for times in cost["rounds"].values())
    sizes = [cost["state_bytes"] for cost in costs]
    assert sizes == [sizes[0], sizes[0], 2 * sizes[0], 3 * sizes[0]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "6-4-10: medians of 5 rounds of 1 calls; ratios to 2 tasks; 1 thread"
    )
    assert lines[-1] == f"Wrote {output / 'constant_cost.json'}."


def test_copies_are_what_was_there_after_so_many_tasks(history: History) -> None:
    """Later tasks do not change them, and only separate tasks need more memory."""
    assert [p.num_tasks for p in penalties(history).values()] == [*TASKS, *TASKS]
    # Per layer: two bases for the weight, one for the bias, eigenvalues and anchors of both.
    entries = sum(d * d + e * e + d * d + 2 * (d * e + d) for d, e in ((5, 6), (10, 5)))
    assert [p.nbytes for p in history.merged.values()] == [4 * entries] * 3
    assert [p.nbytes for p in history.separate.values()] == [4 * entries * t for t in TASKS]
    case = Case(lambda: perceptron(6, 5, 10), (6,), 8, 8)
    fewer, model = live(build_case(case), (2,), (2,)), history.workload.model
    for mode in ("merged", "separate"):
        assert getattr(fewer, mode)[2](model) == getattr(history, mode)[2](model) > 0


def test_what_is_compared_is_timed_side_by_side(history: History) -> None:
    order = [(quantity, mode) for quantity, mode, _ in contenders(history)]
    assert len(order) == 1 + 6 + 6 + 3
    groups = [pair for pair, _ in groupby(order)]
    assert len(groups) == len(set(order)) == 6


@pytest.mark.parametrize("mode", MODES)
def test_work_with_the_penalty(history: History, mode: str) -> None:
    model, penalty = history.workload.model, penalties(history)[mode, 2]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    works = contenders(history)
    expected = torch.autograd.grad(penalty(model), list(model.parameters()))
    gradients = works[PENALTY, mode, 2]()
    assert isinstance(gradients, tuple)
    assert all(map(torch.equal, gradients, expected))
    calls: list[float] = []
    penalty.register_forward_hook(lambda *arguments: calls.append(arguments[2].item()))
    for _ in range(2):
        works[TRAINING_STEP, mode, 2]()
    assert len(set(calls)) == 2, "the step has moved its own copy of the model"
    assert all(map(torch.equal, model.parameters(), before))


def fail(*arguments: object) -> None:
    raise AssertionError("not to be called")


def test_steps_evaluate_only_what_they_need(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = contenders(history)
    monkeypatch.setattr(EKFACPenalty, "forward", fail)
    works[TRAINING_STEP, "", 0]()
    with pytest.raises(AssertionError, match="not to be called"):
        works[TRAINING_STEP, "merged", 2]()
    monkeypatch.setattr(nn.Linear, "forward", fail)
    works[ROTATED_STEP, "merged", 2]()


def test_ratios_are_to_two_tasks_of_the_same_mode_in_the_same_round() -> None:
    costs = [
        Cost("", 0, {TRAINING_STEP: [0.001, 0.002, 0.004]}),
        Cost("merged", 2, {PENALTY: [0.01, 0.02, 0.001], ROTATED_STEP: [0.001] * 3}, 2**20),
        Cost("merged", 50, {PENALTY: [0.03, 0.01, 0.002], ROTATED_STEP: [0.001] * 3}, 2**20),
        Cost("separate", 2, {PENALTY: [0.01] * 3}, 2**21),
        Cost("separate", 50, {PENALTY: [0.25, 0.26, 0.24]}, 50 * 2**20),
    ]
    assert rows_of(costs) == [
        ["no penalty", "–", "–", "–", "2.00", *"–––––"],
        ["merged", "2", "10.00", "1.00", "–", "–", "1.00", "1.00", "1.00", "1.00"],
        ["merged", "50", "10.00", "2.00", "–", "–", "1.00", "1.00", "1.00", "1.00"],
        ["separate", "2", "10.00", "1.00", "–", "–", "–", "–", "2.00", "1.00"],
        ["separate", "50", "250.00", "25.00", "–", "–", "–", "–", "50.00", "25.00"],
    ]


def test_options() -> None:
    assert Options().tasks == (1, 2, 10, 50)
    assert Options(tasks=(50, 1)).tasks == (1, 2, 50)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--hidden 0", "--hidden: expected a whole number ≥ 1, got '0'"),
        ("--rounds 4", "--rounds: expected a whole number ≥ 5, got 4"),
        ("--repetitions 0", "--repetitions: expected a whole number ≥ 1, got '0'"),
    ],
)
def test_bad_values_are_refused_by_name(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(f"study-constant-cost {words}", capsys)
