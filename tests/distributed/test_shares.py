"""Penalties of which each process keeps only its share (`sharded=True`)."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

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
    return EKFACPenalty(**{"strength": 3.0, "fisher_type": "type2", "sharded": True, **options})


def replicas() -> nn.Module:
    """A model that every process has whole."""
    return here(Net())


def mean_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    """Step a replica with the mean gradient of all processes, as data-parallel training does."""
    optimizer.zero_grad()
    ((x, y),) = data
    CE(model(x), y).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    optimizer.step()


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same numbers; the headers differ in the option itself."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert key == "header" or torch.equal(found[key], tensor), key


@distributed_test((2, 3))
def test_shares_make_up_the_whole() -> None:
    """The same bits as in penalties that are whole everywhere; and those of one process alone."""
    for make in (sharded, replicas):
        model, shared, everywhere = make(), penalty_of(), penalty_of(sharded=False)
        plain, alone = here(Net()), penalty_of(sharded=False)
        for seed in range(2):
            shared.consolidate(model, CE, own(batches(seed)))
            everywhere.consolidate(model, CE, own(batches(seed)))
            alone.consolidate(plain, CE, here(batches(seed)), group=None)
            state = shared.state_dict()
            assert_same_state(state, everywhere.state_dict())
        loaded = penalty_of(sharded=False)
        loaded.load_state_dict(state)
        assert_close(
            loaded.terms[0].operator.to_dense(), alone.terms[0].operator.to_dense(), label=make
        )
        kept = gather(shared.nbytes)
        largest = max(
            sum(t.nbytes for t in block.tensors.values())
            for block in loaded.terms[0].operator.blocks
        )
        assert sum(kept) == everywhere.nbytes
        assert max(kept) <= everywhere.nbytes / len(kept) + 2 * largest
        assert shared.max_curvature == pytest.approx(alone.max_curvature, rel=1e-6)


@distributed_test((2,))
def test_the_loss() -> None:
    """Value and gradient are those of a whole penalty, with an axis that has grown as well."""
    for make in (sharded, replicas):
        model, plain = make(), here(Net())
        shared, alone = penalty_of(), penalty_of(sharded=False)
        shared.consolidate(model, CE, own(batches(0)))
        alone.consolidate(plain, CE, here(batches(0)), group=None)
        with torch.no_grad():
            for one in (model, plain):
                for parameter in one.parameters():
                    parameter.mul_(1.5)
        with torch.no_grad():
            assert_close(shared(model), alone(plain))
        (2.0 * shared(model)).backward()
        (2.0 * alone(plain)).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            found = p.grad.full_tensor() if make is sharded else p.grad
            assert_close(found, q.grad, 1e-7, name)


@distributed_test((2, 3))
def test_attached() -> None:
    """Every update is that of a whole penalty attached to one process's model."""
    two = dist.get_world_size() == 2
    for make in (sharded, replicas):
        for update, kind, options in (
            ("rotated", torch.optim.AdamW, {"eps": 1e-4, "weight_decay": 0.1}),
            ("tangent", torch.optim.Adam, {"eps": 1e-4}),
            *([("rotated", torch.optim.Adagrad, {"eps": 1e-4})] if two else []),
            *([("rotated", torch.optim.SGD, {"momentum": 0.9})] if two else []),
            *([("tangent", torch.optim.SGD, {})] if two else []),
            *([("gradient", torch.optim.Adam, {"eps": 1e-4})] if two else []),
        ):
            model, plain = make(), here(Net())
            shared = penalty_of(strength="auto")
            shared.consolidate(model, CE, own(batches(0)))
            alone = penalty_of(strength="auto", sharded=False)
            alone.load_state_dict(shared.state_dict())
            for one, penalty in ((model, shared), (plain, alone)):
                optimizer = kind(one.parameters(), lr=0.01, **options)
                with penalty.attach(optimizer, one, update, 3 if update == "tangent" else 1):
                    for _ in range(STEPS):
                        if one is plain:
                            step(one, optimizer, here(batches(1)))
                        elif make is sharded:
                            step(one, optimizer, part_of(batches(1)))
                        else:
                            mean_step(one, optimizer, part_of(batches(1)))
            label = make, update, kind
            assert shared.strength == pytest.approx(alone.strength, rel=1e-4), label
            for name, parameter in whole(model).items():
                assert_close(parameter, whole(plain)[name], 1e-5, (*label, name))
            first, *others = gather({n: p.cpu() for n, p in whole(model).items()})
            assert all(torch.equal(p, other[n]) for other in others for n, p in first.items())


@distributed_test((2,))
def test_other_kinds_of_penalties() -> None:
    """Thin bases, bases in fewer bits, separate tasks."""
    for options in (
        {"rank": 2},
        {"storage_dtype": "bfloat16", "damping": 0.1},
        {"mode": "separate"},
        {"diagonal": ["norm.*"]},
    ):
        model = replicas().float() if "storage_dtype" in options else replicas()
        dtype = next(model.parameters()).dtype
        shared, everywhere = penalty_of(**options), penalty_of(sharded=False, **options)
        for seed in range(2):
            for penalty in (shared, everywhere):
                penalty.consolidate(model, CE, own(batches(seed, dtype)))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)
        assert_same_state(shared.state_dict(), everywhere.state_dict())
        assert_close(shared(model), everywhere(model), 1e-6)
        assert shared.nbytes < everywhere.nbytes


@distributed_test((3,))
def test_more_processes_than_blocks() -> None:
    """A process that keeps nothing takes part all the same."""
    torch.manual_seed(0)
    model = here(nn.Linear(5, 3).double())
    shared = penalty_of(strength="auto")
    shared.consolidate(model, CE, own(batches(0)))
    assert sorted(gather(shared.nbytes))[:1] == [0]
    shown = "".join(gather(repr(shared.terms[0].operator)))
    assert (shown.count("trace"), shown.count("without numbers")) == (2, 4)
    for update in ("rotated", "tangent", "gradient"):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        with shared.attach(optimizer, model, update, 2 if update == "tangent" else 1):
            for _ in range(STEPS):
                mean_step(model, optimizer, part_of(batches(1)))
        shared.consolidate(model, CE, own(batches(1)))
    assert float(shared(model)) == 0.0
    first, *others = gather({n: p.cpu() for n, p in whole(model).items()})
    assert all(torch.equal(p, other[n]) for other in others for n, p in first.items())


@distributed_test((2,))
def test_models_that_grow() -> None:
    """Rows that are new are free; a parameter that is gone is left out of all processes."""
    torch.manual_seed(0)
    head = here(nn.Linear(5, 2).double())
    shared, everywhere = penalty_of(), penalty_of(sharded=False)
    data = [(x, y % 2) for x, y in own(batches(0))]
    for penalty in (shared, everywhere):
        penalty.consolidate(head, CE, data)
    grown = here(nn.Linear(5, 4).double())
    with torch.no_grad():
        grown.weight[:2], grown.bias[:2] = head.weight + 0.1, head.bias - 0.1
    for penalty in (shared, everywhere):
        grown.zero_grad()
        penalty(grown).backward()
        gradient = grown.weight.grad.clone()
        if penalty is shared:
            found = gradient
    assert_close(found, gradient)
    assert not found[2:].any()
    for penalty in (shared, everywhere):
        penalty.consolidate(grown, CE, own(batches(1)))
    assert_same_state(shared.state_dict(), everywhere.state_dict())


@distributed_test((2,))
def test_saved_and_loaded() -> None:
    """By all processes: as a file that one process reads, and as a distributed checkpoint."""
    (folder,) = of_first(tempfile.mkdtemp)
    model, shared = sharded(), penalty_of()
    shared.consolidate(model, CE, own(batches(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with shared.attach(optimizer, model):
        step(model, optimizer, part_of(batches(1)))
    value, path = shared(model).detach(), f"{folder}/penalty.safetensors"
    shared.save(path)
    dist.barrier()
    again = EKFACPenalty.load(path)
    assert again.sharded
    assert_close(again(model), value)
    kept = again.nbytes
    again.to(here(torch.zeros(1)).device)
    with again.attach(torch.optim.Adam(model.parameters(), lr=0.01), model):
        assert again.nbytes < kept  # from now on only this process's share
        assert_close(again(model), value)
    dcp.save({"penalty": shared.state_dict()}, checkpoint_id=f"{folder}/checkpoint")
    target = {"penalty": {k: torch.zeros_like(t) for k, t in shared.state_dict().items()}}
    dcp.load(target, checkpoint_id=f"{folder}/checkpoint")
    fresh = penalty_of()
    fresh.load_state_dict(target["penalty"])
    assert_close(fresh(model), value)
    # A later task with processes that each keep everything, and back.
    shared.sharded = False
    shared.consolidate(model, CE, own(batches(1)))
    assert shared.nbytes == kept
    assert Path(path).exists()


@distributed_test((2,))
def test_resumed_where_a_process_keeps_nothing() -> None:
    """Right after a look at a step, so that the next one tells all processes what it has done."""
    options: dict[str, Any] = {"strength": "auto", "include": ["first.weight"]}
    model, shared = replicas(), penalty_of(**options)
    shared.consolidate(model, CE, own(batches(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = shared.attach(optimizer, model)
    mean_step(model, optimizer, part_of(batches(1)))
    twin, again = copy.deepcopy(model), penalty_of(**options)
    again.load_state_dict(shared.state_dict())
    other = torch.optim.Adam(twin.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = again.attach(other, twin)
    resumed.load_state_dict(handle.state_dict())
    assert 0 in gather(len(shared.stacks))
    for seed in range(2, 5):
        mean_step(model, optimizer, part_of(batches(seed)))
        mean_step(twin, other, part_of(batches(seed)))
    assert resumed.strength == handle.strength
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


@distributed_test((2,))
def test_a_failure_in_one_block_is_everyones() -> None:
    """Gradients that are not finite, in a block that one process keeps: nobody steps."""
    model, shared = replicas(), penalty_of()
    shared.consolidate(model, CE, own(batches(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = shared.attach(optimizer, model)
    mean_step(model, optimizer, part_of(batches(1)))
    before = whole(model)
    for name, parameter in model.named_parameters():
        parameter.grad.fill_(float("nan") if name == "first.weight" else 1.0)
    with pytest.raises(ValueError, match=r"'first\.weight'.*is not finite"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in whole(model).items())
    mean_step(model, optimizer, part_of(batches(1)))  # and can go on
    handle.detach()


@distributed_test((2,))
def test_what_does_not_go_with_shares() -> None:
    model, shared = replicas(), penalty_of()
    shared.consolidate(model, CE, own(batches(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="sharded=True, which does not go with a view"):
        shared.attach(optimizer, model, "gradient", view=lambda m: dict(m.named_parameters()))
    with pytest.raises(TypeError, match=r"cannot be pickled.*penalty\.save"):
        pickle.dumps(shared)
    assert float(copy.deepcopy(shared)(model)) == 0.0
    with pytest.raises(TypeError, match="sharded is 1"):
        EKFACPenalty(sharded=1)  # type: ignore[arg-type]


def test_alone() -> None:
    """Without processes there is nothing to share."""
    model, shared, usual = Net(), penalty_of(), penalty_of(sharded=False)
    for penalty in (shared, usual):
        penalty.consolidate(model, CE, batches(0))
    assert shared.nbytes == usual.nbytes
    assert_same_state(shared.state_dict(), usual.state_dict())


@distributed_test((2,))
def test_snapshots_that_differ_are_not_mixed() -> None:
    """As those that each process has consolidated with its own data."""
    model, shared = replicas(), penalty_of()
    shared.consolidate(model, CE, here(batches(dist.get_rank())), group=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"digest of 'first.* expected the same on all ranks"):
        shared.attach(optimizer, model)


@distributed_test((2,))
def test_an_error_in_one_process_is_what_the_user_sees() -> None:
    """Leaving the `with` block waits for nobody."""
    model, shared = replicas(), penalty_of()
    shared.consolidate(model, CE, own(batches(0)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if dist.get_rank() == 0:
        with pytest.raises(ZeroDivisionError), shared.attach(optimizer, model):
            raise ZeroDivisionError
    else:
        shared.attach(optimizer, model)
    dist.barrier()
