"""Layers that were replaced by larger ones: grown if they begin with the old rows, or else told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.exact import exact_penalty

CE = nn.CrossEntropyLoss()
MESSAGE = "'1.weight', '1.bias' have grown, but not from the values that were consolidated"


def task(classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(classes)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))]


def learned(mode: str = "merged", strict: bool = True) -> tuple[EKFACPenalty, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    penalty = exact_penalty(2.0, mode, strict=strict)
    penalty.consolidate(model, CE, task())
    return penalty, model


def replaced(model: nn.Sequential, outputs: int, *, copied: bool) -> nn.Sequential:
    """A model with a new layer of more outputs, perhaps with the old ones copied into it."""
    torch.manual_seed(outputs)
    old, model = model[1], copy.deepcopy(model)
    model[1] = nn.Linear(6, outputs)
    if copied:
        with torch.no_grad():
            for new, before in zip(model[1].parameters(), old.parameters(), strict=True):
                new[: len(before)] = before
    return model


def attached_step(penalty: EKFACPenalty, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with penalty.attach(optimizer, model):
        optimizer.step()


EVALUATIONS: dict[str, Callable[[EKFACPenalty, nn.Module], object]] = {
    "value": lambda penalty, model: penalty(model),
    "step": attached_step,
    "consolidation": lambda penalty, model: penalty.consolidate(model, CE, task()),
}


@pytest.mark.parametrize("how", EVALUATIONS)
def test_new_rows_in_the_place_of_old_ones_are_told_once(how: str) -> None:
    penalty, model = learned()
    new = replaced(model, 5, copied=False)
    with pytest.warns(UserWarning, match=MESSAGE):
        EVALUATIONS[how](penalty, new)
    penalty(new), penalty(new)


def test_they_are_told_for_each_size_and_by_name() -> None:
    penalty, model = learned("separate")
    for outputs in (5, 7):
        new = replaced(model, outputs, copied=False)
        with pytest.warns(UserWarning, match=MESSAGE) as caught:
            penalty(new)
        assert len(caught) == 1


def test_copied_rows_are_grown_ones() -> None:
    """The first remedy; training for a while does not matter."""
    penalty, model = learned()
    grown = replaced(model, 5, copied=True)
    assert penalty(grown).item() == 0.0
    penalty, model = learned()
    with torch.no_grad():
        for parameter in grown.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    assert penalty(grown).item() > 0


def test_another_name_leaves_the_new_layer_free() -> None:
    """The second remedy."""
    penalty, model = learned(strict=False)
    new = nn.Sequential()
    new.add_module("0", model[0])
    new.add_module("head", nn.Linear(6, 5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="parameters '1.*are missing in the model")
        value = penalty(new)
    assert value.item() == 0.0
    value.backward()
    assert new.head.weight.grad is None


def test_evaluation_under_vmap_does_not_look() -> None:
    penalty, model = learned()
    parameters = dict(replaced(model, 5, copied=False).named_parameters())
    stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
    values = torch.vmap(lambda given: penalty(given))(stacked)
    assert values.shape == (2,)
    assert values[0] > 0
