"""Random numbers for sampled labels, by the example's place in all the data.

A generator that is drawn from in order gives an example other labels when the data are cut into
other batches, or are spread over several processes. Here numbers are made for many examples at a
time, from a seed of their own; each example takes those at its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Final

import torch
from torch import Generator, Tensor

# How many numbers are made at a time, at least for one example.
_AT_A_TIME: Final = 2**14

Make = Callable[..., Tensor]


class LabelGenerator(Generator):
    """A generator that knows which examples it draws for.

    `uniform` and `normal` give every example numbers that depend on nothing but the seed, its place
    and how many it needs. What is drawn from it in other ways, as from any generator, depends also
    on the batch.

    Attributes:
        position: Number of examples that were drawn for, in this process.
    """

    def __new__(cls, device: torch.device, *args: Any) -> LabelGenerator:
        """Make a generator on a device."""
        return super().__new__(cls, device)  # type: ignore[call-arg]

    def __init__(self, device: torch.device, seed: int, first: int = 0, stride: int = 1) -> None:
        """Begin before the first example.

        Args:
            device: Where the numbers are wanted.
            seed: Of all numbers.
            first: The place of this process's first example in all the data.
            stride: How far its examples are from each other, as with a `DistributedSampler`.
        """
        self.position = 0
        self._seed = seed
        self._first, self._stride = first, stride
        self._count = 0
        self._calls = 0
        self._source = Generator(device)
        self._made: dict[int, tuple[tuple[Any, ...], Tensor]] = {}

    def begin(self, count: int) -> None:
        """Go on to the next examples.

        Args:
            count: How many there are.
        """
        self._calls, self._count = 0, count
        self.manual_seed(_seed_of(self._seed, "batch", self._place(self.position)))
        self.position += count

    def rows(self, make: Make, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return numbers for the examples at hand; a second call returns others.

        Args:
            make: `torch.rand` or `torch.randn`.
            shape: With as many rows for every example.
            like: A tensor of the dtype and device that is wanted.
        """
        each = torch.Size(shape).numel() // max(1, self._count)
        at_a_time = max(1, _AT_A_TIME // max(1, each))
        call, self._calls = self._calls, self._calls + 1
        place = self._place(self.position - self._count)
        left, parts = self._count, []
        while left:
            cell, start = divmod(place, at_a_time)
            taken = min(left, -(-(at_a_time - start) // self._stride))
            made = self._cell(call, cell, make, at_a_time, each, like)
            parts.append(made[start : start + (taken - 1) * self._stride + 1 : self._stride])
            left, place = left - taken, place + taken * self._stride
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found.reshape(tuple(shape))

    def _place(self, position: int) -> int:
        """Return the place in all the data of an example of this process."""
        return self._first + position * self._stride

    def _cell(
        self, call: int, cell: int, make: Make, at_a_time: int, each: int, like: Tensor
    ) -> Tensor:
        """Return the numbers of a cell of examples, `[at_a_time, each]`; the last one is kept."""
        key = (make.__name__, each, like.dtype, call, cell)
        known = self._made.get(call)
        if known is None or known[0] != key:
            self._source.manual_seed(_seed_of(self._seed, *key))
            size = (at_a_time, each)
            made = make(size, generator=self._source, dtype=like.dtype, device=like.device)
            known = self._made[call] = key, made
        return known[1]


def uniform(shape: Sequence[int], like: Tensor, generator: Generator) -> Tensor:
    """Return numbers from 0 to 1 (excluded), for a likelihood's `sampled_vector`.

    Args:
        shape: With as many rows for every example, as the model's outputs have.
        like: A tensor of the dtype and device that is wanted.
        generator: As `sampled_vector` got it.
    """
    return _numbers(torch.rand, shape, like, generator)


def normal(shape: Sequence[int], like: Tensor, generator: Generator) -> Tensor:
    """Return standard normal numbers, as `uniform` does."""
    return _numbers(torch.randn, shape, like, generator)


def _numbers(make: Make, shape: Sequence[int], like: Tensor, generator: Generator) -> Tensor:
    if isinstance(generator, LabelGenerator):
        return generator.rows(make, shape, like)
    return make(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)


def _seed_of(*parts: object) -> int:
    """Return a seed that is different for different values."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
