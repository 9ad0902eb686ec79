"""Embeddings tied to an output layer: against their per-example gradients, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rotate_ewc.linalg.tied_eigenvalues import TiedFactors, summed_tied
from tests.helpers.oracles import assert_close
from tests.helpers.thin import orthonormal

EXAMPLES, WORDS = 4, 11


def drawn(d: int, dense: int, looked_up: int) -> TiedFactors:
    """Words come twice in an example, and one place is padding."""
    generator = torch.Generator().manual_seed(d + dense)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    indices = torch.randint(WORDS, (EXAMPLES, looked_up), generator=generator)
    indices[:, 1] = indices[:, 0]
    indices[1, 2] = -1
    return TiedFactors(
        normal(EXAMPLES, dense + looked_up, d), normal(EXAMPLES, dense, WORDS), indices
    )


def written_out(factors: TiedFactors) -> Tensor:
    """Every example's gradient, `[n, d, words]`, row by row."""
    dense = factors.words.shape[1]
    found = torch.zeros(EXAMPLES, factors.features.shape[2], WORDS, dtype=torch.float64)
    for n in range(EXAMPLES):
        for s in range(dense):
            found[n] += torch.outer(factors.features[n, s], factors.words[n, s])
        for t, word in enumerate(factors.indices[n].tolist()):
            if word >= 0:
                found[n, :, word] += factors.features[n, dense + t]
    return found


SIZES = [(5, 2, 3), (5, 4, 3), (12, 2, 4), (3, 1, 6)]


@pytest.mark.parametrize("sizes", SIZES)
def test_columns_have_the_same_outer_products(sizes: tuple[int, int, int]) -> None:
    factors = drawn(*sizes)
    whole = written_out(factors)
    columns = factors.columns()
    assert columns.shape == (1, EXAMPLES, sizes[1] + sizes[2], sizes[0])
    assert_close(columns[0].mT @ columns[0], whole @ whole.mT)


@pytest.mark.parametrize("max_bytes", [None, 1, 1000])
@pytest.mark.parametrize("rank", [None, 1, 2, "whole"])
@pytest.mark.parametrize("sizes", SIZES)
def test_squares_and_what_is_left_of_them(
    sizes: tuple[int, int, int], rank: int | str | None, max_bytes: int | None
) -> None:
    """Whatever number of columns is worked on at a time."""
    factors, d = drawn(*sizes), sizes[0]
    kept = d if rank == "whole" else rank
    basis = None if kept is None else orthonormal(1, d, int(kept), 7)
    whole = written_out(factors)
    expected = whole.square().sum(dim=0)
    if basis is not None:
        rotated = (basis[0].mT @ whole).square().sum(dim=0)
        rest = expected.sum(dim=0) - rotated.sum(dim=0)
        expected = rotated if kept == d else torch.cat([rotated, rest[None]])
    assert_close(summed_tied(factors, basis, max_bytes)[0], expected)
