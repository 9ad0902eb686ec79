"""The quadratic terms of a penalty, with the blocks of many of them in one set of products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.linalg.block import Block, laid_out


@dataclass(frozen=True)
class Term:
    """One quadratic term of the penalty.

    Attributes:
        operator: The Fisher matrix.
        anchor: The point that it pulls towards, by parameter name.
        weight: Its factor.
    """

    operator: EKFACLinearOperator
    anchor: dict[str, Tensor]
    weight: float

    def map(self, function: Callable[[Tensor], Tensor]) -> Term:
        """Return the term with every tensor replaced by `function` of it."""
        anchor = {name: function(tensor) for name, tensor in self.anchor.items()}
        return Term(self.operator.map(function), anchor, self.weight)

    def only(self, wanted: Callable[[str, Tensor], bool]) -> Term | None:
        """Return the term without the blocks of unwanted parameters; None if nothing is left.

        Args:
            wanted: Whether to keep a parameter, from its name and anchor.
        """
        names = {name for name, anchor in self.anchor.items() if wanted(name, anchor)}
        if len(names) == len(self.anchor):
            return self
        blocks = [block for block in self.operator.blocks if names.issuperset(block.parameters)]
        if not blocks:
            return None
        kept = {name: self.anchor[name] for block in blocks for name in block.parameters}
        shapes = {name: anchor.shape for name, anchor in kept.items()}
        operator = EKFACLinearOperator.from_blocks(blocks, shapes, self.operator.provenance)
        return Term(operator, kept, self.weight)


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks of T terms for the same parameters, as the groups of one block.

    Attributes:
        names: The parameters' names in the model, in the order of `block.parameters`.
        block: T · groups blocks in one, with the terms' weights in its eigenvalues. Its parameters
            have names of their own, because those of the model may be in several stacks.
        anchors: What the parameters are pulled to, `[T, *shape]` each.
    """

    names: tuple[str, ...]
    block: Block
    anchors: tuple[Tensor, ...]

    @property
    def members(self) -> Iterator[tuple[str, str, Tensor]]:
        """For each parameter its name in `block`, its name in the model, and its anchors."""
        return zip(self.block.parameters, self.names, self.anchors, strict=True)


def stack_terms(
    terms: Sequence[Term], is_kept: Callable[[str], bool]
) -> tuple[list[Term], list[Stack]]:
    """Put the blocks of terms that have the same form into stacks.

    Terms whose parameters have grown in between, or changed their dtype, or that keep other numbers
    of directions, are in different stacks.

    Args:
        terms: The terms.
        is_kept: Whether this process keeps the block of a parameter, by name. The others are in no
            stack, but they are numbered too, so that all processes have the same numbers.

    Returns:
        The terms, whose bases are now views of those of the stacks; and the stacks.
    """
    together: dict[tuple[object, ...], list[tuple[int, Block]]] = {}
    for index, term in enumerate(terms):
        for block in term.operator.blocks:
            shapes = tuple(term.anchor[name].shape for name in block.parameters)
            bases = block.gradient_basis, block.activation_basis
            sides = tuple(None if basis is None else (basis.shape, basis.dtype) for basis in bases)
            values = (block.eigenvalues.shape, block.eigenvalues.dtype)
            form = (block.parameters, shapes, values, sides, block.transposed)
            together.setdefault(form, []).append((index, block))
    stacks: list[Stack] = []
    shared: dict[tuple[int, tuple[str, ...]], Block] = {}
    for number, members in enumerate(together.values()):
        if not is_kept(members[0][1].parameters[0]):
            continue
        stack = _stack(number, [(terms[index], block) for index, block in members])
        stacks.append(stack)
        for place, (index, block) in enumerate(members):
            shared[index, block.parameters] = _view(stack.block, place, block)
    viewing = [_with_blocks(term, index, shared) for index, term in enumerate(terms)]
    return viewing, stacks


def _with_blocks(
    term: Term, index: int, shared: Mapping[tuple[int, tuple[str, ...]], Block]
) -> Term:
    operator = term.operator.map_blocks(lambda block: shared.get((index, block.parameters), block))
    return replace(term, operator=operator)


def _stack(index: int, members: Sequence[tuple[Term, Block]]) -> Stack:
    first = members[0][1]
    anchors = tuple(
        _stacked([term.anchor[name] for term, _ in members]) for name in first.parameters
    )
    eigenvalues = torch.cat([block.eigenvalues * term.weight for term, block in members])
    block = Block(
        tuple(f"{index}/{name}" for name in first.parameters),
        _joined([block.gradient_basis for _, block in members]),
        _joined([block.activation_basis for _, block in members]),
        laid_out(eigenvalues, first.transposed),
        first.transposed,
    )
    # Found now, and not in the first product, which may be compiled.
    block.prepare()
    return Stack(first.parameters, block, anchors)


def _view(stacked: Block, place: int, block: Block) -> Block:
    """Return a block with its bases taken from the groups of a stack."""
    groups = len(block.eigenvalues)
    own = slice(place * groups, (place + 1) * groups)
    gradient_basis, activation_basis = (
        None if basis is None else basis[own]
        for basis in (stacked.gradient_basis, stacked.activation_basis)
    )
    return replace(block, gradient_basis=gradient_basis, activation_basis=activation_basis)


def _stacked(anchors: Sequence[Tensor]) -> Tensor:
    """Stack anchors; one alone, which may be as large as a model, is not copied."""
    return anchors[0].contiguous()[None] if len(anchors) == 1 else torch.stack([*anchors])


def _joined(bases: Sequence[Tensor | None]) -> Tensor | None:
    """Join bases along the axis of groups; one alone is not copied."""
    present = [basis for basis in bases if basis is not None]
    if len(present) <= 1:
        return present[0] if present else None
    return torch.cat(present)
