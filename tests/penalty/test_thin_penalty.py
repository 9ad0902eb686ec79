"""Penalties with a rank: what tasks in a row, files and other ranks make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from rotate_ewc import EKFACPenalty, merge
from tests.helpers.exact import exact_penalty
from tests.helpers.thin import dense_groups, partial_traces

CE = nn.CrossEntropyLoss()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def batches(seed: int, directions: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Inputs of which a few directions stand out, others for every seed."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(directions, 24, generator=generator, dtype=torch.float64)
    inputs = torch.randn(40, directions, generator=generator, dtype=torch.float64) @ spread
    inputs += 0.1 * torch.randn(40, 24, generator=generator, dtype=torch.float64)
    return [(inputs, torch.randint(3, (40,), generator=generator))]


def learned(tasks: int, rank: Any, **options: Any) -> tuple[nn.Module, EKFACPenalty]:
    net, penalty = model(), EKFACPenalty(2.0, rank=rank, fisher_type="type2", **options)
    for seed in range(tasks):
        penalty.consolidate(net, CE, batches(seed))
    return net, penalty


def ranks(penalty: EKFACPenalty) -> list[tuple[int, int]]:
    """Of the weights; of the gradients of three classes two directions are not zero."""
    return [
        block.ranks
        for term in penalty.terms
        for block in term.operator.blocks
        if "weight" in block.label
    ]


def test_merged_tasks_keep_the_rank() -> None:
    for tasks in (1, 2, 5):
        assert ranks(learned(tasks, 3)[1]) == [(3, 3), (2, 3)]
    assert ranks(learned(3, {"0.*": 2, "*": "full"})[1]) == [(2, 2), (3, 20)]
    assert ranks(learned(2, "full")[1]) == [(20, 24), (3, 20)]
    assert ranks(learned(2, 3, mode="separate")[1]) == [(3, 3), (2, 3)] * 2


@pytest.mark.parametrize("rank", [2, 5, "auto", 0.9])
def test_traces_are_those_of_whole_bases(rank: Any) -> None:
    """After every number of tasks, damping included; and near to the whole merge."""
    (_, whole), (_, thin) = learned(4, "full"), learned(4, rank)
    for one, other in zip(
        whole.terms[0].operator.blocks, thin.terms[0].operator.blocks, strict=True
    ):
        assert float(other.trace) == pytest.approx(float(one.trace), rel=1e-10)
        assert bool((other.eigenvalues >= 0).all())


def test_more_tasks_than_directions_of_one() -> None:
    """With a limit that none of the tasks comes up to, what they keep adds up."""
    penalty = exact_penalty(1.0, rank=16, fisher_type="type2")
    net = model()
    for seed in range(3):
        (inputs, targets), *_ = batches(seed)
        penalty.consolidate(net, CE, [(inputs[:2], targets[:2])])
    assert ranks(penalty)[0][1] == 6


def test_a_part_of_the_trace_is_kept_of_many_tasks() -> None:
    _, penalty = learned(3, 0.9)
    _, whole = learned(3, "full")
    for one, other in zip(
        penalty.terms[0].operator.blocks, whole.terms[0].operator.blocks, strict=True
    ):
        sizes = one.shape[1:]
        (dense,) = dense_groups(other, sizes)
        for side, trace in enumerate(partial_traces(dense, sizes)):
            basis = (one.gradient_basis, one.activation_basis)[side]
            if basis is None or basis.shape[2] == basis.shape[1]:
                continue
            vectors = basis[0].numpy()
            seen = np.trace(vectors.T @ trace @ vectors) / np.trace(trace)
            # Each of three tasks, and two merges, may have averaged a tenth.
            assert seen > 0.5
            assert basis.shape[2] < basis.shape[1]


def test_files_hold_ranks_and_the_option(tmp_path: Path) -> None:
    net, penalty = learned(2, 3)
    path = tmp_path / "penalty"
    penalty.save(path)
    loaded = EKFACPenalty.load(path)
    assert loaded.settings.rank == 3
    assert ranks(loaded) == ranks(penalty)
    for before, after in zip(
        penalty.terms[0].operator.blocks, loaded.terms[0].operator.blocks, strict=True
    ):
        assert set(before.tensors) == set(after.tensors)
        assert all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())
    with torch.no_grad():
        net[0].weight.add_(0.1)
    assert torch.equal(penalty(net), loaded(net))
    penalty.save(path, storage_dtype=torch.bfloat16)
    small = EKFACPenalty.load(path)
    assert ranks(small) == ranks(penalty)
    assert small(net).item() == pytest.approx(penalty(net).item(), rel=1e-2)


@pytest.mark.parametrize("other", [2, 8, "full"])
def test_another_rank_counts_from_the_next_task_on(other: Any, tmp_path: Path) -> None:
    """What was kept is used as it is; nothing that was averaged comes back."""
    net, penalty = learned(2, 4)
    penalty.save(tmp_path / "penalty")
    loaded = EKFACPenalty.load(tmp_path / "penalty", rank=other)
    assert ranks(loaded) == [(4, 4), (2, 4)]
    with torch.no_grad():
        net[0].weight.add_(0.1)
    assert torch.equal(penalty(net), loaded(net))
    (trace,) = (t.operator.trace for t in loaded.terms)
    loaded.consolidate(net, CE, batches(2))
    expected = {2: [(2, 2), (2, 2)], 8: [(8, 8), (2, 8)], "full": [(20, 24), (3, 20)]}
    assert ranks(loaded) == expected[other]
    assert float(loaded.terms[0].operator.trace) > float(trace)
    empty = EKFACPenalty(2.0, rank=other)
    empty.load_state_dict(penalty.state_dict())
    assert ranks(empty) == [(4, 4), (2, 4)]


def test_thin_and_whole_operators_merge() -> None:
    (_, thin), (_, whole) = learned(1, 3), learned(1, "full")
    operators = [p.terms[0].operator for p in (thin, whole)]
    both = merge(operators)
    assert [b.ranks for b in both.blocks] == [b.ranks for b in operators[1].blocks]
    assert float(both.trace) == pytest.approx(sum(float(o.trace) for o in operators), rel=1e-10)


def test_heads_that_grow() -> None:
    """New outputs of a thin layer are free; the old ones stay as they were protected."""
    net, penalty = learned(1, 2)
    wider = nn.Linear(20, 5).double()
    with torch.no_grad():
        wider.weight[:3], wider.bias[:3] = net[2].weight, net[2].bias
    net[2] = wider
    assert float(penalty(net).detach()) == 0.0
    with torch.no_grad():
        wider.weight[3:] += 1.0
    assert float(penalty(net).detach()) == 0.0
    inputs, targets = batches(3)[0]
    penalty.consolidate(net, CE, [(inputs, targets + 2)])
    assert penalty.terms[0].operator.block("2.weight").shape == (1, 5, 20)
    assert penalty.terms[0].operator.block("2.weight").ranks == (2, 2)
    optimizer = Adam(net.parameters(), lr=0.01)
    with penalty.attach(optimizer, net):
        CE(net(inputs), targets).backward()
        optimizer.step()
    assert penalty(net).item() > 0


def test_parameters_that_are_left_out() -> None:
    net, penalty = learned(1, 2, strict=False)
    net[2] = nn.Linear(20, 2).double()
    with pytest.warns(
        UserWarning, match=r"'2\.bias', '2\.weight' are missing|not protected any more"
    ):
        assert float(penalty(net).detach()) == 0.0
    with torch.no_grad():
        net[0].weight.add_(0.1)
    assert float(penalty(net).detach()) > 0


def test_moving_and_casting() -> None:
    net, penalty = learned(2, 3)
    with torch.no_grad():
        net[0].weight.add_(0.1)
    before = penalty(net).item()
    penalty.float()
    assert penalty.stacks[0].block.eigenvalues.dtype == torch.float32
    assert penalty(net.float()).item() == pytest.approx(before, rel=1e-4)
