"""Memory that runs out in the work on a block costs time: nothing is lost or counted twice.

The allocations fail by injection: at any one call of a kernel, or whenever there are several
examples at once. What comes out is compared with dense matrices and with the layers' own factors,
of which the former tell whether all eigenvalues, and the latter whether all of a factor was counted
once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rotate_ewc._utils.out_of_memory import is_out_of_memory
from rotate_ewc.estimation import accumulate
from rotate_ewc.estimation.microbatch import Microbatch, in_halves
from rotate_ewc.linalg import eigenvalues, outer_products
from rotate_ewc.linalg.outer_products import OuterProducts
from tests.helpers.cases import BY_NAME
from tests.helpers.exactness import (
    TOLERANCE,
    Setting,
    assert_exact_diagonal,
    exact,
    exact_matrix_of,
    off_diagonal,
)
from tests.helpers.oracles import kronecker_factors, partial_traces
from tests.helpers.worlds import failing, world

# Every function that makes something of a microbatch.
WORK = (
    (Microbatch, "block_activations"),
    (Microbatch, "_inputs"),
    (Microbatch, "_output_gradients"),
    (Microbatch, "_as_statistics"),
    (OuterProducts, "add"),
    (OuterProducts, "prepared"),
    (outer_products, "add_covariance_"),
    (outer_products, "_prepared_covariance"),
    (accumulate, "add_to_all"),
    (eigenvalues, "rotate"),
    (eigenvalues, "squared_entries"),
    (eigenvalues, "squared_lookups"),
    (eigenvalues, "squared_projections"),
    (eigenvalues, "squared_rotations"),
    (eigenvalues, "single_position_product"),
    (eigenvalues, "pair_products"),
    (eigenvalues, "example_products"),
)
# Those whose (first or second) argument tells how many examples there are.
KERNELS = (
    "prepared",
    "_prepared_covariance",
    "rotate",
    "squared_entries",
    "squared_lookups",
    "single_position_product",
    "pair_products",
    "example_products",
)
ERRORS = (
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
)


def few(name: str, sizes: tuple[int, ...] = (3,), **options: Any) -> Setting:
    """Estimate a case on few examples, with one output vector unless something else is said."""
    case = replace(BY_NAME[name], batch_sizes=sizes)
    return Setting(case, **{"fisher": "empirical", **options})


SETTINGS = [
    few("tanh-mlp", (3, 2), fisher="type2"),
    few("tanh-mlp", fisher="type2", joint=True),
    few("sequence-outputs", approx="reduce"),
    few("conv2d-stride-groups"),
    few("embedding-tied-token-outputs"),
    few("embedding-padding-flattened-outputs"),
    few("weight-norm", fisher="type2"),
    few("layer-norm-token-outputs"),
]


def assert_exact(setting: Setting, operator: Any) -> None:
    """Compare eigenvalues with the dense matrix, and bases with the factors of the oracles."""
    assert_exact_diagonal(operator, exact_matrix_of(setting), setting.shapes())
    matrices = exact(setting)
    for block in operator.blocks:
        layout = setting.layouts()[block.parameters]
        factors = partial_traces(matrices[block.parameters], block.eigenvalues.shape[1])
        if layout.kind in ("layer", "lookup"):
            terms = setting.terms(block)
            if terms is None:
                continue
            factors = kronecker_factors(terms, setting.approx)[::-1]
        bases = (block.gradient_basis, block.activation_basis)
        for factor, basis in zip(factors, bases, strict=True):
            if basis is not None:
                assert off_diagonal(factor, basis).abs().max() <= TOLERANCE * factor.abs().max()


def sabotage(
    patch: pytest.MonkeyPatch, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    for owner, name in WORK:
        patch.setattr(owner, name, wrap(getattr(owner, name)))


def failing_at(moment: int, error: BaseException, calls: list[str]) -> Callable[..., Any]:
    """Wrap functions so that their k-th call, of all together, fails."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            if len(calls) - 1 == moment:
                raise error
            return function(*args, **kwargs)

        return wrapped

    return wrap


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_one_failure_at_any_call(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    with monkeypatch.context() as patch:
        sabotage(patch, failing_at(-1, MemoryError(), calls))
        setting.estimate()
    total = len(calls)
    assert total > 20
    # All settings together go through the same calls; each fails at every third one.
    for moment in range(SETTINGS.index(setting) % 3, total, 3):
        calls.clear()
        with monkeypatch.context() as patch:
            sabotage(patch, failing_at(moment, ERRORS[moment % len(ERRORS)], calls))
            operator = setting.estimate()
        assert_exact(setting, operator)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_memory_for_one_example(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every microbatch of several examples fails, at one function after another."""
    failed = 0

    def alone(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            examples = args[0] if name in ("prepared", "_prepared_covariance") else tensor
            count = len(examples) if name == "squared_lookups" else examples.shape[1]
            if count > 1:
                failed += 1
                raise MemoryError
            return function(tensor, *args, **kwargs)

        return wrapped

    total = 0
    for owner, name in WORK:
        if name not in KERNELS:
            continue
        failed = 0
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, alone(getattr(owner, name)))
            operator = setting.estimate()
        assert_exact(setting, operator)
        total += failed
    assert total > 0


@pytest.mark.parametrize(
    ("owner", "name", "label", "mode"),
    [
        (outer_products, "_prepared_covariance", "0.weight", "merged"),
        (OuterProducts, "add", "0.weight", "separate"),
        (Microbatch, "per_example_gradients", "0.bias", "merged"),
        (eigenvalues, "squared_projections", "0.weight", "separate"),
        (eigenvalues, "squared_entries", "0.bias", "merged"),
    ],
)
def test_never_enough_memory(
    mode: str, owner: Any, name: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is named, what to do is said, and all is as it was."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    made = world(mode)
    before = made.state()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        expected = f"one example for the block of '{label}'.*memory_budget.*batches.*exclude"
        with pytest.raises(MemoryError, match=expected) as caught:
            made.consolidate()
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    made.assert_unchanged(before)
    made.assert_goes_on(mode)


def test_no_memory_for_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    made = world()
    before = made.state()
    error = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", failing(torch.linalg.eigh, 1, error))
        with pytest.raises(MemoryError, match=r"decomposition of the \w+ factor of '.*exclude=\["):
            made.consolidate()
    made.assert_unchanged(before)
    made.assert_goes_on("merged")


def microbatch(num_examples: int) -> Microbatch:
    """Examples 0 to n - 1 of a batch that nobody looks at."""
    plan: Any = SimpleNamespace(parameter=torch.zeros(1), key=SimpleNamespace(label="block"))
    captured: Any = None
    return Microbatch(captured, plan, slice(0, num_examples), range(1), 1000)


def examples_of(part: Microbatch) -> range:
    return range(part.examples.start, part.examples.stop)


@pytest.mark.parametrize("num_examples", [1, 2, 7, 8])
@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_every_example_counts_once(num_examples: int, most: int) -> None:
    """With memory for so many examples."""
    sums = torch.zeros(num_examples)

    def add(part: Microbatch) -> None:
        if len(examples_of(part)) > most:
            raise MemoryError
        sums[part.examples] += 1

    in_halves(microbatch(num_examples), add)
    assert torch.equal(sums, torch.ones_like(sums))


def test_other_errors_are_not_tried_again() -> None:
    calls = []

    def add(part: Microbatch) -> None:
        calls.append(part)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        in_halves(microbatch(8), add)
    assert len(calls) == 1


def test_what_was_made_before_a_failure_is_released() -> None:
    """Or the second attempt would have no more memory than the first."""
    alive = []

    class Large:
        def __init__(self) -> None:
            alive.append(self)

    found: list[weakref.ref[Large]] = []

    def add(part: Microbatch) -> None:
        assert not any(reference() for reference in found)
        large = Large()
        alive.clear()
        found.append(weakref.ref(large))
        if len(examples_of(part)) > 2:
            raise MemoryError

    in_halves(microbatch(8), add)
    assert len(found) == 7


def test_what_says_that_memory_ran_out() -> None:
    assert all(map(is_out_of_memory, ERRORS))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    for other in (RuntimeError("size mismatch"), ValueError("out of memory"), KeyboardInterrupt()):
        assert not is_out_of_memory(other)
