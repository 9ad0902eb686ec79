"""Products with the matrix of a thin block, computed from the kept directions alone.

On the complement of a thin basis U, whose projection is `I - U Uᵀ`, the matrix is a multiple of the
identity for each direction of the other side. So the complement needs no basis. A rotation of a
vector with d entries into or out of the basis costs `2 d k` operations, half as many as with a
completed basis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc._utils.numerics import full_precision
from rotate_ewc.linalg.kronecker import Basis, from_left, from_right

Parts = tuple[Tensor, Tensor]


class ThinProducts(ABC):
    """The quadratic form of a thin block, and the product that is half of its gradient."""

    @abstractmethod
    def form(self, matrix: Tensor) -> tuple[Tensor, Parts]:
        """Return `⟨D, F D⟩`, and the parts from which `product` computes F D.

        Args:
            matrix: D, `[groups, d_out, d_in]`, or K of them.

        Returns:
            The value for each group, `[groups]`, or for each matrix and group, `[K, groups]`; and
            two tensors.
        """

    @abstractmethod
    def product(self, matrix: Tensor, parts: Parts) -> Tensor:
        """Return F D, given D and the parts that `form` returned for it."""


@dataclass(frozen=True, eq=False)
class BothThin(ThinProducts):
    """Both sides are thin.

    With `C = Uᵀ D V`, with `P = Uᵀ D - C Vᵀ` and `R = D V - U C` (kept on one side only), with
    their eigenvalues A, c, r, and with the eigenvalue m of the rest,

        ⟨D, F D⟩ = Σ A ∘ C² + Σ c ∘ P² + Σ r ∘ R² + m (‖D‖² - ‖C‖² - ‖P‖² - ‖R‖²)
        F D = m D + U ((A - m) ∘ C Vᵀ + (c - m) ∘ P) + ((r - m) ∘ R) Vᵀ

    Attributes:
        gradient_basis: U, `[groups, d_out, k]`.
        activation_basis: V, `[groups, d_in, l]`.
        eigenvalues: `[[A, c], [r, m]]`, `[groups, k + 1, l + 1]`.
    """

    gradient_basis: Tensor
    activation_basis: Tensor
    eigenvalues: Tensor

    @full_precision
    def form(self, matrix: Tensor) -> tuple[Tensor, Parts]:
        """Return the value, and `(A - m) ∘ C Vᵀ + (c - m) ∘ P` and `(r - m) ∘ R`."""
        u, v, values = self.gradient_basis, self.activation_basis, self.eigenvalues
        kept, column = values[:, :-1, :-1], values[:, :-1, -1:]
        row, corner = values[:, -1:, :-1], values[:, -1:, -1:]
        of_outputs, of_inputs = from_left(u.mT, matrix), from_right(matrix, v)
        both = from_right(of_outputs, v)
        of_outputs = of_outputs - from_right(both, v.mT)
        of_inputs = of_inputs - from_left(u, both)
        rest = _square(matrix) - _square(both) - _square(of_outputs) - _square(of_inputs)
        value = (
            _square(both, kept)
            + _square(of_outputs, column)
            + _square(of_inputs, row)
            # The difference of nearly equal numbers may be negative by rounding.
            + corner[:, 0, 0] * rest.clamp(min=0.0)
        )
        left = from_right((kept - corner) * both, v.mT) + (column - corner) * of_outputs
        return value, (left, (row - corner) * of_inputs)

    @full_precision
    def product(self, matrix: Tensor, parts: Parts) -> Tensor:
        """Return F D."""
        corner, (of_outputs, of_inputs) = self.eigenvalues[:, -1:, -1:], parts
        u, v = self.gradient_basis, self.activation_basis
        if matrix.ndim == 3:
            # One product, since what it writes is far larger than what it reads.
            left, right = torch.cat([u, of_inputs], dim=2), torch.cat([of_outputs, v.mT], dim=1)
            return torch.addcmul(left @ right, corner, matrix)
        return corner * matrix + from_left(u, of_outputs) + from_right(of_inputs, v.mT)


@dataclass(frozen=True, eq=False)
class InputsThin(ThinProducts):
    """The input side is thin, the output side is whole.

    With `C = Qᵀ D V`, the means c over the complement and `M = Q diag(c) Qᵀ`,

        ⟨D, F D⟩ = Σ A ∘ C² + (⟨D, M D⟩ - Σ c ∘ C²),    F D = M D + Q ((A - c) ∘ C) Vᵀ

    Attributes:
        basis: Q, `[groups, d_out, d_out]`; None is I.
        means: M; or c, `[groups, d_out, 1]`, where Q is I.
        thin_basis: V, `[groups, d_in, l]`.
        eigenvalues: `[A, c]`, `[groups, d_out, l + 1]`.
    """

    basis: Basis
    means: Tensor
    thin_basis: Tensor
    eigenvalues: Tensor

    @classmethod
    @full_precision
    def of(cls, basis: Basis, thin_basis: Tensor, eigenvalues: Tensor) -> InputsThin:
        """Create it from the bases and eigenvalues of a block."""
        column = eigenvalues[:, :, -1:]
        means = column if basis is None else (basis * column.mT) @ basis.mT
        return cls(basis, means, thin_basis, eigenvalues)

    @full_precision
    def form(self, matrix: Tensor) -> tuple[Tensor, Parts]:
        """Return the value, and `M D` and `Q ((A - c) ∘ C)`."""
        kept, column = self.eigenvalues[:, :, :-1], self.eigenvalues[:, :, -1:]
        both = from_right(matrix, self.thin_basis)
        if self.basis is None:
            spread = self.means * matrix
        else:
            spread, both = from_left(self.means, matrix), from_left(self.basis.mT, both)
        # The difference of nearly equal numbers may be negative by rounding.
        rest = (_inner(matrix, spread) - _square(both, column)).clamp(min=0.0)
        left = (kept - column) * both
        if self.basis is not None:
            left = from_left(self.basis, left)
        return _square(both, kept) + rest, (spread, left)

    @full_precision
    def product(self, matrix: Tensor, parts: Parts) -> Tensor:
        """Return F D."""
        spread, left = parts
        if matrix.ndim == 3:
            return torch.baddbmm(spread, left, self.thin_basis.mT)
        return spread + from_right(left, self.thin_basis.mT)


@dataclass(frozen=True, eq=False)
class OutputsThin(ThinProducts):
    """The output side is thin, the input side is whole: `InputsThin`, transposed.

    Attributes:
        mirrored: The products of the transposed block.
    """

    mirrored: InputsThin

    def form(self, matrix: Tensor) -> tuple[Tensor, Parts]:
        """Return the value, and what `product` needs."""
        return self.mirrored.form(matrix.mT)

    def product(self, matrix: Tensor, parts: Parts) -> Tensor:
        """Return F D."""
        return self.mirrored.product(matrix.mT, parts).mT


def thin_products(
    gradient_basis: Basis, activation_basis: Basis, eigenvalues: Tensor
) -> ThinProducts:
    """Return the products for the bases and eigenvalues of a block with one or two thin sides."""
    # A caller may be in inference mode, whose tensors cannot be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if activation_basis is None or not _is_thin(activation_basis):
            if gradient_basis is None or not _is_thin(gradient_basis):
                raise ValueError("neither basis is thin; expected one that is")
            mirrored = InputsThin.of(activation_basis, gradient_basis, eigenvalues.mT)
            return OutputsThin(mirrored)
        if gradient_basis is None or not _is_thin(gradient_basis):
            return InputsThin.of(gradient_basis, activation_basis, eigenvalues)
        return BothThin(gradient_basis, activation_basis, eigenvalues)


def _is_thin(basis: Tensor) -> bool:
    return basis.shape[2] < basis.shape[1]


def _square(matrix: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of squares of each matrix, weighted if there are weights."""
    return _inner(matrix, matrix if weights is None else weights * matrix)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Return the inner products of pairs of matrices."""
    return (first * second).sum(dim=(-2, -1))
