"""The scale of the Fisher matrix: one for all Fisher types, whatever a loss divides by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from tests.helpers.crossing import crossed
from tests.helpers.oracles import assert_close

REDUCTIONS = ("mean", "sum")
KEPT = torch.tensor([[True, True], [True, False]])


class Tokens(nn.Module):
    """Three classes for each of two tokens, classes second: `[N, 3, 2]`."""

    def __init__(self) -> None:
        """Make the one layer."""
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify the tokens of `[N, 2, 2]`."""
        return self.layer(x).tanh().mT


def problem(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a model and inputs, always the same."""
    torch.manual_seed(0)
    if kind == "tokens":
        return Tokens().double(), torch.randn(2, 2, 2).double()
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(
        2, 4
    ).double()


def all_labels(kind: str, outputs: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Go through labels with the probabilities that the model gives them.

    Squared errors get two values for each output, with mean and variance of the implied normal
    distribution: no more matters to products of two gradients.
    """
    if kind == "tokens":
        p = outputs.softmax(dim=1)
        for classes in itertools.product(range(3), repeat=int(KEPT.sum())):
            labels = torch.full(KEPT.shape, -100)
            labels[KEPT] = torch.tensor(classes)
            chosen = p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            yield labels, float(chosen[KEPT].prod())
        return
    for bits in itertools.product((0.0, 1.0), repeat=outputs.numel()):
        y = torch.tensor(bits).double().view_as(outputs)
        if kind == "mse":
            yield outputs + (y - 0.5) * 2**0.5, 0.5 ** outputs.numel()
        else:
            p = outputs.sigmoid()
            yield y, float(torch.where(y > 0, p, 1 - p).prod())


LOSSES = {"tokens": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_expected_empirical_matrix_is_the_exact_one(kind: str, reduction: str) -> None:
    """Also where examples have different numbers of tokens that count."""
    model, x = problem(kind)
    loss, params = LOSSES[kind](reduction=reduction), list(model.parameters())
    expected = torch.zeros(len(params), dtype=torch.double)
    for y, probability in all_labels(kind, model(x).detach()):
        found = EKFACLinearOperator(model, loss, params, [(x, y)], fisher_type="empirical")
        expected += probability * torch.stack([block.trace for block in found.blocks])
    exact = EKFACLinearOperator(model, loss, params, [(x, y)], fisher_type="type2")
    assert_close(torch.stack([block.trace for block in exact.blocks]), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_types_agree_on_drawn_labels(reduction: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3).double(), torch.randn(4000, 5).double()
    y = model(x).detach() + torch.randn(4000, 3) / 2**0.5
    traces = {
        fisher: float(
            EKFACLinearOperator(
                model,
                nn.MSELoss(reduction=reduction),
                list(model.parameters()),
                [(x, y)],
                fisher_type=fisher,
            ).trace
        )
        for fisher in ("type2", "empirical", "mc")
    }
    # Curvature 2, and a squared gradient |x|² + 1 for each of the outputs.
    exact = 2 * 3 * float(x.square().sum() + len(x)) / (y.numel() if reduction == "mean" else 1)
    assert traces["type2"] == pytest.approx(exact, rel=1e-12)
    assert traces["empirical"] == pytest.approx(exact, rel=0.05)
    assert traces["mc"] == pytest.approx(exact, rel=0.05)


SEQUENCE = torch.tensor([[0, 2, -100, 1], [-100, 1, -100, 1], [2, 2, 0, 0]])
WEIGHTS = torch.tensor([0.5, 2.0, 3.0])
DIVISORS = {
    "ce": (nn.CrossEntropyLoss, {}, SEQUENCE.clamp(min=0), 12),
    "ce-ignored": (nn.CrossEntropyLoss, {}, SEQUENCE, 9),
    "ce-weighted": (nn.CrossEntropyLoss, {"weight": WEIGHTS}, SEQUENCE, 3 * 0.5 + 3 * 2 + 3 * 3),
    "mse": (nn.MSELoss, {}, torch.linspace(-1, 1, 36).view(3, 3, 4), 36),
    "bce": (nn.BCEWithLogitsLoss, {}, torch.linspace(0, 1, 36).view(3, 3, 4).round(), 36),
}


@crossed(kind=DIVISORS, fisher=["type2", "empirical", "mc"], num_data=[None, 100])
def test_sum_is_mean_times_the_number_of_loss_terms(
    kind: str, fisher: str, num_data: int | None
) -> None:
    """Labels that count, their class weights, or elements: not examples."""
    loss, options, y, divisor = DIVISORS[kind]
    torch.manual_seed(0)
    model, x = nn.Conv1d(2, 3, 1).double(), torch.randn(3, 2, 4).double()
    y = y.double() if y.is_floating_point() else y
    found = {
        reduction: EKFACLinearOperator(
            model,
            loss(reduction=reduction, **options).double(),
            list(model.parameters()),
            [(x[:2], y[:2]), (x[2:], y[2:])],
            fisher_type=fisher,
            num_data=num_data,
        )
        for reduction in REDUCTIONS
    }
    stands_for = divisor * (num_data or 3) / 3
    assert_close(found["sum"].trace, stands_for * found["mean"].trace)
    for operator in found.values():
        assert operator.provenance.num_loss_terms == pytest.approx(stands_for, rel=1e-12)
