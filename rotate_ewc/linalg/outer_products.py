"""Sums of outer products of vectors, and their eigenvectors: one side of a Kronecker product."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Final

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc.linalg import eigh, kronecker

# With fewer vectors per entry, decomposing them is the faster way. With 512 to 2048 entries it took
# 0.15 to 0.3 of the time of `eigh` for a quarter as many vectors, half for half, and all of it for
# three quarters.
_FEW: Final = 0.5


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
            groups: Number of sums beside each other.
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
        """Add vectors `[groups, n, shared, d]`."""
        groups, size = self._diagonal.shape
        count = self._num_vectors + vectors.shape[1] * vectors.shape[2]
        if self._matrix is None and count <= _FEW * size:
            # A copy: what they are a view of is larger, and the caller's.
            rows = vectors.flatten(1, 2).clone()
            self._diagonal = self._diagonal + rows.square().sum(dim=1)
            self._vectors.append(rows)
            self._num_vectors = count
            return
        if self._matrix is None:
            matrix = self._diagonal.new_zeros(groups, size, size)
            for rows in self._vectors:
                kronecker.add_covariance_(matrix, rows[:, None])
            self._matrix, self._vectors = matrix, []
        kronecker.add_covariance_(self._matrix, vectors)

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
        with eigh.naming_decomposition(self._diagonal.shape[1], label):
            return _triangular(torch.cat(self._vectors, dim=1))


def eigenvectors(sums: Sequence[OuterProducts], labels: Sequence[str]) -> list[Tensor]:
    """Return the eigenvectors of several sums, `[groups, d, d]` each, as `eigenbases` does.

    Args:
        sums: Of at least one vector each.
        labels: What to call them in messages.
    """
    reduced = [one.reduced(label) for one, label in zip(sums, labels, strict=True)]
    bases = eigh.eigenbases([matrix for _, matrix in reduced], labels)
    return [_within(q, basis) for (q, _), basis in zip(reduced, bases, strict=True)]


@full_precision
def _triangular(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q and `R Rᵀ` of vectors `[groups, n, d]`."""
    q, r = torch.linalg.qr(vectors.mT, mode="complete")
    r = r[:, : vectors.shape[1]]
    return q, r @ r.mT


@full_precision
def _within(q: Tensor | None, basis: Tensor) -> Tensor:
    """Turn the first columns of Q into eigenvectors; those of eigenvalue zero come before them."""
    if q is None:
        return basis
    rank = basis.shape[1]
    return torch.cat([q[:, :, rank:], q[:, :, :rank] @ basis], dim=2)
