"""Which process keeps which blocks of a penalty, where each keeps only its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.tree import place_of
from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.distributed.sharding import gathered
from rotate_ewc.linalg.block import Block
from rotate_ewc.penalty.terms import Term


class Owners:
    """The processes that share a penalty; by default this one alone, which keeps everything.

    Every block has one owner, which keeps its bases, eigenvalues and anchors, and computes with
    them. In the other processes it consists of meta tensors: shapes without numbers. Blocks with a
    common basis have the same owner.

    Attributes:
        ranks: The processes.
        device: Where tensors from other processes are put.
    """

    def __init__(
        self,
        ranks: Ranks | None = None,
        owners: Mapping[str, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Begin with the owners of some parameters, by name."""
        self.ranks = Ranks() if ranks is None else ranks
        self.device = torch.device(device)
        self._owners = dict(owners or {})

    @property
    def are_several(self) -> bool:
        """Whether there is more than one process."""
        return self.ranks.size > 1

    def are_of(self, ranks: Ranks) -> bool:
        """Whether these are the processes of a group."""
        return self.ranks.is_same(ranks)

    def has(self, name: str) -> bool:
        """Whether this process owns a parameter's block."""
        return not self.are_several or self._owners.get(name) == self.ranks.rank

    def of(self, block: Block) -> int:
        """Return the rank of a block's owner."""
        return self._owners[block.parameters[0]]

    def including(self, blocks: Iterable[Block]) -> Owners:
        """Return the owners of these blocks too; the largest go first, to the fewest bytes.

        Args:
            blocks: All blocks that are kept, old and new. Old ones keep their owners.
        """
        if not self.are_several:
            return self
        blocks = list(blocks)
        owners, new = dict(self._owners), []
        kept = [0.0] * self.ranks.size
        for names, num_bytes in _connected(blocks):
            known = next((owners[name] for name in names if name in owners), None)
            if known is None:
                new.append((num_bytes, names))
            else:
                owners.update({name: owners.get(name, known) for name in names})
                kept[known] += num_bytes
        assigned = self.ranks.owners([num_bytes for num_bytes, _ in new], kept)
        for (_, names), owner in zip(new, assigned, strict=True):
            owners.update(dict.fromkeys(names, owner))
        devices = (b.eigenvalues.device for b in blocks if not b.eigenvalues.is_meta)
        return Owners(self.ranks, owners, next(devices, self.device))

    def keep(self, term: Term) -> Term:
        """Return a term with the numbers of this process's own blocks alone."""
        if not self.are_several:
            return term
        known: dict[object, Tensor] = {}
        meta = partial(torch.empty_like, device="meta")

        def without_numbers(tensor: Tensor) -> Tensor:
            # What blocks share they share afterwards.
            return known.setdefault(place_of(tensor), meta(tensor))

        operator = term.operator.map_blocks(
            lambda block: block if self.has(block.parameters[0]) else block.map(without_numbers)
        )
        anchor = {
            name: tensor if self.has(name) else without_numbers(tensor)
            for name, tensor in term.anchor.items()
        }
        return replace(term, operator=operator, anchor=anchor)

    def completed(self, terms: Sequence[Term]) -> list[Term]:
        """Return terms with the numbers of all processes, all of which must call this.

        Blocks that share a basis have copies of it afterwards, in all processes alike.
        """
        if not self.are_several:
            return list(terms)
        own: dict[tuple[int, str, str], dict[str, Tensor]] = {}
        for index, term in enumerate(terms):
            for block in term.operator.blocks:
                if self.has(block.parameters[0]):
                    copies = {name: tensor.clone() for name, tensor in block.tensors.items()}
                    own[index, "block", block.label] = copies
            for name, tensor in term.anchor.items():
                if self.has(name):
                    own[index, "anchor", name] = {name: tensor}
        with self.together():
            found = self.ranks.share("terms of the penalty", own, self.device)

        def block_of(index: int, block: Block) -> Block:
            tensors: dict[str, Any] = dict(found[index, "block", block.label])
            return replace(block, **tensors)

        return [
            Term(
                term.operator.map_blocks(partial(block_of, index)),
                {name: found[index, "anchor", name][name] for name in term.anchor},
                term.weight,
            )
            for index, term in enumerate(terms)
        ]

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all numbers of this process's own tensors; all processes must call this.

        Args:
            tensors: By the names of parameters, in the same order in all processes. They may be
                spread over processes.
        """
        found = {}
        for name, tensor in tensors.items():
            whole = gathered(tensor.detach())  # by all, whoever keeps it
            if self.has(name):
                found[name] = whole
        return found

    def handed_out(
        self, place: str, own: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield tensors of all processes by key, piece by piece; all of them must take all pieces.

        Args:
            place: What is handed out.
            own: This process's own, by key and name.
        """
        return self.ranks.stream(place, own, self.device)

    def moved(self, function: Callable[[Tensor], Tensor]) -> Owners:
        """Return the owners of what a function has moved to another device."""
        if not self.are_several:
            return self
        device = function(torch.empty(0, device=self.device)).device
        return Owners(self.ranks, self._owners, device)

    def map(self, function: Callable[[Tensor], Tensor], terms: Sequence[Term]) -> list[Term]:
        """Return terms with their tensors moved or cast; of those of other processes, the dtype."""

        def on_any(tensor: Tensor) -> Tensor:
            if not (self.are_several and tensor.is_meta):
                return function(tensor)
            return tensor.to(function(torch.empty(0, dtype=tensor.dtype)).dtype)

        return [term.map(on_any) for term in terms]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes."""
        return self.ranks.total("sums", numbers)

    def together(self) -> AbstractContextManager[None]:
        """Succeed in all processes, or raise in all of them."""
        return self.ranks.together()

    def __deepcopy__(self, memo: dict[int, Any]) -> Owners:
        """Return the owners themselves, which never change; a group cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Refuse to be pickled where a process has only its share."""
        if self.are_several:
            raise TypeError(
                "a penalty with sharded=True cannot be pickled: this process has only its own "
                "blocks. Expected penalty.save(path) or penalty.state_dict(), in all processes"
            )
        return Owners, ()


def _connected(blocks: Iterable[Block]) -> list[tuple[list[str], int]]:
    """Return the parameters' names, and the bytes, of blocks that must have the same owner."""
    found: list[tuple[set[object], list[str], int]] = []
    for block in blocks:
        tensors = block.tensors
        keys: set[object] = {*block.parameters}
        keys |= {place_of(tensor) for tensor in tensors.values()}
        names, num_bytes = list(block.parameters), sum(t.nbytes for t in tensors.values())
        apart = []
        for one in found:
            if one[0].isdisjoint(keys):
                apart.append(one)
            else:
                keys, names, num_bytes = keys | one[0], one[1] + names, num_bytes + one[2]
        found = [*apart, (keys, names, num_bytes)]
    return [(list(dict.fromkeys(names)), num_bytes) for _, names, num_bytes in found]
