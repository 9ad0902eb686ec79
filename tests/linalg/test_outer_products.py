"""Sums of outer products against sums by loops, whether the vectors are few or many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.linalg.outer_products import OuterProducts, add_to_all, eigenvectors
from rotate_ewc.linalg.truncation import Truncation
from tests.helpers.memory import peak_bytes
from tests.helpers.oracles import assert_close as assert_close_and_not_zero

SIZE = 6
CE = nn.CrossEntropyLoss()


assert_close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def vectors(groups: int, examples: int, shared: int, seed: int = 0, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, examples, shared, size, generator=generator, dtype=torch.float64)


def sum_of(parts: Sequence[Tensor], size: int = SIZE) -> Tensor:
    """The sum, by loops over groups, examples and positions."""
    total = torch.zeros(parts[0].shape[0], size, size, dtype=torch.float64)
    for part in parts:
        for group, examples in enumerate(part):
            for vector in examples.flatten(0, 1):
                total[group] += torch.outer(vector, vector)
    return total


def collected(parts: Sequence[Tensor], size: int = SIZE) -> OuterProducts:
    found = OuterProducts(parts[0].shape[0], size, parts[0])
    for part in parts:
        found.add(part)
    return found


def check_eigenvectors(basis: Tensor, matrix: Tensor) -> None:
    """Orthonormal, and the matrix, which may be zero, is diagonal in them, in ascending order."""
    assert basis.shape == matrix.shape
    assert_close(basis.mT @ basis, torch.eye(matrix.shape[1], dtype=matrix.dtype).expand_as(matrix))
    rotated = basis.mT @ matrix @ basis
    values = rotated.diagonal(dim1=1, dim2=2)
    assert_close(rotated, torch.diag_embed(values))
    assert bool((values.diff(dim=1) >= -1e-9).all())


@pytest.mark.parametrize("batches", [(1,), (3,), (4,), (20,), (1, 1, 1), (1, 2, 1), (2, 0, 9)])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_eigenvectors(groups: int, shared: int, batches: tuple[int, ...]) -> None:
    parts = [vectors(groups, count, shared, seed) for seed, count in enumerate(batches)]
    for layout in (parts, [part.mT.contiguous().mT for part in parts]):
        found = collected(layout)
        assert_close(found.diagonal, sum_of(parts).diagonal(dim1=1, dim2=2))
        check_eigenvectors(eigenvectors([found], ["sum"])[0], sum_of(parts))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    repeated=st.booleans(),
    scale=st.sampled_from([0.0, 1e-150, 1.0, 1e100]),
)
def test_any_vectors(size: int, batches: list[int], repeated: bool, scale: float) -> None:
    """Also vectors that are zero, or all the same."""
    parts = [vectors(2, count, 1, seed, size) for seed, count in enumerate(batches)]
    if repeated:
        parts = [parts[0][:, :1].expand_as(part) for part in parts]
    basis = eigenvectors([collected([part * scale for part in parts], size)], ["sum"])[0]
    check_eigenvectors(basis, sum_of(parts, size) if scale else torch.zeros_like(basis))


def test_costs_of_decompositions() -> None:
    """By what is decomposed, and the same before and after vectors come in."""
    whole = OuterProducts(1, 1024, torch.zeros(()))
    assert whole.decomposition_cost == 9 * 1024**3
    assert OuterProducts(2, 1024, torch.zeros(())).decomposition_cost == 2 * 9 * 1024**3
    # Of 16 directions of 4,096 there is a sketch of 96 columns; of 64 of 1,024 a range of 82.
    sketch = OuterProducts(1, 4096, torch.zeros(()), Truncation(16))
    assert sketch.form_of_sum.kind == "sketch"
    assert sketch.decomposition_cost == 8 * 4096 * 96**2 + 18 * 96**3
    leading = OuterProducts(1, 1024, torch.zeros(()), Truncation(64))
    assert leading.form_of_sum.kind == "matrix"
    assert leading.decomposition_cost == 6 * 1024**2 * 82 + 8 * 1024 * 82**2 + 9 * 82**3
    for total in (whole, sketch, leading):
        before = total.decomposition_cost
        total.add(vectors(1, 3, 1, 0, total.diagonal.shape[1]).float())
        assert total.decomposition_cost == before


def test_eigenvectors_of_several_are_each_its_own() -> None:
    parts = [[vectors(1, 2, 1, 1)], [vectors(1, 9, 1, 2)], [vectors(2, 3, 1, 3)]]
    found = eigenvectors([collected(part) for part in parts], ["a", "b", "c"])
    for basis, part in zip(found, parts, strict=True):
        check_eigenvectors(basis, sum_of(part))


@pytest.mark.parametrize("before", [2, 9])
@pytest.mark.parametrize("afterwards", [1, 9])
def test_clones_go_their_own_ways(before: int, afterwards: int) -> None:
    first, second, third = (vectors(1, n, 1, n) for n in (before, afterwards, afterwards + 1))
    original = collected([first])
    cloned = original.clone(None)
    original.add(second)
    cloned.add(third)
    for found, parts in ((original, [first, second]), (cloned, [first, third])):
        assert_close(found.diagonal, sum_of(parts).diagonal(dim1=1, dim2=2))
        check_eigenvectors(eigenvectors([found], ["sum"])[0], sum_of(parts))


@pytest.mark.parametrize("count", [2, 9])
def test_the_callers_vectors_are_neither_changed_nor_needed(count: int) -> None:
    given = vectors(1, count, 1)
    before = given.clone()
    found = collected([given])
    assert torch.equal(given, before)
    given.zero_()
    check_eigenvectors(eigenvectors([found], ["sum"])[0], sum_of([before]))


@pytest.mark.parametrize(("count", "decomposed"), [(1, 1), (3, 3), (4, 6), (20, 6)])
def test_few_vectors_are_decomposed_instead_of_their_sum(
    count: int, decomposed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, plain = [], torch.linalg.eigh

    def eigh(matrix: Tensor, UPLO: str) -> tuple[Tensor, Tensor]:  # noqa: N803
        sizes.append(matrix.shape[1])
        return plain(matrix, UPLO=UPLO)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    eigenvectors([collected([vectors(1, count, 1)])], ["sum"])
    assert sizes == [decomposed]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("shared", [1, 300])
@pytest.mark.parametrize(("groups", "size"), [(1, 60), (3, 60), (1, 250), (2, 250)])
def test_what_is_prepared_is_added_without_memory(
    groups: int, size: int, shared: int, count: int, together: bool
) -> None:
    """So it cannot fail half-way for want of it: of few vectors or many, in panels or not."""
    given = vectors(groups, count, shared, size=size)
    found = OuterProducts(groups, size, given)
    if count > 1:
        found.add(given)
    before = found.diagonal.clone()
    add = found.prepared(given.mT.contiguous().mT if together else given)
    assert_close(found.diagonal, before)
    assert peak_bytes(add) == 0
    assert_close(found.diagonal, before + given.square().sum(dim=(1, 2)))


@pytest.mark.parametrize("groups", [1, 3])
def test_many_positions_are_added_without_memory(groups: int) -> None:
    """Where they lie in order, no matrix of each example is made."""
    given = vectors(groups, 20, 70, size=60)
    found = collected([given], size=60)
    assert peak_bytes(lambda: found.add(given)) == 0
    assert_close(found.diagonal, 2 * given.square().sum(dim=(1, 2)))


def test_every_sum_has_a_label() -> None:
    sums = [collected([vectors(1, 2, 1, seed)]) for seed in range(2)]
    for labels in (["first"], ["first", "second", "third"]):
        with pytest.raises(ValueError, match="zip"):
            eigenvectors(sums, labels)


def test_vectors_are_added_to_all_sums_or_to_none(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (OuterProducts(1, SIZE, vectors(1, 1, 1)) for _ in range(2))
    given = vectors(1, 9, 1)
    add_to_all([(first, given), (second, 2 * given)])
    assert_close(first.diagonal, sum_of([given]).diagonal(dim1=1, dim2=2))
    assert_close(second.diagonal, 4 * first.diagonal)
    before = first.diagonal.clone()

    def fails(vectors: Tensor) -> None:
        raise MemoryError

    monkeypatch.setattr(second, "prepared", fails)
    with pytest.raises(MemoryError):
        add_to_all([(first, given), (second, given)])
    assert torch.equal(first.diagonal, before)


def test_autocast_changes_nothing() -> None:
    parts = [vectors(1, 2, 1).float()]
    expected = eigenvectors([collected(parts)], ["sum"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(eigenvectors([collected(parts)], ["sum"])[0], expected)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            MemoryError("too large"),
            MemoryError,
            r"decomposition of the thing, a matrix \[6, 6\] of \d+ bytes \(too large\)",
        ),
        (RuntimeError("can't allocate memory"), MemoryError, r"bytes \(can't allocate memory\)$"),
        (RuntimeError("something else"), RuntimeError, "^something else$"),
    ],
)
def test_errors_of_the_decomposition(
    error: Exception, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(matrix: Tensor, mode: str) -> None:
        raise error

    monkeypatch.setattr(torch.linalg, "qr", fails)
    with pytest.raises(expected, match=message):
        eigenvectors([collected([vectors(1, 2, 1)])], ["thing"])


def test_a_bias_with_few_examples() -> None:
    """Its block is the exact matrix, of as low a rank."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 40)
            self.head = nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.first(x)).mean(dim=1))

    torch.manual_seed(0)
    model = Positions().double()
    x, y = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    operator = EKFACLinearOperator(
        model,
        CE,
        [model.first.bias],
        [(x[:2], y[:2]), (x[2:], y[2:])],
        fisher_type="empirical",
        rank="full",
    )
    exact = torch.zeros(40, 40, dtype=torch.float64)
    for example, label in zip(x, y, strict=True):
        loss = CE(model(example[None]), label[None])
        (gradient,) = torch.autograd.grad(loss, [model.first.bias])
        exact += torch.outer(gradient, gradient) / 4
    (block,) = operator.blocks
    basis = block.gradient_basis[0]
    assert_close_and_not_zero(basis @ torch.diag(block.eigenvalues[0, :, 0]) @ basis.T, exact)
    assert int((block.eigenvalues > 1e-12 * block.eigenvalues.max()).sum()) == 4


def test_no_room_for_the_sum_names_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the vectors that were collected."""
    total = collected([vectors(1, 2, 1)])
    before = total.diagonal.clone()

    def fails(tensor: Tensor, *size: int) -> Tensor:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_zeros", fails)
        message = r"^out of memory in the sum of outer products, a matrix \[6, 6\] of 288 bytes \("
        with pytest.raises(MemoryError, match=message):
            total.add(vectors(1, 4, 1))
    assert torch.equal(total.diagonal, before)
