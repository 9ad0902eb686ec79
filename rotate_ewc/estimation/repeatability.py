"""Whether an estimate would come out again: of random models, and of two estimates."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_ewc._utils.tree import map_tensors
from rotate_ewc._utils.warnings import warn_user
from rotate_ewc.linalg import kronecker
from rotate_ewc.linalg.block import Block


class WatchedForward:
    """A forward function, of which is noted whether its first call draws random numbers.

    That costs nothing for models that draw none. Of another one the first batch is kept, so that
    its outputs can be computed once more.
    """

    def __init__(self, forward: Callable[[Any], Tensor], devices: Iterable[torch.device]) -> None:
        """Watch a function.

        Args:
            forward: From a batch's inputs to outputs.
            devices: Whose random states it may use, beside the CPU's.
        """
        self._forward = forward
        self._devices = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self._called = False
        self._first: tuple[Any, Tensor] | None = None

    def __call__(self, inputs: Any) -> Tensor:
        """Return the outputs."""
        if self._called:
            return self._forward(inputs)
        self._called = True
        with torch._C.DisableTorchFunction():
            before = self._random_states()
            kept = map_tensors(torch.clone, inputs) if before is not None else None
        outputs = self._forward(inputs)
        if isinstance(outputs, Tensor) and self._random_states() != before:
            self._first = (kept, outputs.detach().clone())
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
