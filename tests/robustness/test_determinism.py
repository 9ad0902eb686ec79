"""The same bits for the same seed: once more, in another process, and after an interruption."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from tests.helpers.determinism_cases import (
    CE,
    END,
    ESTIMATIONS,
    EVENTS,
    EVERY,
    RUNS,
    STOPPED,
    STOPS,
    Estimation,
    Run,
    Training,
    bits,
    differences,
    same,
)
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs leave their states."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    """What uninterrupted runs lead to, which save their states on the way."""
    found = {}
    for run in RUNS:
        torch.manual_seed(5)
        training = Training(run)
        for stop in STOPS:
            training.until(stop)
            torch.save(training.state(), folder / f"{run} {stop}.pt")
        training.until(END)
        found[str(run)] = training.outcome()
    return found


@pytest.fixture(scope="module")
def elsewhere(folder: Path, outcomes: dict[str, Any]) -> Any:
    """What another process finds, which has other hashes of strings, other memory and history.

    Snapshots, and what becomes of the states that the runs have saved.
    """
    arguments = [str(folder), str(torch.get_num_threads())]
    module = [sys.executable, "-W", "ignore", "-m", "tests.helpers.determinism_cases"]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    result = subprocess.run(
        [*module, *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "found.pt", weights_only=True)


# ------------------------------------------------------------------ the comparison itself


def test_differences_are_seen() -> None:
    x = torch.tensor([1.0, 0.0, float("nan")])
    assert same(x, x.clone())
    assert not same(x, torch.tensor([1.0, -0.0, float("nan")]))
    assert not same(x, x.double())
    assert not same(x, x[:, None])
    assert not same(x, torch.nextafter(x, torch.tensor(2.0)))
    assert differences({"a": [x, 1]}, {"a": [x, 1]}) == []
    assert differences({"a": [x, 1]}, {"a": [x, True], "b": 2}) == ["/a/1", "/b"]
    assert bits(x[::2]) == bits(x[::2].clone())


# ------------------------------------------------------------------ snapshots


@pytest.mark.parametrize("case", ESTIMATIONS, ids=str)
def test_snapshots(case: Estimation, elsewhere: dict[str, Any]) -> None:
    """Whatever was drawn, allocated and estimated before."""
    first = case.snapshot()
    assert any(bool(value.any()) for value in first.values() if isinstance(value, Tensor))
    torch.rand(7)
    odd = [torch.empty(3 + 16 * n) for n in range(40)]
    assert differences(case.snapshot(), first) == []
    del odd
    assert differences(elsewhere["snapshots"][str(case)], first) == []


def test_another_seed_is_another_snapshot() -> None:
    """The comparison is not one of constants: labels are drawn."""
    case = Estimation("mlp", "mc", joint=False, budget=2**30)
    model, data = case.build(), case.data()
    params = list(model.parameters())
    one, two = (
        EKFACLinearOperator(model, CE, params, data, seed=seed, check_deterministic=False)
        for seed in (0, 1)
    )
    assert differences(one.state_dict(), two.state_dict()) != []


# ------------------------------------------------------------------ threads


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("fisher", "count"), [("mc", 1), ("type2", 2), ("mc", 3)])
def test_snapshots_with_any_number_of_threads(fisher: str, count: int) -> None:
    """With as many, the same bits; with others the same operator, up to rounding."""
    case = Estimation("mlp", fisher, joint=False, budget=2**30)

    def estimate() -> EKFACLinearOperator:
        return case.operator(case.build().double(), [(x.double(), y) for x, y in case.data()])

    with threads(count):
        first, second = estimate(), estimate()
    assert differences(first.state_dict(), second.state_dict()) == []
    with threads(1):
        alone = estimate()
    for name in ("0.bias", "2.bias", "2.weight"):
        pair = [
            dense_operator([found.block(name)], {name: found.parameter_shapes[name]})
            for found in (first, alone)
        ]
        torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-12)
    traces = [torch.stack([block.trace for block in found.blocks]) for found in (first, alone)]
    torch.testing.assert_close(*traces, rtol=1e-10, atol=0.0)


# ------------------------------------------------------------------ training runs


@pytest.mark.parametrize(("run", "stop"), STOPPED, ids=str)
def test_resumed_in_another_process(
    run: Run, stop: int, outcomes: dict[str, Any], elsewhere: dict[str, Any]
) -> None:
    assert outcomes[str(run)]["value"] > 0
    assert outcomes[str(run)]["done"] == END
    assert differences(elsewhere["resumed"][f"{run} {stop}"], outcomes[str(run)]) == []


@pytest.mark.parametrize("run", RUNS[::2], ids=str)  # every way of training
def test_saving_does_not_disturb(run: Run, outcomes: dict[str, Any]) -> None:
    torch.manual_seed(5)
    training = Training(run)
    training.until(END)
    assert differences(training.outcome(), outcomes[str(run)]) == []


@pytest.mark.parametrize("left_out", ["optimizer", "penalty", "handle", "random"])
def test_every_part_of_the_state_matters(left_out: str) -> None:
    """Or the runs would not show that it is restored."""
    torch.manual_seed(5)
    training = Training(Run("tangent", "adam"))
    training.until(EVENTS + EVERY + 1)
    state = training.state()
    training.until(END)
    expected = training.outcome()
    resumed = Training(training.run)
    kept = {**state, left_out: resumed.state()[left_out]}
    if left_out == "penalty":
        # The state of a handle is that of a penalty, and is refused without it.
        with pytest.raises(ValueError, match="is of a penalty with 1 tasks, but this one has 0"):
            resumed.load(kept)
        kept["handle"] = resumed.state()["handle"]
    elif left_out == "handle":
        kept["handle"] = {**state["handle"], "state": {}}
    resumed.load(kept)
    resumed.until(END)
    assert "/value" in differences(resumed.outcome(), expected)


# ------------------------------------------------------------------ copies of a penalty


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_what_is_loaded_has_the_same_value_and_gradient(mode: str, joint: bool) -> None:
    """Also after further tasks, and although nothing is copied on the way."""
    case = Estimation("mlp", "mc", joint=joint, budget=2**30)
    model = case.build()

    def learn(penalty: EKFACPenalty, task: int) -> None:
        penalty.consolidate(model, CE, case.data(task))

    penalty = exact_penalty(mode=mode, separate_weight_and_bias=not joint)
    resumed = exact_penalty(mode=mode, separate_weight_and_bias=not joint)
    for task in range(3):
        learn(penalty, task)
        if task:
            learn(resumed, task)
        resumed.load_state_dict(penalty.state_dict())
        move(model, task)
        assert differences(resumed.state_dict(), penalty.state_dict()) == []
        values = [found(model) for found in (penalty, resumed)]
        assert values[0] > 0
        gradients = [torch.autograd.grad(v, list(model.parameters())) for v in values]
        assert (
            differences([values[1].detach(), gradients[1]], [values[0].detach(), gradients[0]])
            == []
        )


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
