"""Losses of outputs that may be several tensors: a dictionary, a tuple, a dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

from torch import Tensor
from typing_extensions import Self

from rotate_ewc._utils.structure import Packing, packed
from rotate_ewc.losses.base import BatchForm, Likelihood


@dataclass
class LastOutputs:
    """What the outputs of the last forward pass were made of.

    Attributes:
        packing: How they lie in one tensor; None if they were one.
    """

    packing: Packing | None = None


@dataclass(frozen=True, eq=False)
class Structured(Likelihood):
    """A loss whose outputs are packed into one tensor, which is all that tracing need know.

    Attributes:
        packing: How outputs lie in the tensor that the methods get; None if they are one tensor.
        last: Of the outputs of the last forward pass; shared by copies.
    """

    packing: Packing | None = None
    last: LastOutputs = field(default_factory=LastOutputs)

    @property
    def batch_form(self) -> BatchForm:
        """Targets may be anything."""
        return BatchForm.PAIR

    @property
    def current(self) -> Self:
        """The likelihood of outputs that lie in their tensor as the last ones do."""
        if self.packing is self.last.packing:
            return self
        return replace(self, packing=self.last.packing)

    def packing_forward(self, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a forward function whose outputs are one tensor."""

        @wraps(forward, assigned=(), updated=())
        def packing(inputs: Any) -> Any:
            outputs, self.last.packing = packed(self.chosen(forward(inputs)))
            return outputs

        return packing

    def chosen(self, outputs: Any) -> Any:
        """Return those of the model's outputs that the loss looks at."""
        return outputs

    def unpacked(self, outputs: Tensor) -> Any:
        """Return the model's outputs as they were."""
        return outputs if self.packing is None else self.packing.unpacked(outputs)
