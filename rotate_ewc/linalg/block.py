"""One block of the operator: a rotated basis and the eigenvalues in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.kronecker import Basis


def matrix_shape(parameter: torch.Size, groups: int, transposed: bool) -> tuple[int, int, int]:
    """Return `(groups, d_out, d_in)` of a parameter's matrix (without the column of a bias).

    Args:
        parameter: The parameter's shape.
        groups: Number of independent blocks.
        transposed: Whether the activation side comes first.
    """
    rows = parameter[0] if parameter else 1
    columns = parameter.numel() // rows if rows else 0
    rows //= groups
    return (groups, columns, rows) if transposed else (groups, rows, columns)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of tensors by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


@dataclass(frozen=True, eq=False)
class Block:
    """`F ≈ (Q_g ⊗ Q_a) diag(Λ) (Q_g ⊗ Q_a)ᵀ` on one parameter, or on a weight and its bias.

    A parameter is the matrix `parameter.reshape(groups, d_out, d_in)`, or in a transposed block
    (embeddings, transposed convolutions) `parameter.reshape(groups, d_in, d_out).mT`. In a joint
    block the bias is the *first* column of `[bias | weight]`, so that a parameter that has grown
    (new outputs, new inputs) still starts with the slice for which the block was made.

    Attributes:
        parameters: `(name,)`, or `(weight's name, bias's name)` for a joint block.
        gradient_basis: Q_g `[groups, d_out, d_out]`, columns are eigenvectors; None is I.
        activation_basis: Q_a `[groups, d_in, d_in]`; None is I.
        eigenvalues: Λ `[groups, d_out, d_in]`, all at least 0.
        transposed: Whether the activation side comes first in the (weight) parameter.
    """

    parameters: tuple[str, ...]
    gradient_basis: Basis
    activation_basis: Basis
    eigenvalues: Tensor
    transposed: bool = False

    @property
    def label(self) -> str:
        """A name for the block: its parameters', joined by `+`."""
        return "+".join(self.parameters)

    @property
    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar tensor."""
        return self.eigenvalues.sum()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by attribute name; identities are left out."""
        named = {
            "eigenvalues": self.eigenvalues,
            "gradient_basis": self.gradient_basis,
            "activation_basis": self.activation_basis,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        """Return the block with every stored tensor replaced by `function` of it."""
        changed: dict[str, Any] = {name: function(t) for name, t in self.tensors.items()}
        return replace(self, **changed)

    def with_eigenvalues(self, eigenvalues: Tensor) -> Block:
        """Return the block with other eigenvalues in the same basis."""
        return replace(self, eigenvalues=eigenvalues)

    def rotate(self, tensors: Mapping[str, Tensor], *, columns: bool = False) -> Tensor:
        """Gather parameter-shaped tensors D and express them in the eigenbasis, `Q_gᵀ D Q_a`.

        Args:
            tensors: By name, `[*shape]` or `[K, *shape]`; only those of the block are read.
            columns: Whether there are K of each.

        Returns:
            `[groups, d_out, d_in]` or `[K, groups, d_out, d_in]`, in the dtype of the eigenvalues.
        """
        matrix = self.gather(tensors, columns=columns).to(self.eigenvalues.dtype)
        return kronecker.to_eigenbasis(matrix, self.gradient_basis, self.activation_basis)

    def unrotate(self, matrix: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Undo `rotate`: return `Q_g D Q_aᵀ`, split into the parameters.

        Args:
            matrix: D in the eigenbasis, `[groups, d_out, d_in]` or `[K, groups, d_out, d_in]`.
            shapes: The parameters' shapes by name.

        Returns:
            By name, `[*shape]` or `[K, *shape]`.
        """
        product = kronecker.from_eigenbasis(matrix, self.gradient_basis, self.activation_basis)
        return self.split(product, shapes)

    def diagonal_in(self, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
        """Return the diagonal of the block's matrix in another basis.

        Args:
            gradient_basis: `[groups, d_out, rank_out]`; None is the identity.
            activation_basis: `[groups, d_in, rank_in]`; None is the identity.

        Returns:
            `[groups, rank_out, rank_in]`.
        """
        return kronecker.project_eigenvalues(
            kronecker.change_basis(self.gradient_basis, gradient_basis),
            kronecker.change_basis(self.activation_basis, activation_basis),
            self.eigenvalues,
        )

    def gather(self, tensors: Mapping[str, Tensor], *, columns: bool = False) -> Tensor:
        """Gather parameter-shaped tensors into the block's matrix, without a rotation.

        Args:
            tensors: By name, `[*shape]` or `[K, *shape]`; only those of the block are read.
            columns: Whether there are K of each.

        Returns:
            `[groups, d_out, d_in]` or `[K, groups, d_out, d_in]`.
        """
        weight = self._matrix(tensors[self.parameters[0]], columns)
        if len(self.parameters) == 1:
            return weight
        bias = self._matrix(tensors[self.parameters[1]], columns)
        return torch.cat([bias, weight], dim=-1)

    def split(self, matrix: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Undo `gather`: split a matrix, or K of them, into the parameters.

        Args:
            matrix: `[groups, d_out, d_in]` or `[K, groups, d_out, d_in]`.
            shapes: The parameters' shapes by name.

        Returns:
            By name, `[*shape]` or `[K, *shape]`.
        """
        first, *others = self.parameters
        weight = matrix[..., len(others) :]
        parts = {first: weight.mT if self.transposed else weight}
        for name in others:
            parts[name] = matrix[..., :1]
        count = matrix.shape[:-3]
        return {name: part.reshape((*count, *shapes[name])) for name, part in parts.items()}

    def _matrix(self, tensor: Tensor, columns: bool) -> Tensor:
        groups, d_out, _ = self.eigenvalues.shape
        count = tensor.shape[:1] if columns else ()
        # Not left to `reshape`, which cannot tell it where there are no columns.
        d_in = tensor.shape[len(count) :].numel() // (groups * d_out)
        # A bias, one column, is the same either way.
        if self.transposed:
            return tensor.reshape(*count, groups, d_in, d_out).mT
        return tensor.reshape(*count, groups, d_out, d_in)
