"""`embedding`: a linear map of one-hot vectors, which are never written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from rotate_ewc.layers.base import FactoredCall, Factors, Form, IsParameter


@dataclass(frozen=True)
class EmbeddingCall(FactoredCall):
    """A look-up of rows of `weight`, `[vocabulary, *features]`.

    Attributes:
        padding_index: The row that no gradient reaches; -1 if there is none.
    """

    padding_index: int = -1

    # The covariance of one-hot vectors is diagonal: the identity is their eigenbasis.
    weight_form: ClassVar[Form] = Form(Factors.LOOKUP, transposed=True)

    @property
    def batch_axes(self) -> tuple[int, ...]:
        """The first axis, or the second (time-first sequences)."""
        return tuple(range(min(self.input.ndim, 2)))

    @property
    def mergeable_axes(self) -> int:
        """All axes of the indices."""
        return self.input.ndim

    def activations(self, inputs: Tensor) -> Tensor:
        """Lay out the indices as `[1, n, shared, 1]`; -1 for padding."""
        indices = inputs.masked_fill(inputs == self.padding_index, -1)
        return rearrange(indices, "n ... -> 1 n (...) 1")

    def gradients(self, output_gradients: Tensor) -> Tensor:
        """Lay out the output's gradient as `[1, n, shared, d_out]`."""
        features = 0 if self.weight is None else self.weight[0].numel()
        return output_gradients.reshape(1, len(output_gradients), -1, features)

    def weight_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Add the gradients to the rows looked up, `[n, vocabulary, *features]`."""
        indices = self.activations(inputs)[0, :, :, 0]
        shape = torch.Size((0, 0)) if self.weight is None else self.weight.shape
        rows = scatter_rows(self.gradients(output_gradients)[0], indices, shape[0])
        return rows.reshape(len(inputs), *shape)


def embedding(
    _: IsParameter,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> EmbeddingCall:
    """Read the arguments of `torch.nn.functional.embedding`."""
    del norm_type, sparse
    if max_norm is not None:
        raise ValueError(
            "an embedding has max_norm set, which rescales its weight whenever it is used; "
            "expected max_norm=None"
        )
    if scale_grad_by_freq:
        raise ValueError(
            "an embedding has scale_grad_by_freq set, with which its gradient is not that of the "
            "loss; expected scale_grad_by_freq=False"
        )
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    return EmbeddingCall(input, weight, None, padding_index=padding)


def scatter_rows(gradients: Tensor, indices: Tensor, vocabulary: int) -> Tensor:
    """Add gradients `[n, shared, d]` to the rows looked up → `[n, vocabulary, d]`.

    Negative indices count nothing.
    """
    examples, features = len(indices), gradients.shape[2]
    kept = (indices >= 0).flatten()
    rows = (torch.arange(examples, device=indices.device)[:, None] * vocabulary + indices).flatten()
    total = gradients.new_zeros(examples * vocabulary, features)
    total.index_add_(0, rows[kept], gradients.flatten(0, 1)[kept])
    return total.view(examples, vocabulary, features)
