"""Tasks weigh in by loss terms: at strength 1, learning them in a row is learning them jointly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close, dense_ggn, dense_operator
from tests.helpers.penalties import flat, flat_gradient, hessian, shapes_of, unflat

EXACT: dict[str, Any] = {"fisher_type": "type2", "separate_weight_and_bias": False}
# Numbers of examples, and of tokens in each of them.
TASKS = ((5, 20), (30, 2), (4, 1))


def sequences(examples: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs `[N, T, 4]` and targets `[N, T, 3]`, with another solution for every seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, tokens, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(examples, tokens, 3, generator=generator, dtype=torch.float64)


def least_squares(tasks: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Weight and bias, flat, of the linear regression on all tokens of some tasks."""
    x = torch.cat([x.flatten(0, 1) for x, _ in tasks])
    y = torch.cat([y.flatten(0, 1) for _, y in tasks])
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1).double()], dim=1), y).solution
    return torch.cat([solution[:4].T.flatten(), solution[4]])


def minimize(
    model: nn.Linear, loss: nn.Module, penalty: EKFACPenalty, x: Tensor, y: Tensor
) -> None:
    """Go to the minimum of loss and penalty, both quadratic, by one Newton step."""
    shapes = shapes_of(model)

    def objective(theta: Tensor) -> Tensor:
        values = unflat(theta, shapes)
        return loss(torch.func.functional_call(model, values, (x,)), y) + penalty(values)

    start = flat(model)
    curvature = torch.autograd.functional.hessian(objective, start)
    gradient = torch.func.grad(objective)(start)
    with torch.no_grad():
        for name, value in unflat(start - torch.linalg.solve(curvature, gradient), shapes).items():
            model.get_parameter(name).copy_(value)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("mode", "num_tasks"), [("merged", 3), ("separate", 2)])
def test_regressions_in_a_row_are_the_joint_regression(
    mode: str, num_tasks: int, reduction: str
) -> None:
    """Bayes' rule, for tasks of different sizes whose examples have different numbers of terms.

    Two separate anchors are one too many for Bayes' rule.
    """
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.MSELoss(reduction=reduction)
    penalty = exact_penalty(1.0, mode, **EXACT)
    tasks = [sequences(*size, seed) for seed, size in enumerate(TASKS[:num_tasks])]
    for number, (x, y) in enumerate(tasks):
        penalty.current_num_data = len(x)
        penalty.current_num_loss_terms = y.numel()
        minimize(model, loss, penalty, x, y)
        assert_close(flat(model), least_squares(tasks[: number + 1]), 1e-9)
        penalty.consolidate(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_examples_alone_are_enough_where_all_have_the_same_terms(reduction: str) -> None:
    """Twelve elements of outputs each; and of the first task, data are only a half."""
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.MSELoss(reduction=reduction)
    penalty = exact_penalty(**EXACT)
    half, second = sequences(5, 4, 0), sequences(3, 4, 1)
    minimize(model, loss, penalty, *half)
    penalty.consolidate(model, loss, [half], num_data=10)
    penalty.current_num_data = 3
    assert penalty.current_num_loss_terms == 36.0
    minimize(model, loss, penalty, *second)
    assert_close(flat(model), least_squares([half, half, second]), 1e-9)


# --------------------------------------------------------------------------- token losses


class Tokens(nn.Module):
    """A tiny language model: classes second, as cross-entropy has them."""

    def __init__(self) -> None:
        """Make its one layer."""
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the tokens of `[N, T, 4]`."""
        return self.layer(x).mT


def tagged(examples: int, tokens: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Token classification, of which a few labels are ignored."""
    x, y = sequences(examples, tokens, seed)
    labels = y.argmax(dim=2)
    labels[:, -1][y[:, -1, 0] < -0.5] = -100
    return [(x[:1], labels[:1]), (x[1:], labels[1:])]


LOSSES = {
    "plain": ({}, lambda y: int((y >= 0).sum())),
    "weighted": (
        {"weight": torch.tensor([0.5, 1.0, 2.5]).double()},
        lambda y: 0.5 * int((y == 0).sum()) + int((y == 1).sum()) + 2.5 * int((y == 2).sum()),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", LOSSES)
def test_what_is_kept_is_the_matrix_of_the_summed_loss(kind: str, reduction: str) -> None:
    """And the second derivatives of the penalty are those over what the present mean divides by."""
    options, count = LOSSES[kind]
    torch.manual_seed(0)
    model = Tokens().double()
    loss = nn.CrossEntropyLoss(reduction=reduction, **options)
    summed = nn.CrossEntropyLoss(reduction="sum", **options)
    penalty = exact_penalty(1.0, "separate", **EXACT)
    for seed, size in enumerate(((4, 20), (4, 2))):
        data = tagged(*size, seed)
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        penalty.consolidate(model, loss, data)
        assert penalty.current_num_loss_terms == pytest.approx(count(y), rel=1e-12)
        term = penalty.terms[-1]
        assert term.operator.provenance.num_loss_terms == pytest.approx(count(y), rel=1e-12)
        names = list(term.operator.parameter_shapes)
        exact = dense_ggn(model, summed, names, x, y)
        assert_close(term.weight * term.operator.trace, exact.trace(), 1e-9)
    parts = [
        t.weight * dense_operator(t.operator.blocks, t.operator.parameter_shapes)
        for t in penalty.terms
    ]
    penalty.current_num_loss_terms = now = 12.5
    scale = 1 / now if reduction == "mean" else 1.0
    assert_close(hessian(penalty, model), scale * torch.stack(parts).sum(dim=0), 1e-9)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_tasks_of_long_and_short_sequences(mode: str, weighting: str) -> None:
    """A summed loss is so many times the mean loss, and so is its penalty."""
    found = {}
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model, loss = Tokens().double(), nn.CrossEntropyLoss(reduction=reduction)
        penalty = exact_penalty(1.0, mode, weighting=weighting, **EXACT)
        traces = []
        for seed, tokens in enumerate((16, 2)):
            data = tagged(6, tokens, seed)
            alone = exact_penalty(1.0, "separate", weighting=weighting, **EXACT)
            alone.consolidate(model, loss, data)
            traces.append(alone.terms[0].weight * float(alone.terms[0].operator.trace))
            penalty.consolidate(model, loss, data)
        with torch.no_grad():
            model.layer.weight[0].add_(0.3)  # of one class: softmax does not see all of them move
        penalty.current_num_loss_terms = 50
        value = penalty(model)
        value.backward()
        scale = 50 if reduction == "sum" else 1
        found[reduction] = traces[0] / traces[1], value / scale, flat_gradient(model) / scale
    assert found["mean"][0] == pytest.approx(found["sum"][0], rel=1e-9)
    assert found["mean"][0] == pytest.approx(10 if weighting == "examples" else 1, rel=0.35)
    for one, other in zip(found["mean"][1:], found["sum"][1:], strict=True):
        assert_close(one, other, 1e-9)


# --------------------------------------------------------------------------- the present task


def consolidated(**options: Any) -> EKFACPenalty:
    """A penalty after a task of four examples with six terms each."""
    penalty, (x, y) = exact_penalty(**options), sequences(4, 2, 0)
    torch.manual_seed(0)
    penalty.consolidate(nn.Linear(4, 3).double(), nn.MSELoss(), [(x, y)])
    return penalty


def test_number_of_terms_of_the_present_task() -> None:
    penalty = exact_penalty()
    assert penalty.current_num_loss_terms == 1.0
    penalty.current_num_data = 5
    assert penalty.current_num_loss_terms == 5.0
    penalty = consolidated()
    assert penalty.current_num_loss_terms == 24.0
    penalty.current_num_data = 5
    assert penalty.current_num_loss_terms == 30.0
    penalty.current_num_loss_terms = 7.5
    assert (penalty.current_num_data, penalty.current_num_loss_terms) == (5, 7.5)
    assert penalty.scale == 1 / 7.5
    penalty.current_num_loss_terms = None
    assert penalty.current_num_loss_terms == 30.0
    penalty.current_num_loss_terms = 7
    penalty.current_num_data = 2
    assert penalty.current_num_loss_terms == 12.0
    penalty.current_num_loss_terms = 7
    penalty.current_num_data = None
    assert penalty.current_num_loss_terms == 24.0


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "is 0; expected more than 0"),
        (-1.0, ValueError, "is -1.0; expected a finite number"),
        (float("nan"), ValueError, "is nan; expected a finite number"),
        ("7", TypeError, "is '7'; expected a number"),
        (True, TypeError, "is True; expected a number"),
    ],
)
def test_bad_numbers_of_terms(value: Any, error: type[Exception], message: str) -> None:
    penalty = consolidated()
    with pytest.raises(error, match=f"current_num_loss_terms {message}"):
        penalty.current_num_loss_terms = value
    assert penalty.current_num_loss_terms == 24.0


def test_state_knows_the_terms_of_the_last_task() -> None:
    resumed = exact_penalty()
    resumed.load_state_dict(consolidated().state_dict())
    assert resumed.current_num_loss_terms == 24.0
    resumed.current_num_data = 5
    assert resumed.current_num_loss_terms == 30.0


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_a_task_of_which_nothing_counts_changes_nothing(weighting: str) -> None:
    """Not even what the next task is taken to be like; only a summed loss has such tasks."""
    torch.manual_seed(0)
    model, loss = Tokens().double(), nn.CrossEntropyLoss(reduction="sum")
    penalty = exact_penalty(1.0, "separate", weighting=weighting, **EXACT)
    x, y = tagged(6, 5, 0)[1]
    penalty.consolidate(model, loss, [(x, y)])
    terms, scale = penalty.current_num_loss_terms, penalty.scale
    with pytest.warns(RuntimeWarning, match="has vanished"):
        penalty.consolidate(model, loss, [(x, torch.full_like(y, -100))])
    assert penalty.num_tasks == 2
    assert penalty.terms[1].operator.provenance.num_loss_terms == 0.0
    assert (penalty.current_num_loss_terms, penalty.scale) == (terms, scale)
    with torch.no_grad():
        model.layer.weight[0].add_(0.1)
    assert penalty(model).item() > 0
