"""Whether an estimate would come out again: of random models, and of two estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rotate_ewc._utils.preserve_state import random_states
from rotate_ewc._utils.tree import map_tensors
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.linalg.block import Block

# How much more than traces products may differ, where nearly equal eigenvectors turn by rounding.
_TURNING: Final = 10

_REMEDY: Final = (
    "the model or the data loader is random (shuffling, augmentation, dropout in a function). Make "
    "it deterministic, or pass check_deterministic=False"
)


class WatchedForward:
    """A forward function, of which is noted whether its first call draws random numbers.

    That costs nothing for models that draw none. Of another one the first batch is kept, so that
    its outputs can be computed once more.
    """

    def __init__(self, forward: Callable[[Any], Tensor], devices: Iterable[torch.device]) -> None:
        """Watch a function.

        Args:
            forward: From a batch's inputs to outputs.
            devices: Whose random states it may use, besides the CPU's.
        """
        self.__wrapped__ = self._forward = forward
        self._devices = set(devices)
        self._called = False
        self._first: tuple[Any, Tensor] | None = None

    def __call__(self, inputs: Any) -> Tensor:
        """Return the outputs."""
        if self._called:
            return self._forward(inputs)
        self._called = True
        with torch._C.DisableTorchFunction():
            before = self._random_states()
        outputs = self._forward(inputs)
        # No recorder is to see this.
        with torch._C.DisableTorchFunction():
            if isinstance(outputs, Tensor) and self._random_states() != before:
                # The data may fill the same tensors for the next batch.
                self._first = map_tensors(torch.clone, inputs), outputs.detach().clone()
        return outputs

    def warn_if_random(self) -> None:
        """Warn if the outputs of the first batch are others when they are computed once more."""
        if self._first is None:
            return
        inputs, outputs = self._first
        self._first = None
        with torch.no_grad():
            again = self._forward(inputs)
        if again.shape == outputs.shape and _distance(again, outputs) <= _tolerance(outputs.dtype):
            return
        warn_user(
            "the model's outputs are random: two runs of the first batch differ, although the "
            "modules that could be found are in eval mode, so that the noise enters the Fisher "
            "matrix. Draw random numbers only in training, as F.dropout(x, p, "
            "training=self.training) does, and put modules that forward finds in other ways into "
            "eval mode",
            RuntimeWarning,
        )

    def _random_states(self) -> dict[Any, Any]:
        """Return all random states, as values that can be compared."""
        return {state.key: _plain(state.read()) for state in random_states(self._devices)}


def check_equal(blocks: Sequence[Block], others: Sequence[Block]) -> None:
    """Raise if two estimates differ by more than rounding, naming the first block that does.

    Compared are the traces and the products with a random matrix. Eigenvectors of equal eigenvalues
    may turn, by which neither changes.

    Raises:
        ValueError: If they do.
    """
    if [block.label for block in blocks] != [block.label for block in others]:
        raise ValueError(
            f"two estimates have blocks {[block.label for block in blocks]} and "
            f"{[block.label for block in others]}; {_REMEDY}"
        )
    for block, other in zip(blocks, others, strict=True):
        first, second = block.trace.item(), other.trace.item()
        tolerance = _tolerance(block.eigenvalues.dtype)
        if abs(first - second) > tolerance * max(abs(first), abs(second)):
            raise ValueError(
                f"two estimates of the block of {block.label!r} have traces {first:.6g} and "
                f"{second:.6g}; {_REMEDY}"
            )
        distance = _distance(_random_product(block), _random_product(other))
        if distance > _TURNING * tolerance:
            raise ValueError(
                f"two estimates of the block of {block.label!r} have products with the same vector "
                f"that differ by {100 * distance:.2g} %; {_REMEDY}"
            )


def _plain(state: Any) -> Any:
    """Return a random state with lists instead of tensors and arrays."""
    if isinstance(state, tuple):
        # Python's has hundreds of numbers, which are plain already.
        return tuple(one if isinstance(one, int) else _plain(one) for one in state)
    return state.tolist() if hasattr(state, "tolist") else state


def _random_product(block: Block) -> Tensor:
    """Return the product of a block with a vector of random numbers, always the same."""
    groups, d_out, d_in = block.shape
    weight, *bias = block.parameters
    columns = {weight: d_in - len(bias), **dict.fromkeys(bias, 1)}
    shapes = {name: (groups * d_out * count,) for name, count in columns.items()}
    values = block.eigenvalues
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(block.shape, generator=generator, dtype=values.dtype).to(values.device)
    rotated = block.rotate(block.split(drawn, shapes))
    product = block.unrotate(block.spectrum * rotated, shapes)
    return torch.cat([product[name] for name in shapes])


def _distance(one: Tensor, other: Tensor) -> float:
    """Return how far tensors of one shape are from each other, relative to the larger."""
    norms = [
        torch.linalg.vector_norm(t.detach().double()).item() for t in (one - other, one, other)
    ]
    return norms[0] / max(norms[1], norms[2]) if norms[0] else 0.0


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-8 if dtype is torch.float64 else 1e-3
