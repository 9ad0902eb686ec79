"""Bases that several blocks have in common: what a snapshot may say of them, and what not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rotate_ewc import EKFACLinearOperator, SnapshotError
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.thin import orthonormal


def operator() -> EKFACLinearOperator:
    """Two blocks with one basis of their inputs, and one of another size."""
    inputs = orthonormal(1, 4, 4, 0)
    sizes = {"a": 3, "b": 2}
    blocks = [
        Block((name,), orthonormal(1, size, size, size), inputs, torch.ones(1, size, 4).double())
        for name, size in sizes.items()
    ]
    other = orthonormal(1, 5, 5, 1)
    blocks.append(Block(("c",), None, other, torch.ones(1, 2, 5).double()))
    shapes = {name: torch.Size((size, 4)) for name, size in sizes.items()}
    shapes["c"] = torch.Size((2, 5))
    provenance = Provenance(
        loss="CrossEntropyLoss",
        reduction="mean",
        fisher_type="mc",
        num_data=1,
        num_loss_terms=1.0,
        settings={},
    )
    return EKFACLinearOperator.from_blocks(blocks, shapes, provenance)


def header(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(state["header"].numpy()))
    return found


def with_header(state: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    return {**state, "header": torch.tensor(list(json.dumps(changed).encode()), dtype=torch.uint8)}


def test_told_in_the_header_and_stored_with_the_first() -> None:
    state = operator().state_dict()
    assert "a/activation_basis" in state
    assert "b/activation_basis" not in state
    blocks = {block["parameters"][0]: block for block in header(state)["blocks"]}
    assert blocks["b"]["shared"] == {"activation_basis": "a"}
    assert "shared" not in blocks["a"]
    first, second, _ = EKFACLinearOperator.from_state_dict(state).blocks
    assert second.activation_basis is first.activation_basis


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (
            {"activation_basis": "c"},
            "shares the 'activation_basis' of 'c'; expected an earlier block",
        ),
        (
            {"activation_basis": "b"},
            "shares the 'activation_basis' of 'b'; expected an earlier block",
        ),
        (
            {"activation_basis": "d"},
            "shares the 'activation_basis' of 'd'; expected an earlier block",
        ),
        (
            {"gradient_basis": "a"},
            "shares the 'gradient_basis' of 'a'; .* the same shape and dtype",
        ),
        ({"eigenvalues": "a"}, "'shared' has ..eigenvalues..; expected some of 'bases'"),
        ({"activation_basis": 3}, "Expected `str`, got `int`"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_what_does_not_fit_is_refused(shared: Any, message: str) -> None:
    state = operator().state_dict()
    changed = header(state)
    changed["blocks"][1]["shared"] = shared
    with pytest.raises(SnapshotError, match=message):
        EKFACLinearOperator.from_state_dict(with_header(state, changed))


def test_what_is_stored_with_another_block_must_not_be_stored_again() -> None:
    state = operator().state_dict()
    more = {**state, "b/activation_basis": state["a/activation_basis"]}
    with pytest.raises(SnapshotError, match="unexpected key 'b/activation_basis'"):
        EKFACLinearOperator.from_state_dict(more)
    missing = {key: value for key, value in state.items() if key != "a/activation_basis"}
    with pytest.raises(SnapshotError, match="'a/activation_basis' is missing"):
        EKFACLinearOperator.from_state_dict(missing)
