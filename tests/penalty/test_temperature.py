"""Softened predictions in a snapshot, against Jacobians written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close, dense_operator
from tests.helpers.penalties import CE, make, move, task


def fisher(model: nn.Module, inputs: Tensor, temperature: float) -> Tensor:
    """The mean of `J_nᵀ (diag(p) - p pᵀ) J_n` with J that of the outputs, p softened."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total: Tensor | float = 0.0
    for row in inputs:
        outputs = jacrev(lambda p, x=row: functional_call(model, p, (x[None],))[0])(parameters)
        jacobian = torch.cat([outputs[name].flatten(1) for name in parameters], dim=1)
        p = (model(row[None])[0] / temperature).softmax(0).detach()
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return torch.as_tensor(total) / len(inputs)


def consolidated(temperature: float, model: nn.Module, **options: Any) -> EKFACPenalty:
    penalty = exact_penalty(2.0, fisher_type="type2", temperature=temperature, **options)
    penalty.consolidate(model, CE, task("plain", 0))
    return penalty


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_trace_and_biases_are_those_of_the_softened_model(temperature: float, joint: bool) -> None:
    model = make("plain")
    inputs = torch.cat([x for x, _ in task("plain", 0)])
    expected = fisher(model, inputs, temperature)
    penalty = consolidated(temperature, model, separate_weight_and_bias=not joint)
    (term,) = penalty.terms
    # A merged term carries its weight, the nine examples.
    found = dense_operator(term.operator.blocks, term.operator.parameter_shapes) / 9
    assert_close(found.trace(), expected.trace())
    if not joint:  # separate blocks of biases are exact
        for own in (slice(20, 25), slice(40, 43)):
            assert_close(found[own, own], expected[own, own])
    move(model, 1)
    shift = torch.cat([(p - term.anchor[n]).flatten() for n, p in model.named_parameters()])
    assert_close(penalty(model), 0.5 * 2.0 * shift @ found @ shift)


def test_one_is_no_temperature() -> None:
    model = make("plain")
    penalty = exact_penalty(2.0, fisher_type="type2")
    penalty.consolidate(model, CE, task("plain", 0))
    other = consolidated(1.0, model)
    move(model, 1)
    assert torch.equal(penalty(model), other(model))


def test_softening_gives_weight_to_examples_that_are_sure() -> None:
    model = make("plain")
    with torch.no_grad():
        model[2].weight.mul_(30)
    assert consolidated(10.0, model).terms[0].operator.trace > (
        3 * consolidated(1.0, model).terms[0].operator.trace
    )


def test_squared_error_has_no_temperature() -> None:
    model, data = make("plain"), [(x, torch.zeros(len(x), 3).double()) for x, _ in task("plain", 0)]
    values = []
    for temperature in (1.0, 4.0):
        penalty = exact_penalty(2.0, fisher_type="type2", temperature=temperature)
        penalty.consolidate(model, nn.MSELoss(), data)
        values.append(penalty.terms[0].operator.trace)
    assert_close(values[1], values[0])


def test_a_forward_function_is_softened_too() -> None:
    model = make("plain")
    penalty = exact_penalty(2.0, fisher_type="type2", temperature=3.0)
    penalty.consolidate(model, CE, task("plain", 0), forward=lambda x: model(x))
    expected = consolidated(3.0, model)
    assert torch.equal(penalty.terms[0].operator.trace, expected.terms[0].operator.trace)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), ("2", TypeError)],
)
def test_bad_temperatures(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"temperature is '?{value}"):
        exact_penalty(3.0, temperature=value)
