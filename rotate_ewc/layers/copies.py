"""Entries of parameters that are copied: looked up, gathered, or broadcast over the examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_ewc.layers.base import DIAGONAL, Form, IsParameter, LayerCall, Rule, form_within_reach
from rotate_ewc.layers.elementwise import ElementwiseCall
from rotate_ewc.layers.embedding import EmbeddingCall


@dataclass(frozen=True)
class BroadcastCall(ElementwiseCall):
    """The parameter `bias`, broadcast to the shape of `input`, of which only the shape matters."""

    @property
    def bias_form(self) -> Form:  # type: ignore[override]
        """A token, or several, have a basis; not so whatever scales or shifts data."""
        return form_within_reach(torch.Size() if self.bias is None else self.bias.shape)


@dataclass(frozen=True)
class GatherCall(LayerCall):
    """Copies of entries of `weight`: `weight.flatten()[input]`."""

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis, or the second."""
        return tuple(range(min(self.input.ndim, 2)))

    @property
    def mergeable_axes(self) -> int:
        """All axes of the positions."""
        return self.input.ndim

    @property
    def weight_form(self) -> Form:
        """Both sides get a basis, where that is within reach."""
        return form_within_reach(torch.Size() if self.weight is None else self.weight.shape)

    @property
    def bias_form(self) -> Form:
        """There is no bias."""
        return DIAGONAL

    def weight_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Add the gradient of every copy to its entry."""
        shape = torch.Size() if self.weight is None else self.weight.shape
        total = output_gradients.new_zeros(len(inputs), shape.numel())
        total.scatter_add_(1, inputs.flatten(1), output_gradients.flatten(1))
        return total.reshape(len(inputs), *shape)

    def bias_gradients(self, output_gradients: Tensor) -> Tensor:
        """Return nothing: there is no bias."""
        return output_gradients.new_zeros(len(output_gradients), 0)


def token(parameter: Tensor, shape: Sequence[int]) -> LayerCall:
    """Return the call that broadcasts a parameter over examples, as a token that all have."""
    call = BroadcastCall(_like(parameter, shape), None, parameter, view=_view(parameter, shape))
    # It may itself vary with the examples: then, copies of some of its entries are theirs.
    copied = any(shape[axis] > 1 for axis in call.batch_axes)
    return call if copied else _gathered(parameter, shape)


def broadcast(parameter: Tensor, shape: Sequence[int], *, shared: bool) -> LayerCall:
    """Return the call that broadcasts a parameter to the shape of data.

    Args:
        parameter: The parameter.
        shape: The data's shape.
        shared: Whether the parameter is known not to vary with the examples.
    """
    call = ElementwiseCall(_like(parameter, shape), None, parameter, view=_view(parameter, shape))
    # A second axis of size one, as of a single head, does not hold examples.
    over_examples = any(axis == 0 or shape[axis] > 1 for axis in call.batch_axes)
    return call if shared and over_examples else _gathered(parameter, shape)


def stretched(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Expand a tensor to a shape; leading axes of size one may be too many, as in `x[i] = y`."""
    return tensor.reshape(_view(tensor, shape)).expand(shape)


def _view(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(tensor.shape[max(0, tensor.ndim - len(shape)) :])


def _like(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """Return one number, expanded to a shape."""
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(shape)


def _gathered(parameter: Tensor, shape: Sequence[int]) -> GatherCall:
    return GatherCall(stretched(positions_of(parameter), shape), parameter, None)


def positions_of(parameter: Tensor) -> Tensor:
    """Return for every entry its position in the flattened parameter."""
    numbers = torch.arange(parameter.numel(), device=parameter.device)
    return numbers.view(parameter.shape)


def getitem(is_parameter: IsParameter, input: Tensor, index: object) -> LayerCall | None:
    """Read `input[index]`, where the index depends on data and `input` does not."""
    if isinstance(index, Tensor) and not _is_mask(index):
        return index_select(is_parameter, input, 0, index)
    return picking(lambda tensor: tensor[index])(is_parameter, input)


def index_select(
    is_parameter: IsParameter, input: Tensor, dim: int, index: Tensor
) -> LayerCall | None:
    """Read the arguments of `torch.index_select`, where the index depends on data."""
    if dim == 0 and is_parameter(input) and input.ndim > 0:
        return EmbeddingCall(index % len(input), input, None)
    return picking(torch.index_select)(is_parameter, input, dim, index)


def picking(function: Callable[..., Tensor]) -> Rule:
    """Return the rule for a function that returns copies of entries of its first argument."""

    def read(
        is_parameter: IsParameter, input: Tensor, *args: Any, **kwargs: Any
    ) -> GatherCall | None:
        if not is_parameter(input):
            return None
        return GatherCall(function(positions_of(input), *args, **kwargs), input, None)

    return read


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)
