"""Layers with the same input have one factor and one basis for it, in memory and in files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc._utils.tree import place_of
from rotate_ewc.linalg.outer_products import OuterProducts
from tests.helpers.oracles import dense_empirical_fisher

CE = nn.CrossEntropyLoss()
D = 12


class Attention(nn.Module):
    """Queries, keys and values of one input; in some batches of copies of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        other = x.clone() if x.shape[1] == 4 else x
        q, k, v = self.q(x), self.k(other), self.v(x)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.head(mixed.mean(dim=1))
        return y


def model() -> Attention:
    torch.manual_seed(0)
    return Attention().double()


def batches(*positions: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, count, D, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )
        for count in positions
    ]


def estimated(net: nn.Module, data: Any, **options: Any) -> EKFACLinearOperator:
    options = {"fisher_type": "empirical", "check_deterministic": False, **options}
    return EKFACLinearOperator(net, CE, list(net.parameters()), data, **options)


def input_bases(operator: EKFACLinearOperator) -> dict[str, Tensor]:
    return {b.label: b.activation_basis for b in operator.blocks if b.activation_basis is not None}


@pytest.mark.parametrize("rank", ["full", 5])
@pytest.mark.parametrize(
    ("positions", "shared"), [((5, 6), "qkv"), ((5, 4), "qv"), ((4, 5), "qv"), ((4, 4), "qv")]
)
def test_one_basis_as_long_as_the_input_is_one(
    positions: tuple[int, ...], shared: str, rank: Any
) -> None:
    """It diagonalises the covariance of all inputs; also where one layer goes its own way."""
    net, data = model(), batches(*positions)
    operator = estimated(net, data, rank=rank)
    bases = input_bases(operator)
    owners = Counter(place_of(basis) for basis in bases.values())
    assert sorted(owners.values()) == sorted([len(shared), *[1] * (4 - len(shared))])
    inputs = torch.cat([x.flatten(0, 1) for x, _ in data])
    covariance = inputs.mT @ inputs
    for name in "qkv":
        basis = bases[f"{name}.weight"][0]
        rotated = basis.mT @ covariance @ basis
        off = rotated - torch.diag_embed(rotated.diagonal())
        assert float(off.abs().max()) <= 1e-10 * float(covariance.abs().max())
    names = [name for name, _ in net.named_parameters()]
    exact = sum(
        float(
            dense_empirical_fisher(net, nn.CrossEntropyLoss(reduction="sum"), names, x, y).trace()
        )
        for x, y in data
    )
    assert float(operator.trace) == pytest.approx(exact / 16, rel=1e-10)


def test_the_factor_is_summed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    add = OuterProducts.add

    def counting(self: OuterProducts, vectors: Tensor) -> None:
        sizes.append(vectors.shape[1] * vectors.shape[2])
        add(self, vectors)

    monkeypatch.setattr(OuterProducts, "add", counting)
    estimated(model(), batches(5))
    # Three gradients and one input of 8 × 5 positions; and of the head, with one position.
    assert Counter(sizes) == {40: 4, 8: 2}


def test_other_ranks_have_bases_of_their_own() -> None:
    operator = estimated(model(), batches(5, 6), rank={"q.*": 2, "*": "full"})
    bases = input_bases(operator)
    assert bases["q.weight"].shape[2] == 2
    assert place_of(bases["k.weight"]) == place_of(bases["v.weight"])


def test_stored_once_and_loaded_as_one(tmp_path: Path) -> None:
    operator = estimated(model(), batches(5, 6))
    state = operator.state_dict()
    assert {"q.weight/activation_basis", "head.weight/activation_basis"} == {
        key for key in state if key.endswith("activation_basis")
    }
    again = EKFACLinearOperator.from_state_dict(state)
    for name, basis in input_bases(operator).items():
        assert torch.equal(input_bases(again)[name], basis)
    assert len({place_of(basis) for basis in input_bases(again).values()}) == 2
    penalty = EKFACPenalty(1.0, fisher_type="empirical", temperature=1.0)
    net = model()
    penalty.consolidate(net, CE, batches(5, 6))
    penalty.save(tmp_path / "penalty.safetensors")
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors")
    assert loaded.nbytes == penalty.nbytes
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    assert torch.equal(loaded(net), penalty(net))
    assert penalty.double().nbytes == penalty.nbytes
    penalty.consolidate(net, CE, batches(5))
    assert penalty.nbytes > loaded.nbytes
