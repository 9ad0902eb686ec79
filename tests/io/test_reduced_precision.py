"""Snapshots stored in a smaller dtype, compared with whole ones in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.linalg.orthonormal import restored_basis
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator

BATCHES = [(torch.randn(40, 12, generator=torch.Generator().manual_seed(i)),) for i in range(2)]


def estimated(dtype: torch.dtype = torch.float32) -> EKFACLinearOperator:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5)).to(dtype)
    data = [(x.to(dtype), torch.arange(40) % 5) for (x,) in BATCHES]
    return EKFACLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)


def dense(operator: EKFACLinearOperator) -> Tensor:
    blocks = operator.to(dtype=torch.float64).blocks
    return dense_operator(blocks, operator.parameter_shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_the_bytes_at_a_known_error(dtype: torch.dtype, tmp_path: Path) -> None:
    operator = estimated(dtype)
    operator.save(tmp_path / "whole")
    operator.save(tmp_path / "half", storage_dtype=torch.bfloat16)
    header = 4096
    bits = torch.finfo(dtype).bits / 16
    sizes = [(tmp_path / name).stat().st_size for name in ("whole", "half")]
    assert sizes[0] - header < bits * sizes[1]
    assert sizes[1] < sizes[0] / bits + header
    loaded = EKFACLinearOperator.load(tmp_path / "half")
    assert loaded.dtype == dtype
    assert loaded.provenance == operator.provenance
    exact, stored = dense(operator), dense(loaded)
    error = torch.linalg.matrix_norm(stored - exact) / torch.linalg.matrix_norm(exact)
    assert 1e-5 < error < 4e-3
    assert stored.trace().item() == pytest.approx(exact.trace().item(), rel=1e-3)
    smallest = torch.linalg.eigvalsh(stored)[0].item()
    assert smallest > -1e-6 * torch.linalg.matrix_norm(exact, 2).item()


def test_whole_bits_by_default(tmp_path: Path) -> None:
    operator = estimated()
    for dtype in (None, torch.float32, torch.float64):
        operator.save(tmp_path / "file", storage_dtype=dtype)
        loaded = EKFACLinearOperator.load(tmp_path / "file")
        for block, other in zip(operator.blocks, loaded.blocks, strict=True):
            assert all(torch.equal(block.tensors[n], other.tensors[n]) for n in block.tensors)


def test_double_in_single_precision(tmp_path: Path) -> None:
    operator = estimated(torch.float64)
    operator.save(tmp_path / "single", storage_dtype=torch.float32)
    loaded = EKFACLinearOperator.load(tmp_path / "single")
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(dense(loaded), dense(operator), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 30, 200])
def test_bases_are_orthonormal_again(size: int) -> None:
    torch.manual_seed(size)
    basis = torch.linalg.qr(torch.randn(3, size, size, dtype=torch.float64))[0]
    stored = basis.to(torch.bfloat16)
    restored = restored_basis(stored, torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    rounded = stored.double()
    before = (rounded.mT @ rounded - identity).abs().max().item()
    after = (restored.mT @ restored - identity).abs().max().item()
    # Newton's step squares the error, up to a constant.
    assert after <= max(1e-15, 2 * size * before**2)
    assert (restored - basis).abs().max() < 2**-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e5m2, "half", 16])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = r"storage_dtype is .*; expected one of float64, .*bfloat16 .* too small a range"
    with pytest.raises(ValueError, match=expected):
        estimated().save(tmp_path / "file", storage_dtype=dtype)
    with pytest.raises(ValueError, match="storage_dtype is"):
        exact_penalty().save(tmp_path / "file", storage_dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_cast_operators_go_through_files(cast: torch.dtype, tmp_path: Path) -> None:
    """A basis that was rounded in between is still accepted."""
    operator = estimated().to(dtype=cast)
    operator.save(tmp_path / "file")
    loaded = EKFACLinearOperator.load(tmp_path / "file")
    assert loaded.dtype == cast
    assert torch.equal(dense(loaded), dense(operator))
    back = operator.to(dtype=torch.float32)
    back.save(tmp_path / "file")
    assert torch.equal(dense(EKFACLinearOperator.load(tmp_path / "file")), dense(back))


def test_anchors_keep_their_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 5)
    penalty = exact_penalty(2.0)
    data = [(x, torch.arange(40) % 5) for (x,) in BATCHES]
    penalty.consolidate(model, nn.CrossEntropyLoss(), data)
    penalty.save(tmp_path / "penalty", storage_dtype=torch.bfloat16)
    loaded = EKFACPenalty.load(tmp_path / "penalty")
    for name, anchor in penalty.terms[0].anchor.items():
        assert torch.equal(loaded.terms[0].anchor[name], anchor)
    assert loaded(model).item() == 0.0
    with torch.no_grad():
        model.weight.add_(0.1 * torch.randn_like(model.weight))
    assert loaded(model).item() == pytest.approx(penalty(model).item(), rel=5e-3)
    assert loaded(model).item() != penalty(model).item()
