"""Work that is done once: for a bias with its weight, and for both passes over the data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, kernels
from rotate_ewc.batches import count_batches
from rotate_ewc.keeper import Keeper
from rotate_ewc.layers.linear import LinearCall
from rotate_ewc.observation import Observation
from rotate_ewc.recorder import Use
from tests.oracles import assert_close, dense_fisher

LOSS = nn.CrossEntropyLoss(reduction="sum")
Batch = tuple[Tensor, Tensor]


class Tokens(nn.Module):
    """Linear layers over tokens, whose first bias takes part only where there are not two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if x.shape[1] == 2 else self.first.bias
        hidden = F.linear(x, self.first.weight, bias)
        return self.head(torch.tanh(hidden).mean(dim=1))


def tokens(length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(5, length, 3, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (5,), generator=generator)


def model() -> Tokens:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tokens().double()


@pytest.mark.parametrize("budget", [1, 2**30])
@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("lengths", [(1, 1, 1), *permutations((1, 2, 3)), (1, 1, 2), (2, 1, 1)])
def test_separate_bias_is_exact_whatever_its_weight_does(
    lengths: tuple[int, ...], fisher: str, budget: int
) -> None:
    """With one token a bias's gradients are its weight's; with three they are sums, with two none.

    Whichever comes first, the block of a separate bias is the exact matrix.
    """
    network = model()
    data = [tokens(length, seed) for seed, length in enumerate(lengths)]
    operator = EKFACLinearOperator(
        network,
        LOSS,
        list(network.parameters()),
        data,
        fisher_type=fisher,
        memory_budget=budget,
    )
    for name in ("first.bias", "head.bias"):
        with_bias = [(x, y) for x, y in data if name != "first.bias" or x.shape[1] != 2]
        exact = sum(
            (dense_fisher(network, LOSS, [name], x, y, fisher) for x, y in with_bias),  # type: ignore[arg-type]
            torch.zeros(()),
        )
        block = operator.block(name)
        basis = block.gradient_basis[0]
        assert_close(basis @ torch.diag(block.eigenvalues[0, :, 0]) @ basis.T, exact)


def test_bias_and_weight_do_not_share_memory() -> None:
    network = model()
    operator = EKFACLinearOperator(network, LOSS, list(network.parameters()), [tokens(1, 0)])
    bases = [operator.block(f"first.{kind}").gradient_basis for kind in ("weight", "bias")]
    assert torch.equal(*bases)
    assert len({basis.data_ptr() for basis in bases}) == 2


def test_one_factor_and_one_eigh_serve_a_weight_and_its_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    plain = kernels.decomposed

    def counted(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        sizes.append(covariance.shape[1])
        return plain(covariance, label)

    monkeypatch.setattr(kernels, "decomposed", counted)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.ones(2, 5), torch.tensor([0, 1]))]
    EKFACLinearOperator(network, LOSS, list(network.parameters()), data, check_deterministic=False)
    assert sorted(sizes) == [3, 4, 4, 5]


# What four batches that are slices of one tensor keep: that tensor once, and their gradients.
SLICES = 40 * 30 * 4 + 40 * 3 * 4


@pytest.mark.parametrize(
    ("budget", "runs"), [(2**30, 4), (2 * SLICES + 2000, 4), (2 * SLICES - 2000, 8), (2000, 8)]
)
def test_the_model_runs_once_where_its_layers_fit_in_memory(budget: int, runs: int) -> None:
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(len(x))
        return network(x)

    network = nn.Linear(30, 3)
    inputs, labels = torch.ones(40, 30), torch.zeros(40, dtype=torch.long)
    data = list(zip(inputs.split(10), labels.split(10), strict=True))
    EKFACLinearOperator(
        forward,
        LOSS,
        list(network.parameters()),
        data,
        check_deterministic=False,
        memory_budget=budget,
    )
    assert len(calls) == runs


def observed(inputs: Tensor, *, first: bool = True) -> Observation:
    """An observation that holds some inputs and nothing else."""
    use = Use("weight", None, LinearCall(inputs, None, None), inputs._version)
    return Observation(
        num_examples=len(inputs),
        mass=1.0,
        parameters={},
        plans=(),
        uses=(use,),
        placements=(),
        computed={},
        first=first,
    )


def kept_after(keeper: Keeper, inputs: list[Tensor]) -> list[int]:
    """Offer observations, and see how many are held after each."""
    held = []
    for tensor in inputs:
        keeper.offer(observed(tensor))
        held.append(len(keeper.intact()))
    return held


def test_two_batches_tell_whether_all_will_fit() -> None:
    batches = [torch.ones(10, 25) for _ in range(6)]  # 1,000 bytes each
    assert kept_after(Keeper(6000, 6), batches) == [1, 2, 3, 4, 5, 6]
    # Known when the third begins; without a number of batches, when there is no more room.
    assert kept_after(Keeper(5999, 6), batches) == [1, 2, 0, 0, 0, 0]
    assert kept_after(Keeper(5999, None), batches) == [1, 2, 3, 4, 5, 0]
    assert kept_after(Keeper(999, 6), batches) == [0, 0, 0, 0, 0, 0]


def test_slices_of_one_tensor_grow_by_nothing() -> None:
    batches = list(torch.ones(60, 25).split(10))
    assert kept_after(Keeper(6000, 6), batches) == [1, 2, 3, 4, 5, 6]
    assert kept_after(Keeper(5999, 6), batches) == [0, 0, 0, 0, 0, 0]


def test_parts_of_one_batch_are_no_batches() -> None:
    keeper = Keeper(6000, 2)
    for first in (True, False, False, True, False, False):
        keeper.offer(observed(torch.ones(10, 25), first=first))
    assert len(keeper.intact()) == 6


def test_observations_that_were_written_to_are_not_returned() -> None:
    keeper, inputs = Keeper(6000, 2), torch.ones(10, 25)
    keeper.offer(observed(inputs))
    assert len(keeper.intact()) == 1
    inputs.zero_()
    assert keeper.intact() == []


def test_number_of_batches() -> None:
    class Unsized:
        def __iter__(self) -> Iterator[Batch]:
            return iter(())

    class Refusing(Unsized):
        def __len__(self) -> int:
            raise NotImplementedError

    assert count_batches([tokens(1, 0)] * 3) == 3
    assert count_batches(Unsized()) is None
    assert count_batches(Refusing()) is None
