"""Sampled labels: reproducible, the same in both passes, and right on average."""

from itertools import cycle

import numpy as np
import pytest
import torch

from rotate_ewc import FisherType
from tests.helpers.cases import BASIC, BY_NAME, FURTHER, PLAIN_LOSSES, Case
from tests.helpers.exactness import Setting, estimated, exact, ignore_even_kernels
from tests.helpers.oracles import assert_close, in_own_basis

pytestmark = ignore_even_kernels

SEVERAL = (
    "tanh-mlp",
    "sequence-outputs",
    "conv2d-stride-groups",
    "embedding-tied-token-outputs",
    "encoder-layer-norm-last",
)


@pytest.mark.parametrize(("name", "loss"), list(zip(SEVERAL, cycle(PLAIN_LOSSES), strict=False)))
def test_monte_carlo_is_reproducible(name: str, loss: str) -> None:
    """The same seed gives the same bits, another seed does not."""
    setting = Setting(BY_NAME[name], loss)
    options = {"fisher_type": FisherType.MC, "mc_samples": 2}
    torch.manual_seed(0)
    first = setting.estimate(**options, seed=1)
    torch.manual_seed(1)
    second = setting.estimate(**options, seed=1)
    other = setting.estimate(**options, seed=2)
    for a, b, c in zip(first.blocks, second.blocks, other.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert not torch.allclose(a.eigenvalues, c.eigenvalues, rtol=1e-3)


@pytest.mark.parametrize(
    ("case", "loss"),
    list(zip((*BASIC[::4], *FURTHER[::16]), cycle(PLAIN_LOSSES), strict=False)),
    ids=str,
)
def test_monte_carlo_draws_are_the_same_in_both_passes(case: Case, loss: str) -> None:
    """Neither a second pass nor chunks change the sampled labels."""
    setting = Setting(case, loss)
    options = {"fisher_type": FisherType.MC, "mc_samples": 2}
    small = setting.dense(setting.estimate(**options, memory_budget=1))
    large = setting.dense(setting.estimate(**options, memory_budget=2**40))
    assert_close(small, large, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", PLAIN_LOSSES)
@pytest.mark.parametrize("name", ["tanh-mlp", "sequence-outputs"])
def test_monte_carlo_expectation(name: str, loss: str, reduction: str) -> None:
    """With many samples trace and eigenvalues come near the exact matrix's."""
    setting = Setting(BY_NAME[name], loss, reduction)
    data = setting.case.data(loss, [setting.case.examples])
    operator = setting.estimate(fisher_type=FisherType.MC, mc_samples=700, data=data)
    expected = sum(m.diagonal(dim1=1, dim2=2).sum().item() for m in exact(setting).values())
    assert float(operator.trace) == pytest.approx(expected, rel=0.05)
    for block in operator.blocks:
        diagonal = in_own_basis(block, exact(setting)[block.parameters])
        assert (block.eigenvalues - diagonal).abs().sum() <= 0.1 * diagonal.sum()


@pytest.mark.parametrize("loss", PLAIN_LOSSES)
def test_monte_carlo_rate(loss: str) -> None:
    """Sixteen times the samples divide the error of the trace by about four."""
    setting = Setting(BY_NAME["tanh-mlp"], loss)
    expected = float(estimated(setting).trace)
    data = setting.case.data(loss, [setting.case.examples])

    def error(samples: int) -> float:
        errors = []
        for seed in range(16):
            options = {"fisher_type": FisherType.MC, "mc_samples": samples, "seed": seed}
            options["data"] = data
            errors.append(float(setting.estimate(**options).trace) / expected - 1)
        return float(np.sqrt(np.mean(np.square(errors))))

    assert 2 < error(2) / error(32) < 8
