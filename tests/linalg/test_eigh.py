"""Eigenvectors of whatever factors there are, and what is done where `eigh` fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.linalg import eigh
from rotate_ewc.linalg.block import Block

CE = nn.CrossEntropyLoss()
SIZES = (2, 7, 40)
EPSILON = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}
FACTORS = {
    "zero": lambda x: x * 0,
    "subnormal": lambda x: x * 1e-20,
    "tiny": lambda x: x * 1e-18,
    "huge": lambda x: x * 1e17,
    "graded": lambda x: x * torch.logspace(0, -15, x.shape[1], dtype=torch.float64),
    "graded upwards": lambda x: x * torch.logspace(-18, 17, x.shape[1], dtype=torch.float64),
    "rank one": lambda x: x[:1],
    "low rank": lambda x: x[: len(x) // 4 + 1],
    "repeated": lambda x: torch.eye(x.shape[1], dtype=torch.float64),
    "duplicated": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "dead": lambda x: x * (torch.arange(x.shape[1]) % 3 > 0),
}


def factor(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    rows = FACTORS[kind](torch.randn(3 * size, size, generator=generator, dtype=torch.float64))
    return (rows.mT @ rows)[None]


def errors(basis: Tensor, covariance: Tensor) -> tuple[float, float]:
    """Distances, in float64, from orthonormality, and from diagonality relative to the norm."""
    q, c = basis.double(), covariance.double()
    c = c / c.norm().clamp_min(1e-300)
    rotated = q.mT @ c @ q
    beside = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
    eye = torch.eye(q.shape[1], dtype=torch.float64)
    return float((q.mT @ q - eye).abs().max()), float(beside.abs().max())


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", FACTORS)
def test_bases_are_orthonormal_however_bad_the_factor(
    kind: str, size: int, dtype: torch.dtype
) -> None:
    covariance = factor(kind, size).to(dtype)
    assert bool(covariance.isfinite().all())
    unorthonormal, beside = errors(eigh.eigenbasis(covariance), covariance)
    assert unorthonormal < 30 * EPSILON[dtype]
    assert beside < 30 * EPSILON[dtype]


def failing_eigh(patch: pytest.MonkeyPatch, times: int, how: str, size: int = 5) -> list[Tensor]:
    """Make the first decompositions of matrices of a size fail; return what they are given."""
    plain, seen = torch.linalg.eigh, []

    def eigh(matrix: Tensor, UPLO: str) -> Any:  # noqa: N803
        if matrix.shape[-1] != size:
            return plain(matrix, UPLO=UPLO)
        seen.append(matrix)
        if len(seen) > times:
            return plain(matrix, UPLO=UPLO)
        if how == "raises":
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return plain(matrix, UPLO=UPLO)[0], torch.full_like(matrix, float("nan"))

    patch.setattr(torch.linalg, "eigh", eigh)
    return seen


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize(
    ("times", "message"),
    [
        (1, r"5 × 5 factor did not converge in torch.float32; it did in float64$"),
        (2, r"it did in float64 with its diagonal raised by up to 1e-06 of its mean$"),
    ],
)
def test_what_is_tried_where_eigh_fails(
    times: int, message: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    covariance = factor("low rank", 5).float()
    seen = failing_eigh(monkeypatch, times, how)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        basis = eigh.eigenbasis(covariance)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [m.dtype for m in seen] == [torch.float32, *[torch.float64] * times]
    assert basis.dtype == torch.float32
    unorthonormal, beside = errors(basis, covariance)
    assert unorthonormal < 1e-6
    assert beside < (1e-6 if times == 1 else 2e-6)
    if times == 2:
        change = (seen[2] - seen[1]).squeeze()
        diagonal = change.diagonal()
        assert torch.equal(change, torch.diag(diagonal))
        mean = covariance.double().diagonal(dim1=1, dim2=2).mean()
        assert len(set(diagonal.tolist())) == 5
        assert 0 <= diagonal.min() < diagonal.max() <= 1.0001e-6 * mean


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_factor_that_cannot_be_decomposed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    params = list(model.parameters())
    message = r"eigh of the 5 × 5 gradient factor of '0.weight' did not converge.*exclude"
    with monkeypatch.context() as patch:
        failing_eigh(patch, 3, how)
        with pytest.raises(ValueError, match=message):
            EKFACLinearOperator(model, CE, params, data)
    operator = EKFACLinearOperator(model, CE, params, data)
    with monkeypatch.context() as patch:
        failing_eigh(patch, 3, how)
        with pytest.raises(ValueError, match=r"merged gradient factor of '0\.weight'"):
            merge([operator, operator])


@pytest.mark.parametrize("least", [1, 1000], ids=["threads", "one after another"])
def test_the_block_and_the_line_are_named(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the decompositions run in threads of their own; and the result is as good."""
    monkeypatch.setattr(eigh, "_SMALLEST_IN_THREADS", least)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    params = list(model.parameters())
    expected = EKFACLinearOperator(model, CE, params, data).trace
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        failing_eigh(monkeypatch, 1, "raises", size=4)
        with pytest.warns(RuntimeWarning, match="4 × 4 activation factor of '0.weight'") as caught:
            operator = EKFACLinearOperator(model, CE, params, data, check_deterministic=False)
    finally:
        torch.set_num_threads(threads)
    assert [warning.filename for warning in caught] == [__file__]
    assert float(operator.trace) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_operators_whose_sum_is_not_finite(value: float) -> None:
    def operator(entry: float) -> EKFACLinearOperator:
        eigenvalues = torch.full((1, 2, 2), entry)
        block = Block(("w",), torch.eye(2)[None], torch.eye(2)[None], eigenvalues)
        return made.from_blocks([block], {"w": (2, 2)}, made.provenance)

    model = nn.Linear(2, 2)
    made = EKFACLinearOperator(model, CE, [model.weight], [(torch.ones(2, 2), torch.arange(2))])
    for operators in ([operator(value)], [operator(1.0), operator(value)]):
        with pytest.raises(NotFiniteError, match="Fisher matrix of 'w' is not finite"):
            merge(operators)
    with pytest.raises(NotFiniteError, match="Fisher matrix of 'w' is not finite"):
        merge([operator(1e37), operator(1.0)], [100.0, 1.0])


def test_nothing_to_warn_of() -> None:
    (_, basis), remark = eigh.decomposed(factor("low rank", 7), "factor")
    assert basis.shape == (1, 7, 7)
    assert remark == ""


def test_all_attempts_are_made_on_the_device_of_the_matrix() -> None:
    """Of tensors that have no data, so that no such device is needed."""
    with FakeTensorMode():
        attempts = [c for _, c in eigh._attempts(torch.empty(2, 4, 4, device="cuda"))]
    assert [c.device.type for c in attempts] == ["cuda"] * 3


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rows_have_unit_vectors(dtype: torch.dtype, rows: int) -> None:
    """Not mixed with others of next to no variance; only upper triangles are looked at."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, rows, 12, generator=generator).to(dtype)
    dead = torch.tensor([1, 5, 11])
    data[:, :, dead] = 0.0
    data[0, :, 3] = 0.0  # but not in the other group
    covariance = (data.mT @ data).triu() + torch.full((12, 12), 7.0, dtype=dtype).tril(-1)
    basis = eigh.eigenbasis(covariance)
    assert torch.equal(basis[:, dead, :3], torch.eye(3, dtype=dtype).expand(2, 3, 3))
    assert not basis[:, dead, 3:].any()
    whole = basis.mT @ (data.mT @ data) @ basis
    assert (whole - torch.diag_embed(whole.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert (basis.mT @ basis - torch.eye(12)).abs().max() < 1e-5
    assert (whole.diagonal(dim1=1, dim2=2).diff() > -1e-4).all()
