"""Snapshots of every format, compared with matrices that are written out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SnapshotError, __version__
from rotate_ewc.io.header import header_text
from rotate_ewc.io.layout import OPERATOR, PENALTY
from tests.helpers import golden
from tests.helpers.exact import exact_penalty

FORMATS = range(1, golden.VERSION + 1)


@pytest.mark.parametrize("version", FORMATS)
def test_operators_of_every_format(version: int) -> None:
    loaded = EKFACLinearOperator.load(golden.DATA / f"operator-{version}.safetensors")
    torch.testing.assert_close(loaded.to_dense(), golden.dense(), rtol=1e-13, atol=1e-13)
    assert loaded.parameter_shapes == golden.SHAPES
    assert loaded.provenance.loss == "CrossEntropyLoss"
    assert loaded.provenance.num_data == 1000
    assert loaded.provenance.num_loss_terms == 2500.5
    assert loaded.provenance.settings == {"mc_samples": 1, "seed": 7}


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("kind", ["operator", "penalty"])
def test_dictionaries_of_every_format(version: int, kind: str) -> None:
    state = torch.load(golden.DATA / f"{kind}-{version}.pt", weights_only=True)
    if kind == "operator":
        loaded = EKFACLinearOperator.from_state_dict(state)
        torch.testing.assert_close(loaded.to_dense(), golden.dense(), rtol=1e-13, atol=1e-13)
        return
    penalty = exact_penalty(golden.STRENGTH, "separate", weighting="uniform")
    penalty.load_state_dict(state)
    assert penalty.num_tasks == 2
    assert penalty(golden.anchor(2)).item() == pytest.approx(golden.penalty_value(), rel=1e-13)


@pytest.mark.parametrize("version", FORMATS)
def test_penalty_files_of_every_format(version: int) -> None:
    penalty = EKFACPenalty.load(golden.DATA / f"penalty-{version}.safetensors")
    assert (penalty.strength, penalty.mode, penalty.decay) == (golden.STRENGTH, "separate", 0.5)
    assert penalty(golden.anchor(2)).item() == pytest.approx(golden.penalty_value(), rel=1e-13)


@pytest.mark.parametrize("version", FORMATS)
def test_reduced_files_of_every_format(version: int) -> None:
    loaded = EKFACLinearOperator.load(golden.DATA / f"operator-{version}-bfloat16.safetensors")
    assert loaded.dtype == torch.float64
    error = torch.linalg.matrix_norm(loaded.to_dense() - golden.dense())
    assert 1e-4 < error / torch.linalg.matrix_norm(golden.dense()) < 4e-3


def test_all_kinds_have_the_same_version() -> None:
    """So that the golden files of one number belong together."""
    assert {name.split("/")[1] for name in (OPERATOR, PENALTY)} == {str(golden.VERSION)}


def header_of(state: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(header_text(state)))


@pytest.mark.parametrize("kind", ["operator", "penalty"])
def test_what_is_written_today_is_in_the_newest_golden_file(kind: str) -> None:
    """A change of the format that goes unnoticed would have no number."""
    newest = torch.load(golden.DATA / f"{kind}-{golden.VERSION}.pt", weights_only=True)
    now = (golden.operator() if kind == "operator" else golden.penalty()).state_dict()
    headers = [{**header_of(state), "library": ""} for state in (newest, now)]
    assert headers[0] == headers[1]
    assert list(headers[0]["parameters" if kind == "operator" else "options"]) == list(
        headers[1]["parameters" if kind == "operator" else "options"]
    )
    assert list(newest) == list(now)
    for key in set(now) - {"header"}:
        torch.testing.assert_close(newest[key], now[key], rtol=1e-14, atol=1e-14)


def test_headers_tell_everything() -> None:
    header = header_of(golden.operator().state_dict())
    assert header["format"] == OPERATOR
    assert header["library"] == f"rotate_ewc {__version__}"
    assert header["parameters"] == {name: list(shape) for name, shape in golden.SHAPES.items()}
    assert header["blocks"][3] == {
        "parameters": ["embedding.weight"],
        "transposed": True,
        "shape": [1, 2, 5],
        "dtype": "float64",
        "bases": ["gradient_basis"],
        "ranks": [2, 5],
    }
    assert header["blocks"][5]["ranks"] == [1, 2]
    assert header["provenance"] == {
        "loss": "CrossEntropyLoss",
        "reduction": "mean",
        "fisher_type": "mc",
        "num_data": 1000,
        "num_loss_terms": 2500.5,
        "settings": {"mc_samples": 1, "seed": 7},
    }


@pytest.mark.parametrize("kind", ["operator", "penalty"])
def test_formats_of_the_future_are_refused_by_name(kind: str) -> None:
    state = (golden.operator() if kind == "operator" else golden.penalty()).state_dict()
    future = {**header_of(state), "format": f"rotate_ewc.{kind}/99", "new": {"field": [1]}}
    state["header"] = json.dumps(future)
    message = rf'format is "rotate_ewc.{kind}/99"; expected .* later version than rotate_ewc 0'
    penalty = exact_penalty(1.0, "separate", weighting="uniform")
    read: Any = (
        EKFACLinearOperator.from_state_dict if kind == "operator" else penalty.load_state_dict
    )
    with pytest.raises(SnapshotError, match=message):
        read(state)


def test_kinds_are_told_apart() -> None:
    message = "format is 'rotate_ewc.{}/1'; expected 'rotate_ewc.{}/1'"
    with pytest.raises(SnapshotError, match=message.format("penalty", "operator")):
        EKFACLinearOperator.load(golden.DATA / "penalty-1.safetensors")
    with pytest.raises(SnapshotError, match=message.format("operator", "penalty")):
        EKFACPenalty.load(golden.DATA / "operator-1.safetensors")
