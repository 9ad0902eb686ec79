"""An embedding tied to an output layer: no per-example gradient of the vocabulary's size.

Of one example the gradient is a sum of outer products, of the rows looked up and of the output
layer together,

    G_n = Σ_s h_ns g_nsᵀ + Σ_t e_nt 1_kᵀ,    `[d, vocabulary]`

with layer inputs h and output gradients g (or the other way round), and e the gradient of the row
looked up at t, that of token k. Both sums must be made before anything is squared.

Everything computes in the dtypes of its arguments: call it outside of `torch.autocast`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_ewc.linalg.eigenvalues import examples_at_once
from rotate_ewc.linalg.kronecker import Basis
from rotate_ewc.linalg.thin_eigenvalues import is_thin


@dataclass(frozen=True)
class TiedFactors:
    """The factors of some examples' gradients.

    Attributes:
        features: h and e, in this order, `[n, S + T, d]`.
        words: g, `[n, S, vocabulary]`.
        indices: k, `[n, T]`; negative ones count nothing.
    """

    features: Tensor
    words: Tensor
    indices: Tensor

    def _inner_products(self) -> Tensor:
        """Return those of the right sides, g and one-hot vectors, `[n, S + T, S + T]`."""
        known, (_, dense, _) = self.indices >= 0, self.words.shape
        places = self.indices.clamp(min=0)[:, None].expand(-1, dense, -1)
        crossed = self.words.gather(2, places) * known[:, None]
        same = self.indices[:, :, None] == self.indices[:, None]
        of_words = torch.cat([self.words @ self.words.mT, crossed], dim=2)
        of_rows = torch.cat([crossed.mT, (same & known[:, :, None]).to(crossed.dtype)], dim=2)
        return torch.cat([of_words, of_rows], dim=1)

    def columns(self) -> Tensor:
        """Return vectors whose outer products sum up to `G_n G_nᵀ`, `[1, n, S + T, d]`."""
        return (_root(self._inner_products()).mT @ self.features)[None]


def _root(matrices: Tensor) -> Tensor:
    """Return B with `B Bᵀ` the positive semi-definite matrices, `[n, m, m]`."""
    values, vectors = torch.linalg.eigh(matrices.double())
    root: Tensor = vectors * values.clamp(min=0.0).sqrt()[:, None]
    return root.to(matrices.dtype)


def summed_tied(factors: TiedFactors, basis: Basis, max_bytes: int | None = None) -> Tensor:
    """Sum the squares of the examples' gradients, rotated on the side of the features.

    What is not kept of a thin basis is known from norms, and these from vectors that are as short
    as there are positions: with `features featuresᵀ = B Bᵀ`, B has their inner products.

    Args:
        factors: The examples.
        basis: `[1, d, k]`; None is the identity.
        max_bytes: What the work on some columns may take (or on one, if that takes more).

    Returns:
        `[1, K, vocabulary]`, with one row more than k, the rest, where the basis is thin.
    """
    features = kept = factors.features
    if basis is not None:
        kept = features @ basis[0]
    thin = is_thin(basis)
    if thin:
        short = features.shape[1] < features.shape[2]
        kept = torch.cat([kept, _root(features @ features.mT) if short else features], dim=2)
    rank = 0 if basis is None else basis.shape[2]
    (count, dense, vocabulary), width = factors.words.shape, kept.shape[2]
    total = kept.new_zeros(vocabulary, rank + 1 if thin else width)
    # As many columns of the matrices as are worked on at a time; their rows come first below.
    size = examples_at_once(kept, 2 * count * width, max_bytes)
    of_words, of_rows = kept[:, :dense], kept[:, dense:]
    for start in range(0, vocabulary, size):
        words = factors.words[:, :, start : start + size]
        gradients = words.mT @ of_words
        number = gradients.shape[1]
        inside = ((factors.indices >= start) & (factors.indices < start + number)).nonzero()
        example, position = inside[:, 0], inside[:, 1]
        rows = example * number + factors.indices[example, position] - start
        gradients.view(-1, width).index_add_(0, rows, of_rows[example, position])
        squares = gradients.square_().sum(dim=0)
        if thin:
            own = squares[:, :rank]
            rest = squares[:, rank:].sum(dim=1) - own.sum(dim=1)
            squares = torch.cat([own, rest.clamp_(min=0.0)[:, None]], dim=1)
        total[start : start + number] = squares
    return total.mT[None]
