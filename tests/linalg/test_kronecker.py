"""Every kernel against loops over groups, examples, positions and entries, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rotate_ewc._utils.numerics import full_precision, statistics_dtype
from rotate_ewc.layers.embedding import scatter_rows
from rotate_ewc.linalg import eigenvalues, eigh, kronecker
from rotate_ewc.linalg.completion import complete
from rotate_ewc.linalg.outer_products import add_covariance_
from tests.helpers.oracles import assert_close

SIDES = ["both", "gradient", "activation", "neither"]


def seeded(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def orthogonal(groups: int, size: int, seed: int, rank: int | None = None) -> Tensor:
    """Orthonormal columns, as many as there are rows or fewer."""
    return torch.linalg.qr(seeded(groups, size, size, seed=seed))[0][..., :rank]


def covariances(groups: int, size: int, seed: int = 0) -> Tensor:
    root = seeded(groups, size, size, seed=seed)
    return root @ root.mT


def positions_together(vectors: Tensor) -> Tensor:
    """The same numbers, laid out as a convolution leaves them."""
    return vectors.mT.contiguous().mT


def bases_of(
    sides: str, groups: int, d_out: int, d_in: int, less: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """The bases of two sides; None where a side has the identity."""
    left = orthogonal(groups, d_out, 1, d_out - less) if sides in ("both", "gradient") else None
    right = orthogonal(groups, d_in, 2, d_in - less) if sides in ("both", "activation") else None
    return left, right


def written_out(basis: Tensor | None, group: int, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64) if basis is None else basis[group]


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


# --- numbers and dtypes ---


@pytest.mark.parametrize(
    ("of_model", "of_statistics"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_statistics_are_in_single_precision_or_better(
    of_model: torch.dtype, of_statistics: torch.dtype
) -> None:
    assert statistics_dtype(of_model) is of_statistics


Kernels = list[tuple[str, Callable[[], Tensor]]]


def kernels_with_products() -> Kernels:
    """Calls that autocast would turn into products of half precision."""
    left, right = orthogonal(1, 4, 1).float(), orthogonal(1, 6, 2).float()
    thin = orthogonal(1, 4, 3, rank=1).float()
    matrices = seeded(1, 3, 4, 6).float()
    values = seeded(1, 4, 6, seed=5).square().float()
    return [
        ("to_eigenbasis", lambda: kronecker.to_eigenbasis(matrices[:, 0], left, right)),
        ("from_eigenbasis", lambda: kronecker.from_eigenbasis(matrices[:, 0], left, right)),
        ("columns", lambda: kronecker.to_eigenbasis(matrices.transpose(0, 1), left, right)),
        ("columns back", lambda: kronecker.from_eigenbasis(matrices.transpose(0, 1), left, right)),
        ("merged_basis", lambda: kronecker.merged_basis([left], [values[:, :, 0]])),
        ("overlaps", lambda: kronecker.overlaps(left, 4, left, 4)),
        ("project_eigenvalues", lambda: kronecker.project_eigenvalues(left, right, values)),
        ("completed", lambda: kronecker.to_eigenbasis(matrices[:, 0], complete(thin), None)),
        ("and back", lambda: kronecker.from_eigenbasis(matrices[:, 0], complete(thin), None)),
    ]


def kernels_of_estimation() -> Kernels:
    """Calls that estimation makes, outside of autocast."""
    left, right = orthogonal(1, 4, 1).float(), orthogonal(1, 6, 2).float()
    matrices, vectors = seeded(1, 3, 4, 6).float(), seeded(1, 3, 2, 6).float()

    def covariance() -> Tensor:
        total = torch.zeros(1, 6, 6, device="cpu")
        add_covariance_(total, vectors)
        return total

    return [
        ("add_covariance_", covariance),
        ("rotate", lambda: eigenvalues.rotate(vectors, right)),
        ("squared_entries", lambda: eigenvalues.squared_entries(matrices, left, right)),
    ]


@pytest.mark.parametrize(("name", "call"), kernels_with_products())
def test_autocast_does_not_reach_a_kernel(name: str, call: Callable[[], Tensor]) -> None:
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
        assert torch.is_autocast_enabled("cpu")
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
    assert found.dtype == torch.float32, name
    assert torch.equal(found, expected), name


def test_full_precision_of_any_arguments() -> None:
    @full_precision
    def product(left: Any, right: Any = None) -> Any:
        """Multiply."""
        return left @ right if isinstance(right, Tensor) else torch.is_autocast_enabled("cpu")

    eye = torch.eye(2)
    assert product.__name__ == "product"
    assert product.__doc__ == "Multiply."
    assert product(3) is False
    assert product(eye, right=eye).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product(eye, right=eye).dtype == torch.float32
        assert product(left=eye, right=eye).dtype == torch.float32
        # Without a tensor, there is no device whose autocast could be meant.
        assert product(3) is True
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            product(torch.eye(2), torch.eye(3).double())
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("name", "call"), [*kernels_with_products(), *kernels_of_estimation()])
def test_the_default_device_does_not_reach_a_kernel(name: str, call: Callable[[], Tensor]) -> None:
    expected = call()
    with torch.device("meta"):
        found = call()
    assert found.device == expected.device, name
    assert torch.equal(found, expected), name


# --- covariances ---


def outer_products(vectors: Tensor, start: Tensor) -> Tensor:
    total = start.clone()
    for group, rows in enumerate(vectors.flatten(1, 2)):
        for row in rows:
            total[group] += torch.outer(row, row)
    return total


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("groups", "size", "shared"),
    [
        *((1, 1, 1), (1, 5, 4), (1, 5, 5), (3, 5, 9), (1, 191, 2), (1, 192, 2), (2, 200, 2)),
        *((1, 293, 2), (1, 390, 2), (1, 500, 1), (1, 577, 1)),
    ],
)
def test_covariance(groups: int, size: int, shared: int, together: bool) -> None:
    """Whatever lies below the diagonal is not looked at."""
    vectors, start = seeded(groups, 3, shared, size), seeded(groups, size, size, seed=1)
    expected = outer_products(vectors, start).triu()
    total = start.triu() + torch.full_like(start, float("nan")).tril(-1)
    given = positions_together(vectors) if together else vectors
    before = given.clone()
    assert add_covariance_(total, given) is None
    assert_close(total.triu(), expected)
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    ("groups", "size", "share"),
    # Of p panels, (p + 1) / 2p of the square are above the diagonal.
    [
        *((1, 100, 1.0), (1, 191, 1.0), (1, 192, 3 / 4), (1, 288, 4 / 6), (1, 384, 5 / 8)),
        *((1, 800, 5 / 8), (2, 384, 1.0)),
    ],
)
def test_covariance_of_large_factors_saves_products(groups: int, size: int, share: float) -> None:
    vectors = seeded(groups, 2, 1, size)
    total = torch.zeros(groups, size, size, dtype=torch.float64)
    with Products() as products:
        add_covariance_(total, vectors)
    assert products.count == pytest.approx(share * groups * 2 * size**2)


def test_covariance_of_pixels_is_computed_without_copies() -> None:
    """A layout with positions side by side is multiplied as it is, where it is not too narrow."""

    class Copies(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.found += func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy")
            return func(*args, **(kwargs or {}))

    for shared, copies in ((8, 0), (4, 0), (3, 1)):
        vectors = positions_together(seeded(1, 3, shared, 4))
        with Copies() as mode:
            add_covariance_(torch.zeros(1, 4, 4, dtype=torch.float64), vectors)
        assert mode.found == copies, shared


# --- bases ---


def check_basis(basis: Tensor, matrix: Tensor) -> None:
    """A basis is orthonormal and makes a matrix diagonal, in ascending order."""
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype).expand_as(matrix)
    assert_close(basis.mT @ basis, eye)
    rotated = basis.mT @ matrix @ basis
    values = rotated.diagonal(dim1=1, dim2=2)
    assert_close(rotated, torch.diag_embed(values))
    assert bool((values.diff(dim=1) >= -1e-9).all())


@pytest.mark.parametrize(("groups", "size"), [(1, 1), (1, 6), (3, 5)])
def test_eigenbasis(groups: int, size: int) -> None:
    matrices = covariances(groups, size)
    below = torch.full_like(matrices, 7.0).tril(-1)
    basis = eigh.eigenbasis(matrices.triu() + below)
    assert basis.dtype == torch.float64
    check_basis(basis, matrices)


def test_eigenbases_in_the_order_that_they_are_asked_for() -> None:
    matrices = [covariances(g, size, seed=size) for g, size in ((1, 4), (2, 7), (1, 1), (1, 5))]
    for basis, matrix in zip(eigh.eigenbases(matrices), matrices, strict=True):
        check_basis(basis, matrix)
    assert eigh.eigenbases([]) == []


def failing_eigh(
    monkeypatch: pytest.MonkeyPatch, times: int, error: Exception, seen: list[Tensor]
) -> None:
    """Let `eigh` fail some times, and note what it is asked to decompose."""
    plain = torch.linalg.eigh

    def eigh(matrix: Tensor, **options: str) -> Any:
        seen.append(matrix)
        if len(seen) <= times:
            raise error
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


def test_each_group_is_changed_in_proportion_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups as there are entries, so that one cannot be taken for the other unnoticed."""
    matrices = (
        covariances(3, 3) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    )
    seen: list[Tensor] = []
    failing_eigh(monkeypatch, 2, torch.linalg.LinAlgError("did not converge"), seen)
    with pytest.warns(RuntimeWarning, match="^eigh of the 3 × 3 factor did not converge"):
        (basis,) = eigh.eigenbases([matrices])
    for group, (changed, matrix) in enumerate(zip(seen[2], matrices, strict=True)):
        mean = sum(float(matrix[i, i]) for i in range(3)) / 3
        for i in range(3):
            expected = float(matrix[i, i]) + mean * eigh._JITTER * i / 2
            assert float(changed[i, i]) == pytest.approx(expected, rel=1e-14)
        assert torch.equal(changed.triu(1), matrix.triu(1)), group
        assert_close(basis[group].T @ basis[group], torch.eye(3, dtype=torch.float64))


def test_labels_of_what_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.linalg.LinAlgError("did not converge")
    values = seeded(1, 3).square()
    for call, label in (
        (lambda: eigh.eigenbasis(covariances(1, 3)), "factor"),
        (lambda: eigh.eigenbases([covariances(1, 3)], ["thing"]), "thing"),
        (lambda: kronecker.merged_basis([orthogonal(1, 3, 1)], [values]), "merged factor"),
    ):
        with monkeypatch.context() as patch:
            failing_eigh(patch, 3, error, [])
            with pytest.raises(ValueError, match=f"^eigh of the 3 × 3 {label} did not converge"):
                call()


def test_out_of_memory_names_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_eigh(monkeypatch, 9, MemoryError("too large"), [])
    with pytest.raises(
        MemoryError,
        match=r"^out of memory in the decomposition of the thing, a matrix \[3, 3\] of \d+ bytes "
        r"\(too large\)$",
    ):
        eigh.eigenbasis(covariances(1, 3), "thing")


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 2.0, 0.5)])
@pytest.mark.parametrize("identities", [(), (0,), (1, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_merged_basis(groups: int, identities: Sequence[int], weights: Sequence[float]) -> None:
    """Old bases may be rectangular: they then hold fewer directions than there are entries."""
    bases: list[Tensor | None] = [
        orthogonal(groups, 5, seed=3),
        orthogonal(groups, 5, seed=4),
        orthogonal(groups, 5, seed=5),
    ]
    if not identities:
        bases[1] = orthogonal(groups, 5, seed=6, rank=3)
    for index in identities:
        bases[index] = None
    ranks = [5 if basis is None else basis.shape[2] for basis in bases]
    values = [w * seeded(groups, r, seed=9).square() for r, w in zip(ranks, weights, strict=True)]
    total = torch.zeros(groups, 5, 5, dtype=torch.float64)
    for basis, diagonal in zip(bases, values, strict=True):
        for group in range(groups):
            q = written_out(basis, group, 5)
            for entry, vector in zip(diagonal[group], q.T, strict=True):
                total[group] += entry * torch.outer(vector, vector)
    found = kronecker.merged_basis(bases, values)
    assert found is not None
    check_basis(found, total)


def test_identities_merge_into_the_identity() -> None:
    values = seeded(1, 3).square()
    assert kronecker.merged_basis([None], [values]) is None
    assert kronecker.merged_basis([None, None], [values, values]) is None
    with pytest.raises(ValueError, match=r"zip\(\)"):
        kronecker.merged_basis([orthogonal(1, 3, 1), None], [values])


@pytest.mark.parametrize("new_rank", [None, 1, 3, 5])
@pytest.mark.parametrize(("size", "rank"), [(5, None), (5, 5), (5, 2), (3, None), (3, 3), (3, 1)])
def test_overlaps(size: int, rank: int | None, new_rank: int | None) -> None:
    """Traces of products of projections, the last ones on complements."""
    old = None if rank is None else padded(orthogonal(2, size, seed=1, rank=rank), 5)
    new = None if new_rank is None else orthogonal(2, 5, seed=2, rank=new_rank)
    found = kronecker.overlaps(old, size, new, 5)
    if old is None and new is None:
        assert found is None
        return
    assert found is not None
    for group in range(2):
        first = projections(written_out(old, group, 5)[:, :size], size)
        second = projections(written_out(new, group, 5), 5)
        expected = [[float((p @ q).trace() / p.trace()) for q in first] for p in second]
        assert_close(found[group], torch.tensor(expected, dtype=torch.float64))


def padded(basis: Tensor, size: int) -> Tensor:
    return torch.cat([basis, basis.new_zeros(2, size - basis.shape[1], basis.shape[2])], dim=1)


def projections(basis: Tensor, size: int) -> list[Tensor]:
    """On each column, and on what is left of the leading entries."""
    found = [torch.outer(column, column) for column in basis.T]
    if len(found) < size:
        leading = torch.diag((torch.arange(len(basis)) < size).double())
        found.append(leading - basis @ basis.T)
    return found


# --- rotations ---


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("groups", "shared"), [(1, 1), (2, 1), (1, 2), (3, 6)])
def test_rotate(groups: int, shared: int, together: bool, rank: int) -> None:
    vectors, basis = seeded(groups, 3, shared, 4), orthogonal(groups, 4, seed=1, rank=rank)
    expected = torch.zeros(groups, 3, shared, rank, dtype=torch.float64)
    for group in range(groups):
        for n in range(3):
            for s in range(shared):
                expected[group, n, s] = basis[group].T @ vectors[group, n, s]
    given = positions_together(vectors) if together else vectors
    found = eigenvalues.rotate(given, basis)
    assert_close(found, expected)
    if shared > 1:
        # Positions or features lie side by side, as they did.
        assert found.stride(2 if together else 3) == 1
    assert eigenvalues.rotate(given, None) is given


@pytest.mark.parametrize("d_in", [1, 4])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("groups", [1, 3])
def test_squared_entries(groups: int, sides: str, d_in: int) -> None:
    gradients, (left, right) = seeded(groups, 5, 3, d_in), bases_of(sides, groups, 3, d_in)
    expected = torch.zeros(groups, 3, d_in, dtype=torch.float64)
    for group in range(groups):
        q_g, q_a = written_out(left, group, 3), written_out(right, group, d_in)
        for gradient in gradients[group]:
            expected[group] += (q_g.T @ gradient @ q_a) ** 2
    before = gradients.clone()
    assert_close(eigenvalues.squared_entries(gradients, left, right), expected)
    assert torch.equal(gradients, before)


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("groups", [1, 3])
def test_to_and_from_the_eigenbasis(groups: int, sides: str, less: int) -> None:
    left, right = bases_of(sides, groups, 3, 4, less)
    matrix = seeded(groups, 3, 4)
    found = kronecker.to_eigenbasis(matrix, left, right)
    back = kronecker.from_eigenbasis(found, left, right)
    for group in range(groups):
        q_g, q_a = written_out(left, group, 3), written_out(right, group, 4)
        assert_close(found[group], q_g.T @ matrix[group] @ q_a)
        assert_close(back[group], q_g @ found[group] @ q_a.T)


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_columns_to_and_from_the_eigenbasis(count: int, groups: int, sides: str, less: int) -> None:
    left, right = bases_of(sides, groups, 3, 4, less)
    matrices = seeded(count, groups, 3, 4)
    before = matrices.clone()
    found = kronecker.to_eigenbasis(matrices, left, right)
    back = kronecker.from_eigenbasis(found, left, right)
    for place in itertools.product(range(count), range(groups)):
        q_g, q_a = written_out(left, place[-1], 3), written_out(right, place[-1], 4)
        assert_close(found[place], q_g.T @ matrices[place] @ q_a)
        assert_close(back[place], q_g @ found[place] @ q_a.T)
    assert torch.equal(matrices, before)


@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("groups", [1, 3])
def test_eigenvalues_in_another_basis(groups: int, sides: str, less: int) -> None:
    """The diagonal of `(L ⊗ R) diag(Λ) (L ⊗ R)ᵀ`, from the whole matrix."""
    left, right = bases_of(sides, groups, 3, 4, less)
    rank_out = 3 if left is None else left.shape[2]
    rank_in = 4 if right is None else right.shape[2]
    values = seeded(groups, rank_out, rank_in, seed=7).square()
    squares = (None if basis is None else basis.square() for basis in (left, right))
    found = kronecker.project_eigenvalues(*squares, values)
    assert found.shape == (groups, 3, 4)
    for group in range(groups):
        q_g, q_a = written_out(left, group, 3), written_out(right, group, 4)
        both = torch.kron(q_g.contiguous(), q_a.contiguous())
        whole = both @ torch.diag(values[group].flatten()) @ both.T
        assert_close(found[group], whole.diagonal().reshape(3, 4))


# --- rows looked up ---

# Repeated within an example and over examples, the first and the last row, and padding.
LOOKUPS = [
    ([[0, 1, 1, 4], [4, 4, 4, 0], [2, -1, 3, -1]], 5),
    ([[-1, -1], [-1, -1]], 3),
    ([[0], [0], [0]], 1),
    ([[2, 0, 2]], 4),
    ([[-2, 1, -2], [-100, 0, 1]], 2),
]


def summed_by_row(gradients: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    total = torch.zeros(len(indices), vocabulary, gradients.shape[2], dtype=gradients.dtype)
    for n, row in enumerate(indices.tolist()):
        for s, index in enumerate(row):
            if index >= 0:
                total[n, index] += gradients[n, s]
    return total


@pytest.mark.parametrize(("rows", "vocabulary"), LOOKUPS)
def test_rows_looked_up(rows: list[list[int]], vocabulary: int) -> None:
    indices = torch.tensor(rows)
    gradients = seeded(*indices.shape, 3)
    by_row = summed_by_row(gradients, indices, vocabulary)
    squares = torch.zeros(vocabulary, 3, dtype=torch.float64)
    for example in by_row:
        squares += example**2
    before = gradients.clone()
    with torch.device("meta"):  # where nothing of the data is
        found = scatter_rows(gradients, indices, vocabulary)
        found_squares = eigenvalues.squared_lookups(gradients, indices, vocabulary)
    torch.testing.assert_close(found, by_row, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_squares, squares, rtol=1e-12, atol=1e-12)
    assert torch.equal(gradients, before)


def test_rows_looked_up_take_no_memory_for_each_example() -> None:
    """A vocabulary for each of these examples would be 16 GB."""
    examples, vocabulary = 1000, 2_000_000
    indices = torch.arange(examples)[:, None] * 2
    squares = eigenvalues.squared_lookups(torch.ones(examples, 1, 1), indices, vocabulary)
    assert int(squares.count_nonzero()) == examples
    assert float(squares.sum()) == examples
