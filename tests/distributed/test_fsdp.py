"""Models whose parameters are spread over processes by `fully_shard`."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from rotate_ewc import EKFACPenalty
from tests.helpers.penalties import CE
from tests.helpers.processes import distributed_test, gather, here
from tests.helpers.sharded_models import (
    STEPS,
    Net,
    assert_close,
    batches,
    of_first,
    own,
    part_of,
    sharded,
    step,
    whole,
)


def penalty_of(**options: Any) -> EKFACPenalty:
    return EKFACPenalty(**{"strength": 3.0, "fisher_type": "type2", **options})


@distributed_test((2, 3))
def test_consolidation_is_that_of_the_ordinary_model() -> None:
    """And the next training step is what it would have been."""
    for reshard in (True, False) if dist.get_world_size() == 2 else (True,):
        model, plain, untouched = sharded(reshard), here(Net()), sharded(reshard)
        optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, plain, untouched)]
        together, alone = penalty_of(), penalty_of()
        for seed in range(2):
            for one, optimizer in zip(
                (model, untouched), (optimizers[0], optimizers[2]), strict=True
            ):
                step(one, optimizer, part_of(batches(9)))
            step(plain, optimizers[1], here(batches(9)))
            with torch.no_grad():
                model(part_of(batches(9))[0][0])  # after which some parameters are whole
            together.consolidate(model, CE, own(batches(seed)))
            alone.consolidate(plain, CE, here(batches(seed)), group=None)
        for optimizer, one in zip(optimizers, (model, plain, untouched), strict=True):
            step(one, optimizer, here(batches(9)) if one is plain else part_of(batches(9)))
        for name, parameter in whole(model).items():
            assert torch.equal(parameter, whole(untouched)[name])
            assert_close(parameter, whole(plain)[name])
        assert all(isinstance(p, DTensor) for p in model.parameters())
        ((first,), (second,)) = together.terms, alone.terms
        assert_close(first.operator.to_dense(), second.operator.to_dense())
        value = together(model)
        assert_close(value, alone(plain))
        value.backward()
        alone(plain).backward()
        optimizers[1].zero_grad()
        alone(plain).backward()
        optimizers[0].zero_grad()
        together(model).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert isinstance(p.grad, DTensor), name
            assert_close(p.grad.full_tensor(), q.grad, 1e-7)


@distributed_test((2,))
def test_attached_to_a_sharded_optimizer() -> None:
    """Every update is that of the ordinary model with the mean gradient of all processes."""
    for update, kind, options in (
        # With an ε that is larger than rounding errors, of which Adam would make full steps.
        ("rotated", torch.optim.Adam, {"eps": 1e-4}),
        ("rotated", torch.optim.AdamW, {"eps": 1e-4, "weight_decay": 0.1}),
        ("rotated", torch.optim.SGD, {"momentum": 0.9}),
        ("tangent", torch.optim.Adam, {"eps": 1e-4}),
        ("gradient", torch.optim.Adam, {"eps": 1e-4}),
    ):
        model, plain = sharded(), here(Net())
        penalty_in_common = penalty_of()
        penalty_in_common.consolidate(model, CE, own(batches(0)))
        found = []
        for one in (model, plain):
            optimizer = kind(one.parameters(), lr=0.01, **options)
            penalty = penalty_of(strength="auto" if update == "rotated" else 3.0)
            # In the same eigenbasis, which rounding errors turn where eigenvalues are close.
            penalty.load_state_dict(penalty_in_common.state_dict())
            with penalty.attach(optimizer, one, update, 3 if update == "tangent" else 1):
                for _ in range(STEPS):
                    step(one, optimizer, part_of(batches(1)) if one is model else here(batches(1)))
            found.append((whole(one), penalty.strength))
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
        for name, parameter in found[0][0].items():
            assert_close(parameter, found[1][0][name], 1e-6, (update, kind, name))
        assert all(isinstance(p, DTensor) for p in model.parameters())


@distributed_test((2,))
def test_a_failed_step_is_undone() -> None:
    model = sharded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalty = penalty_of()
    penalty.consolidate(model, CE, own(batches(0)))
    penalty.attach(optimizer, model)
    step(model, optimizer, part_of(batches(1)))
    before = whole(model)
    optimizer.param_groups[0]["lr"] = "no number"
    with pytest.raises(TypeError):
        step(model, optimizer, part_of(batches(1)))
    assert all(torch.equal(before[n], p) for n, p in whole(model).items())


@distributed_test((2,))
def test_mixed_precision() -> None:
    """The estimate is that of the parameters as they are kept, not as they are cast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mp_policy=policy, dtype=torch.float32)
    together, alone = penalty_of(), penalty_of()
    together.consolidate(model, CE, own(batches(0, torch.float32)))
    plain = here(Net(torch.float32))
    alone.consolidate(plain, CE, here(batches(0, torch.float32)), group=None)
    first, second = together.terms[0].operator.to_dense(), alone.terms[0].operator.to_dense()
    assert_close(first, second, 1e-3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with together.attach(optimizer, model):
        step(model, optimizer, part_of(batches(1, torch.float32)))


@distributed_test((2,))
def test_hybrid_meshes() -> None:
    """Copies of shards, on two processes: shards of one each, and one shard with two copies."""
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    for shape in ((2, 1), (1, 2)):
        model = sharded(mesh=init_device_mesh(kind, shape, mesh_dim_names=("copies", "shards")))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        penalty = penalty_of()
        penalty.consolidate(model, CE, own(batches(0)))
        with penalty.attach(optimizer, model):
            for _ in range(3):
                step(model, optimizer, part_of(batches(1)))
        first, *others = gather({n: p.cpu() for n, p in whole(model).items()})
        assert all(torch.equal(p, other[n]) for other in others for n, p in first.items())


@distributed_test((2,))
def test_tensor_parallel_is_refused_by_name() -> None:
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(kind, (2,))
    model = here(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double())
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    data = here([(torch.randn(4, 4, dtype=torch.float64), torch.zeros(4).long())])
    with pytest.raises(ValueError, match=r"'0.weight', '0.bias' are spread .* tensor parallelism"):
        penalty_of().consolidate(model, CE, data)


@distributed_test((2,))
def test_checkpoints() -> None:
    """Saved by two processes, loaded by one, and back; and an ordinary file from rank 0."""
    (folder,) = of_first(tempfile.mkdtemp)
    model = sharded()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalty = penalty_of()
    penalty.consolidate(model, CE, own(batches(0)))
    with penalty.attach(optimizer, model):
        step(model, optimizer, part_of(batches(1)))
    state, _ = get_state_dict(model, optimizer)
    kept = {"model": state, "penalty": penalty.state_dict()}
    dcp.save(kept, checkpoint_id=f"{folder}/two")
    value = penalty(model).detach()
    if dist.get_rank() == 0:
        penalty.save(f"{folder}/penalty.safetensors")
    dist.barrier()
    assert_close(EKFACPenalty.load(f"{folder}/penalty.safetensors").to(value.device)(model), value)
    if dist.get_rank() == 0:
        alone = here(Net())
        loaded = copy.deepcopy({"model": alone.state_dict(), "penalty": penalty.state_dict()})
        for tensor in (*loaded["model"].values(), *loaded["penalty"].values()):
            tensor.zero_()
        dcp.load(loaded, checkpoint_id=f"{folder}/two", no_dist=True)
        alone.load_state_dict(loaded["model"])
        fresh = penalty_of()
        fresh.load_state_dict(loaded["penalty"])
        assert_close(fresh(alone), value)
        again = {"model": alone.state_dict(), "penalty": fresh.state_dict()}
        dcp.save(again, checkpoint_id=f"{folder}/one", no_dist=True)
    dist.barrier()
    target = {"model": state, "penalty": penalty.state_dict()}
    dcp.load(target, checkpoint_id=f"{folder}/one")
    back = penalty_of()
    back.load_state_dict(target["penalty"])
    assert_close(back(model), value)
    assert Path(folder, "penalty.safetensors").exists()
