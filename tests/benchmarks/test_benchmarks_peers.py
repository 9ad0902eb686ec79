"""What other packages make of layers and losses: the parts that need none of them installed."""

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers.adapters import Adapter, RotateEWC
from benchmarks.peers.adapters.adapter import Mode
from benchmarks.peers.document import cell
from benchmarks.peers.exact import DenseMatrix, exact_matrix, mean_divisor
from benchmarks.peers.measure import Record, measure
from benchmarks.peers.problem import Problem
from benchmarks.peers.problems import PLAIN, PROBLEMS
from benchmarks.peers.row import Question, Row
from benchmarks.peers.verdict import (
    BlockEstimate,
    NotOffered,
    Status,
    Structure,
    judge,
    name_exception,
)

SOFTMAX = Problem(lambda act: [nn.Linear(2, 3, bias=False)], (2,))
DOUBLE = torch.float64


# --------------------------------------------------------------------------- the exact matrices


def test_exact_matrix_of_softmax_regression() -> None:
    x, _ = SOFTMAX.data()
    p = SOFTMAX.model()(x).softmax(1)
    expected = torch.zeros(6, 6, dtype=DOUBLE)
    for x_n, p_n in zip(x, p, strict=True):
        expected += torch.kron(p_n.diag() - torch.outer(p_n, p_n), torch.outer(x_n, x_n)) / len(x)
    exact = exact_matrix(SOFTMAX, "type2")
    assert dict(exact.shapes) == {"0.weight": (3, 2)}
    torch.testing.assert_close(exact.matrix, expected)


def test_empirical_matrix_of_softmax_regression_is_a_sum() -> None:
    x, y = SOFTMAX.data()
    expected = torch.zeros(6, 6, dtype=DOUBLE)
    for x_n, y_n, p_n in zip(x, y[:, 0], SOFTMAX.model()(x).softmax(1), strict=True):
        label = torch.eye(3, dtype=DOUBLE)[y_n]
        gradient = torch.outer(p_n - label, x_n).flatten()
        expected += torch.outer(gradient, gradient)
    torch.testing.assert_close(exact_matrix(SOFTMAX, "empirical").matrix, expected)


@pytest.mark.parametrize(("reduction", "divisor"), [("mean", 18), ("sum", 1)])
def test_exact_matrix_of_linear_regression(reduction: str, divisor: int) -> None:
    problem = dataclasses.replace(
        SOFTMAX,
        loss=lambda reduction: nn.MSELoss(reduction=reduction),
        targets="numbers",
        reduction=reduction,
    )
    x, _ = problem.data()
    expected = torch.kron(2 * torch.eye(3, dtype=DOUBLE), x.T @ x) / divisor
    torch.testing.assert_close(exact_matrix(problem, "type2").matrix, expected)


def test_only_what_batches_hold_counts() -> None:
    problem = dataclasses.replace(SOFTMAX, examples=7, batch_size=3, drop_last=True)
    assert [len(x) for x, _ in problem.loader()] == [3, 3]
    assert len(problem.seen()) == 6
    assert mean_divisor(problem) == pytest.approx(6)


def test_graphs_are_padded_inputs_without_the_padding() -> None:
    padded, graphs = PROBLEMS["ragged"]
    batches = [inputs for inputs, _ in graphs.loader()]
    assert [len(batch["sizes"]) for batch in batches] == [3, 3]
    assert [len(batch["rows"]) for batch in batches] == [int(b["sizes"].sum()) for b in batches]
    assert len({size for batch in batches for size in batch["sizes"].tolist()}) > 1
    expected = exact_matrix(padded, "type2").matrix
    torch.testing.assert_close(exact_matrix(graphs, "type2").matrix, expected)


def test_blocks_are_cut_in_the_order_of_the_names() -> None:
    matrix = torch.arange(9.0).reshape(3, 3)
    exact = DenseMatrix(matrix, {"weight": torch.Size([2]), "bias": torch.Size([1])})
    assert exact.block(["bias", "weight"]).tolist() == [[8, 6, 7], [2, 0, 1], [5, 3, 4]]


# --------------------------------------------------------------------------- the verdict

B = torch.tensor([[2.0, 1.0], [1.0, 4.0]], dtype=DOUBLE)
EXACT = DenseMatrix(B, {"w": torch.Size([2])})


def rotation(angle: float) -> torch.Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=DOUBLE)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0])
def test_exact_eigenvalues_in_any_basis_are_right(angle: float) -> None:
    basis = rotation(angle)
    matrix = basis @ (basis.T @ B @ basis).diagonal().diag() @ basis.T
    outcome = judge(EXACT, Structure.EKFAC, [BlockEstimate(("w",), matrix)])
    assert outcome.status is Status.RIGHT


def test_wrong_trace_is_measured() -> None:
    outcome = judge(EXACT, Structure.EKFAC, [BlockEstimate(("w",), 1.5 * B)])
    assert outcome.status is Status.WRONG
    assert outcome.trace_ratio == pytest.approx(1.5)


def test_right_trace_does_not_hide_wrong_eigenvalues() -> None:
    outcome = judge(EXACT, Structure.EKFAC, [BlockEstimate(("w",), B.diagonal().flip(0).diag())])
    assert outcome.status is Status.WRONG
    assert outcome.trace_ratio == pytest.approx(1)
    assert outcome.error == pytest.approx(0.5)


def test_equal_eigenvalues_are_compared_by_their_mean() -> None:
    same = DenseMatrix(torch.diag(torch.tensor([1.0, 3.0, 5.0]).double()), {"w": torch.Size([3])})
    matrix = torch.diag(torch.tensor([2.0, 2.0, 5.0]).double())
    outcome = judge(same, Structure.EKFAC, [BlockEstimate(("w",), matrix)])
    assert outcome.status is Status.RIGHT


def test_diagonals_are_compared_as_they_are() -> None:
    right = BlockEstimate(("w",), B.diagonal().diag())
    flipped = BlockEstimate(("w",), B.diagonal().flip(0).diag())
    assert judge(EXACT, Structure.DIAGONAL, [right]).status is Status.RIGHT
    assert judge(EXACT, Structure.DIAGONAL, [flipped]).status is Status.WRONG


def test_blocks_of_the_same_parameter_are_added() -> None:
    halves = [BlockEstimate(("w",), B.diagonal().diag() / 2)] * 2
    assert judge(EXACT, Structure.DIAGONAL, halves).status is Status.RIGHT


def test_missing_parameters_are_named() -> None:
    exact = DenseMatrix(torch.eye(3, dtype=DOUBLE), {"v": torch.Size([1]), "w": torch.Size([2])})
    outcome = judge(exact, Structure.EKFAC, [BlockEstimate(("v",), torch.ones(1, 1))])
    assert (outcome.status, outcome.message) == (Status.LEFT_OUT, "w")


def test_nothing_at_all_and_wrong_shapes_are_wrong() -> None:
    assert judge(EXACT, Structure.EKFAC, []).status is Status.WRONG
    too_large = [BlockEstimate(("w",), torch.eye(3))]
    assert judge(EXACT, Structure.EKFAC, too_large).status is Status.WRONG
    not_finite = [BlockEstimate(("w",), torch.full((2, 2), math.nan))]
    assert judge(EXACT, Structure.EKFAC, not_finite).status is Status.WRONG


def test_errors_of_a_package_are_refusals_and_others_failures() -> None:
    def outcome_of(function: Any, *packages: str) -> Any:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - any kind will do
            function()
        return name_exception(caught.value, packages)

    refused = outcome_of(lambda: RotateEWC().save(SOFTMAX, Path("no such folder")), "x")
    assert refused.status is Status.FAILS
    by_torch = outcome_of(lambda: torch.zeros(2) @ torch.zeros(3), "torch")
    assert by_torch.status is Status.FAILS
    assert by_torch.message.startswith("RuntimeError: inconsistent tensor size")
    said = outcome_of(lambda: nn.Linear(2, 2).get_parameter("none"), "torch")
    assert said.status is Status.REFUSED
    assert outcome_of(lambda: nn.Linear(2, 2).get_parameter("none"), "other").status is Status.FAILS
    assert name_exception(NotOffered("why"), ()).message == "why"


# --------------------------------------------------------------------------- measuring


class Absent(Adapter):
    """A package that nobody has."""

    package = "absent"
    title = "absent"
    module = "no_such_module_anywhere"
    modes = (Mode("type2", "type2"),)
    raisers = ()


class Fake(Adapter):
    """A package with the exact diagonal, which has its whims."""

    package = "fake"
    title = "fake"
    module = "torch"
    modes = (Mode("diagonal", "type2", Structure.DIAGONAL),)
    raisers = ("torch",)
    takes_loss = True

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        if problem.reduction == "none":
            raise KeyError("none")
        model.train(False)
        for parameter in model.parameters():
            parameter.grad = None
        exact = exact_matrix(problem, "type2")
        return [BlockEstimate((n,), exact.block([n])) for n in exact.shapes]

    def save(self, problem: Problem, folder: Path) -> list[torch.Tensor]:
        (folder / "matrix.pkl").write_bytes(pickle.dumps(Fake))
        return [torch.ones(1)]

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[torch.Tensor]:
        return [torch.ones(1)]


def ask(adapter: Adapter, *problems: Problem, question: Question = "matrix") -> list[Record]:
    return measure(Row("row", "a row", {}, {}, question), adapter, problems)


def test_package_that_is_missing_leaves_a_cell_that_says_so() -> None:
    (found,) = ask(Absent(), SOFTMAX, SOFTMAX)
    assert found.status == "not installed"
    assert cell([found]) == "not installed"


@pytest.mark.parametrize(
    ("question", "status", "message"),
    [
        ("matrix", "right", ""),
        ("pickle", "wrong", "needs pickle"),
        ("weights", "right", ""),
        ("as found", "wrong", "changes modes, `.grad`"),
    ],
)
def test_questions(question: Any, status: str, message: str) -> None:
    problem = Problem(lambda act: [nn.Linear(2, 3), act()], (2,))
    (found,) = ask(Fake(), problem, question=question)
    assert (found.status, found.message) == (status, message)


def test_bare_error_is_no_refusal_of_a_reduction() -> None:
    problem = dataclasses.replace(SOFTMAX, reduction="none")
    (found,) = ask(Fake(), problem, question="reduction")
    assert (found.status, found.message) == ("fails", "KeyError: 'none'")


def test_this_package_is_measured_like_the_others() -> None:
    records = ask(RotateEWC(), PLAIN)
    assert [(r.mode, r.status) for r in records] == [("type2", "right"), ("empirical", "right")]
    questions: tuple[Question, ...] = ("pickle", "weights", "as found")
    for question in questions:
        (found,) = ask(RotateEWC(), PLAIN, question=question)
        assert found.status == "right"
