"""Every loss on the device of its outputs: the matrices of the CPU, and labels drawn there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EmpiricalLoss, ModelLoss, SumOfLosses
from rotate_ewc._utils.structure import mapped
from tests.helpers.exactness import seeded

Losses = dict[str, tuple[Any, nn.Module, Any]]
N = 6


def labels() -> Tensor:
    return torch.arange(N) % 3


LOSSES: Losses = {
    "nll": (nn.NLLLoss(), nn.LogSoftmax(dim=1), labels()),
    "bce": (nn.BCELoss(), nn.Sigmoid(), (seeded(N, 3) > 0).double()),
    "poisson": (nn.PoissonNLLLoss(), nn.Identity(), seeded(N, 3).abs().round()),
    "huber": (nn.HuberLoss(), nn.Identity(), seeded(N, 3)),
    "gaussian": (nn.GaussianNLLLoss(), nn.Identity(), (seeded(N, 3), seeded(N, 1).abs())),
    "heads": (
        SumOfLosses({0: nn.CrossEntropyLoss(), 1: nn.MSELoss()}),
        nn.Identity(),
        (labels(), seeded(N, 3)),
    ),
    "any": (
        EmpiricalLoss(lambda f, y: (f - y).square().mean(), terms=lambda f, y: torch.ones_like(y)),
        nn.Identity(),
        seeded(N, 3),
    ),
    "own": (ModelLoss(lambda model, batch: model(batch[0]).square().mean()), nn.Identity(), None),
}
EMPIRICAL_ONLY = ("any", "own")


def estimate(name: str, device: torch.device, **options: Any) -> EKFACLinearOperator:
    loss, last, targets = LOSSES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), last).double().to(device)

    def to_device(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    batch = mapped(to_device, (seeded(N, 4), targets))
    forward = (lambda x: (model(x), model(x) * 2)) if name == "heads" else model
    return EKFACLinearOperator(forward, loss, dict(model.named_parameters()), [batch], **options)


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("name", LOSSES)
def test_matrices_are_those_of_the_cpu(name: str, fisher: str, device: torch.device) -> None:
    if name in EMPIRICAL_ONLY and fisher == "type2":
        pytest.skip("there is no distribution")
    found = estimate(name, device, fisher_type=fisher)
    expected = estimate(name, torch.device("cpu"), fisher_type=fisher)
    assert found.device == device
    for block, other in zip(found.blocks, expected.blocks, strict=True):
        torch.testing.assert_close(block.trace.cpu(), other.trace, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in EMPIRICAL_ONLY])
def test_labels_are_drawn_on_the_device(name: str, device: torch.device) -> None:
    found = estimate(name, device, fisher_type="mc", mc_samples=300)
    exact = estimate(name, device, fisher_type="type2")
    assert float(found.trace) == pytest.approx(float(exact.trace), rel=0.15)
