"""Handles of attached penalties: found again, and not copied; what the documents advise works."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam

from rotate_ewc import Attachment, EKFACPenalty
from tests.helpers.dense_steps import draw
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close
from tests.helpers.penalties import consolidated, flat


@pytest.mark.parametrize("other", [False, True])
def test_handles_that_nobody_has_kept(other: bool) -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters())
    penalty.attach(optimizer, model)
    second = exact_penalty() if other else penalty
    with pytest.raises(ValueError, match=r"already has .* detach\(\) .* Attachment\.of\(optim"):
        second.attach(optimizer, model)
    Attachment.of(optimizer).detach()
    with pytest.raises(ValueError, match="the optimizer has no penalty attached"):
        Attachment.of(optimizer)
    assert Attachment.of(second.attach(optimizer, model).optimizer).penalty is second
    with pytest.raises(TypeError, match="optimizer is Sequential"):
        Attachment.of(model)  # type: ignore[arg-type]


def test_handles_of_wrapped_optimizers_are_found() -> None:
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters())
    handle = penalty.attach(optimizer, model)
    wrapped: Any = nn.Identity()
    wrapped.optimizer = optimizer
    assert Attachment.of(wrapped) is handle


# --------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda handle: torch.save(handle, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_handles_are_not_copied(duplicate: Callable[[Any], Any]) -> None:
    model, penalty = consolidated("plain", 1)
    handle = penalty.attach(Adam(model.parameters()), model)
    with pytest.raises(TypeError, match=r"handle\.state_dict\(\).*penalty\.attach"):
        duplicate(handle)


@pytest.mark.parametrize(("update", "every"), [("rotated", 1), ("tangent", 3), ("gradient", 1)])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copied_optimizers_go_on_when_attached(way: str, update: str, every: int) -> None:
    """As the documents advise, to the same bits; copied optimizers have no hooks."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    handle = penalty.attach(optimizer, model, update, every)
    for step in range(4):
        draw(model, step)
        optimizer.step()
    whole = (model, penalty, optimizer)
    twin, second, copied = (
        copy.deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    )
    with pytest.raises(ValueError, match=r"no penalty attached.*not a copy of it"):
        Attachment.of(copied)
    second.attach(copied, twin, update, every).load_state_dict(handle.state_dict())
    for step in range(4, 8):
        for net, stepped in ((model, optimizer), (twin, copied)):
            draw(net, step)
            stepped.step()
    assert torch.equal(flat(twin), flat(model))


def test_copied_optimizers_that_are_to_have_no_penalty() -> None:
    """Averages in an eigenbasis start again, as when the original is detached."""
    model, penalty = consolidated("plain", 1)
    optimizer = Adam(model.parameters(), lr=0.1)
    penalty.attach(optimizer, model)
    draw(model, 0)
    optimizer.step()
    twin, copied = copy.deepcopy((model, optimizer))
    EKFACPenalty().attach(copied, twin).detach()
    reference = copy.deepcopy(twin)
    new = Adam(reference.parameters(), lr=0.1)
    for net, stepped in ((twin, copied), (reference, new)):
        draw(net, 1)
        stepped.step()
    assert_close(flat(twin), flat(reference), 1e-14)
