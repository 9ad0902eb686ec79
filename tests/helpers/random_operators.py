"""Random operators with their dense matrices, written out without the operator's help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.thin import projections

BASES = st.sampled_from(["both", "gradient", "activation", "none"])


@dataclass(frozen=True)
class Layout:
    """How one block of an operator looks.

    Attributes:
        groups: Number of independent blocks of the parameter.
        d_out: Rows of the parameter as a matrix.
        columns: Columns of the parameter as a matrix; a bias in the block is one more.
        transposed: Whether the parameter is stored as `[groups, columns, d_out]`.
        joint: Whether a bias is in the block.
        bases: Which sides have a basis that is not the identity.
        form: Which of the parameter shapes is taken that have this matrix.
        cut_off: How many directions each of the bases lacks, if there are more than these.
    """

    groups: int
    d_out: int
    columns: int
    transposed: bool
    joint: bool
    bases: str
    form: int
    cut_off: tuple[int, int] = (0, 0)

    @property
    def d_in(self) -> int:
        """Columns of the block."""
        return self.columns + int(self.joint)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter: of two or four axes, or of fewer where one number allows it."""
        rows, rest = self.groups * self.d_out, self.columns
        if self.transposed:
            rows, rest = self.groups * self.columns, self.d_out
        split = (2, rest // 2) if rest % 2 == 0 else (1, rest)
        shapes: list[tuple[int, ...]] = [(rows, rest), (rows, *split, 1)]
        if rest == 1:
            shapes.append((rows,))
        if rows * rest == 1:
            shapes.append(())
        return shapes[self.form % len(shapes)]

    def names(self, number: int) -> tuple[str, ...]:
        """The block's parameters."""
        return (f"w{number}", f"b{number}") if self.joint else (f"w{number}",)

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the block's parameters."""
        shapes = (self.weight_shape, (self.groups * self.d_out,))
        return dict(zip(self.names(number), shapes, strict=False))

    def block(self, number: int, generator: torch.Generator, eigenvalues: str) -> Block:
        """Draw orthogonal bases and eigenvalues, some (or all, or none) of which are zero."""

        def rank(side: str, size: int, cut_off: int) -> int:
            return max(1, size - cut_off) if self.bases in (side, "both") else size

        def basis(side: str, size: int) -> Tensor | None:
            if self.bases not in (side, "both"):
                return None
            shape = (self.groups, size, size)
            normal = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(normal)[0][:, :, : ranks[side]]

        sizes = {"gradient": self.d_out, "activation": self.d_in}
        ranks = {s: rank(s, d, n) for (s, d), n in zip(sizes.items(), self.cut_off, strict=True)}
        # One more for what is not kept.
        shape = (self.groups, *(ranks[s] + (ranks[s] < d) for s, d in sizes.items()))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        values = {
            "some zero": 2 * (uniform - 0.4).clamp(min=0),
            "all zero": torch.zeros_like(uniform),
            "positive": uniform + 0.1,
        }
        return Block(
            self.names(number),
            basis("gradient", self.d_out),
            basis("activation", self.d_in),
            values[eigenvalues],
            transposed=self.transposed,
        )


@dataclass(frozen=True)
class RandomOperator:
    """An operator's description, from which it and its matrix are made independently.

    Attributes:
        layouts: Its blocks.
        order: A seed for the order of its parameters.
        seed: Seed of its numbers.
        eigenvalues: `"some zero"`, `"all zero"` or `"positive"`.
    """

    layouts: tuple[Layout, ...]
    order: int
    seed: int
    eigenvalues: str

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter shapes by name, in an order that is not that of the blocks."""
        unordered = {
            name: shape
            for number, layout in enumerate(self.layouts)
            for name, shape in layout.shapes(number).items()
        }
        names = list(unordered)
        generator = torch.Generator().manual_seed(self.order)
        order = torch.randperm(len(names), generator=generator).tolist()
        return {names[index]: unordered[names[index]] for index in order}

    def blocks(self) -> list[Block]:
        """The blocks; the same ones at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            layout.block(number, generator, self.eigenvalues)
            for number, layout in enumerate(self.layouts)
        ]

    def operator(self) -> EKFACLinearOperator:
        """The operator."""
        provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
        return EKFACLinearOperator.from_blocks(self.blocks(), self.shapes(), provenance)

    def positions(self) -> list[Tensor]:
        """For every block, where its entries `[groups, d_out, d_in]` are in the flat vector."""
        shapes = self.shapes()
        starts = dict(zip(shapes, accumulate(map(prod, shapes.values()), initial=0), strict=False))
        positions = []
        for number, layout in enumerate(self.layouts):
            weight, *bias = layout.names(number)
            entries = starts[weight] + torch.arange(prod(shapes[weight]))
            if layout.transposed:
                matrix = entries.reshape(layout.groups, layout.columns, layout.d_out).mT
            else:
                matrix = entries.reshape(layout.groups, layout.d_out, layout.columns)
            for name in bias:
                column = starts[name] + torch.arange(prod(shapes[name]))
                matrix = torch.cat([column.reshape(layout.groups, layout.d_out, 1), matrix], dim=2)
            positions.append(matrix)
        return positions

    def dense(self) -> Tensor:
        """The matrix `Σ_pq λ_pq P_p ⊗ R_q` of every group of every block.

        P and R are the projections on the directions of a side, and on the complement of these.
        """
        return _dense(self).clone()


@lru_cache(maxsize=4)
def _dense(random: RandomOperator) -> Tensor:
    size = sum(map(prod, random.shapes().values()))
    dense = torch.zeros(size, size, dtype=torch.float64)
    for block, positions in zip(random.blocks(), random.positions(), strict=True):
        for group, position in enumerate(positions):
            rows, columns = position.shape
            left = projections(block.gradient_basis, group, rows)
            right = projections(block.activation_basis, group, columns)
            for p, of_outputs in enumerate(left):
                for q, of_inputs in enumerate(right):
                    product = torch.from_numpy(np.kron(of_outputs, of_inputs))
                    term = block.eigenvalues[group, p, q] * product
                    dense[position.flatten()[:, None], position.flatten()] += term
    return dense


def random_operators(
    eigenvalues: Sequence[str] = ("some zero", "positive", "all zero"),
    max_blocks: int = 3,
    thin: bool = True,
) -> st.SearchStrategy[RandomOperator]:
    """Draw operators of one to `max_blocks` blocks, with thin ones among them."""
    lacking = st.integers(0, 3 if thin else 0)
    layouts = st.builds(
        Layout,
        groups=st.integers(1, 3),
        d_out=st.integers(1, 4),
        columns=st.integers(1, 4),
        transposed=st.booleans(),
        joint=st.booleans(),
        bases=BASES,
        form=st.integers(0, 3),
        cut_off=st.tuples(lacking, lacking),
    )
    return st.builds(
        RandomOperator,
        layouts=st.lists(layouts, min_size=1, max_size=max_blocks).map(tuple),
        order=st.integers(0, 100),
        seed=st.integers(0, 10_000),
        eigenvalues=st.sampled_from(eigenvalues),
    )
