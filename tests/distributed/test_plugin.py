"""Avalanche's strategies, in processes that all have the whole stream."""

from __future__ import annotations

import pytest
import torch

from rotate_ewc.distributed.processes import Ranks
from rotate_ewc.integrations.avalanche import RotatedEWC, RotatedEWCPlugin
from tests.helpers.avalanche_training import CE, domain_benchmark, net, sgd
from tests.helpers.processes import distributed_test, gather

OPTIONS = {"fisher_type": "mc", "train_mb_size": 8, "train_epochs": 1, "evaluator": None}


def strategy(group: str | None) -> RotatedEWC:
    torch.manual_seed(0)
    model = net(dropout=0.0)
    made = RotatedEWC(model=model, optimizer=sgd(model), criterion=CE, group=group, **OPTIONS)
    torch.manual_seed(1)
    for experience in domain_benchmark(2).train_stream:
        made.train(experience)
    return made


@pytest.mark.slow  # each process imports Avalanche
@distributed_test((2,), backends=["gloo"], seconds=200)
def test_each_process_looks_at_its_part() -> None:
    """The result is that of all of it, sampled labels included."""
    together, alone = strategy("auto"), strategy(None)
    state, expected = (s.rotated_ewc.penalty.terms[0].operator for s in (together, alone))
    assert state.provenance.num_data == expected.provenance.num_data
    difference = (state.to_dense() - expected.to_dense()).abs().max()
    assert float(difference) < 1e-3 * float(expected.to_dense().abs().max())
    first, second = gather([p.detach() for p in together.model.parameters()])
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("group", ["all", 3])
def test_no_group(group: object) -> None:
    with pytest.raises(TypeError, match=r"group is .*; expected 'auto'"):
        RotatedEWCPlugin(group=group)
    assert Ranks.of("auto").size == 1
