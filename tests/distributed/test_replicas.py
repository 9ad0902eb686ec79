"""Replicas that consolidate together and train with `DistributedDataParallel` stay one model."""

from __future__ import annotations

import warnings
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.penalty import replicas
from tests.helpers.penalties import CE, Batches, flat, make, task
from tests.helpers.processes import distributed_test, gather, here

STEPS = 25


def own_part(batches: Batches) -> Batches:
    """Every W-th example, in one batch."""
    part = slice(dist.get_rank(), None, dist.get_world_size())
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    return here([(x[part], y[part])])


def assert_same_everywhere(tensor: Tensor) -> None:
    first, *others = gather(tensor.detach().cpu())
    assert all(torch.equal(first, other) for other in others)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def consolidated(group: Any, tasks: int = 2, **options: Any) -> tuple[nn.Module, EKFACPenalty]:
    model = here(make("plain"))
    penalty = EKFACPenalty(**{"fisher_type": "type2", **options})
    for seed in range(tasks):
        data = task("plain", seed, 30)
        penalty.consolidate(
            model, CE, own_part(data) if group else here(data), num_data=500, group=group
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    return model, penalty


@distributed_test((3,))
def test_softened_merged_penalties_are_those_of_one_process() -> None:
    for options in ({}, {"mode": "separate", "decay": 0.5}, {"fisher_type": "mc"}):
        model, together = consolidated("auto", strength=3.0, **options)
        _, alone = consolidated(None, strength=3.0, **options)
        assert_close(together(model), alone(model))
        for one, two in zip(together.terms, alone.terms, strict=True):
            assert one.operator.provenance.settings["temperature"] == pytest.approx(
                two.operator.provenance.settings["temperature"], rel=1e-9
            )
            assert one.operator.provenance.num_loss_terms == pytest.approx(
                two.operator.provenance.num_loss_terms
            )
        for term in together.terms:
            for tensor in (t for b in term.operator.blocks for t in b.tensors.values()):
                assert_same_everywhere(tensor)
                assert_same_everywhere(torch.tensor(tensor.stride()))


class Growing(nn.Module):
    """A head that gets more outputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head.weight = nn.Parameter(self.head.weight[:outputs].clone())
        self.head.bias = nn.Parameter(self.head.bias[:outputs].clone())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(torch.tanh(self.body(x)))
        return outputs


@distributed_test((2,))
def test_growing_heads() -> None:
    values = []
    for group in ("auto", None):
        penalty = EKFACPenalty(1.0, fisher_type="type2", separate_weight_and_bias=False)
        for seed, outputs in enumerate((2, 4)):
            data = task("plain", seed, 20, classes=outputs)
            penalty.consolidate(
                here(Growing(outputs)), CE, own_part(data) if group else here(data), group=group
            )
        moved = here(Growing(4))
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.add_(0.1)
        values.append(penalty(moved).detach())
    assert_close(values[0], values[1])


def train(optimizer: torch.optim.Optimizer, model: nn.Module, accumulate: bool) -> None:
    ((x, y),) = own_part(task("plain", 9, 24))
    for number in range(STEPS):
        optimizer.zero_grad()
        if accumulate and number % 5 == 0:
            with model.no_sync():
                CE(model(x), y).backward()
        CE(model(x + 1.0), y).backward()
        optimizer.step()


@distributed_test((2,))
def test_every_update_keeps_replicas_the_same() -> None:
    """To the bit, after 25 steps on different data; and so is the strength that was found."""
    for update in ("rotated", "tangent", "gradient"):
        for kind, rate in ((torch.optim.SGD, 0.01), (torch.optim.Adam, 0.01)):
            model, penalty = consolidated("auto", tasks=1)
            ddp = DistributedDataParallel(model)
            optimizer = kind(ddp.parameters(), lr=rate)
            every = 3 if update == "tangent" else 1
            with penalty.attach(optimizer, ddp, update, every):
                train(optimizer, ddp, accumulate=True)
            assert penalty.strength != 1.0, "no strength was found"
            assert_same_everywhere(torch.tensor(penalty.strength, dtype=torch.float64))
            assert_same_everywhere(flat(model))
            penalty.consolidate(ddp, CE, own_part(task("plain", 3)))
            assert penalty.num_tasks == 2


@distributed_test((2,))
def test_a_forward_through_the_wrapper_exchanges_nothing() -> None:
    """Though there are buffers to broadcast, and processes have different numbers of batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    ddp = DistributedDataParallel(here(model))
    data = task("plain", 0, 12)
    own = here([*data, *data] if dist.get_rank() else data)
    penalty = EKFACPenalty(1.0)
    penalty.consolidate(ddp, CE, own, forward=lambda x: ddp(x))
    assert ddp.require_forward_param_sync
    assert penalty.terms[0].operator.num_data == 36


@distributed_test((2,))
def test_meshes_and_groups() -> None:
    mesh = dist.device_mesh.init_device_mesh(
        "cuda" if dist.get_backend() == "nccl" else "cpu", (2,), mesh_dim_names=("data",)
    )
    group = dist.new_group([0, 1])
    alone = [dist.new_group([rank]) for rank in (0, 1)]
    data, own = here(task("plain", 0)), own_part(task("plain", 0))
    expected = operator(data, None).to_dense()
    for one in (mesh, mesh["data"], group, "auto"):
        assert_close(operator(own, one).to_dense(), expected)
    assert_close(operator(data, alone[dist.get_rank()]).to_dense(), expected)
    with pytest.raises(ValueError, match="group does not contain this process"):
        operator(data, alone[1 - dist.get_rank()])
    with pytest.raises(TypeError, match="group is 'all'; expected 'auto'"):
        operator(data, "all")
    square = dist.device_mesh.init_device_mesh(mesh.device_type, (1, 2), mesh_dim_names=("a", "b"))
    with pytest.raises(ValueError, match=r"dimensions \('a', 'b'\); expected one of them"):
        operator(data, square)


def operator(data: Batches, group: Any) -> EKFACLinearOperator:
    model = here(make("plain"))
    return EKFACLinearOperator(
        model, CE, list(model.parameters()), data, group=group, fisher_type="type2"
    )


@distributed_test((2,))
def test_different_penalties_are_told_of() -> None:
    """Once, where they are used; and not where they are the same, or made together."""
    # Processes are kept between tests, in some of which one of them consolidates alone.
    replicas._NUMBERS = count(1_000_000)
    model, penalty = here(make("plain")), EKFACPenalty(1.0, fisher_type="type2")
    penalty.consolidate(model, CE, own_part(task("plain", 0)), group=None)
    dist.barrier()
    with pytest.warns(RuntimeWarning, match=r"'0.weight' is not the same on rank .* group='auto'"):
        penalty(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(model)
        for data, group in ((here(task("plain", 0)), None), (own_part(task("plain", 0)), "auto")):
            other = EKFACPenalty(1.0, fisher_type="type2")
            other.consolidate(model, CE, data, group=group)
            dist.barrier()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with other.attach(optimizer, model):
                CE(model(data[0][0]), data[0][1]).backward()
                optimizer.step()
            optimizer.zero_grad()
