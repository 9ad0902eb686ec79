"""One block of the operator: a rotated basis and the eigenvalues in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.tree import place_of
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.completion import CompletedBasis, complete
from rotate_ewc.linalg.kronecker import Basis, Rotation
from rotate_ewc.linalg.orthonormal import restored_basis
from rotate_ewc.linalg.thin_products import ThinProducts, thin_products


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


def laid_out(matrix: Tensor, transposed: bool) -> Tensor:
    """Return a block's matrix with the entries in memory as they are in the parameter."""
    return matrix.mT.contiguous().mT if transposed else matrix


@dataclass(frozen=True, eq=False)
class Block:
    """`F ≈ (Q_g ⊗ Q_a) diag(Λ) (Q_g ⊗ Q_a)ᵀ` on one parameter, or on a weight and its bias.

    A parameter is the matrix `parameter.reshape(groups, d_out, d_in)`, or in a transposed block
    (embeddings, transposed convolutions) `parameter.reshape(groups, d_in, d_out).mT`. In a joint
    block the bias is the *first* column of `[bias | weight]`, so the block stays the leading slice
    of a parameter that grows (new outputs, new inputs).

    A basis may be *thin*: k of d eigenvectors. All directions of its complement share their mean
    eigenvalues, stored as the last row or column of Λ. So traces and partial traces are exact for
    every k.

    If a block has no basis for its inputs, only inputs with different eigenvalues are rotated
    (`rotated_inputs`), not the words that no example had.

    Bases may be *stored* in a smaller dtype than the eigenvalues. The block is then the one with
    the orthonormal bases that `restored` has in their place, for as long as a product takes.

    Attributes:
        parameters: `(name,)`, or `(weight's name, bias's name)` for a joint block.
        gradient_basis: Q_g `[groups, d_out, k_out]`, columns are eigenvectors; None is I.
        activation_basis: Q_a `[groups, d_in, k_in]`; None is I.
        eigenvalues: Λ `[groups, K_out, K_in]`, all at least 0. K is d where a side is whole (k = d,
            or I), and k + 1 where it is thin.
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

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """`(groups, d_out, d_in)` of the parameter as a matrix."""
        groups, d_out, d_in = self.eigenvalues.shape
        if self.gradient_basis is not None:
            d_out = self.gradient_basis.shape[1]
        if self.activation_basis is not None:
            d_in = self.activation_basis.shape[1]
        return groups, d_out, d_in

    @property
    def ranks(self) -> tuple[int, int]:
        """How many directions are kept of each side: `(k_out, k_in)`, d where all are."""
        _, d_out, d_in = self.shape
        bases = self.gradient_basis, self.activation_basis
        k_out, k_in = (None if basis is None else basis.shape[2] for basis in bases)
        return d_out if k_out is None else k_out, d_in if k_in is None else k_in

    @cached_property
    def is_thin(self) -> bool:
        """Whether a side keeps fewer than all of its directions."""
        return self.ranks != self.shape[1:]

    @cached_property
    def storage_dtype(self) -> torch.dtype | None:
        """The dtype of the bases where it is not that of the eigenvalues; else None."""
        for basis in (self.gradient_basis, self.activation_basis):
            if basis is not None and basis.dtype != self.eigenvalues.dtype:
                return basis.dtype
        return None

    @property
    def restored(self) -> Block:
        """The block with orthonormal bases in the dtype of its eigenvalues: itself if it has them.

        Nothing that is found of it is kept longer than the block that is returned.
        """
        if self.storage_dtype is None:
            return self
        bases = self.gradient_basis, self.activation_basis
        gradient_basis, activation_basis = (
            None if basis is None else restored_basis(basis, self.eigenvalues.dtype)
            for basis in bases
        )
        return replace(self, gradient_basis=gradient_basis, activation_basis=activation_basis)

    @property
    def multiplicities(self) -> tuple[Tensor, Tensor]:
        """Number of directions that each row, and each column, of the eigenvalues represents.

        All are 1, except the last of a thin side, which is `d - k`.
        """
        counts = []
        for axis, (size, rank) in enumerate(zip(self.shape[1:], self.ranks, strict=True), 1):
            own = self.eigenvalues.new_ones(self.eigenvalues.shape[axis])
            if rank < size:
                own[-1] = size - rank
            counts.append(own)
        return counts[0], counts[1]

    def total(self, values: Tensor) -> Tensor:
        """Sum values of the eigenvalues, each multiplied by its number of directions.

        Args:
            values: `[groups, K_out, K_in]`, such as the eigenvalues themselves.

        Returns:
            A scalar tensor.
        """
        if not self.is_thin:
            return values.sum()
        rows, columns = self.multiplicities
        return (rows[:, None] * values * columns).sum()

    @property
    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar tensor."""
        return self.total(self.eigenvalues)

    @property
    def mean(self) -> Tensor:
        """Mean of the eigenvalues over all directions, a scalar tensor."""
        groups, d_out, d_in = self.shape
        return self.trace / (groups * d_out * d_in) if self.is_thin else self.eigenvalues.mean()

    @property
    def partial_traces(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues summed over all directions of the other side.

        Returns:
            `[groups, K_out]` and `[groups, K_in]`; of a complement, those of one direction.
        """
        if not self.is_thin:
            return self.eigenvalues.sum(dim=2), self.eigenvalues.sum(dim=1)
        rows, columns = self.multiplicities
        # No products, which `torch.autocast` would take in half precision.
        of_outputs = (self.eigenvalues * columns).sum(dim=2)
        return of_outputs, (rows[:, None] * self.eigenvalues).sum(dim=1)

    @property
    def spectrum(self) -> Tensor:
        """The eigenvalue of each coordinate that `rotate` returns, `[groups, d_out, d_in]`."""
        return self.restored._spread if self.is_thin else self.eigenvalues

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
        block = replace(self, eigenvalues=eigenvalues)
        if "_completed" in vars(self):
            vars(block)["_completed"] = self._completed
        return block

    @cached_property
    def rotated_inputs(self) -> Tensor | None:
        """The numbers of the inputs that are rotated, `[n]`, in order; None if all are.

        Where the inputs have no basis, and all eigenvalues of one are the same number c, its part
        of the matrix is c I, whatever the basis of the outputs. So it stays as it is: the rows of
        words that no example had, which are most of a large vocabulary.
        """
        values = self.eigenvalues
        looked_up = self.activation_basis is None and self.gradient_basis is not None
        if not looked_up or values.shape[2] == 1 or values.is_meta:  # a bias; no numbers at all
            return None
        # A caller may be in inference mode, whose tensors cannot be used outside of it. (By name,
        # torch.compile does not take its argument.)
        with torch.inference_mode(False), torch.no_grad():
            differing = (values != values[:, :1]).any(dim=1).any(dim=0)
            numbers = differing.nonzero().flatten()
        # Where more are rotated, putting them among the others takes longer than it saves.
        return numbers if 2 * len(numbers) <= len(differing) else None

    def rotate(
        self,
        tensors: Mapping[str, Tensor],
        *,
        columns: bool = False,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Gather parameter-shaped tensors D and express them in the eigenbasis, `Q_gᵀ D Q_a`.

        A thin basis is completed to an orthogonal one (`rotate_ewc.linalg.completion`).

        Args:
            tensors: By name, `[*shape]` or `[K, *shape]`; only those of the block are read.
            columns: Whether there are K of each.
            finish: What to make of the products, in any orientation, and perhaps in place. Inputs
                that are not rotated are left out.

        Returns:
            `[groups, d_out, d_in]` or `[K, groups, d_out, d_in]`, in the dtype of the eigenvalues
            and, where the block is transposed, with the inputs first in memory.
        """
        matrix = self.gather(tensors, columns=columns).to(self.eigenvalues.dtype)
        return self._turned(matrix, kronecker.to_eigenbasis, finish)

    def unrotate(self, matrix: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Undo `rotate`: return `Q_g D Q_aᵀ`, split into the parameters.

        Args:
            matrix: D in the eigenbasis, `[groups, d_out, d_in]` or `[K, groups, d_out, d_in]`.
            shapes: The parameters' shapes by name.

        Returns:
            By name, `[*shape]` or `[K, *shape]`.
        """
        return self.split(self.from_eigenbasis(matrix), shapes)

    def from_eigenbasis(self, matrix: Tensor) -> Tensor:
        """Return `Q_g D Q_aᵀ` for a matrix D in the eigenbasis, or for K of them, as one matrix."""
        return self._turned(matrix, kronecker.from_eigenbasis)

    def multiply(self, matrix: Tensor) -> Tensor:
        """Return F D for a gathered matrix D, or for K of them, in the standard basis.

        Args:
            matrix: As `gather` returns it, in the dtype of the eigenvalues.
        """
        own = self.restored
        if own.products is None:
            rotated = own._turned(matrix, kronecker.to_eigenbasis)
            return own.from_eigenbasis(own.spectrum * rotated)
        return own.products.product(matrix, own.products.form(matrix)[1])

    @cached_property
    def products(self) -> ThinProducts | None:
        """Products in the kept directions alone; None where all are kept, or few inputs rotated.

        Of a block whose bases are stored in another dtype, those of `restored`.
        """
        if self.storage_dtype is not None:
            raise RuntimeError(f"the bases of {self.label!r} are to be restored first")
        if not self.is_thin or self.rotated_inputs is not None:
            return None
        return thin_products(self.gradient_basis, self.activation_basis, self.eigenvalues)

    def prepare(self) -> None:
        """Compute cached tensors now rather than in the first product, which may be compiled."""
        if self.storage_dtype is None and self.products is None:
            _ = self._rotations, self.spectrum, self.rotated_inputs

    def diagonal_in(self, gradient_basis: Basis, activation_basis: Basis) -> Tensor:
        """Return the diagonal of the block's matrix in another basis.

        Args:
            gradient_basis: `[groups, d_out, l_out]`; None is the identity.
            activation_basis: `[groups, d_in, l_in]`; None is the identity.

        Returns:
            `[groups, L_out, L_in]`: for a thin basis with the means over the complement.
        """
        (_, d_out, d_in), own = self.shape, self.restored
        return kronecker.project_eigenvalues(
            kronecker.overlaps(own.gradient_basis, d_out, gradient_basis, d_out),
            kronecker.overlaps(own.activation_basis, d_in, activation_basis, d_in),
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

    def _turned(
        self,
        matrix: Tensor,
        turn: Callable[[Tensor, Rotation, Rotation], Tensor],
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Rotate a matrix, or K of them, into or out of the eigenbasis."""
        gradient, activation = self.restored._rotations
        if self.rotated_inputs is not None:
            # Rows of inputs lie together in memory, where they are looked up.
            inputs = matrix.mT
            turned = turn(inputs.index_select(-2, self.rotated_inputs), None, gradient)
            turned = turned if finish is None else finish(turned)
            return inputs.index_copy(-2, self.rotated_inputs, turned).mT
        if self.transposed:
            matrix = turn(matrix.mT, activation, gradient)
        else:
            matrix = turn(matrix, gradient, activation)
        matrix = matrix if finish is None else finish(matrix)
        return matrix.mT if self.transposed else matrix

    @cached_property
    def _completed(self) -> tuple[CompletedBasis | None, CompletedBasis | None]:
        """What the thin bases are completed to; None for a side that is whole."""
        bases = self.gradient_basis, self.activation_basis
        gradient, activation = (
            None if basis is None or basis.shape[1] == basis.shape[2] else complete(basis)
            for basis in bases
        )
        return gradient, activation

    @cached_property
    def _rotations(self) -> tuple[Rotation, Rotation]:
        """What matrices are rotated with."""
        bases = self.gradient_basis, self.activation_basis
        if not self.is_thin:
            return bases
        gradient, activation = (
            basis if completed is None else completed.rotation
            for basis, completed in zip(bases, self._completed, strict=True)
        )
        return gradient, activation

    @cached_property
    def _spread(self) -> Tensor:
        """The eigenvalues at the positions of their coordinates."""
        _, d_out, d_in = self.shape
        gradient, activation = self._completed
        spread = self.eigenvalues
        if gradient is not None:
            rows = gradient.numbers(d_out)[:, :, None]
            spread = spread.gather(1, rows.expand(-1, -1, spread.shape[2]))
        if activation is not None:
            columns = activation.numbers(d_in)[:, None, :]
            spread = spread.gather(2, columns.expand(-1, spread.shape[1], -1))
        return laid_out(spread, self.transposed)

    def _matrix(self, tensor: Tensor, columns: bool) -> Tensor:
        groups, d_out, _ = self.shape
        count = tensor.shape[:1] if columns else ()
        # Not left to `reshape`, which cannot tell it where there are no columns.
        d_in = tensor.shape[len(count) :].numel() // (groups * d_out)
        # A bias, one column, is the same either way.
        if self.transposed:
            return tensor.reshape(*count, groups, d_in, d_out).mT
        return tensor.reshape(*count, groups, d_out, d_in)


def map_together(
    function: Callable[[Tensor], Tensor], blocks: Iterable[Block]
) -> tuple[Block, ...]:
    """Return blocks with every stored tensor replaced by a function of it.

    What several blocks share, such as the basis of an input that they have in common, they share
    afterwards. Bases that are stored in another dtype than the eigenvalues stay in it.
    """
    known: dict[object, Tensor] = {}

    def mapped(tensor: Tensor, storage_dtype: torch.dtype | None) -> Tensor:
        place = place_of(tensor)
        if place not in known:
            known[place] = function(tensor)
            if tensor.dtype == storage_dtype:
                known[place] = known[place].to(storage_dtype)
        return known[place]

    # The places of tensors that nobody holds any longer may be taken by others.
    blocks = tuple(blocks)
    return tuple(block.map(partial(mapped, storage_dtype=block.storage_dtype)) for block in blocks)
