"""Many tensors in few messages."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)

# Small tensors are sent together up to this size; it is also what sending takes in memory.
_BUCKET_BYTES: Final = 32 * 2**20


class Bucket:
    """Tensors of one dtype and device, with one owner, in one flat tensor.

    Attributes:
        owner: Whose they are.
        flat: Their numbers, one after the other; a tensor that is alone is not copied.
    """

    def __init__(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Copy tensors into one."""
        self.owner = owner
        self._tensors: Sequence[Tensor] = tensors
        if len(tensors) == 1 and tensors[0].is_contiguous():
            self.flat = tensors[0].detach().view(-1)
            self._tensors = ()
        else:
            self.flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])

    def unpack(self) -> None:
        """Copy the numbers back into the tensors."""
        start = 0
        for tensor in self._tensors:
            tensor.detach().copy_(self.flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def buckets(
    tensors: Sequence[tuple[Tensor, int]], max_bytes: int = _BUCKET_BYTES
) -> Iterator[Bucket]:
    """Put tensors with the same owner, dtype and device into buckets, in order.

    Args:
        tensors: Tensors and the ranks of their owners.
        max_bytes: What a bucket of several tensors may hold.
    """
    together: list[Tensor] = []
    kind: tuple[object, ...] = ()
    for tensor, owner in tensors:
        found = (owner, tensor.dtype, tensor.device)
        full = sum(t.nbytes for t in together) + tensor.nbytes > max_bytes
        if together and (found != kind or full):
            yield Bucket(together, int(str(kind[0])))
            together = []
        kind = found
        together.append(tensor)
    if together:
        yield Bucket(together, int(str(kind[0])))


def portions(
    described: Sequence[tuple[Key, dict[str, Any]]],
) -> Iterator[list[tuple[Key, dict[str, Any]]]]:
    """Split what a process has told of its tensors into portions of one bucket each, or one key."""
    portion: list[tuple[Key, dict[str, Any]]] = []
    size = 0
    for key, named in described:
        num_bytes = sum(Laid.num_bytes(told) for told in named.values())
        if portion and size + num_bytes > _BUCKET_BYTES:
            yield portion
            portion, size = [], 0
        portion.append((key, named))
        size += num_bytes
    if portion:
        yield portion


class Laid:
    """A tensor, and the contiguous one with the same numbers in which it is sent.

    Matrices whose columns lie together, as those of `eigh`, keep doing so: products with the same
    numbers in another layout may differ in their last bits.
    """

    def __init__(self, wire: Tensor, columns: bool) -> None:
        """Take what is sent, and whether its columns are to lie together."""
        self.wire = wire
        self.tensor = wire.mT if columns else wire
        self.told = tuple(wire.shape), wire.dtype, columns

    @classmethod
    def of(cls, tensor: Tensor) -> Laid:
        """Lay out a tensor of this process."""
        columns = tensor.ndim > 1 and not tensor.is_contiguous() and tensor.mT.is_contiguous()
        return cls(tensor.mT if columns else tensor.contiguous(), columns)

    @classmethod
    def empty(cls, told: tuple[Any, torch.dtype, bool], device: torch.device) -> Laid:
        """Make room for one of another process."""
        shape, dtype, columns = told
        return cls(torch.empty(shape, dtype=dtype, device=device), columns)

    @staticmethod
    def num_bytes(told: tuple[Any, torch.dtype, bool]) -> int:
        """Return how large a tensor of another process is."""
        shape, dtype, _ = told
        return dtype.itemsize * int(math.prod(shape))
