"""Work that is done once: for a bias with its weight, and for both passes over the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.layers.linear import LinearCall
from rotate_ewc.linalg import eigh
from rotate_ewc.linalg.block import Block
from rotate_ewc.tracing import passes
from rotate_ewc.tracing.capture import CapturedBatch
from rotate_ewc.tracing.passes import ActivationCache
from rotate_ewc.tracing.recorder import Use
from tests.helpers.crossing import crossed
from tests.helpers.oracles import assert_close, dense_fisher

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


@crossed(
    lengths=[(1, 1, 1), *permutations((1, 2, 3)), (1, 1, 2), (2, 1, 1)],
    fisher=["type2", "empirical"],
    budget=[1, 2**30],
)
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
    plain = eigh.decomposed

    def counted(covariance: Tensor, label: str) -> tuple[Tensor, str]:
        sizes.append(covariance.shape[1])
        return plain(covariance, label)

    monkeypatch.setattr(eigh, "decomposed", counted)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(torch.ones(4, 5), torch.arange(4) % 2)]
    EKFACLinearOperator(network, LOSS, list(network.parameters()), data, check_deterministic=False)
    assert sorted(sizes) == [3, 4, 4, 5]


# What four batches that are slices of one tensor keep: that tensor once, their labels', and their
# gradients.
SLICES = 40 * 30 * 4 + 40 * 8 + 40 * 3 * 4


@pytest.mark.parametrize(
    ("budget", "again"),
    [
        (2**30, []),
        (2 * SLICES, []),
        (2 * SLICES - 2, [3]),
        (2 * SLICES - 2 * 120 - 2, [2, 3]),
        (2 * (SLICES - 4 * 120), [0, 1, 2, 3]),
    ],
)
def test_the_model_runs_again_only_for_what_does_not_fit_in_memory(
    budget: int, again: list[int]
) -> None:
    """Inputs and labels of four batches are slices of one tensor each; gradients take 120 bytes."""
    calls: list[int] = []

    def forward(x: Tensor) -> Tensor:
        calls.append(int(x[0, 0]))
        return network(x)

    network = nn.Linear(30, 3)
    inputs, labels = torch.ones(40, 30), torch.zeros(40, dtype=torch.long)
    inputs[:, 0] = torch.arange(4).repeat_interleave(10)
    data = list(zip(inputs.split(10), labels.split(10), strict=True))
    EKFACLinearOperator(
        forward,
        LOSS,
        list(network.parameters()),
        data,
        check_deterministic=False,
        memory_budget=budget,
    )
    assert calls == [0, 1, 2, 3, *again]


def limit_cache(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the cache hold so many bytes, whatever the memory budget is."""
    patch.setattr(passes, "ActivationCache", lambda max_bytes: ActivationCache(num_bytes))


@pytest.mark.parametrize("fisher", ["mc", "type2"])
@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 5])
def test_nothing_depends_on_how_much_is_kept(
    kept: int, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and so with the same sampled labels."""
    network, data = model(), [tokens(3, seed) for seed in range(5)]
    # Bytes of the labels, the inputs of both layers, and the gradients at their outputs.
    of_batch = 8 * 5 * (1 + 3 * 3 + 4 + (3 * 4 + 3) * (1 if fisher == "mc" else 2))
    runs = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return network(x)

    def blocks() -> dict[str, Tensor]:
        operator = EKFACLinearOperator(
            forward,
            LOSS,
            dict(network.named_parameters()),
            data,
            fisher_type=fisher,
            check_deterministic=False,
        )
        return {n: t for n, t in operator.state_dict().items() if isinstance(t, Tensor)}

    expected, runs = blocks(), 0
    monkeypatch.setattr(
        passes, "ActivationCache", lambda max_bytes: ActivationCache(kept * of_batch)
    )
    found = blocks()
    assert runs == 5 + (5 - kept)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Restless:
    """A loader whose batches are others the second time: in another order, or changed."""

    def __init__(self, data: list[Batch], how: str) -> None:
        self.data, self.how, self.times = data, how, 0

    def __iter__(self) -> Iterator[Batch]:
        self.times += 1
        yield from self.data if self.times == 1 else self._others()

    def _others(self) -> list[Batch]:
        if self.how == "same":
            return self.data
        if self.how == "other order":
            return self.data[::-1]
        if self.how == "swapped in the middle":
            return [self.data[i] for i in (0, 2, 1, 3, 4)]
        if self.how == "cut otherwise":
            inputs = torch.cat([x for x, _ in self.data])
            labels = torch.cat([y for _, y in self.data])
            return [(inputs[:8], labels[:8]), (inputs[8:], labels[8:])]
        return [(x, y.roll(1)) for x, y in self.data]


class Buffered(Restless):
    """Every batch in the same memory, where another one was before."""

    def __iter__(self) -> Iterator[Batch]:
        inputs, labels = (tensor.clone() for tensor in self.data[0])
        for x, y in super().__iter__():
            yield inputs.copy_(x), labels.copy_(y)


class Converting(nn.Module):
    """A model that makes tensors of its own of its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * 1)


@pytest.mark.parametrize("how", ["same", "other order"])
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_every_batch_in_the_same_memory(
    kept: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers' inputs that were kept are right, but of which batch nobody knows any more."""
    network, data = Converting(model()), [tokens(3, seed) for seed in range(5)]
    of_batch = 8 * 5 * (2 * 3 * 3 + 4 + 3 * 4 + 3)
    monkeypatch.setattr(
        passes, "ActivationCache", lambda max_bytes: ActivationCache(kept * of_batch + 999)
    )
    params = list(network.parameters())
    options = {"fisher_type": "empirical", "check_deterministic": False}
    loader = Buffered(data, how)
    operator = EKFACLinearOperator(network, LOSS, params, loader, **options)
    assert loader.times == 2
    expected = EKFACLinearOperator(network, LOSS, params, data, **options)
    for found, block in zip(operator.blocks, expected.blocks, strict=True):
        assert_close(found.eigenvalues, block.eigenvalues)


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("how", ["other order", "swapped in the middle", "cut otherwise", "labels"])
def test_every_batch_counts_once_whatever_its_place(
    how: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept is not used for another batch. With changed labels the second ones count."""
    network, data = model(), [tokens(3, seed) for seed in range(5)]
    of_batch = 8 * 5 * (1 + 3 * 3 + 4 + 3 * 4 + 3)
    monkeypatch.setattr(
        passes, "ActivationCache", lambda max_bytes: ActivationCache(kept * of_batch)
    )
    loader = Restless(data, how)
    operator = EKFACLinearOperator(
        network,
        LOSS,
        list(network.parameters()),
        loader,
        fisher_type="empirical",
        check_deterministic=False,
    )
    if kept < 5 and how == "labels":
        data = [(x, y.roll(1)) for x, y in data]
    assert loader.times == (1 if kept == 5 else 2)
    for name in ("first.weight", "first.bias", "head.weight", "head.bias"):
        exact = sum(
            (dense_fisher(network, LOSS, [name], x, y, "empirical") for x, y in data),
            torch.zeros(()),
        )
        block = operator.block(name)
        found = basis_of(block).T @ exact @ basis_of(block)
        assert_close(block.eigenvalues.flatten(), found.diagonal())


def basis_of(block: Block) -> Tensor:
    """The basis of a block without groups, as one matrix over the parameter's entries."""
    if block.activation_basis is None:
        return block.gradient_basis[0]
    return torch.kron(block.gradient_basis[0], block.activation_basis[0])


def captured(inputs: Tensor) -> CapturedBatch:
    """What a batch shows, which is some inputs and nothing else."""
    use = Use("weight", None, LinearCall(inputs, None, None), inputs._version)
    return CapturedBatch(len(inputs), 1.0, (), (use,), (inputs,), (None,))


def batch(number: int, inputs: Tensor) -> passes.Batch:
    return passes.Batch(number, inputs, inputs[:0])


def kept(max_bytes: int, inputs: Sequence[Tensor], parts: int = 1) -> tuple[int, bool]:
    """Add so many parts of each batch; return how many are kept, and whether all are."""
    cache = ActivationCache(max_bytes)
    for index, tensor in enumerate(inputs):
        cache.add(batch(index // parts, tensor), captured(tensor))
    if cache.holds_all:
        found = [part.inputs[0] for cached in cache.take_all() for part in cached.parts]
        assert list(map(id, found)) == list(map(id, inputs))
        return len(found), True
    count = 0
    for number in range(len(inputs) // parts):
        expected = inputs[number * parts : (number + 1) * parts]
        cached = cache.take(batch(number, expected[0]))
        found = [] if cached is None else [part.inputs[0] for part in cached.parts]
        assert list(map(id, found)) in ([], list(map(id, expected)))
        count += len(found)
    return count, False


def test_batches_are_kept_while_they_fit() -> None:
    batches = [torch.ones(10, 25) for _ in range(6)]  # 1,000 bytes each
    assert kept(6000, batches) == (6, True)
    assert kept(5999, batches) == (5, False)
    assert kept(2000, batches) == (2, False)
    assert kept(999, batches) == (0, False)
    # One that is small may not take the place of one before it.
    assert kept(2500, [*batches[:3], torch.ones(1)]) == (2, False)


def test_slices_of_one_tensor_count_once() -> None:
    batches = torch.ones(60, 25).split(10)
    assert kept(6000, batches) == (6, True)
    assert kept(5999, batches) == (0, False)


def test_a_batch_is_kept_as_a_whole_or_not_at_all() -> None:
    parts = [torch.ones(10, 25) for _ in range(6)]
    assert kept(6000, parts, parts=3) == (6, True)
    assert kept(5000, parts, parts=3) == (3, False)
    assert kept(2000, parts, parts=3) == (0, False)


def test_batches_that_were_written_to_are_not_returned() -> None:
    batches = [torch.ones(10, 25) for _ in range(3)]
    cache = ActivationCache(6000)
    for number, inputs in enumerate(batches):
        cache.add(batch(number, inputs), captured(inputs))
    assert cache.holds_all
    batches[1].add_(1)
    assert not cache.holds_all
    found = cache.take(batch(0, batches[0]))
    assert found is not None
    assert len(found.parts) == 1
    assert cache.take(batch(1, batches[1])) is None
    assert cache.take(batch(2, batches[2])) is None, "nor any that come afterwards"
