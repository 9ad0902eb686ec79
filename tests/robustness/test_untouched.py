"""Estimation leaves the model, its gradients and the random states as it found them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases import BY_NAME, Case
from tests.helpers.exactness import (
    FISHER_TYPES,
    Counting,
    Setting,
    assert_exact_diagonal,
    estimated,
    exact_matrix_of,
)
from tests.helpers.model_state import ModelState
from tests.helpers.oracles import assert_close


def well_used_model(case: Case) -> nn.Module:
    """Return a model with mixed modes and some gradients."""
    model = case.model().train()
    modules = list(model.modules())
    for module in modules[2::2]:
        module.training = False
    for parameter in list(model.parameters())[::2]:
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 7.0)
    return model


UNTOUCHED = (
    "batch-norm-and-dropout",
    "subset-of-parameters",
    "tied-weights",
    "linear-twice",
    "attention-subset",
    "decoder-layer-norm-last",
    "spectral-norm",
    "weight-norm-subset",
    "lstm",
)


# Every model with every Fisher type; passes and checks in all four combinations with each of these.
CHOICES = [
    (name, fisher, (1, 2**30)[(m + f) % 2], bool((m + f) // 2 % 2))
    for m, name in enumerate(UNTOUCHED)
    for f, fisher in enumerate(FISHER_TYPES)
]


@pytest.mark.parametrize(("name", "fisher", "budget", "check"), CHOICES)
def test_estimation_leaves_everything_as_found(
    name: str, fisher: str, budget: int, check: bool
) -> None:
    """Weights, buffers, gradients, modes, flags, hooks and random states."""
    case = BY_NAME[name]
    model = well_used_model(case)
    params = [p for n, p in model.named_parameters() if n not in case.left_out]
    before = ModelState.of(model)
    assert len(set(before.modes.values())) == 2
    assert all(before.requires_grad.values()) != bool(case.frozen)
    data = Counting(case.data("ce"))
    with Setting(case).warns():
        EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            params,
            data,
            fisher_type=FISHER_TYPES[fisher],
            memory_budget=budget,
            check_deterministic=check,
            unsupported=case.unsupported,
        )
    before.assert_unchanged(model)
    assert data.passes > 0


@pytest.mark.parametrize(
    "name", ["subset-of-parameters", "attention-subset", "weight-norm-subset", "low-rank-update"]
)
def test_frozen_parameters_can_be_estimated(name: str) -> None:
    """Parameters that do not require gradients are treated like the others."""
    case = BY_NAME[name]
    frozen, free = Setting(replace(case, left_out=())), Setting(replace(case, frozen=()))
    free = replace(free, case=replace(free.case, left_out=()))
    model = frozen.case.model()
    operator = frozen.estimate(params=dict(model.named_parameters()), model=model)
    assert_close(free.dense(operator), free.dense(estimated(free)))


def test_estimation_in_evaluation_mode() -> None:
    """The modes a model comes in do not matter: BatchNorm and Dropout are always in eval mode."""
    case = BY_NAME["batch-norm-and-dropout"]
    setting = Setting(case)
    model = well_used_model(case)
    parameters = dict(model.named_parameters())
    operator = EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [parameters[name] for name in case.names(model)],
        case.data("ce"),
        fisher_type=FisherType.TYPE2,
    )
    assert_exact_diagonal(operator, exact_matrix_of(setting), setting.shapes())


class Broken(nn.Module):
    """A layer that fails on its third call."""

    def __init__(self) -> None:
        """Start counting."""
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Pass on, or fail."""
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("broken on purpose")
        return x


def test_a_failure_leaves_everything_as_found() -> None:
    """An exception in the middle of a pass reaches the caller, and the model is restored."""
    case = BY_NAME["batch-norm-and-dropout"]
    model = well_used_model(replace(case, build=with_broken_layer(case.build)))
    parameters = dict(model.named_parameters())
    params = [parameters[f"0.{name}"] for name in case.names(case.model())]
    before = ModelState.of(model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        EKFACLinearOperator(model, nn.CrossEntropyLoss(), params, case.data("ce"))
    before.assert_unchanged(model)


def with_broken_layer(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Append the failing layer to a model."""
    return lambda: nn.Sequential(build(), Broken())


def test_operator_is_finished_when_made() -> None:
    """Changing the weights and the data afterwards does not change the operator."""
    case = BY_NAME["tanh-mlp"]
    setting = Setting(case)
    model, data = case.model(), case.data("ce")
    operator = EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, fisher_type=FisherType.TYPE2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for x, _ in data:
            x.zero_()
    assert_close(setting.dense(operator), setting.dense(estimated(setting)))
