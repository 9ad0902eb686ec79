"""The bound of the curvature and the advice, on numbers made by hand."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rotate_ewc import EKFACPenalty
from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.stability import _rounded_down, largest_curvature, warn_if_divergent
from rotate_ewc.penalty.terms import Stack
from tests.helpers.exact import exact_penalty
from tests.helpers.penalties import CE, make, task

SEEDED = settings(derandomize=True, deadline=None, max_examples=60)


def stack(names: tuple[str, ...], terms: int, eigenvalues: list[list[float]]) -> Stack:
    """A stack of terms, of one group for each row of eigenvalues over their number."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)[:, None, :]
    block = Block(tuple(f"0/{name}" for name in names), None, None, values)
    return Stack(names, block, tuple(torch.zeros(terms, 1) for _ in names))


def test_largest_curvature_of_one_term() -> None:
    assert largest_curvature([stack(("w",), 1, [[1.0, 5.0, 2.0]])]) == 5.0
    assert largest_curvature([stack(("w",), 1, [[1.0, 5.0], [7.0, 0.0], [6.0, 6.0]])]) == 7.0
    assert largest_curvature([]) == 0.0


def test_largest_curvatures_of_terms_add() -> None:
    """Those of the groups of one term do not: they are of other entries."""
    rows = [[1.0, 5.0], [7.0, 0.0], [0.5, 0.25], [0.125, 0.25]]
    assert largest_curvature([stack(("w",), 4, rows)]) == 5.0 + 7.0 + 0.5 + 0.25
    assert largest_curvature([stack(("w",), 2, rows)]) == 7.0 + 0.5


def test_parameters_that_have_grown_are_in_several_stacks() -> None:
    first, second = stack(("w", "b"), 1, [[3.0, 1.0]]), stack(("w",), 1, [[4.0, 1.0]])
    other = stack(("v",), 1, [[6.0, 1.0]])
    assert largest_curvature([first, second, other]) == 3.0 + 4.0
    assert largest_curvature([first, other]) == 6.0
    assert largest_curvature([other, first]) == 6.0


def test_border_between_convergence_and_divergence() -> None:
    assert warn_if_divergent(0.5, 4.0, 1.0) is True
    assert warn_if_divergent(0.0, 4.0, 1.0) is True
    with pytest.warns(UserWarning, match="the penalty will diverge under gradient descent"):
        assert warn_if_divergent(0.5, 4.0 + 1e-9, 1.0) is False


def test_advice_in_numbers() -> None:
    with pytest.warns(UserWarning, match="diverge") as caught:
        warn_if_divergent(0.7, 12.3456, 3.0)
    assert re.findall(r"\d+\.?\d*", str(caught[0].message)) == [
        *("0.7", "12.35", "3", "8.64", "2"),
        # Two over the curvature is 0.16200..., and what the strength has to be 0.694...
        *("0.16", "0.69"),
    ]


@SEEDED
@given(st.floats(1e-30, 1e30))
def test_rounding_down_to_two_digits(value: float) -> None:
    text = _rounded_down(value)
    digits = re.sub(r"e.*", "", text).replace(".", "").strip("0")
    assert 1 <= len(digits) <= 2
    assert 0 < float(text) < value
    assert float(text) > value * (1 - 1 / 10) * (1 - 1e-6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.129, "0.12"), (1.0, "0.99"), (10.0, "9.9"), (0.1, "0.099"), (99.9, "99")),
        *((56.0, "55"), (3.19, "3.1"), (987.6, "9.8e+02"), (0.00123, "0.0012")),
    ],
)
def test_rounding_down_of_familiar_numbers(value: float, text: str) -> None:
    """A number that is on the border itself gives way, since rounding errors would decide."""
    assert _rounded_down(value) == text


def attached(optimizer: torch.optim.Optimizer, model: nn.Module, strength: float) -> EKFACPenalty:
    penalty = exact_penalty(strength, fisher_type="type2")
    penalty.attach(optimizer, model, "gradient")
    penalty.consolidate(model, CE, task("plain", 0))
    return penalty


def told(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Which warnings two steps give."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in [*task("plain", 1)[:1]] * 2:
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    return [str(one.message)[:25] for one in caught]


@pytest.mark.parametrize("nesterov", [False, True])
def test_divergence_of_an_attached_gradient_is_told_once_for_each_task(nesterov: bool) -> None:
    """At the rate and strength of each step, as a warm-up or a schedule changes them."""
    model = make("plain")
    momentum = {"momentum": 0.9, "nesterov": True} if nesterov else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **momentum)
    penalty = attached(optimizer, model, 1.0)
    factor = 2.8 / 1.9 if nesterov else 1.0
    border = 2 / (0.1 * factor * penalty.max_curvature)
    penalty.strength = 0.99 * border
    assert told(optimizer, model) == []
    penalty.strength = 1.01 * border
    assert told(optimizer, model) == ["the penalty will diverge "]
    assert told(optimizer, model) == []
    penalty.strength = 0.5 * border
    penalty.consolidate(model, CE, task("plain", 0))
    assert told(optimizer, model) == []
    optimizer.param_groups[0]["lr"] = 10.0
    assert told(optimizer, model) == ["the penalty will diverge "]


def test_rates_of_what_is_not_protected_and_strengths_to_be_found_are_not_checked() -> None:
    model, head = make("plain"), nn.Linear(3, 3).double()
    groups = [{"params": model.parameters(), "lr": 1e-6}, {"params": head.parameters(), "lr": 1e6}]
    attached(torch.optim.SGD(groups), model, 1.0)
    assert told(torch.optim.SGD(groups), model) == []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    penalty = attached(optimizer, model, 1.0)
    optimizer.param_groups[0]["lr"] = 2.1 / penalty.max_curvature
    penalty.strength = "auto"  # for which 1 is no more than a start
    for x, y in task("plain", 1)[:1]:
        optimizer.zero_grad()
        (1e-3 * CE(model(x), y)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()


def test_steps_of_bounded_size_are_not_checked() -> None:
    model = make("plain")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attached(optimizer, model, 1e6)
    assert told(optimizer, model) == []


def test_a_strength_in_the_loss_that_nothing_finds() -> None:
    """Told once, where the penalty is trained on; not where it is looked at, or was attached."""
    model = make("plain")
    penalty = exact_penalty("auto")
    penalty.consolidate(model, CE, task("plain", 0))
    assert repr(penalty).startswith("EKFACPenalty(strength=auto (none found yet, 1)")
    with torch.no_grad():
        penalty(model)
    with pytest.warns(UserWarning, match=r"strength 'auto', .* penalty.attach\(optimizer, model\)"):
        penalty(model)
    penalty(model)
    other = exact_penalty("auto")
    other.attach(torch.optim.Adam(model.parameters()), model)
    other.consolidate(model, CE, task("plain", 0))
    other(model)
    given = exact_penalty(2.0)
    given.consolidate(model, CE, task("plain", 0))
    given(model)
