"""Blocks: which there must be, where their entries are, and what matrices they stand for."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tests.helpers.oracles.curvature import Shapes

# What a block's parameter is, which decides on its bases:
#   layer     weight of a Linear-like layer or convolution, perhaps with its bias: KFAC's factors
#   bias      separate bias of such a layer: its exact covariance, hence exact
#   lookup    table of an embedding: identity on the vocabulary, gradients at positions
#   tied      table that also is an output layer: identity on the vocabulary, exact partial trace
#   diagonal  multiplied with or added to data element by element: both identities
#   derived   reaches layers through a computation, or layers of different kinds: exact partial
#             traces
Kind = Literal["layer", "bias", "lookup", "tied", "diagonal", "derived"]

TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALISATIONS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)


class BlockLike(Protocol):
    """What the oracles read from a block of the operator under test."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the block's parameters."""

    @property
    def gradient_basis(self) -> Tensor | None:
        """Basis of the output side, ``[groups, d_out, k]``; ``None`` is the identity."""

    @property
    def activation_basis(self) -> Tensor | None:
        """Basis of the input side, ``[groups, d_in, d_in]``; ``None`` is the identity."""

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues, ``[groups, d_out, d_in]``."""

    @property
    def transposed(self) -> bool:
        """Whether the parameter is laid out as ``[groups, d_in, d_out]``."""


@dataclass(frozen=True)
class BlockLayout:
    """A block as it should be.

    Attributes:
        parameters: One parameter, or a weight and its bias.
        groups: The number of groups.
        transposed: Whether the weight is laid out as ``[groups, d_in, d_out]``.
        kind: What its bases are.
    """

    parameters: tuple[str, ...]
    groups: int = 1
    transposed: bool = False
    kind: Kind = "layer"

    def apart(self) -> "list[BlockLayout]":
        """Return the layouts of a weight and a bias that do not share a block."""
        if len(self.parameters) == 1:
            return [self]
        weight, bias = self.parameters
        return [
            BlockLayout((weight,), self.groups, self.transposed),
            BlockLayout((bias,), self.groups, kind="bias"),
        ]


# --------------------------------------------------------------------------- layouts


def module_layouts(prefix: str, module: nn.Module) -> Iterator[BlockLayout]:
    """Work out the blocks of the parameters that one module owns itself.

    Args:
        prefix: Name of the module.
        module: Any module; of those not known here nothing is said.

    Yields:
        One layout for each parameter, or for a weight and a bias that may share a block.
    """
    dot = f"{prefix}." if prefix else ""
    if isinstance(module, MATRIX_LAYERS):
        groups = getattr(module, "groups", 1)
        yield BlockLayout((f"{dot}weight", f"{dot}bias"), groups)
    elif isinstance(module, TRANSPOSED_CONVOLUTIONS):
        yield BlockLayout((f"{dot}weight",), module.groups, transposed=True)
        yield BlockLayout((f"{dot}bias",), module.groups, kind="bias")
    elif isinstance(module, nn.Embedding):
        yield BlockLayout((f"{dot}weight",), transposed=True, kind="lookup")
    elif isinstance(module, NORMALISATIONS):
        yield BlockLayout((f"{dot}weight",), kind="diagonal")
        yield BlockLayout((f"{dot}bias",), kind="diagonal")
    elif isinstance(module, nn.MultiheadAttention):
        yield BlockLayout((f"{dot}in_proj_weight", f"{dot}in_proj_bias"))


def expected_layouts(
    model: nn.Module, names: Sequence[str], joint: bool, given: Sequence[BlockLayout] = ()
) -> list[BlockLayout]:
    """Work out the blocks of a model.

    Args:
        model: The model.
        names: The parameters to be estimated.
        joint: Whether a weight and its bias share a block (where both are estimated).
        given: Layouts of parameters of which the modules alone do not tell how they are used.

    Returns:
        One layout per block, covering every name exactly once.
    """
    told = {name for layout in given for name in layout.parameters}
    found = [*given]
    for prefix, module in model.named_modules():
        for layout in module_layouts(prefix, module):
            if not told & {*layout.parameters}:
                found.append(layout)
            else:
                found.extend(part for part in layout.apart() if part.parameters[0] not in told)
    layouts = []
    for layout in found:
        if joint and all(name in names for name in layout.parameters):
            layouts.append(layout)
        else:
            layouts.extend(part for part in layout.apart() if part.parameters[0] in names)
    covered = [name for layout in layouts for name in layout.parameters]
    assert sorted(covered) == sorted(names), "the case has parameters of unknown use"
    return layouts


# --------------------------------------------------------------------------- entries


def block_indices(
    shapes: Shapes, parameters: Sequence[str], groups: int = 1, transposed: bool = False
) -> Tensor:
    """Find a block's entries in the flat parameter vector.

    Args:
        shapes: Shapes of all parameters, in flat order.
        parameters: One parameter, or a weight and its bias.
        groups: The number of groups.
        transposed: Whether the weight is laid out as ``[groups, d_in, d_out]``.

    Returns:
        Positions ``[groups, d_out, d_in]``; for a weight and its bias, the bias comes first.
    """
    offsets = dict(
        zip(
            shapes,
            itertools.accumulate((prod(shape) for shape in shapes.values()), initial=0),
            strict=False,
        )
    )

    def positions(name: str) -> Tensor:
        shape = shapes[name]
        rows = shape[0] if shape else 1
        entries = offsets[name] + torch.arange(prod(shape))
        return entries.reshape(groups, rows // groups, -1)

    weight, *bias = parameters
    matrix = positions(weight).mT if transposed else positions(weight)
    return torch.cat([*(positions(name) for name in bias), matrix], dim=2)


def block_matrix(
    dense: Tensor,
    shapes: Shapes,
    parameters: Sequence[str],
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """Cut a block out of a dense matrix, in the block's own layout.

    Args:
        dense: Matrix over all parameters, ``[D, D]``.
        shapes: Shapes of all parameters, in flat order.
        parameters: One parameter, or a weight and its bias.
        groups: The number of groups; entries between different groups are dropped.
        transposed: Whether the weight is laid out as ``[groups, d_in, d_out]``.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``.
    """
    indices = block_indices(shapes, parameters, groups, transposed).flatten(start_dim=1)
    return torch.stack([dense[index][:, index] for index in indices])


def exact_blocks(
    dense: Tensor, shapes: Shapes, layouts: Iterable[BlockLayout]
) -> dict[tuple[str, ...], Tensor]:
    """Cut all blocks out of a dense matrix.

    Args:
        dense: Matrix over all parameters, ``[D, D]``.
        shapes: Shapes of all parameters, in flat order.
        layouts: The blocks.

    Returns:
        Parameter names to ``[groups, d_out * d_in, d_out * d_in]``.
    """
    return {
        layout.parameters: block_matrix(
            dense, shapes, layout.parameters, layout.groups, layout.transposed
        )
        for layout in layouts
    }


# --------------------------------------------------------------------------- matrices


def block_bases(block: BlockLike) -> tuple[Tensor, Tensor]:
    """Return both bases of a block, with identities written out.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, d_out, d_out]`` and ``[groups, d_in, d_in]``.
    """
    groups, d_out, d_in = block.eigenvalues.shape

    def explicit(basis: Tensor | None, size: int) -> Tensor:
        if basis is not None:
            return basis
        return torch.eye(size, dtype=block.eigenvalues.dtype).expand(groups, size, size)

    return explicit(block.gradient_basis, d_out), explicit(block.activation_basis, d_in)


def kronecker_basis(block: BlockLike) -> Tensor:
    """Write out a block's eigenvectors as Kronecker products.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``, eigenvectors in columns.
    """
    pairs = zip(*block_bases(block), strict=True)
    return torch.stack([torch.kron(q_g.contiguous(), q_a.contiguous()) for q_g, q_a in pairs])


def is_thin(block: BlockLike) -> bool:
    """Whether a side of a block has fewer directions than entries."""
    bases = (block.gradient_basis, block.activation_basis)
    return any(basis is not None and basis.shape[2] < basis.shape[1] for basis in bases)


def projections(block: BlockLike) -> tuple[Tensor, Tensor]:
    """Write out the projections on each direction of both sides, and on a thin one's complement.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, K, d, d]`` for the outputs, and for the inputs.
    """
    found = []
    sizes = block.eigenvalues.shape[1:]
    bases = (block.gradient_basis, block.activation_basis)
    for size, basis in zip(sizes, bases, strict=True):
        if basis is None:
            basis = torch.eye(size, dtype=block.eigenvalues.dtype).expand(
                len(block.eigenvalues), -1, -1
            )
        every = torch.einsum("gok,gpk->gkop", basis, basis)
        if basis.shape[2] < basis.shape[1]:
            rest = torch.eye(basis.shape[1], dtype=basis.dtype) - every.sum(dim=1, keepdim=True)
            every = torch.cat([every, rest], dim=1)
        found.append(every)
    return found[0], found[1]


def in_own_basis(block: BlockLike, matrix: Tensor) -> Tensor:
    """Return ``diag(Q^T B Q)`` in the shape of a block's eigenvalues.

    Of the complement of a thin basis, the mean.

    Args:
        block: A block of an operator, of which only the bases are used.
        matrix: ``[groups, d_out * d_in, d_out * d_in]``.

    Returns:
        ``[groups, d_out, d_in]``.
    """
    if is_thin(block):
        of_outputs, of_inputs = projections(block)
        d_out, d_in = of_outputs.shape[2], of_inputs.shape[2]
        split = matrix.reshape(-1, d_out, d_in, d_out, d_in)
        sums = torch.einsum("gpoq,gaiu,goiqu->gpa", of_outputs, of_inputs, split)
        rows, columns = (p.diagonal(dim1=2, dim2=3).sum(dim=2) for p in (of_outputs, of_inputs))
        return sums / (rows[:, :, None] * columns[:, None, :])
    basis = kronecker_basis(block)
    rotated = basis.mT @ matrix @ basis
    return rotated.diagonal(dim1=1, dim2=2).reshape(block.eigenvalues.shape)


def partial_traces(matrix: Tensor, d_out: int) -> tuple[Tensor, Tensor]:
    """Trace out one side of a block: the sums of ``G G^T`` and ``G^T G`` over its gradients.

    Args:
        matrix: ``[groups, d_out * d_in, d_out * d_in]``.
        d_out: Size of the output side.

    Returns:
        ``[groups, d_out, d_out]`` and ``[groups, d_in, d_in]``.
    """
    d_in = matrix.shape[1] // d_out
    split = matrix.reshape(len(matrix), d_out, d_in, d_out, d_in)
    return torch.einsum("gopup->gou", split), torch.einsum("gpipj->gij", split)


def dense_block(block: BlockLike) -> Tensor:
    """Write out the matrix a block stands for.

    Args:
        block: A block of an operator.

    Returns:
        ``[groups, d_out * d_in, d_out * d_in]``.
    """
    left, right = (_projections(block, side) for side in (1, 2))
    groups, d_out, d_in = (len(left), left.shape[-1], right.shape[-1])
    return torch.einsum("gpab,gpq,gqij->gaibj", left, block.eigenvalues, right).reshape(
        groups, d_out * d_in, d_out * d_in
    )


def _projections(block: BlockLike, side: int) -> Tensor:
    """Return those on each direction of a side, and on the complement of a thin one."""
    groups, *sizes = block.eigenvalues.shape
    basis = (block.gradient_basis, block.activation_basis)[side - 1]
    if basis is None:
        basis = torch.eye(sizes[side - 1], dtype=block.eigenvalues.dtype).repeat(groups, 1, 1)
    found = [torch.einsum("ga,gb->gab", column, column) for column in basis.unbind(dim=2)]
    if basis.shape[2] < basis.shape[1]:
        found.append(torch.eye(basis.shape[1], dtype=basis.dtype) - basis @ basis.mT)
    return torch.stack(found, dim=1)


def dense_operator(blocks: Iterable[BlockLike], shapes: Shapes) -> Tensor:
    """Write out the matrix over all parameters that a set of blocks stands for.

    Args:
        blocks: All blocks of an operator.
        shapes: Shapes of all parameters, in flat order.

    Returns:
        ``[D, D]``, zero between blocks and between groups.
    """
    size = sum(prod(shape) for shape in shapes.values())
    dense = torch.zeros(size, size, dtype=torch.float64)
    for block in blocks:
        groups = block.eigenvalues.shape[0]
        indices = block_indices(shapes, block.parameters, groups, block.transposed)
        for index, matrix in zip(indices.flatten(start_dim=1), dense_block(block), strict=True):
            dense[index[:, None], index[None, :]] += matrix
    return dense
