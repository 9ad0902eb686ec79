"""Models in single and half precision, and under autocast."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases import BY_NAME, Case
from tests.helpers.exactness import EXACT_FISHERS, FISHER_TYPES, Setting
from tests.helpers.oracles import (
    Fisher,
    block_bases,
    block_matrix,
    dense_fisher,
    in_own_basis,
    parameter_shapes,
)

# Largest error of an eigenvalue, relative to the largest entry of its exact block: some multiples
# of the number format's own.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
CASES = (
    "tanh-mlp",
    "conv2d-stride-groups",
    "conv-transpose2d-stride-groups",
    "embedding-tied-token-outputs",
    "layer-norm-token-outputs",
    "batch-norm1d",
    "learned-positions",
    "attention-batch-first",
    "cross-attention-memory",
    "gpt-functional-positions",
    "weight-norm",
    "matmul-tokens",
    "bilinear",
)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert real numbers, and leave tokens and labels as they are."""
    return x.to(dtype) if x.is_floating_point() else x


def assert_near(operator: EKFACLinearOperator, dense: Tensor, model: nn.Module, tol: float) -> None:
    """Compare eigenvalues, computed in float32, with the exact diagonal in their own basis."""
    shapes = parameter_shapes(model, [name for name, _ in model.named_parameters()])
    assert operator.dtype == torch.float32
    for block in operator.blocks:
        assert all(tensor.dtype == torch.float32 for tensor in block.tensors.values())
        exact: Any = block.map(Tensor.double)
        for basis in block_bases(exact):
            eye = torch.eye(basis.shape[-1], dtype=torch.float64)
            assert (basis.mT @ basis - eye).abs().max() < 1e-5
        groups = block.eigenvalues.shape[0]
        matrix = block_matrix(dense, shapes, block.parameters, groups, block.transposed)
        error = (exact.eigenvalues - in_own_basis(exact, matrix)).abs().max()
        assert error <= tol * matrix.abs().max(), block.label
    assert float(operator.trace) == pytest.approx(float(dense.trace()), rel=tol)


def problem(case: Case, loss: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor, Any]:
    """Return a model in a dtype, the same numbers in float64, the inputs, and the targets."""
    model = case.model().to(dtype)
    return model, case.model().to(dtype).double(), cast(case.inputs(), dtype), case.targets(loss)


@pytest.mark.parametrize(
    ("name", "dtype", "fisher"),
    [
        (name, dtype, EXACT_FISHERS[(n + m) % 2])
        for n, name in enumerate(CASES)
        for m, dtype in enumerate(TOLERANCES)
        if (n + m) % 3  # two of three
    ],
    ids=str,
)
def test_models_in_lower_precision(name: str, dtype: torch.dtype, fisher: Fisher) -> None:
    """Statistics are in float32, and as near as the model's own rounding lets them be."""
    case = BY_NAME[name]
    loss = "ce" if fisher == "type2" else "mse"
    model, reference, x, y = problem(case, loss, dtype)
    loss_func = case.loss_func(loss)
    rows = [case.rows * size for size in case.batch_sizes]
    data = zip(torch.split(x, case.batch_sizes), torch.split(cast(y, dtype), rows), strict=True)
    params = list(model.parameters())
    with Setting(case).warns():
        operator = EKFACLinearOperator(
            model,
            loss_func,
            params,
            list(data),
            fisher_type=FISHER_TYPES[fisher],
            unsupported=case.unsupported,
            rank="full",
        )
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    names = [n for n, _ in reference.named_parameters()]
    dense = dense_fisher(reference, loss_func, names, cast(x, torch.float64), y, fisher)
    assert_near(operator, dense, reference, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        (name, (2**30, 1)[n % 2])
        for n, name in enumerate(CASES)
        # The first is made of what others have, and the second torch cannot.
        if name not in ("gpt-functional-positions", "bilinear")
    ],
)
def test_autocast(name: str, budget: int) -> None:
    """Only the model's own operations are in half precision."""
    case = BY_NAME[name]
    model, reference, x, y = problem(case, "ce", torch.float32)
    rows = [case.rows * size for size in case.batch_sizes]
    data = list(zip(torch.split(x, case.batch_sizes), torch.split(y, rows), strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        operator = EKFACLinearOperator(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            data,
            fisher_type=FisherType.TYPE2,
            memory_budget=budget,
            rank="full",
        )
    names = [n for n, _ in reference.named_parameters()]
    dense = dense_fisher(
        reference, nn.CrossEntropyLoss(), names, cast(x, torch.float64), y, "type2"
    )
    assert_near(operator, dense, reference, TOLERANCES[torch.bfloat16])
