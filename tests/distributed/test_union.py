"""Many processes estimate what one does with all of their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from tests.helpers.cases import BY_NAME, Case
from tests.helpers.penalties import Batches
from tests.helpers.processes import distributed_test, gather, here

# Convolutions, embeddings, tied weights, norms, attention, and parameters without a rule.
NAMES = (
    "tanh-mlp",
    "conv2d-stride-groups",
    "conv1d-groups-reflect",
    "embedding-pooled",
    "embedding-tied-token-outputs",
    "tied-weights",
    "batch-norm-and-dropout",
    "layer-norm-token-outputs",
    "attention-batch-first",
    "learned-positions",
    "weight-norm",
    "low-rank",
    "wide-few-positions",
    "lstm",
    "subset-of-parameters",
)
TOLERANCE = 1e-12


def estimate(case: Case, data: Batches, group: Any, **options: Any) -> EKFACLinearOperator:
    model = here(case.model())
    parameters = dict(model.named_parameters())
    with pytest.warns() if case.unsupported != "error" else _nothing():
        return EKFACLinearOperator(
            model,
            case.loss_func("ce"),
            [parameters[name] for name in case.names(model)],
            here(data),
            group=group,
            unsupported=case.unsupported,
            **{"check_deterministic": False, **options},
        )


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def shard(case: Case, split: str) -> Batches:
    """This process's part of a case's examples, in batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    n = case.examples
    own: Sequence[int] = range(rank, n, size)
    if split == "uneven":
        own = [i for i in range(n) if min(i, size - 1) == rank]
    if split == "one has all":
        own = range(n) if rank == size - 1 else ()
    batches = case.data("ce", [1] * n)
    chosen = [batches[i] for i in own]
    if split == "strided" and chosen:  # in one batch, and elsewhere in many
        return [(torch.cat([x for x, _ in chosen]), torch.cat([y for _, y in chosen]))]
    return chosen


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_bits(operator: EKFACLinearOperator) -> None:
    """All processes hold the same tensors, in the same layouts."""
    tensors = [t for block in operator.blocks for t in block.tensors.values()]
    own = [(t.cpu().contiguous(), t.stride()) for t in tensors]
    first, *others = gather(own)
    for other in others:
        for (one, strides), (two, theirs) in zip(first, other, strict=True):
            assert torch.equal(one, two)
            assert strides == theirs


def assert_union(case: Case, split: str, **options: Any) -> None:
    together = estimate(case, shard(case, split), "auto", **options)
    alone = estimate(case, case.data("ce"), None, **options)
    label = f"{case.name}, {split}, {options}"
    assert relative(together.to_dense(), alone.to_dense()) < TOLERANCE, label
    assert together.provenance == alone.provenance, label
    assert_same_bits(together)


@distributed_test()
def test_layers() -> None:
    for name in NAMES[:3]:
        assert_union(BY_NAME[name], "strided", fisher_type="type2")


@distributed_test((2,))
def test_every_kind_of_layer() -> None:
    for name in NAMES[3:]:
        assert_union(BY_NAME[name], "strided", fisher_type="type2")


@distributed_test((2, 3))
def test_any_split() -> None:
    for name in ("tanh-mlp", "tied-weights"):
        for split in ("uneven", "one has all"):
            assert_union(BY_NAME[name], split, fisher_type="type2")
            assert_union(BY_NAME[name], split, fisher_type="empirical", memory_budget=1)


@distributed_test((2, 3))
def test_joint_blocks_reduced_factors_and_sampled_labels() -> None:
    # Of few examples, reduced factors leave a part of the basis open where positions are shared.
    assert_union(BY_NAME["tanh-mlp"], "strided", fisher_type="type2", kfac_approx="reduce")
    for name in ("tanh-mlp", "conv2d-stride-groups"):
        case = BY_NAME[name]
        assert_union(case, "strided", fisher_type="type2", separate_weight_and_bias=False)
        assert_union(case, "strided", fisher_type="mc", mc_samples=2, check_deterministic=True)
        assert_union(case, "strided", fisher_type="mc", memory_budget=1)


class Heads(nn.Module):
    """Two heads, of which each example uses one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        head = self.first if x[0, 0] > 0 else self.second
        outputs: Tensor = head(torch.tanh(self.body(x)))
        return outputs


@distributed_test((2, 3))
def test_parameters_that_some_processes_do_not_use() -> None:
    """One head's data are all on one process, and a bias follows its weight on one only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    x[:, 0] = torch.tensor([1.0, 1, 1, -1, -1, -1])
    batches = [(x[i : i + 1], torch.tensor([i % 3])) for i in range(6)]
    own = batches[:3] if dist.get_rank() == 0 else batches[3:] if dist.get_rank() == 1 else []
    operators = []
    for data, group in ((own, "auto"), (batches, None)):
        model = here(Heads())
        parameters = dict(model.named_parameters())
        operators.append(
            EKFACLinearOperator(
                model,
                nn.CrossEntropyLoss(),
                parameters,
                here(data),
                group=group,
                fisher_type="type2",
            )
        )
    assert relative(operators[0].to_dense(), operators[1].to_dense()) < TOLERANCE
    assert operators[0].provenance == operators[1].provenance
    assert_same_bits(operators[0])


@distributed_test((2, 3))
def test_token_losses_with_ignored_labels() -> None:
    """What the mean divides by is counted over all processes."""
    case = BY_NAME["embedding-token-outputs"]
    ((x, y),) = case.data("ce", [case.examples])
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = len(y) // len(x)
    y = y.view(len(x), rows, *y.shape[1:]).clone()
    y[1:3] = -100
    own = slice(rank, None, size)
    found = []
    for inputs, targets, group in ((x[own], y[own], "auto"), (x, y, None)):
        model = here(case.model())
        found.append(
            EKFACLinearOperator(
                model,
                case.loss_func("ce"),
                list(model.parameters()),
                here([(inputs, targets.flatten(0, 1))]),
                group=group,
                fisher_type="type2",
                num_data=1000,
            )
        )
    assert relative(found[0].to_dense(), found[1].to_dense()) < TOLERANCE
    assert found[0].provenance == found[1].provenance
    assert found[0].num_data == 1000
