"""What tasks weigh, against sums over loss terms written out."""

from __future__ import annotations

from itertools import product

import pytest

from rotate_ewc.options import Reduction, Weighting
from rotate_ewc.penalty.weighting import kept_weight, scale_of_penalty

CASES = list(product(Weighting, Reduction))
OF_ONE_TERM = 0.75  # the second derivative of every term of a loss


def second_derivative(num_loss_terms: int, reduction: Reduction) -> float:
    """Of a loss over a task's data."""
    total = sum(OF_ONE_TERM for _ in range(num_loss_terms))
    return total if reduction is Reduction.SUM else total / num_loss_terms


@pytest.mark.parametrize(("weighting", "reduction"), CASES)
@pytest.mark.parametrize("past", [1, 8])
def test_what_is_kept_of_a_task(past: int, weighting: Weighting, reduction: Reduction) -> None:
    """The matrix of the summed loss, or of the mean one, whichever of the two the loss is."""
    wanted = Reduction.SUM if weighting is Weighting.EXAMPLES else Reduction.MEAN
    found = kept_weight(2.0, past, weighting, reduction) * second_derivative(past, reduction)
    assert found == pytest.approx(2.0 * second_derivative(past, wanted))


@pytest.mark.parametrize(("weighting", "reduction"), CASES)
def test_penalty_in_proportion_to_the_loss(weighting: Weighting, reduction: Reduction) -> None:
    """With weights by numbers, three past terms and five present ones are as one loss of eight."""
    past, now = 3, 5
    kept = kept_weight(1.0, past, weighting, reduction) * second_derivative(past, reduction)
    found = scale_of_penalty(2.0, now, weighting, reduction) * kept
    in_all = past * OF_ONE_TERM if weighting is Weighting.EXAMPLES else now * OF_ONE_TERM
    assert found == pytest.approx(2.0 * (in_all if reduction is Reduction.SUM else in_all / now))


def test_task_of_which_nothing_counts_weighs_nothing() -> None:
    assert kept_weight(2.0, 0.0, Weighting.UNIFORM, Reduction.SUM) == 0.0
