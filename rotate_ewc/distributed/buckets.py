"""Many tensors in few messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

# Small tensors are sent together up to this size; it is also what sending takes in memory.
BUCKET_BYTES: Final = 32 * 2**20


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
    tensors: Sequence[tuple[Tensor, int]], max_bytes: int = BUCKET_BYTES
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
