"""Out of memory in the work on one block: what is left of the work again, in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

import torch

# What allocators say that have no error of their own: those of the CPU, of MPS, and of cuBLAS.
_MESSAGES: Final = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "alloc_failed",
)


class Divisible(Protocol):
    """Examples that can be worked on in two halves."""

    @property
    def label(self) -> str:
        """The block's name."""

    def halves(self: PieceType) -> Sequence[PieceType]:
        """Return the two halves; nothing for a single example."""


PieceType = TypeVar("PieceType", bound=Divisible)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on whatever device."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _MESSAGES)


def in_pieces(
    piece: PieceType, additions: Callable[[PieceType, int], Iterator[None]], done: int = 0
) -> None:
    """Add what some examples contribute; where memory does not suffice, one half after the other.

    Nothing counts twice: an addition is made for all examples of a piece or for none of them, and
    those that were made before memory ran out are left out for the halves.

    Args:
        piece: The examples.
        additions: From examples, and the number of first additions to leave out, to a generator
            that makes the others and yields after each. How many there are must not depend on the
            number of examples, and an addition must fail before it changes a sum, or not at all.
        done: How many additions have been made.

    Raises:
        MemoryError: If a single example needs more memory than there is, naming the block.
    """
    try:
        for _ in additions(piece, done):
            done += 1
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{error}"
    # Not in the handler: as long as the error lives, so do the tensors of the work that failed.
    halves = piece.halves()
    if not halves:
        raise MemoryError(
            f"out of memory in the work on a single example for the block of {piece.label!r} "
            f"({reason}); pass a smaller memory_budget, so that less is kept beside it, use "
            f"smaller batches, or leave the parameter out (exclude, or params)"
        )
    for half in halves:
        in_pieces(half, additions, done)
