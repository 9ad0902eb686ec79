"""Sums of outer products of vectors, and their eigenvectors: one side of a Kronecker product.

Vectors are `[groups, batch, shared, d]` and sums `[groups, d, d]`, as in
`rotate_ewc.linalg.kronecker`. Vectors are multiplied in their own dtype: add them outside of
`torch.autocast`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc._utils.out_of_memory import naming_matrix
from rotate_ewc.linalg import eigh

# With fewer vectors per entry, decomposing them is the faster way. With 512 to 2048 entries it took
# 0.15 to 0.3 of the time of `eigh` for a quarter as many vectors, half for half, and all of it for
# three quarters.
_FEW: Final = 0.5

# Symmetric products are computed by panels, above the diagonal only: narrower ones save more, but
# products of less than about this width are slow.
_NARROWEST_PANEL: Final = 96
_MOST_PANELS: Final = 4

# Of a sum that goes to another process, strips of so many rows, from the diagonal on.
_ROWS_OF_A_STRIP: Final = 64


class OuterProducts:
    """`Σ v vᵀ`: the vectors themselves as long as they are few, then the sum.

    A bias that many positions share has one vector for each example and label, and often more
    entries than that. A decomposition of the vectors then costs less than one of the sum: with
    `V = [v₁ … vₙ] = Q R`, where Q is square and only the n first rows of R are not zero, and
    `R Rᵀ = U Λ Uᵀ` for these rows, the eigenvectors of `V Vᵀ` are the first n columns of Q times U,
    and the other columns of Q.
    """

    def __init__(self, groups: int, size: int, template: Tensor) -> None:
        """Begin with no vectors.

        Args:
            groups: Number of independent sums.
            size: d, the entries of a vector.
            template: A tensor of the sum's dtype and device.
        """
        self._vectors: list[Tensor] = []
        self._num_vectors = 0
        self._diagonal = template.new_zeros(groups, size)
        self._matrix: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the sum, `[groups, d]`."""
        if self._matrix is None:
            return self._diagonal
        return self._matrix.diagonal(dim1=1, dim2=2)

    def add(self, vectors: Tensor) -> None:
        """Add vectors `[groups, n, shared, d]`: all or, where memory runs out, none of them."""
        self.prepared(vectors)()

    def prepared(self, vectors: Tensor) -> Callable[[], object]:
        """Allocate whatever adding vectors takes, and return what adds them without allocating.

        In this way several sums can be changed together: see `add_to_all`.
        """
        size = self._diagonal.shape[1]
        count = self._num_vectors + vectors.shape[1] * vectors.shape[2]
        if self._matrix is None and count <= _FEW * size:
            # A copy: what they are a view of is larger, and the caller's.
            rows = vectors.flatten(1, 2).clone()
            return partial(self._keep, rows, self._diagonal + rows.square().sum(dim=1), count)
        return _prepared_covariance(self._summed(), vectors)

    def _summed(self) -> Tensor:
        """Return the sum, from now on kept instead of the vectors."""
        if self._matrix is None:
            groups, size = self._diagonal.shape
            with naming_matrix("the sum of outer products", size, self._diagonal.dtype):
                matrix = self._diagonal.new_zeros(groups, size, size)
            for rows in self._vectors:
                add_covariance_(matrix, rows[:, None])
            self._matrix, self._vectors = matrix, []
        return self._matrix

    @property
    def num_vectors(self) -> int | None:
        """How many vectors are kept; None once there is only their sum."""
        return self._num_vectors if self._matrix is None else None

    def to_be_summed(self, counts: Sequence[int | None], place: int) -> list[Tensor]:
        """Return tensors that, summed over several of these, hold the sum of all their vectors.

        Args:
            counts: `num_vectors` of all of them.
            place: Which of them this is.

        Returns:
            Strips of the upper triangle; or, where all have few vectors, one tensor with zeros in
            the places of the others'. The sum is to be taken in place, and `settle` to be called.
        """
        groups, size = self._diagonal.shape
        few = [count for count in counts if count is not None]
        if len(few) == len(counts) and sum(few) <= _FEW * size:
            rows = self._diagonal.new_zeros(groups, sum(few), size)
            start = sum(few[:place])
            if self._vectors:
                rows[:, start : start + few[place]] = torch.cat(self._vectors, dim=1)
            self._vectors, self._num_vectors = [rows], sum(few)
            return [rows]
        matrix, width = self._summed(), _ROWS_OF_A_STRIP
        return [matrix[:, start : start + width, start:] for start in range(0, size, width)]

    def settle(self, diagonal: Tensor, *, keep: bool) -> None:
        """Be the sum of several of these, of which the vectors or the matrix may be dropped.

        Args:
            diagonal: The diagonal of the sum.
            keep: Whether what `to_be_summed` returned now holds the sum, or else anything.
        """
        self._diagonal = diagonal
        if not keep:
            self._vectors, self._matrix = [], None

    def _keep(self, rows: Tensor, diagonal: Tensor, count: int) -> None:
        self._vectors.append(rows)
        self._diagonal, self._num_vectors = diagonal, count

    def clone(self) -> OuterProducts:
        """Return a sum of the same vectors, to which others can be added."""
        cloned = copy(self)
        # Nothing else is changed in place.
        cloned._vectors = list(self._vectors)
        cloned._matrix = None if self._matrix is None else self._matrix.clone()
        return cloned

    def reduced(self, label: str) -> tuple[Tensor | None, Tensor]:
        """Return Q and `R Rᵀ`, or None and the sum, of which the upper triangle counts.

        Args:
            label: What to call the sum in messages.

        Raises:
            MemoryError: If there is not enough memory.
        """
        if self._matrix is not None:
            return None, self._matrix
        size, dtype = self._diagonal.shape[1], self._diagonal.dtype
        with naming_matrix(f"the decomposition of the {label}", size, dtype):
            return _triangular(torch.cat(self._vectors, dim=1))


def add_to_all(additions: Sequence[tuple[OuterProducts, Tensor]]) -> None:
    """Add vectors to several sums: to all of them or, where memory runs out, to none.

    Args:
        additions: Sums, and the vectors `[groups, n, shared, d]` to add to each.
    """
    for add in [total.prepared(vectors) for total, vectors in additions]:
        add()


def add_covariance_(total: Tensor, vectors: Tensor) -> None:
    """Add the outer products of vectors to a symmetric sum, of which the upper triangle counts.

    Args:
        total: `[groups, d, d]`, changed in place. What is below the diagonal is meaningless.
        vectors: `[groups, batch, shared, d]`.
    """
    _prepared_covariance(total, vectors)()


def _prepared_covariance(total: Tensor, vectors: Tensor) -> Callable[[], Any]:
    """Return what adds outer products to a sum in place, and allocates nothing."""
    shared, size = vectors.shape[2:]
    if vectors.stride(3) != 1 and shared >= size:
        # Positions lie together (as pixels do): cheaper multiplied as they are than copied.
        return partial(total.add_, (vectors.mT @ vectors).sum(dim=1))
    return partial(_add_products_, total, vectors.flatten(1, 2))


def _add_products_(total: Tensor, rows: Tensor) -> None:
    """Add `Vᵀ V` of rows V `[groups, n, d]`, above the diagonal."""
    size = rows.shape[2]
    panels = min(_MOST_PANELS, size // _NARROWEST_PANEL)
    if len(rows) > 1 or panels < 2:
        total.baddbmm_(rows.mT, rows)
        return
    width = -(-size // panels)
    for start in range(0, size, width):
        panel = total[0, start : start + width, start:]
        left = rows[0, :, start : start + width]
        panel.addmm_(left.mT, rows[0, :, start:])


def eigenvectors(sums: Sequence[OuterProducts], labels: Sequence[str]) -> list[Tensor]:
    """Return the eigenvectors of several sums, `[groups, d, d]` each, as `eigenbases` does.

    Args:
        sums: Of at least one vector each.
        labels: What to call them in messages.

    Raises:
        ValueError: If one cannot be decomposed, naming it.
        MemoryError: If there is not enough memory, likewise.
    """
    reduced = [one.reduced(label) for one, label in zip(sums, labels, strict=True)]
    bases = eigh.eigenbases([matrix for _, matrix in reduced], labels)
    found = []
    for label, total, (q, _), basis in zip(labels, sums, reduced, bases, strict=True):
        size, dtype = total.diagonal.shape[1], basis.dtype
        with naming_matrix(f"the decomposition of the {label}", size, dtype):
            found.append(_within(q, basis))
    return found


@full_precision
def _triangular(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and `R Rᵀ` of vectors `[groups, n, d]`.

    Entries that are zero in all vectors have unit vectors of their own, as in `eigh.decomposed`.
    """
    alive = (vectors != 0).flatten(0, 1).any(dim=0)
    rest, zero = alive.nonzero().flatten(), (~alive).nonzero().flatten()
    q, r = torch.linalg.qr(vectors[:, :, rest].mT, mode="complete")
    r = r[:, : vectors.shape[1]]
    if len(zero):
        whole = q.new_zeros(len(q), len(alive), len(alive))
        whole[:, rest, : len(rest)] = q
        whole[:, zero, torch.arange(len(rest), len(alive), device=zero.device)] = 1.0
        q = whole
    return q, r @ r.mT


@full_precision
def _within(q: Tensor | None, basis: Tensor) -> Tensor:
    """Turn the first columns of Q into eigenvectors; those of eigenvalue zero come before them."""
    if q is None:
        return basis
    rank = basis.shape[1]
    return torch.cat([q[:, :, rank:], q[:, :, :rank] @ basis], dim=2)
