"""Find which rows of a layer's tensors belong to which example, by measuring it.

Back-propagation is linear in the output vector. So if the part of example n is multiplied by w_n,
a row of a layer's output gradient is multiplied by w_n as well if only example n depends on it, and
by nothing in particular if several examples do. The weights are powers of two and their negatives,
by which floating-point numbers are multiplied without rounding: a row that is scaled by anything
but one of them, up to a few roundings, mixes examples. Where there are more examples than such
weights (256 in single precision), their numbers are told digit by digit, each by one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Generator, Tensor

from rotate_ewc._utils.numerics import statistics_dtype, without_autocast
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.tracing.example_rows import ExampleRows, Layout, ScatteredRows, even_axes
from rotate_ewc.tracing.forward_pass import ForwardPass
from rotate_ewc.tracing.recorder import Use

# The smallest exponent of the weights and how many there are: a part of a dtype's range. That of
# double precision is not used up, since models may compute some things, such as norms, in float32.
_EXPONENTS: Final = {
    torch.float16: (-3, 8),
    torch.bfloat16: (-60, 128),
    torch.float32: (-60, 128),
    torch.float64: (-60, 128),
}
# A sum of rounded numbers may be wrong by this many roundings of the sum of their sizes.
_ROUNDINGS: Final = 64
# Whatever is wrong by more than this may come from any weight.
_TELLING: Final = 0.2
# Rows whose gradient is zero; rows whose gradient is too faint to tell; and rows on which several
# examples depend.
_UNKNOWN: Final = -1
_FAINT: Final = -2
_MIXED: Final = -3


@dataclass(frozen=True)
class Signatures:
    """What is kept of the gradient at a use: a number for each cell of the leading axes.

    Attributes:
        sums: A fixed random combination of the cell's entries, the same for each cell.
        sizes: The sum of the entries' sizes; 0 if and only if they are all zero.
        dtype: The gradient's dtype.
    """

    sums: Tensor
    sizes: Tensor
    dtype: torch.dtype


def find_example_rows(
    recorded: ForwardPass,
    num_examples: int,
    vector: Tensor,
    before: Sequence[Signatures],
    *,
    free_graph: bool = False,
) -> Layout:
    """Find the rows of every example in every use.

    Args:
        recorded: The forward pass.
        num_examples: Number of examples in the batch; the outputs' first axis holds as many rows of
            one as of another.
        vector: The output vector to try, which is written over. A row that gets no gradient from it
            may be given to any example.
        before: The signatures of this vector's gradients.
        free_graph: Whether nothing else will be back-propagated.

    Returns:
        The rows. If those of a use lie on an axis, evenly spaced, they come as an `ExampleAxis`.
    """
    with without_autocast(vector.device):
        owners = _owners(recorded, num_examples, vector, before, free_graph=free_graph)
    rows, certain = [], True
    for use, cells in zip(recorded.uses, owners, strict=True):
        found, is_only = _rows_of(use, cells, num_examples)
        rows.append(found)
        certain = certain and is_only
    unseen = [cells == _UNKNOWN for cells in owners]
    return Layout(
        tuple(rows), certain, tuple(cells if bool(cells.any()) else None for cells in unseen)
    )


def signatures(uses: Sequence[Use], gradients: Sequence[Tensor]) -> list[Signatures]:
    """Return the signatures of gradients, which need not be kept.

    Raises:
        ValueError: If one is not finite, naming the layer.
    """
    found = []
    for use, gradient in zip(uses, gradients, strict=True):
        with without_autocast(gradient.device):
            of_use = _signatures(use, gradient)
        if not bool(torch.isfinite(of_use.sizes).all()):
            raise NotFiniteError(
                f"the output gradients of {use.name!r} are not finite (NaN or infinity)"
            )
        found.append(of_use)
    return found


def random_vector(outputs: Tensor, generator: Generator) -> Tensor:
    """Return an output vector that reaches whatever any vector does."""
    # Made where the generator is, which may be another device than that of the outputs.
    vector = torch.randn(outputs.shape, generator=generator, device=generator.device)
    return vector.to(outputs)


def _owners(
    recorded: ForwardPass,
    num_examples: int,
    vector: Tensor,
    before: Sequence[Signatures],
    *,
    free_graph: bool,
) -> list[Tensor]:
    """Return, for every use, the example of each cell of its leading axes; or what else it is."""
    lowest, exponents = min((_EXPONENTS[b.dtype] for b in before), key=lambda w: w[1])
    base = 2 * exponents
    owners = [torch.zeros_like(of_use.sums, dtype=torch.long) for of_use in before]
    examples, weights = torch.arange(num_examples), torch.ones(num_examples, dtype=torch.float64)
    places = max(1, math.ceil(math.log(num_examples, base) - 1e-9))
    for place in range(places):
        digits = examples // base**place % base
        sizes = torch.exp2((digits % exponents + lowest).double())
        # In place, from one weight to the next: outputs may be the largest tensor of all.
        before_it, weights = weights, torch.where(digits < exponents, sizes, -sizes)
        parts = vector.view(num_examples, -1)
        parts.mul_((weights / before_it).to(parts)[:, None])
        last = free_graph and place == places - 1
        after = [
            _signatures(use, gradient).sums
            for use, gradient in zip(
                recorded.uses, recorded.gradients(vector, last=last), strict=True
            )
        ]
        for index, sums in enumerate(after):
            digit = _digit(before[index], sums, lowest, exponents)
            known = (owners[index] >= 0) & (digit >= 0)
            owners[index] = torch.where(
                known, owners[index] + digit * base**place, torch.minimum(owners[index], digit)
            )
    # A weight that no example has is a coincidence.
    return [torch.where(of_use < num_examples, of_use, _MIXED) for of_use in owners]


def _leading(use: Use) -> int:
    """Return how many leading axes of a use may hold examples."""
    return max(use.call.mergeable_axes, *(axis + 1 for axis in use.call.batch_axes), 1)


def _signatures(use: Use, gradient: Tensor) -> Signatures:
    """Return the signatures of the gradient at a use."""
    # Their sum may be too large for half precision where each of them is not.
    dtype, leading = statistics_dtype(gradient.dtype), _leading(use)
    if gradient.ndim <= leading:
        # A copy, since the gradient may be the output vector itself, which is written over.
        cells = gradient.to(dtype, copy=True)
        return Signatures(cells, cells.abs(), gradient.dtype)
    cells = gradient.to(dtype).flatten(leading)
    coefficients = torch.rand(
        cells.shape[-1], generator=Generator().manual_seed(cells.shape[-1]), dtype=torch.float64
    )
    # Not the sum of what `abs` returns, which would be a copy of the whole gradient.
    sizes = torch.linalg.vector_norm(cells, ord=1, dim=-1)
    return Signatures(cells @ (coefficients + 0.5).to(cells), sizes, gradient.dtype)


def _digit(before: Signatures, after: Tensor, lowest: int, exponents: int) -> Tensor:
    """Return the digit by whose weight each signature was multiplied; or what else it is.

    Args:
        before: The signatures.
        after: The sums of the weighted vector's gradient.
        lowest: The smallest exponent of the weights.
        exponents: How many exponents there are.
    """
    # In double precision, where no quotient of two finite numbers of a narrower dtype overflows.
    quotients = after.double() / before.sums.double()
    mantissas, powers = torch.frexp(quotients.abs())
    # A mantissa is from ½ to 1, and that of a power of two is ½; roundings may take it to 1.
    below = mantissas > 0.75
    digits = powers - 1 + below - lowest
    error = torch.where(below, 1 - mantissas, 2 * mantissas - 1)
    # Half precision has so few exponents that products may lose bits.
    half = before.dtype == torch.float16
    rounding = torch.finfo(before.dtype if half else before.sums.dtype).eps
    sizes = before.sizes.double()
    tolerance = _ROUNDINGS * rounding * sizes / before.sums.double().abs()
    pure = (error <= tolerance.clamp(max=_TELLING)) & (digits >= 0) & (digits < exponents)
    digits = torch.where(quotients < 0, digits + exponents, digits)
    nothing = (sizes == 0) & (after == 0)
    span = torch.finfo(before.dtype)
    faint = (sizes < span.tiny * 2.0**-lowest) | (sizes > span.max * 2.0 ** -(exponents + lowest))
    faint = (sizes > 0) & (faint | (tolerance > _TELLING))
    other = torch.where(nothing, _UNKNOWN, torch.where(faint, _FAINT, _MIXED))
    return torch.where(pure, digits, other).long()


def _rows_of(use: Use, owners: Tensor, num_examples: int) -> tuple[ExampleRows | None, bool]:
    """Return the rows of the examples in a use, and whether no others are possible.

    Args:
        use: The use.
        owners: The example of each cell of the leading axes, or that it is not known, or mixed.
        num_examples: Number of examples in the batch.
    """
    if bool((owners == _MIXED).any()):
        return None, True
    unseen = (owners == _UNKNOWN) | (owners == _FAINT)
    certain = not bool(unseen.any())
    passing = []
    for even in even_axes(use, num_examples):
        expected = even.owners(owners.shape, num_examples).to(owners.device)
        if bool((unseen | (owners == expected)).all()):
            passing.append(even)
    if passing:
        return passing[0], certain or len(passing) == 1
    if bool((owners == _FAINT).any()):
        return None, certain
    ways = [(axis, 1) for axis in use.call.batch_axes]
    ways += [(0, axes) for axes in range(2, use.call.mergeable_axes + 1)]
    for axis, merged in ways:
        rows = owners.movedim(axis, 0).flatten(0, merged - 1)
        found = _row_owners(rows.flatten(1) if rows.ndim > 1 else rows[:, None])
        if found is not None:
            return ScatteredRows.of(axis, merged, found, num_examples), certain
    return None, certain


def _row_owners(cells: Tensor) -> Tensor | None:
    """Return the owner of every row `[rows]` of cells `[rows, rest]`; None if one has several.

    A row that is not known goes to the owner of the one before it.
    """
    highest = cells.amax(dim=1) if cells.shape[1] else cells.new_full((len(cells),), _UNKNOWN)
    if bool(((cells != highest[:, None]) & (cells != _UNKNOWN)).any()):
        return None
    places = torch.arange(len(highest), device=cells.device)
    places = torch.where(highest >= 0, places, -1).cummax(dim=0).values
    return torch.where(places >= 0, highest[places.clamp(min=0)], 0)
