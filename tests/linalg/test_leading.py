"""Leading eigenvectors without the whole matrix, against `eigh` of the whole matrix."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg import leading
from rotate_ewc.linalg.outer_products import OuterProducts, eigenvectors
from rotate_ewc.linalg.truncation import Truncation
from tests.helpers.memory import peak_bytes

SIZE = 400
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": lambda i: 1 / i,
    "inverse-square": lambda i: i**-2,
    "inverse-root": lambda i: i**-0.5,
    "exponential": lambda i: torch.exp(-i / 15),
}


def vectors_of(spectrum: str, size: int = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    """As many vectors as entries, whose outer products have a spectrum; `[1, n, 1, d]`."""
    generator = torch.Generator().manual_seed(1)
    first, second = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = SPECTRA[spectrum](torch.arange(1, size + 1, dtype=torch.float64))
    return (first * values.sqrt() @ second.T)[None, :, None].to(dtype)


def kept_of(vectors: Tensor, truncation: Truncation | None, batches: int = 4) -> Tensor:
    total = OuterProducts(len(vectors), vectors.shape[3], vectors, truncation)
    for part in vectors.chunk(batches, dim=1):
        total.add(part)
    return eigenvectors([total], ["factor"])[0]


def left_over(vectors: Tensor, basis: Tensor) -> float:
    """What the columns leave of the trace."""
    rows = vectors.flatten(1, 2)
    return float(rows.square().sum() - (rows @ basis).square().sum())


def check_orthonormal(basis: Tensor, tolerance: float = 1e-10) -> None:
    eye = torch.eye(basis.shape[2], dtype=basis.dtype).expand(len(basis), -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [4, 16, 40])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("way", ["sketch", "range"])
def test_nearly_the_best_directions(
    way: str, spectrum: str, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the trace is at most 1.1 of the least that can be."""
    monkeypatch.setattr(leading, "LONGEST_SQUARE", 0 if way == "sketch" else SIZE)
    monkeypatch.setattr(leading, "_SMALL_PART", 0.0)
    vectors = vectors_of(spectrum, dtype=dtype)
    basis = kept_of(vectors, Truncation(rank))
    assert basis.shape == (1, SIZE, rank)
    check_orthonormal(basis, 1e-10 if dtype is torch.float64 else 1e-5)
    doubled = vectors.double()
    best = left_over(doubled, torch.linalg.svd(doubled[0, :, 0])[2][None, :rank].mT)
    assert left_over(doubled, basis.double()) <= 1.1 * best


@pytest.mark.parametrize("way", ["sketch", "range"])
def test_the_same_vectors_give_the_same_bits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever state the global generator is in."""
    monkeypatch.setattr(leading, "LONGEST_SQUARE", 0 if way == "sketch" else SIZE)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(kept_of(vectors_of("inverse"), Truncation(8)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


def test_low_ranks_are_found_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sketch, of more vectors than it has columns; nothing else is kept."""
    monkeypatch.setattr(leading, "LONGEST_SQUARE", 0)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    directions = torch.randn(5, SIZE, generator=generator, dtype=torch.float64)
    vectors = (mixed @ directions)[None, :, None]
    basis = kept_of(vectors, Truncation(20))
    assert basis.shape == (1, SIZE, 5)
    assert abs(left_over(vectors, basis)) <= 1e-9 * float(vectors.square().sum())


@pytest.mark.parametrize("way", ["sketch", "range", "vectors", "whole"])
def test_entries_that_are_never_on_have_no_part(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "sketch":
        monkeypatch.setattr(leading, "LONGEST_SQUARE", 0)
    vectors = vectors_of("inverse").clone()
    vectors[..., [0, 7, 399]] = 0.0
    if way == "vectors":
        vectors = vectors[:, :12]
    basis = kept_of(vectors, Truncation(300 if way == "whole" else 8))
    assert bool((basis[:, [0, 7, 399]] == 0).all())


def test_groups_keep_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "LONGEST_SQUARE", 0)
    both = torch.cat([vectors_of("inverse"), vectors_of("exponential")])
    both[1, 3:] = 0.0
    basis = kept_of(both, Truncation(6))
    assert basis.shape == (2, SIZE, 6)
    check_orthonormal(basis)
    assert abs(left_over(both[1:], basis[1:])) <= 1e-9


@pytest.mark.parametrize("vectors", [torch.zeros(2, 3, 1, 30), torch.zeros(2, 0, 1, 30)])
def test_of_nothing_one_direction_is_kept(vectors: Tensor) -> None:
    basis = kept_of(vectors, Truncation(4), batches=1)
    assert basis.shape == (2, 30, 1)
    check_orthonormal(basis)


def test_nothing_is_square_on_a_long_side() -> None:
    """Not longer than these are all that is made: two of `d` times the columns of a sketch."""
    size = leading.LONGEST_SQUARE + 1000
    vectors = torch.randn(1, 300, 1, size)
    width = leading.sketch_width(size, 16)
    peak = peak_bytes(lambda: kept_of(vectors, Truncation(16)))
    assert peak <= 7 * 4 * width * size < 4 * size**2 / 4


@pytest.mark.parametrize(
    ("truncation", "values", "kept"),
    [
        (Truncation(2), [1.0, 2.0, 3.0, 4.0], 2),
        (Truncation(9), [1.0, 2.0, 3.0, 4.0], 4),
        (Truncation(4), [0.0, 1e-17, 1.0, 4.0], 2),
        (Truncation(4), [0.0, 0.0, 0.0, 0.0], 1),
        (Truncation(4, part=0.4), [1.0, 2.0, 3.0, 4.0], 1),
        (Truncation(4, part=0.5), [1.0, 2.0, 3.0, 4.0], 2),
        (Truncation(4, part=0.9), [1.0, 2.0, 3.0, 4.0], 3),
        (Truncation(4, part=1.0), [0.0, 2.0, 3.0, 4.0], 3),
        (Truncation(4, all_or_half=True), [0.0, 2.0, 3.0, 4.0], 4),
        (Truncation(4, all_or_half=True), [0.0, 0.0, 3.0, 4.0], 2),
    ],
    ids=str,
)
def test_how_many_are_kept(truncation: Truncation, values: list[float], kept: int) -> None:
    found = torch.tensor([values], dtype=torch.float64)
    assert truncation.count(found, found.sum(dim=1), 4) == kept


@pytest.mark.parametrize(
    ("size", "most", "sketch", "is_sketched", "of_range"),
    [
        (50, 4, 50, False, None),
        (255, 4, 96, False, None),
        (256, 4, 96, False, 14),
        (256, 48, 106, False, 64),
        (256, 49, 108, False, None),
        (2000, 8, 96, True, 19),
        (767, 8, 96, False, 19),
        (768, 8, 96, True, 19),
        (1000, 43, 96, True, 58),
        (1000, 44, 98, True, 59),
        (1000, 57, 124, True, 74),
        (1000, 58, 126, False, 75),
        (4096, 251, 512, True, 292),
        (4096, 252, 514, False, 293),
        (4097, 252, 514, True, 293),
        (4097, 2043, 4096, True, None),
        (4097, 2044, 4097, False, None),
    ],
)
def test_how_many_columns(
    size: int, most: int, sketch: int, is_sketched: bool, of_range: int | None
) -> None:
    """2 m + 10 of a sketch, at least 96, an eighth of a side; 1⅛ m + 10 of a range, a quarter."""
    assert leading.sketch_width(size, most) == sketch
    assert leading.is_sketched(size, most) == is_sketched
    assert leading.range_width(size, most) == of_range


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_columns_are_the_same_each_time(dtype: torch.dtype) -> None:
    first, second = (leading.random_columns(300, 40, torch.ones(1, dtype=dtype)) for _ in range(2))
    assert first.shape == (300, 40)
    assert first.dtype == dtype
    assert torch.equal(first, second)
    assert abs(float(first.mean())) < 0.05
    assert abs(float(first.var()) - 1.0) < 0.05


@pytest.mark.parametrize("dead", [[], [0, 5]])
def test_range_of_a_low_rank(dead: list[int]) -> None:
    """All of it, from upper triangles; in rows of zeros there is nothing."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    directions[:, dead] = 0.0
    exact = directions @ directions.mT
    garbage = torch.full_like(exact, 7.0).tril(-1)
    garbage[:, dead] = 0.0
    garbage[:, :, dead] = 0.0
    q, reduced = leading.leading_range(exact.triu() + garbage, 6)
    assert q.shape == (2, 30, 6)
    check_orthonormal(q)
    assert not q[:, dead].any()
    torch.testing.assert_close(reduced, q.mT @ exact @ q, rtol=0, atol=1e-9)
    torch.testing.assert_close(q @ reduced @ q.mT, exact, rtol=0, atol=1e-9)
    # No more columns than there are rows that are not zero.
    assert leading.leading_range(exact, 40)[0].shape == (2, 30, 30 - len(dead))


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sketches_add_up(dtype: torch.dtype, scale: float) -> None:
    """Products with the random columns, vector by vector; of a low rank all is known."""
    like = torch.ones(1, dtype=dtype)
    columns = leading.random_columns(20, 8, like).double()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 5, 20, generator=generator, dtype=torch.float64).to(dtype)
    rows[1, 2:] = 0.0
    rows *= scale
    sketch = leading.Sketch(2, 20, 8, like)
    assert sketch.product.shape == (2, 20, 8)
    assert sketch.product.dtype == dtype
    for part in rows.split(3, dim=1):
        sketch.prepared(part)()
    expected = sum(torch.einsum("gi,gj->gij", v, v) @ columns for v in rows.double().unbind(dim=1))
    tolerance = scale**2 * (1e-10 if dtype is torch.float64 else 1e-4)
    torch.testing.assert_close(sketch.product.double(), expected, rtol=0, atol=tolerance)
    found = sketch.vectors()
    assert found.shape == (2, 8, 20)
    assert found.dtype == dtype
    exact = rows.double().mT @ rows.double()
    torch.testing.assert_close(
        found.double().mT @ found.double(), exact, rtol=0, atol=100 * tolerance
    )
    # Nothing of what is numerically zero.
    assert (found.ne(0).any(dim=2).sum(dim=1)).tolist() == [5, 2]
    other = sketch.clone()
    other.prepared(rows)()
    torch.testing.assert_close(sketch.product.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(other.product.double(), 2 * expected, rtol=0, atol=2 * tolerance)


def test_a_sketch_of_nothing() -> None:
    assert not leading.Sketch(2, 20, 8, torch.ones(1)).vectors().any()
