"""Leading eigenvectors without a decomposition of the whole matrix: randomised ranges.

A matrix A of size d is multiplied with a few random columns, `Y = A Ω`, and whatever is decomposed
is as small as these are few (Halko, Martinsson, Tropp 2011, "Finding structure with randomness").
The random numbers are the same each time, in all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Final

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision

# Columns more than eigenvectors are wanted, and one more for eight of these. What the eigenvectors
# leave of the trace is then at most 1.1 of the least possible, with two products, on spectra that
# decay (1/i, 1/i², 1/√i, exponentially).
_OVERSAMPLING: Final = 10
_MULTIPLICATIONS: Final = 2
_SEED: Final = 0

# A sketch has twice as many columns as eigenvectors are wanted, and at least so many, since the
# matrix is multiplied only once. It is taken instead of longer matrices, and of those of which it
# is a small part.
_FEWEST_COLUMNS: Final = 96
LONGEST_SQUARE: Final = 4096
_SMALL_PART: Final = 0.125

# A smaller matrix, or one of which a larger part is wanted, is decomposed as fast as a whole.
_SMALLEST: Final = 256
_LARGEST_PART: Final = 0.25

# Of a sketch, what is below this part of the largest eigenvalue is rounding errors.
_SIGNIFICANT: Final = 1e-7


def random_columns(size: int, width: int, like: Tensor) -> Tensor:
    """Return Ω, `[size, width]`, of normal random numbers."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(size, width, generator=generator).to(like)


def sketch_width(size: int, most: int) -> int:
    """Return how many columns a sketch has, for so many eigenvectors."""
    return min(size, max(_FEWEST_COLUMNS, 2 * most + _OVERSAMPLING))


def is_sketched(size: int, most: int) -> bool:
    """Whether to make a sketch of a matrix rather than the matrix itself."""
    width = sketch_width(size, most)
    return width < size if size > LONGEST_SQUARE else width <= _SMALL_PART * size


def range_width(size: int, most: int) -> int | None:
    """Return how many columns the range of a matrix is to have; None if all of it is needed."""
    width = most + most // 8 + _OVERSAMPLING
    return width if size >= _SMALLEST and width <= _LARGEST_PART * size else None


@full_precision
def leading_range(matrix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return Q and `Qᵀ A Q`, for a Q that holds nearly all that the leading eigenvectors span.

    Args:
        matrix: A, `[groups, d, d]`, of which the upper triangle counts.
        width: Number of Q's columns.

    Returns:
        `[groups, d, width]`, orthonormal, and `[groups, width, width]`. Where A has a row of zeros,
        so has Q.
    """
    alive = (matrix.diagonal(dim1=1, dim2=2) != 0).any(dim=0)
    rest = alive.nonzero().flatten()
    # Or the first columns of Q would have rounding errors there.
    within = matrix if bool(alive.all()) else matrix[:, rest[:, None], rest]
    whole = within.triu() + within.triu(1).mT
    q = random_columns(whole.shape[1], min(width, whole.shape[1]), matrix)
    for _ in range(_MULTIPLICATIONS):
        q = torch.linalg.qr(whole @ q)[0]
    reduced = q.mT @ (whole @ q)
    if within is matrix:
        return q, reduced
    expanded = q.new_zeros(len(q), matrix.shape[1], q.shape[2])
    expanded[:, rest] = q
    return expanded, reduced


class Sketch:
    """The product of a sum of outer products with random columns, `Y = Σ v (vᵀ Ω)`.

    Attributes:
        product: Y, `[groups, d, width]`.
    """

    def __init__(self, groups: int, size: int, width: int, like: Tensor) -> None:
        """Begin with no vectors, in the dtype and on the device of a tensor."""
        self._columns = random_columns(size, width, like)
        self.product = like.new_zeros(groups, size, width)

    def prepared(self, rows: Tensor) -> Callable[[], object]:
        """Return what adds vectors `[groups, n, d]`, and allocates nothing but what is done now."""
        return partial(self.product.baddbmm_, rows.mT, rows @ self._columns)

    def clone(self) -> Sketch:
        """Return a sketch of the same sum, to which other vectors can be added."""
        cloned = copy(self)
        cloned.product = self.product.clone()
        return cloned

    @full_precision
    def vectors(self) -> Tensor:
        """Return vectors `[groups, width, d]` whose outer products have nearly the same sum.

        With `Ωᵀ Y = W diag(w) Wᵀ` they are the columns of `Y W diag(w)^-½` (Nyström), without those
        of a w that is numerically zero.
        """
        core = self._columns.mT.double() @ self.product.double()
        values, vectors = torch.linalg.eigh(0.5 * (core + core.mT))
        significant = values > _SIGNIFICANT * values[:, -1:].clamp(min=0.0)
        scale = torch.where(significant, values, 1.0).rsqrt() * significant
        found: Tensor = self.product @ (vectors * scale[:, None, :]).to(self.product.dtype)
        return found.mT
