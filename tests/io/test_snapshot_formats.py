"""Snapshots of every format that ever was, against matrices written out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, SnapshotError, __version__
from rotate_ewc.io.header import OPERATOR, PENALTY
from tests.helpers import golden

FORMATS = range(1, golden.VERSION + 1)


@pytest.mark.parametrize("version", FORMATS)
def test_operators_of_every_format(version: int) -> None:
    loaded = EKFACLinearOperator.load(golden.DATA / f"operator-{version}.safetensors")
    torch.testing.assert_close(loaded.to_dense(), golden.dense(), rtol=1e-13, atol=1e-13)
    assert loaded.parameter_shapes == golden.SHAPES
    assert loaded.provenance.loss == "CrossEntropyLoss"
    assert loaded.provenance.num_data == 1000
    assert loaded.provenance.settings == ({} if version == 1 else {"mc_samples": 1, "seed": 7})


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("kind", ["operator", "penalty"])
def test_dictionaries_of_every_format(version: int, kind: str) -> None:
    state = torch.load(golden.DATA / f"{kind}-{version}.pt", weights_only=True)
    if kind == "operator":
        loaded = EKFACLinearOperator.from_state_dict(state)
        torch.testing.assert_close(loaded.to_dense(), golden.dense(), rtol=1e-13, atol=1e-13)
        return
    penalty = EKFACPenalty(golden.STRENGTH, "separate", weighting="uniform")
    penalty.load_state_dict(state)
    assert penalty.num_tasks == 2
    assert penalty(golden.anchor(2)).item() == pytest.approx(golden.penalty_value(), rel=1e-13)


def test_penalty_file_of_the_present_format() -> None:
    penalty = EKFACPenalty.load(golden.DATA / f"penalty-{golden.VERSION}.safetensors")
    assert (penalty.strength, penalty.mode, penalty.decay) == (golden.STRENGTH, "separate", 0.5)
    assert penalty(golden.anchor(2)).item() == pytest.approx(golden.penalty_value(), rel=1e-13)


def test_reduced_file_of_the_present_format() -> None:
    path = golden.DATA / f"operator-{golden.VERSION}-bfloat16.safetensors"
    loaded = EKFACLinearOperator.load(path)
    assert loaded.dtype == torch.float64
    error = torch.linalg.matrix_norm(loaded.to_dense() - golden.dense())
    assert 1e-4 < error / torch.linalg.matrix_norm(golden.dense()) < 4e-3


def test_both_kinds_have_the_same_version() -> None:
    """So that the golden files of one number belong together."""
    assert OPERATOR.split("/")[1] == PENALTY.split("/")[1] == str(golden.VERSION)


def header_of(state: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(state["header"]))


@pytest.mark.parametrize("kind", ["operator", "penalty"])
def test_what_is_written_today_is_in_the_newest_golden_file(kind: str) -> None:
    """A change of the format that goes unnoticed would have no number."""
    newest = torch.load(golden.DATA / f"{kind}-{golden.VERSION}.pt", weights_only=True)
    now = (golden.operator() if kind == "operator" else golden.penalty()).state_dict()
    headers = [{**header_of(state), "library": ""} for state in (newest, now)]
    assert headers[0] == headers[1]
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
    }
    assert header["provenance"] == {
        "loss": "CrossEntropyLoss",
        "reduction": "mean",
        "fisher_type": "mc",
        "num_data": 1000,
        "settings": {"mc_samples": 1, "seed": 7},
    }


@pytest.mark.parametrize("kind", ["operator", "penalty"])
def test_formats_of_the_future_are_refused_by_name(kind: str) -> None:
    state = (golden.operator() if kind == "operator" else golden.penalty()).state_dict()
    state["header"] = json.dumps({**header_of(state), "format": f"rotate_ewc.{kind}/99"})
    message = rf"format is 'rotate_ewc.{kind}/99'; expected .* later version than rotate_ewc 0"
    penalty = EKFACPenalty(1.0, "separate", weighting="uniform")
    read: Any = (
        EKFACLinearOperator.from_state_dict if kind == "operator" else penalty.load_state_dict
    )
    with pytest.raises(SnapshotError, match=message):
        read(state)


def test_kinds_are_told_apart() -> None:
    with pytest.raises(SnapshotError, match=r"format is 'rotate_ewc.penalty/2'; expected"):
        EKFACLinearOperator.load(golden.DATA / "penalty-2.safetensors")
    with pytest.raises(SnapshotError, match=r"format is 'rotate_ewc.operator/2'; expected"):
        EKFACPenalty.load(golden.DATA / "operator-2.safetensors")


@pytest.mark.parametrize("field", ["blocks", "parameters", "provenance"])
def test_old_headers_may_be_incomplete(field: str) -> None:
    state = torch.load(golden.DATA / "operator-1.pt", weights_only=True)
    header = header_of(state)
    del header[field]
    with pytest.raises(SnapshotError, match=rf"'header' is incomplete: '{field}'"):
        EKFACLinearOperator.from_state_dict({**state, "header": json.dumps(header)})


def test_old_snapshots_may_lack_tensors() -> None:
    state = torch.load(golden.DATA / "operator-1.pt", weights_only=True)
    del state["layer.bias/eigenvalues"]
    with pytest.raises(SnapshotError, match=r"'layer.bias/eigenvalues' is missing or no tensor"):
        EKFACLinearOperator.from_state_dict(state)


def test_old_penalties_may_have_a_parameter_called_header() -> None:
    """The first format had headers of terms, under keys that end in the same word."""
    state = torch.load(golden.DATA / "penalty-1.pt", weights_only=True)
    header = header_of(state)
    renamed = {key.replace("layer.bias", "layer.header"): value for key, value in state.items()}
    for key in renamed:
        if key.endswith("/operator/header"):
            renamed[key] = renamed[key].replace("layer.bias", "layer.header")
    receiver = EKFACPenalty(mode=header["mode"], weighting=header["weighting"])
    receiver.load_state_dict(renamed)
    assert "layer.header" in receiver.terms[0].anchor
