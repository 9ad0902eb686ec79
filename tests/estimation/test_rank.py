"""What `rank` and `diagonal` mean: how many directions are kept, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty, EstimationSettings
from rotate_ewc.linalg.truncation import truncation_of
from tests.helpers.oracles import assert_close, dense_empirical_fisher, parameter_shapes

CE = nn.CrossEntropyLoss()
Data = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(100, 40), nn.Tanh(), nn.Linear(40, 5)
    return nn.Sequential(*layers).double()


def data(examples: int = 120, inputs: int = 100, classes: int = 5) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (examples,), generator=generator)
    return list(zip(x.split(50), y.split(50), strict=True))


def estimated(model: nn.Module, batches: Data, **options: Any) -> EKFACLinearOperator:
    params = list(model.parameters())
    options = {"fisher_type": "empirical", "check_deterministic": False, **options}
    return EKFACLinearOperator(model, CE, params, batches, **options)


def ranks(operator: EKFACLinearOperator) -> dict[str, tuple[int, int]]:
    return {block.label: block.ranks for block in operator.blocks}


BAD_RANKS = [
    (0, ValueError, "rank is 0; expected a positive integer"),
    (-3, ValueError, "rank is -3; expected a positive integer"),
    (True, TypeError, "rank is True; expected a positive integer"),
    (0.0, ValueError, "rank is 0.0; expected a positive integer, a part of the trace"),
    (1.5, ValueError, "rank is 1.5; expected a positive integer, a part of the trace"),
    (-0.5, ValueError, "rank is -0.5"),
    (float("nan"), ValueError, "rank is nan"),
    (float("inf"), ValueError, "rank is inf"),
    ("half", ValueError, "rank is 'half'; expected a positive integer"),
    (None, TypeError, "rank is None; expected a positive integer"),
    ([3], TypeError, "rank is [3]; expected a positive integer"),
    ({}, ValueError, "rank is empty; expected at least one pattern, such as {'*': 64}"),
    ({3: 3}, TypeError, "rank has the keys [3]; expected name patterns"),
    ({"*": 0}, ValueError, "rank['*'] is 0; expected a positive integer"),
    ({"*": {"*": 3}}, TypeError, "rank['*'] is {'*': 3}; expected a positive integer"),
]


@pytest.mark.parametrize(("rank", "kind", "message"), BAD_RANKS, ids=str)
def test_other_ranks_are_refused(rank: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        EstimationSettings(rank=rank)
    with pytest.raises(kind, match=re.escape(message)):
        EKFACPenalty(rank=rank)
    with pytest.raises(kind, match=re.escape(message)):
        estimated(network(), data(), rank=rank)


@pytest.mark.parametrize("diagonal", ["*.bias", 3, [3], None])
def test_other_patterns_are_refused(diagonal: Any) -> None:
    with pytest.raises(TypeError, match="diagonal is"):
        EstimationSettings(diagonal=diagonal)


@pytest.mark.parametrize("option", ["rank", "diagonal"])
def test_patterns_that_match_nothing_are_refused(option: str) -> None:
    """All of them at once; the penalty and the model stay as they were."""
    model, names = network(), ["9.weight", "x*"]
    value: Any = dict.fromkeys(["*", *names], 2) if option == "rank" else names
    message = f"{option} patterns '9.weight', 'x*' match no parameter that is estimated"
    with pytest.raises(ValueError, match=re.escape(message)):
        estimated(model, data(), **{option: value})
    penalty = EKFACPenalty(**{option: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        penalty.consolidate(model, CE, data())
    assert penalty.num_tasks == 0


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        ("full", [(40, 100), (40, 1), (5, 40), (5, 1)]),
        ("auto", [(40, 100), (40, 1), (5, 40), (5, 1)]),
        (7, [(7, 7), (7, 1), (4, 7), (4, 1)]),
        # Gradients of a softmax sum up to zero: there are four directions of five.
        (1000, [(40, 100), (40, 1), (4, 40), (4, 1)]),
        (1.0, [(40, 100), (40, 1), (4, 40), (4, 1)]),
        ({"2.*": 3, "0.weight": "full", "*": 2}, [(40, 100), (2, 1), (3, 3), (3, 1)]),
        ({"0.bias": 3}, [(40, 100), (3, 1), (5, 40), (5, 1)]),
    ],
    ids=str,
)
def test_how_many_directions_are_kept(rank: Any, expected: list[tuple[int, int]]) -> None:
    found = ranks(estimated(network(), data(), rank=rank, fisher_type="mc"))
    assert list(found.values()) == expected


@pytest.mark.parametrize(
    ("size", "other", "kept"),
    [
        (128, 2, None),
        (129, 2, 16),
        (512, 1, None),
        (513, 1, 16),
        (784, 98, None),  # 784 × 100 weights
        (784, 97, 97),
        (1024, 128, None),
        (1025, 129, 129),
        (2000, 1001, 2000),  # all of nearly a square one
        (2000, 1000, 1000),
    ],
)
def test_a_basis_is_short_or_no_larger_than_its_parameter(
    size: int, other: int, kept: int | None
) -> None:
    found = truncation_of("auto", size, other)
    assert (found and found.count(torch.ones(1, size), torch.ones(1), size)) == kept


def test_a_joint_block_goes_by_its_weight() -> None:
    found = ranks(
        estimated(
            network(),
            data(),
            rank={"0.bias": 2, "0.weight": 9, "2.*": 3},
            separate_weight_and_bias=False,
        )
    )
    assert found == {"0.weight+0.bias": (9, 9), "2.weight+2.bias": (3, 3)}


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_a_part_of_the_trace(part: float) -> None:
    """The kept directions make it up, and one less would not."""
    model, batches = network(), data()
    block = estimated(model, batches, rank=part).block("0.weight")
    x = torch.cat([inputs for inputs, _ in batches])
    values = torch.linalg.eigvalsh(x.T @ x).flip(0)
    sums = values.cumsum(0) / values.sum()
    kept = block.ranks[1]
    assert sums[kept - 1] >= part > sums[kept - 2]
    basis = block.activation_basis
    assert basis is not None
    found = float((x @ basis[0]).square().sum() / x.square().sum())
    assert found == pytest.approx(float(sums[kept - 1]), rel=1e-10)


@pytest.mark.parametrize("rank", ["auto", 1000, 1.0])
def test_nothing_is_stored_for_what_four_examples_do_not_show(rank: Any) -> None:
    """A square basis of 1500 outputs for four rows that are not zero would be 18 MB."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1500)
    x, y = torch.randn(4, 8), torch.randint(1500, (4,))
    operator = EKFACLinearOperator(model, CE, list(model.parameters()), [(x, y)], rank=rank)
    assert operator.block("weight").ranks[0] == operator.block("bias").ranks[0] == 4
    for block in operator.blocks:
        kept, rest = block.eigenvalues[0, :-1].max(), block.eigenvalues[0, -1].max()
        assert rest <= 1e-6 * kept


def test_a_wide_output_takes_little_memory() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 32000)
    batches = [(torch.randn(32, 16), torch.randint(32000, (32,))) for _ in range(4)]
    params = list(model.parameters())
    operator = EKFACLinearOperator(model, CE, params, batches, check_deterministic=False)
    stored = sum(t.nbytes for block in operator.blocks for t in block.tensors.values())
    assert stored <= 2 * sum(p.nbytes for p in params)


@pytest.mark.parametrize("joint", [False, True])
def test_parameters_that_are_not_rotated_have_their_exact_diagonal(joint: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=generator)
    names = [name for name, _ in model.named_parameters()]
    dense = dense_empirical_fisher(model, CE, names, x, y)
    operator = estimated(
        model, [(x, y)], diagonal=["0.*", "3.bias"], separate_weight_and_bias=not joint
    )
    sizes = [torch.Size(shape).numel() for shape in parameter_shapes(model, names).values()]
    expected = dict(zip(names, dense.diagonal().split(sizes), strict=True))
    found = dict(zip(names, operator.diagonal(), strict=True))
    for block in operator.blocks:
        rotated = block.parameters == ("3.weight",)
        assert (block.gradient_basis is not None) == rotated
        assert (block.activation_basis is not None) == rotated
        for name in () if rotated else block.parameters:
            assert_close(found[name].flatten(), expected[name])
    assert float(operator.trace) == pytest.approx(float(dense.trace()), rel=1e-10)


def test_ranks_are_told_and_kept(tmp_path: Any) -> None:
    rank = {"2.*": 3, "*": 0.9}
    penalty = EKFACPenalty(rank=rank, diagonal=["0.bias"])
    penalty.consolidate(network(), CE, data())
    penalty.save(tmp_path / "penalty.safetensors")
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors")
    assert loaded.settings.rank == rank
    assert loaded.settings.diagonal == ("0.bias",)
