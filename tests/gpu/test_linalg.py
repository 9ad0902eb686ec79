"""Decompositions and memory that runs out, on the device where the matrices are."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rotate_ewc._utils.out_of_memory import is_out_of_memory
from rotate_ewc.linalg import eigh
from rotate_ewc.linalg.outer_products import OuterProducts
from tests.helpers.cases import BY_NAME
from tests.helpers.exactness import Setting, assert_exact_diagonal, exact_matrix_of, off_diagonal

TOLERANCE = 1e-10


def covariance(seed: int, size: int, device: torch.device) -> Tensor:
    factor = torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return (factor @ factor.mT / size).to(device)


def assert_eigenbasis(basis: Tensor, matrix: Tensor, tolerance: float = TOLERANCE) -> None:
    basis, matrix = basis.cpu(), matrix.cpu()
    assert (basis.mT @ basis - torch.eye(basis.shape[-1])).abs().max() < TOLERANCE
    assert off_diagonal(matrix, basis).abs().max() < tolerance * matrix.abs().max()


def test_threads_are_for_the_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU decomposes one matrix after another; several CPU threads, several matrices."""
    pools = []

    def pool(*args: Any, **kwargs: Any) -> ThreadPoolExecutor:
        pools.append(args)
        return ThreadPoolExecutor(*args, **kwargs)

    monkeypatch.setattr(eigh, "ThreadPoolExecutor", pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    matrices = [covariance(seed, 128, device) for seed in range(3)]
    for basis, matrix in zip(eigh.eigenbases(matrices), matrices, strict=True):
        assert basis.device == device
        assert_eigenbasis(basis, matrix)
    assert bool(pools) == (device.type == "cpu")


@pytest.mark.parametrize("failures", [1, 2])
def test_eigh_that_does_not_converge(
    device: torch.device, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, and then with another diagonal, on the same device."""
    matrix, left, whole = covariance(0, 20, device).float(), failures, torch.linalg.eigh

    def failing(argument: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        assert argument.device == device
        left -= 1
        if left >= 0:
            raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]
        return whole(argument, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.warns(RuntimeWarning, match="did not converge in torch.float32; it did in float64"):
        basis = eigh.eigenbasis(matrix)
    assert (basis.device, basis.dtype) == (device, torch.float32)
    gram = (basis.mT @ basis).cpu()
    assert (gram - torch.eye(20)).abs().max() < 1e-5
    assert off_diagonal(matrix, basis).abs().max() < 1e-4 * matrix.abs().max()


def out_of_memory(device: torch.device) -> BaseException:
    """What the device's own allocator raises."""
    try:
        torch.empty(2**50, device=device)
    except (RuntimeError, MemoryError) as error:
        return error.with_traceback(None)
    raise AssertionError("there are 4 PiB of memory")


def test_what_the_allocator_says_is_understood(device: torch.device) -> None:
    error = out_of_memory(device)
    assert is_out_of_memory(error)
    assert isinstance(error, torch.cuda.OutOfMemoryError) == (device.type == "cuda")


@pytest.mark.parametrize("name", ["conv2d-stride-groups", "sequence-outputs"])
def test_work_is_halved_where_memory_runs_out(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real error, for all that is done on more than one example at once."""
    error, add, failed = out_of_memory(device), OuterProducts.add, []

    def failing(products: OuterProducts, vectors: Tensor) -> None:
        if vectors.shape[1] > 1:
            failed.append(vectors.shape)
            raise error
        add(products, vectors)

    monkeypatch.setattr(OuterProducts, "add", failing)
    setting = Setting(BY_NAME[name], fisher="empirical")
    operator = setting.estimate(model=setting.case.model().to(device))
    assert failed
    assert_exact_diagonal(operator.to("cpu"), exact_matrix_of(setting), setting.shapes())
