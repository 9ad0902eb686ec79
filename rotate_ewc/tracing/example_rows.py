"""Find which rows of a layer's tensors belong to which example, by measuring it.

Back-propagation is linear in the output vector. So if the part of example n is multiplied by w_n,
a row of a layer's output gradient is multiplied by w_n as well if only example n depends on it, and
by nothing in particular if several examples do. The weights are powers of two, by which
floating-point numbers are multiplied without rounding: a row that is scaled by anything but one of
them, up to a few roundings, mixes examples. Where there are more examples than powers of two that a
dtype holds, their numbers are told digit by digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from einops import rearrange
from torch import Generator, Tensor

from rotate_ewc._utils.numerics import statistics_dtype
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.tracing.recorder import ForwardPass, Use

# The smallest exponent of the weights and how many there are: a part of a dtype's range.
_EXPONENTS: Final = {
    torch.float16: (-3, 8),
    torch.bfloat16: (-30, 96),
    torch.float32: (-30, 96),
    torch.float64: (-300, 700),
}
# Rows whose gradient is zero, and rows on which several examples depend.
_UNKNOWN: Final = -1
_MIXED: Final = -2


class ExampleRows(Protocol):
    """Which rows of a use's input and output belong to which example."""

    @property
    def present(self) -> Tensor | None:
        """Which of the rows `[num_examples, rows]` exist; None if all do."""

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return a tensor as `[num_examples, rows, *rest]`; anything where a row does not exist."""

    def gradients_first(self, gradients: Tensor, num_examples: int) -> Tensor:
        """Return gradients as `[num_examples, rows, *rest]`; zeros where a row does not exist."""

    def size_of(self, shape: Sequence[int]) -> int:
        """Return how many numbers a tensor of some shape has with the examples first."""


@dataclass(frozen=True)
class ExampleAxis:
    """An axis that holds the examples, each of which owns as many rows of it as every other.

    Attributes:
        axis: The axis; it reads `(runs, examples, rows)`.
        runs: In how many runs of consecutive rows an example's lie: one; or as many as it has rows,
            where the rows are ordered by time first (as inside `MultiheadAttention`); or a number
            between (the same, with several windows of each example).
    """

    axis: int
    runs: int = 1

    @property
    def present(self) -> None:
        """All rows exist."""
        return

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return a view `[num_examples, rows, *rest]` of a tensor."""
        moved = tensor.movedim(self.axis, 0)
        return rearrange(moved, "(r n t) ... -> n (r t) ...", n=num_examples, r=self.runs)

    def gradients_first(self, gradients: Tensor, num_examples: int) -> Tensor:
        """Return a view likewise."""
        return self.examples_first(gradients, num_examples)

    def size_of(self, shape: Sequence[int]) -> int:
        """Return how many numbers a tensor of some shape has."""
        return math.prod(shape)

    def owners(self, leading: Sequence[int], num_examples: int) -> Tensor:
        """Return the example of every cell of the leading axes, `[*leading]`."""
        size = leading[self.axis]
        examples = torch.arange(size).view(self.runs, num_examples, -1)
        examples = examples // examples.shape[2] % num_examples
        view = [1] * len(leading)
        view[self.axis] = size
        return examples.reshape(view).expand(*leading)


@dataclass(frozen=True, eq=False)
class ScatteredRows:
    """Rows of which every example owns some, in any order and number.

    Attributes:
        axis: The axis of the rows, or the first of those that are merged into one.
        merged: How many axes are merged; then `axis` is 0.
        rows: Every example's rows, `[num_examples, most]`; a row of another one where it has less.
        present: Which of them are the example's own.
    """

    axis: int
    merged: int
    rows: Tensor
    present: Tensor

    @classmethod
    def of(cls, axis: int, merged: int, owners: Tensor, num_examples: int) -> ScatteredRows:
        """Sort rows by their owners `[size]`."""
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=num_examples)
        starts = counts.cumsum(0) - counts
        places = torch.arange(int(counts.max()), device=owners.device)
        present = places < counts[:, None]
        positions = torch.where(present, starts[:, None] + places, 0)
        return cls(axis, merged, order[positions], present)

    def examples_first(self, tensor: Tensor, num_examples: int) -> Tensor:
        """Return the rows of every example, `[num_examples, most, *rest]`, a copy."""
        del num_examples
        return tensor.movedim(self.axis, 0).flatten(0, self.merged - 1)[self.rows]

    def gradients_first(self, gradients: Tensor, num_examples: int) -> Tensor:
        """Return the gradients of every example's rows, with zeros for those that it lacks."""
        found = self.examples_first(gradients, num_examples)
        return found.mul_(self.present.view(*self.present.shape, *(1,) * (found.ndim - 2)))

    def size_of(self, shape: Sequence[int]) -> int:
        """Return how many numbers a tensor of some shape has when every example has the most."""
        rows = math.prod(shape[self.axis : self.axis + self.merged])
        return math.prod(shape) // max(1, rows) * self.rows.numel()


@dataclass(frozen=True)
class Layout:
    """Where the examples are in all uses of a batch.

    Attributes:
        rows: For every use; None where examples are mixed.
        certain: Whether it was seen for every row.
    """

    rows: tuple[ExampleRows | None, ...]
    certain: bool


def find_example_rows(
    recorded: ForwardPass,
    num_examples: int,
    generator: Generator,
    vector: Tensor | None = None,
    gradients: Sequence[Tensor] | None = None,
    *,
    free_graph: bool = False,
) -> Layout:
    """Find the rows of every example in every use.

    Args:
        recorded: The forward pass.
        num_examples: Number of examples in the batch; the outputs' first axis holds as many rows of
            one as of another.
        generator: Where a random output vector comes from.
        vector: An output vector to take instead. What is found then holds for this vector: a row
            that gets no gradient from it may be given to any example.
        gradients: The gradients of this vector at every use.
        free_graph: Whether nothing else will be back-propagated.

    Returns:
        The rows. If those of a use lie on an axis, evenly spaced, they come as an `ExampleAxis`.

    Raises:
        ValueError: If a gradient is not finite, naming the layer.
    """
    if num_examples == 1 or not recorded.uses:
        rows = [next(_even(use, 1), None) for use in recorded.uses]
        return Layout(tuple(rows), certain=False)
    if vector is None or gradients is None:
        outputs = recorded.outputs.detach()
        # Made where the generator is, which may be another device than that of the outputs.
        vector = torch.randn(outputs.shape, generator=generator, device=generator.device)
        vector = vector.to(outputs)
        gradients = recorded.gradients(vector, last=False)
    lowest, base = _weights(gradients)
    before = [
        _signatures(use, gradient) for use, gradient in zip(recorded.uses, gradients, strict=True)
    ]
    # Or several sets of gradients would live at once.
    del gradients
    owners = [torch.zeros(cells.shape, dtype=torch.long, device=cells.device) for cells in before]
    examples = torch.arange(num_examples)
    places = _digits_of(num_examples, base)
    for place in range(places):
        digits = examples // base**place % base
        weights = torch.ldexp(torch.ones(num_examples, dtype=torch.float64), digits + lowest)
        weighted = _by_example(vector, weights)
        last = free_graph and place == places - 1
        for index, gradient in enumerate(recorded.gradients(weighted, last=last)):
            after = _signatures(recorded.uses[index], gradient)
            digit = _digit(before[index], after, lowest, base)
            known = (owners[index] >= 0) & (digit >= 0)
            owners[index] = torch.where(
                known, owners[index] + digit * base**place, torch.minimum(owners[index], digit)
            )
    found = [
        _rows_of(use, cells, num_examples) for use, cells in zip(recorded.uses, owners, strict=True)
    ]
    return Layout(tuple(rows for rows, _ in found), all(certain for _, certain in found))


def mixing_message(uses: Sequence[Use], num_examples: int) -> str:
    """Say which layers mix the examples of a batch, and what to do."""
    shapes = {use.name: list(use.call.input.shape) for use in uses}
    layers = ", ".join(f"{name!r} (input shape {shape})" for name, shape in shapes.items())
    return (
        f"the outputs of one example depend on other examples' values in the layer of {layers}, "
        f"for a batch of {num_examples} examples; expected independent examples. Use BatchNorm in "
        f"eval mode with running statistics; pass batch_size_fn if the batch has another number of "
        f"examples; and where examples do depend on each other (a graph, a contrastive loss), take "
        f"a batch for one example: batch_size_fn=lambda inputs: 1, which is exact with "
        f"fisher_type='type2'"
    )


def _weights(gradients: Sequence[Tensor]) -> tuple[int, int]:
    """Return the smallest exponent of the weights, and how many exponents there are."""
    narrowest = min((_EXPONENTS[gradient.dtype] for gradient in gradients), key=lambda w: w[1])
    return narrowest


def _digits_of(num_examples: int, base: int) -> int:
    """Return how many digits it takes to tell the examples apart."""
    return max(1, math.ceil(math.log(num_examples, base) - 1e-9))


def _by_example(vector: Tensor, weights: Tensor) -> Tensor:
    """Multiply each example's part of an output vector by its weight."""
    parts = vector.reshape(len(weights), -1)
    return (parts * weights.to(parts)[:, None]).view_as(vector)


def _leading(use: Use) -> int:
    """Return how many leading axes of a use may hold examples."""
    return max(use.call.mergeable_axes, *(axis + 1 for axis in use.call.batch_axes), 1)


def _signatures(use: Use, gradient: Tensor) -> Tensor:
    """Return a number for each cell of the leading axes, which is 0 if and only if its gradient is.

    It is a fixed random combination of the entries, the same for each cell.
    """
    # Their sum may be too large for half precision where each of them is not.
    dtype = statistics_dtype(gradient.dtype)
    if not bool(torch.isfinite(gradient.sum(dtype=dtype))):
        raise NotFiniteError(
            f"the output gradients of {use.name!r} are not finite (NaN or infinity)"
        )
    cells = gradient.to(dtype).flatten(_leading(use)) if gradient.ndim > _leading(use) else None
    if cells is None:
        return gradient.to(dtype)
    coefficients = torch.rand(
        cells.shape[-1], generator=Generator().manual_seed(cells.shape[-1]), dtype=torch.float64
    )
    return cells @ (coefficients + 0.5).to(cells)


def _digit(before: Tensor, after: Tensor, lowest: int, base: int) -> Tensor:
    """Return the exponent by which each signature was multiplied, from 0 to `base`."""
    # In double precision, where no quotient of two finite numbers of a narrower dtype overflows.
    mantissas, exponents = torch.frexp(after.double() / before.double())
    tolerance = 64 * torch.finfo(before.dtype).eps
    # A mantissa is from ½ to 1, and that of a power of two is ½; roundings may take it to 1.
    below = (1 - mantissas) <= tolerance
    digits = exponents - 1 + below - lowest
    pure = below | ((mantissas - 0.5).abs() <= tolerance)
    pure &= (digits >= 0) & (digits < base)
    digits = torch.where(pure, digits, _MIXED)
    return torch.where(before == 0, torch.where(after == 0, _UNKNOWN, _MIXED), digits).long()


def _even(use: Use, num_examples: int) -> Iterator[ExampleAxis]:
    """Yield the even layouts that the shape of a use's input allows, likely ones first."""
    shape = use.call.input.shape
    for axis in use.call.batch_axes:
        rows, left_over = divmod(shape[axis], num_examples)
        if left_over or not rows:
            continue
        yield ExampleAxis(axis)
        if num_examples > 1 and rows > 1:
            yield ExampleAxis(axis, rows)
            yield from (ExampleAxis(axis, r) for r in range(2, rows) if rows % r == 0)


def _rows_of(use: Use, owners: Tensor, num_examples: int) -> tuple[ExampleRows | None, bool]:
    """Return the rows of the examples in a use, and whether they are certain.

    Args:
        use: The use.
        owners: The example of each cell of the leading axes, or that it is not known, or mixed.
        num_examples: Number of examples in the batch.
    """
    if bool((owners == _MIXED).any()):
        return None, False
    unknown = owners == _UNKNOWN
    passing = []
    for even in _even(use, num_examples):
        expected = even.owners(owners.shape, num_examples)
        if bool((unknown | (owners == expected)).all()):
            passing.append(even)
    if passing:
        return passing[0], len(passing) == 1
    merged = use.call.mergeable_axes
    ways = [(axis, 1) for axis in use.call.batch_axes]
    ways += [(0, axes) for axes in range(2, merged + 1)]
    for axis, axes in ways:
        rows = owners.movedim(axis, 0).flatten(0, axes - 1).flatten(1)
        found = _row_owners(rows)
        if found is not None:
            return ScatteredRows.of(axis, axes, found, num_examples), not bool(unknown.any())
    return None, False


def _row_owners(cells: Tensor) -> Tensor | None:
    """Return the owner of every row `[rows]` of cells `[rows, rest]`; None if one has several.

    A row that is not known goes to the owner of the one before it.
    """
    highest = cells.amax(dim=1) if cells.shape[1] else cells.new_full((len(cells),), _UNKNOWN)
    if bool(((cells != highest[:, None]) & (cells != _UNKNOWN)).any()):
        return None
    places = torch.where(highest >= 0, torch.arange(len(highest)), -1).cummax(dim=0).values
    return torch.where(places >= 0, highest[places.clamp(min=0)], 0)
