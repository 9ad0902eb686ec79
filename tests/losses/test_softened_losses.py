"""Softening of outputs that are probabilities is that of the logits before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACPenalty
from tests.helpers.crossing import crossed
from tests.helpers.exactness import seeded
from tests.helpers.oracles import assert_close, dense_operator

PAIRS: dict[str, tuple[nn.Module, nn.Module, nn.Module]] = {
    "softmax": (nn.CrossEntropyLoss(), nn.LogSoftmax(dim=1), nn.NLLLoss()),
    "sigmoid": (nn.BCEWithLogitsLoss(), nn.Sigmoid(), nn.BCELoss()),
}


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[2].weight.mul_(30)
    return model


def data(loss: nn.Module) -> list[tuple[Tensor, Tensor]]:
    x = seeded(8, 4)
    labels = torch.arange(8) % 3
    y = labels if isinstance(loss, nn.CrossEntropyLoss) else (seeded(8, 3, seed=2) > 0).double()
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def snapshot(model: nn.Module, loss: nn.Module, batches: Any, **options: Any) -> Any:
    penalty = EKFACPenalty(1.0, damping=0.0, **options)
    penalty.consolidate(model, loss, batches)
    (term,) = penalty.terms
    return term.operator


@crossed(kind=PAIRS, temperature=[1.0, 3.0, "auto"], fisher=["type2", "empirical"])
def test_softened_snapshots_are_those_of_the_logits(
    kind: str, temperature: Any, fisher: str
) -> None:
    on_logits, last, on_probabilities = PAIRS[kind]
    options = {"temperature": temperature, "fisher_type": fisher}
    expected = snapshot(network(), on_logits, data(on_logits), **options)
    found = snapshot(nn.Sequential(*network(), last), on_probabilities, data(on_logits), **options)
    found_at, expected_at = (o.provenance.settings["temperature"] for o in (found, expected))
    assert found_at == pytest.approx(expected_at, rel=1e-6)
    assert temperature == 1.0 or expected_at > 1
    dense = [dense_operator(o.blocks, o.parameter_shapes) for o in (found, expected)]
    assert_close(dense[0], dense[1], 1e-6)


@pytest.mark.parametrize("loss", [nn.PoissonNLLLoss(), nn.HuberLoss(), nn.MSELoss()])
def test_regression_has_nothing_to_soften(loss: nn.Module) -> None:
    batches = [(x, y.double().abs()) for x, y in data(nn.BCEWithLogitsLoss())]
    found = [
        snapshot(network(), loss, batches, temperature=t, fisher_type="type2")
        for t in (1.0, 2.0, "auto")
    ]
    assert {operator.provenance.settings["temperature"] for operator in found} == {1.0}
    assert_close(found[1].trace, found[0].trace)
