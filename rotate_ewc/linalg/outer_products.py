"""Sums of outer products of vectors, and their eigenvectors: one side of a Kronecker product.

All eigenvectors, or only the leading ones. Then nothing is square that need not be.

Vectors are `[groups, batch, shared, d]` and sums `[groups, d, d]`, as in
`rotate_ewc.linalg.kronecker`. Vectors are multiplied in their own dtype: add them outside of
`torch.autocast`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc._utils.out_of_memory import naming_matrix
from rotate_ewc.linalg import eigh, leading
from rotate_ewc.linalg.leading import Sketch
from rotate_ewc.linalg.truncation import Truncation

# With fewer vectors per entry, decomposing them is the faster way. With 512 to 2048 entries it took
# 0.15 to 0.3 of the time of `eigh` for a quarter as many vectors, half for half, and all of it for
# three quarters.
_FEW: Final = 0.5

# At most this many eigenvectors of a sketch, if only a part of the trace is wanted.
_MOST_OF_A_SKETCH: Final = 512

# Symmetric products are computed by panels, above the diagonal only: narrower ones save more, but
# products of less than about this width are slow.
_NARROWEST_PANEL: Final = 96
_MOST_PANELS: Final = 4

# Of a sum that goes to another process, strips of so many rows, from the diagonal on.
_ROWS_OF_A_STRIP: Final = 64


class Held(NamedTuple):
    """What a sum of outer products holds.

    Attributes:
        kind: `"vectors"`, `"matrix"` or `"sketch"`.
        size: How many vectors, or columns.
    """

    kind: str
    size: int


class OuterProducts:
    """`Σ v vᵀ`: the vectors themselves as long as they are few, then the sum, or a sketch of it.

    A bias that many positions share has one vector for each example and label, and often more
    entries than that. A decomposition of the vectors then costs less than one of the sum: with
    `V = [v₁ … vₙ] = Q R`, where Q is square and only the n first rows of R are not zero, and
    `R Rᵀ = U Λ Uᵀ` for these rows, the eigenvectors of `V Vᵀ` are the first n columns of Q times U,
    and the other columns of Q.

    The sketch is the product of the sum with a few random columns, `Σ v (vᵀ Ω)`. There is one in
    place of the sum where the vectors are very long and only few eigenvectors are kept.
    """

    def __init__(
        self, groups: int, size: int, template: Tensor, truncation: Truncation | None = None
    ) -> None:
        """Begin with no vectors.

        Args:
            groups: Number of independent sums.
            size: d, the entries of a vector.
            template: A tensor of the sum's dtype and device.
            truncation: Which eigenvectors are kept; None is all, also those of eigenvalue zero.
        """
        self.truncation = truncation
        self._vectors: list[Tensor] = []
        self._num_vectors = 0
        self._diagonal = template.new_zeros(groups, size)
        self._matrix: Tensor | None = None
        self._sketch: Sketch | None = None

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
        count = self._num_vectors + vectors.shape[1] * vectors.shape[2]
        is_list = self._matrix is None and self._sketch is None
        if is_list and count <= self._most_vectors:
            # A copy: what they are a view of is larger, and the caller's.
            rows = vectors.flatten(1, 2).clone()
            return partial(self._keep, rows, self._diagonal + rows.square().sum(dim=1), count)
        if is_list:
            self._begin_sum(self.form_of_sum)
        if self._matrix is not None:
            return _prepared_covariance(self._matrix, vectors)
        if self._sketch is None:
            raise RuntimeError("there is neither a sum nor a sketch; expected one of them")
        rows = vectors.flatten(1, 2)
        add, squares = self._sketch.prepared(rows), rows.square().sum(dim=1)
        return lambda: (add(), self._diagonal.add_(squares))

    @property
    def _most(self) -> int:
        """Not more eigenvectors than this number are kept, for all that is known."""
        size, truncation = self._diagonal.shape[1], self.truncation
        if truncation is None:
            return size
        if truncation.part is None or size <= leading.LONGEST_SQUARE:
            return truncation.most
        # Not known: as many as a sketch can be expected to find.
        return min(truncation.most, _MOST_OF_A_SKETCH)

    @property
    def _most_vectors(self) -> float:
        """How many vectors are kept as they are, because they are few."""
        few = _FEW * self._diagonal.shape[1]
        if self.truncation is None:
            return few
        return min(few, leading.sketch_width(self._diagonal.shape[1], self._most))

    @property
    def form_of_sum(self) -> Held:
        """What there will be in place of the vectors once they are many."""
        size = self._diagonal.shape[1]
        if self.truncation is not None and leading.is_sketched(size, self._most):
            return Held("sketch", leading.sketch_width(size, self._most))
        return Held("matrix", size)

    @property
    def decomposition_cost(self) -> float:
        """About how many operations a decomposition of the sum takes.

        It depends on nothing but size, groups and truncation. `eigh` of d rows is counted as 9 d³;
        if only a sketch or the range of w columns is decomposed, their products and QR as well.
        """
        (groups, size), form = self._diagonal.shape, self.form_of_sum
        width = leading.range_width(size, self._most) if self.truncation is not None else None
        if form.kind == "sketch":
            cost = 8.0 * size * form.size**2 + 18.0 * form.size**3
        elif width is not None:
            cost = 6.0 * size**2 * width + 8.0 * size * width**2 + 9.0 * width**3
        else:
            cost = 9.0 * size**3
        return groups * cost

    @property
    def most_bytes(self) -> int:
        """What there will be in memory once the vectors are many, with a sketch its columns too."""
        (groups, size), form = self._diagonal.shape, self.form_of_sum
        rows = groups * size + (size if form.kind == "sketch" else 0)
        return rows * form.size * self._diagonal.element_size()

    def _begin_sum(self, form: Held) -> None:
        """Replace the vectors by their sum, or by a sketch of it."""
        (groups, size), dtype = self._diagonal.shape, self._diagonal.dtype
        if form.kind == "sketch":
            with naming_matrix("the sketch of a sum of outer products", size, dtype, form.size):
                sketch = Sketch(groups, size, form.size, self._diagonal)
                for rows in self._vectors:
                    sketch.prepared(rows)()
            self._sketch, self._vectors = sketch, []
            # Which is added to in place from now on.
            self._diagonal = self._diagonal.clone()
            return
        with naming_matrix("the sum of outer products", size, dtype):
            matrix = self._diagonal.new_zeros(groups, size, size)
        for rows in self._vectors:
            add_covariance_(matrix, rows[:, None])
        self._matrix, self._vectors = matrix, []

    @property
    def held(self) -> Held:
        """What there is of the sum."""
        if self._matrix is not None:
            return Held("matrix", self._matrix.shape[1])
        if self._sketch is not None:
            return Held("sketch", self._sketch.product.shape[2])
        return Held("vectors", self._num_vectors)

    def to_be_summed(self, every: Sequence[Held], place: int) -> list[Tensor]:
        """Return tensors that, summed over several of these, hold the sum of all their vectors.

        Args:
            every: `held` of all of them; those that hold no vectors must hold the same.
            place: Which of them this is.

        Returns:
            Strips of the upper triangle, or the sketch; or, where all have few vectors, one tensor
            with zeros in the places of the others'. The sum is to be taken in place, and `settle`
            to be called.
        """
        groups, size = self._diagonal.shape
        few = [held.size for held in every if held.kind == "vectors"]
        if len(few) == len(every) and sum(few) <= self._most_vectors:
            rows = self._diagonal.new_zeros(groups, sum(few), size)
            start = sum(few[:place])
            if self._vectors:
                rows[:, start : start + few[place]] = torch.cat(self._vectors, dim=1)
            self._vectors, self._num_vectors = [rows], sum(few)
            return [rows]
        if self.held.kind == "vectors":
            begun = (held for held in every if held.kind != "vectors")
            self._begin_sum(next(begun, self.form_of_sum))
        if self._matrix is None:
            return [] if self._sketch is None else [self._sketch.product]
        width = _ROWS_OF_A_STRIP
        return [self._matrix[:, start : start + width, start:] for start in range(0, size, width)]

    def settle(self, diagonal: Tensor, *, keep: bool) -> None:
        """Be the sum of several of these, of which all but the diagonal may be dropped.

        Args:
            diagonal: The diagonal of the sum.
            keep: Whether what `to_be_summed` returned now holds the sum, or else anything.
        """
        self._diagonal = diagonal
        if not keep:
            self._vectors, self._matrix, self._sketch = [], None, None

    def _keep(self, rows: Tensor, diagonal: Tensor, count: int) -> None:
        self._vectors.append(rows)
        self._diagonal, self._num_vectors = diagonal, count

    def clone(self, truncation: Truncation | None) -> OuterProducts:
        """Return a sum of the same vectors, to which others can be added.

        Args:
            truncation: Which eigenvectors of it are kept, of the largest not more than of this one.
        """
        cloned = copy(self)
        cloned.truncation = truncation
        cloned._vectors = list(self._vectors)
        cloned._diagonal = self._diagonal.clone()
        cloned._matrix = None if self._matrix is None else self._matrix.clone()
        cloned._sketch = None if self._sketch is None else self._sketch.clone()
        return cloned

    def reduced(self, label: str) -> tuple[Tensor | None, Tensor]:
        """Return Q and `R Rᵀ`, or None and the sum, of which the upper triangle counts.

        If only the leading eigenvectors are kept, Q has no columns for others, where that is
        cheaper.

        Args:
            label: What to call the sum in messages.

        Raises:
            MemoryError: If there is not enough memory.
        """
        size, dtype = self._diagonal.shape[1], self._diagonal.dtype
        if self._matrix is not None:
            width = leading.range_width(size, self._most)
            if width is None:
                return None, self._matrix
            with naming_matrix(f"the decomposition of the {label}", size, dtype):
                return leading.leading_range(self._matrix, width)
        sketch, columns = self._sketch, None
        if self.truncation is not None:
            columns = self._num_vectors if sketch is None else sketch.product.shape[2]
        with naming_matrix(f"the decomposition of the {label}", size, dtype, columns):
            vectors = self._vectors if sketch is None else [sketch.vectors()]
            return _triangular(torch.cat(vectors, dim=1), complete=self.truncation is None)


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
    """Return the eigenvectors of several sums that are kept, `[groups, d, k]` each.

    They are in ascending order of eigenvalue, as `eigenbases` has them.

    Args:
        sums: Of at least one vector each.
        labels: What to call them in messages.

    Raises:
        ValueError: If one cannot be decomposed, naming it.
        MemoryError: If there is not enough memory, likewise.
    """
    reduced = [one.reduced(label) for one, label in zip(sums, labels, strict=True)]
    pairs = eigh.eigenpairs([matrix for _, matrix in reduced], labels)
    found = []
    for label, total, (q, _), (values, basis) in zip(labels, sums, reduced, pairs, strict=True):
        size, dtype = total.diagonal.shape[1], basis.dtype
        count = size
        if total.truncation is not None:
            count = total.truncation.count(values, total.diagonal.sum(dim=1), size)
        with naming_matrix(f"the decomposition of the {label}", size, dtype, count):
            full = total.truncation is None
            found.append(_within(q, basis) if full else _leading(q, basis, count))
    return found


@full_precision
def _leading(q: Tensor | None, basis: Tensor, count: int) -> Tensor:
    """Return the last eigenvectors; of a sum of nothing, a unit vector."""
    if not basis.shape[1]:
        size = 0 if q is None else q.shape[1]
        return torch.eye(size, 1, dtype=basis.dtype, device=basis.device).repeat(len(basis), 1, 1)
    last = basis[:, :, max(0, basis.shape[2] - count) :]
    return last.contiguous() if q is None else q @ last


@full_precision
def _triangular(vectors: Tensor, *, complete: bool) -> tuple[Tensor, Tensor]:
    """Return Q and `R Rᵀ` of vectors `[groups, n, d]`; a Q of n columns unless it is complete.

    Entries that are zero in all vectors have unit vectors of their own, as in `eigh.decomposed`.
    """
    alive = (vectors != 0).flatten(0, 1).any(dim=0)
    rest, zero = alive.nonzero().flatten(), (~alive).nonzero().flatten()
    if not complete:
        return _thin_triangular(vectors, rest)
    q, r = torch.linalg.qr(vectors[:, :, rest].mT, mode="complete")
    r = r[:, : vectors.shape[1]]
    if len(zero):
        whole = q.new_zeros(len(q), len(alive), len(alive))
        whole[:, rest, : len(rest)] = q
        whole[:, zero, torch.arange(len(rest), len(alive), device=zero.device)] = 1.0
        q = whole
    return q, r @ r.mT


def _thin_triangular(vectors: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q `[groups, d, n]` and `R Rᵀ`, with zeros in Q's rows for entries not alive."""
    q, r = torch.linalg.qr(vectors[:, :, alive].mT)
    whole = q.new_zeros(len(q), vectors.shape[2], q.shape[2])
    whole[:, alive] = q
    return whole, r @ r.mT


@full_precision
def _within(q: Tensor | None, basis: Tensor) -> Tensor:
    """Turn the first columns of Q into eigenvectors; those of eigenvalue zero come before them."""
    if q is None:
        return basis
    rank = basis.shape[1]
    return torch.cat([q[:, :, rank:], q[:, :, :rank] @ basis], dim=2)
