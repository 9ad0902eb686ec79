"""What a layer family must tell: how one use of its parameters makes per-example gradients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Final

import torch
from einops import einsum, rearrange
from torch import Tensor

from rotate_ewc.linalg.block import matrix_shape


class Factors(Enum):
    """In which factored form a layer family knows its per-example gradients, if any."""

    OUTER_PRODUCTS = "outer products"
    """`G_n = Σ_s g_ns a_nsᵀ`."""

    LOOKUP = "lookup"
    """`G_n = Σ_s g_ns e_kᵀ`, with k the index looked up at position s."""

    TIED = "lookup and outer products"
    """The sum of both, of an embedding tied to an output layer."""

    NONE = "none"
    """Only G_n itself."""


@dataclass(frozen=True)
class Form:
    """How a parameter is a matrix for each group, which sides of it get a basis, and why.

    The matrix is `parameter.reshape(groups, d_out, d_in)`, or where it is transposed
    `parameter.reshape(groups, d_in, d_out).mT`.

    Attributes:
        factors: The factored form of the per-example gradients.
        groups: Number of independent blocks.
        transposed: Whether the input side comes first in the parameter.
        gradient_basis: Whether the side of the output gradients gets a basis; else the identity.
        activation_basis: Whether the side of the inputs does.
        window: Number of positions in a kernel. The features of an input run over (position,
            channel), as its windows are cut fastest; the matrix's columns over (channel, position).
    """

    factors: Factors = Factors.NONE
    groups: int = 1
    transposed: bool = False
    gradient_basis: bool = True
    activation_basis: bool = False
    window: int = 1

    def shape(self, parameter: torch.Size) -> tuple[int, int, int]:
        """Return `(groups, d_out, d_in)` for a parameter's shape."""
        return matrix_shape(parameter, self.groups, self.transposed)

    def matrices(self, gradients: Tensor) -> Tensor:
        """Turn per-example gradients `[n, *shape]` into `[groups, n, d_out, d_in]`."""
        groups, d_out, d_in = self.shape(gradients.shape[1:])
        if self.transposed:
            return gradients.reshape(-1, groups, d_in, d_out).mT.transpose(0, 1)
        return gradients.reshape(-1, groups, d_out, d_in).transpose(0, 1)

    def columns_of(self, features: Tensor, *, leading: int = 0) -> Tensor:
        """Reorder the last axis from input features to the matrix's columns.

        Args:
            features: `[..., leading + d_in]`.
            leading: Entries in front that stay where they are (the one that stands for a bias).
        """
        return self._reordered(features, leading, "... (k c) -> ... (c k)")

    def features_of(self, columns: Tensor, *, leading: int = 0) -> Tensor:
        """Reorder the last axis from the matrix's columns to input features."""
        return self._reordered(columns, leading, "... (c k) -> ... (k c)")

    def _reordered(self, tensor: Tensor, leading: int, pattern: str) -> Tensor:
        if self.window == 1:
            return tensor
        moved = rearrange(tensor[..., leading:], pattern, k=self.window)
        return torch.cat([tensor[..., :leading], moved], dim=-1) if leading else moved


DIAGONAL = Form(gradient_basis=False)

# Bases of prompts with this many entries take a second; positional embeddings may have 150,000.
_WITHIN_REACH: Final = 2048


def form_within_reach(parameter: torch.Size) -> Form:
    """Return the form of a parameter whose per-example gradients are known as a whole.

    A side gets a basis, from the exact covariance of its rows or columns, unless it has too many
    entries for a matrix of their covariances.
    """
    _, d_out, d_in = matrix_shape(parameter, groups=1, transposed=False)
    return Form(
        gradient_basis=d_out <= _WITHIN_REACH,
        activation_basis=len(parameter) > 1 and d_in <= _WITHIN_REACH,
    )


@dataclass(frozen=True)
class LayerCall(ABC):
    """One use of a layer's parameters.

    Tensors come *examples first*, `[n, rows, *rest]`: n examples, the rows that each of them has
    along the batch axis (or along several leading axes flattened into one), and the operation's
    other axes. Factors leave in the canonical layout `[groups, n, shared, features]`.

    Attributes:
        input: What the gradient of the weight depends on: the layer's input.
        weight: The weight, if any.
        bias: The bias, if any.
        groups: Number of independent blocks of the weight.
    """

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None

    groups: int = 1

    joins_bias: ClassVar[bool] = False
    """Whether weight and bias can have a joint block."""

    @property
    @abstractmethod
    def batch_axes(self) -> tuple[int, ...]:
        """Axes of the input, and of the output, that can hold the examples, likely ones first."""

    @property
    def mergeable_axes(self) -> int:
        """How many leading axes of the input, and of the output, may be flattened into one."""
        return 1

    @property
    @abstractmethod
    def weight_form(self) -> Form:
        """How the weight becomes a block."""

    @property
    @abstractmethod
    def bias_form(self) -> Form:
        """How the bias becomes a block."""

    def elements(self, output_shape: Sequence[int]) -> int:
        """Return how many numbers have to be laid out for all examples together."""
        return self.input.numel() + math.prod(output_shape)

    @abstractmethod
    def weight_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Return the gradient of the weight for every example, `[n, *weight.shape]`."""

    @abstractmethod
    def bias_gradients(self, output_gradients: Tensor) -> Tensor:
        """Return the gradient of the bias for every example, `[n, *bias.shape]`."""


@dataclass(frozen=True)
class FactoredCall(LayerCall):
    """A use whose weight gradients are sums of outer products, `G_n = Σ_s g_ns a_nsᵀ`."""

    joins_bias: ClassVar[bool] = True

    @property
    def weight_form(self) -> Form:
        """Both sides get a basis, from the covariances of g and a."""
        return Form(Factors.OUTER_PRODUCTS, self.groups, activation_basis=True)

    @property
    def bias_form(self) -> Form:
        """One basis, from the exact covariance."""
        return Form(groups=self.groups)

    @abstractmethod
    def activations(self, inputs: Tensor) -> Tensor:
        """Turn inputs into a `[groups, n, shared, d_in]`, with features as the form has them."""

    @abstractmethod
    def gradients(self, output_gradients: Tensor) -> Tensor:
        """Turn output gradients into g `[groups, n, shared, d_out]`."""

    def weight_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Sum the outer products over shared positions."""
        a = self.weight_form.columns_of(self.activations(inputs))
        g = self.gradients(output_gradients)
        pattern = "n g i o" if self.weight_form.transposed else "n g o i"
        outer_products = einsum(g, a, f"g n s o, g n s i -> {pattern}")
        shape = () if self.weight is None else self.weight.shape
        return outer_products.reshape(len(inputs), *shape)

    def bias_gradients(self, output_gradients: Tensor) -> Tensor:
        """Sum g over shared positions."""
        summed = self.gradients(output_gradients).sum(dim=2)
        return rearrange(summed, "g n o -> n (g o)")


IsParameter = Callable[[object], bool]
"""Whether a tensor comes from parameters alone."""

Rule = Callable[..., LayerCall | None]
"""Makes a `LayerCall` from an `IsParameter` and the arguments of a torch function; None if the rule
does not apply to these arguments."""
