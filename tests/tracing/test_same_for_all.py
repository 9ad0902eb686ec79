"""Tensors that are the same for all examples of a batch, wherever a model has them from."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator

CE = nn.CrossEntropyLoss()
LENGTH = 6


class Positioned(nn.Module):
    """Words and positions, each with a table; the positions are a buffer of one row, or given."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 5), nn.Embedding(9, 5)
        self.head = nn.Linear(5, 3)
        self.register_buffer("ids", torch.arange(9)[None])

    def forward(self, words: Tensor, ids: Tensor | None = None) -> Tensor:
        ids = self.ids[:, : words.shape[1]] if ids is None else ids
        y: Tensor = self.head((self.words(words) + self.places(ids)).tanh().mean(1))
        return y


class OfMappings(Positioned):
    """The same, with a dictionary of words and positions as its inputs."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["words"], batch["ids"])


class Picky(OfMappings):
    """It wants one row of positions."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward({**batch, "ids": batch["ids"].squeeze(0)[None]})


class Summing(OfMappings):
    """More rows of positions change what it computes."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        own = batch["ids"].sum(0, keepdim=True).clamp(max=8)
        return super().forward({**batch, "ids": own})


def model(kind: type[Positioned] = Positioned) -> Any:
    torch.manual_seed(0)
    return kind().double()


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(11, (9, LENGTH), generator=generator)
    return words, torch.randint(3, (9,), generator=generator)


def batches(sizes: tuple[int, ...], ids: Tensor | None = None) -> list[Any]:
    words, labels = (part.split(sizes) for part in examples())
    inputs = words if ids is None else [{"words": own, "ids": ids} for own in words]
    return list(zip(inputs, labels, strict=True))


def estimated(function: Any, net: nn.Module, data: Any, **options: Any) -> EKFACLinearOperator:
    options = {"fisher_type": "empirical", **options}
    return EKFACLinearOperator(function, CE, dict(net.named_parameters()), data, **options)


def assert_exact(
    operator: EKFACLinearOperator, net: nn.Module | None = None, forward: Any = None
) -> None:
    """Compare traces with the squared gradients of one example after another, in a plain loop."""
    net = net or model()
    forward = forward or net
    words, labels = examples()
    squares = dict.fromkeys(dict(net.named_parameters()), 0.0)
    for own, label in zip(words, labels, strict=True):
        net.zero_grad()
        nn.functional.cross_entropy(forward(own[None]), label[None]).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            squares[name] += float(parameter.grad.square().sum()) / len(words)
    for name, square in squares.items():
        assert float(operator.block(name).trace) == pytest.approx(square, rel=1e-10), name


@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1), (1, 4, 4), (LENGTH, 3)])
def test_buffers_of_a_module_that_a_function_calls(sizes: tuple[int, ...]) -> None:
    net = model()
    operator = estimated(lambda words: net(words), net, batches(sizes))
    assert_exact(operator)
    whole = estimated(net, net, batches(sizes))
    torch.testing.assert_close(operator.to_dense(), whole.to_dense(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1), (1, 4, 4), (LENGTH, 3)])
@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
def test_inputs_of_one_row(sizes: tuple[int, ...], unsupported: str) -> None:
    net = model(OfMappings)
    ids = torch.arange(LENGTH)[None]
    operator = estimated(net, net, batches(sizes, ids), unsupported=unsupported)
    assert operator.block("places.weight").gradient_basis is not None
    assert_exact(operator)


@pytest.mark.parametrize("kind", [Picky, Summing])
def test_models_for_which_one_row_is_not_as_good_as_one_for_each(kind: type[Positioned]) -> None:
    net, data = model(kind), batches((9,), torch.arange(LENGTH)[None])
    with pytest.raises(ValueError, match=r"'places.weight'.* a row for each \(positions.expand"):
        estimated(net, net, data)
    with pytest.warns(UserWarning, match="places.weight"):
        operator = estimated(net, net, data, unsupported="diagonal")
    assert_exact(operator)


@pytest.mark.parametrize("ids", [torch.arange(LENGTH)[None], torch.arange(LENGTH)])
@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1), (LENGTH, 3)])
def test_tensors_that_a_function_holds(ids: Tensor, sizes: tuple[int, ...]) -> None:
    net = model()
    assert_exact(estimated(lambda words: net(words, ids), net, batches(sizes)))
    assert_exact(estimated(partial(net, ids=ids), net, batches(sizes)))


def test_the_advice_where_the_first_batch_has_one_example() -> None:
    net, ids = model(), torch.arange(LENGTH)[None]
    with pytest.raises(ValueError, match="one example in the first batch, put a larger"):
        estimated(lambda words: net(words, ids), net, batches((1, 4, 4)))


def test_the_advice_for_inputs_of_as_many_rows_as_positions() -> None:
    net, ids = model(OfMappings), torch.arange(LENGTH)
    with pytest.raises(ValueError, match=r"'places.weight'.* a row for each \(positions.expand"):
        estimated(net, net, batches((9,), ids))
    data = [({**x, "ids": ids.expand(len(x["words"]), -1)}, y) for x, y in batches((4, 4, 1), ids)]
    assert_exact(estimated(net, net, data))


class Sorting(nn.Module):
    """Tokens are sorted, as by expert, worked on, and put back where they were."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 5), nn.Embedding(9, 5)
        self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.order = order

    def forward(self, words: Tensor, ids: Tensor | None = None) -> Tensor:
        ids = torch.arange(words.shape[1]) if ids is None else ids
        order = self.order(words)
        x = (self.words(words) + self.places(ids)).tanh().flatten(0, 1)
        x = self.middle(x[order]).tanh()[order.argsort()]
        y: Tensor = self.head(x.view(*words.shape, 5).mean(1))
        return y


KEPT = torch.zeros(9, LENGTH).long()


def _listed(words: Tensor) -> Tensor:
    numbers = words.flatten().tolist()
    return torch.LongTensor(sorted(range(len(numbers)), key=numbers.__getitem__))


def _of_numpy(words: Tensor) -> Tensor:
    return torch.from_numpy(np.argsort(words.numpy().ravel(), kind="stable"))


def _mapped(words: Tensor) -> Tensor:
    order: Any = torch.func.vmap(lambda row: row.flatten().argsort(stable=True))(words[None])
    return order[0]  # type: ignore[no-any-return]


def _kept(words: Tensor) -> Tensor:
    KEPT[: len(words)].copy_(words)
    return KEPT[: len(words)].flatten().argsort(stable=True)


@pytest.mark.parametrize("order", [_listed, _of_numpy, _mapped, _kept])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
def test_rows_that_move_by_what_is_not_seen_to_come_from_the_data(
    order: Callable[[Tensor], Tensor], given: bool, unsupported: str
) -> None:
    """Rows of a batch are not those of another one, though both call the same functions."""
    torch.manual_seed(0)
    net = Sorting(order).double()
    ids = torch.arange(LENGTH)[None] if given else None
    data = batches((3, 3, 3))
    assert_exact(estimated(lambda w: net(w, ids), net, data, unsupported=unsupported), net)


def _by_data(order: Tensor, words: Tensor) -> None:
    order.data.copy_(words)


def _by_numpy(order: Tensor, words: Tensor) -> None:
    order.numpy()[:] = words.numpy()


@pytest.mark.parametrize("write", [Tensor.copy_, _by_data, _by_numpy])
@pytest.mark.parametrize("inside", [False, True])
def test_rows_that_move_by_a_buffer_that_is_written_to(
    write: Callable[[Tensor, Tensor], Any], inside: bool
) -> None:
    """By the model in each call, or between its calls by whatever yields the batches."""
    torch.manual_seed(0)
    net = Sorting(lambda words: net.kept[: len(words)].flatten().argsort(stable=True)).double()
    net.register_buffer("kept", torch.zeros(3, LENGTH).long())

    class Writing(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for words, labels in super().__iter__():
                write(net.kept, words)
                yield words, labels

    def forward(words: Tensor) -> Tensor:
        if inside:
            write(net.kept, words)
        return net(words)  # type: ignore[no-any-return]

    data = batches((3, 3, 3))
    operator = estimated(forward, net, data if inside else Writing(data))
    net.order = lambda words: words.flatten().argsort(stable=True)
    assert_exact(operator, net)


def _by_list(x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    order = sorted(range(len(x)), key=words.flatten().tolist().__getitem__)
    back = sorted(range(len(x)), key=order.__getitem__)
    rows = list(x)
    return torch.stack([rows[i] for i in order]), torch.tensor(back)


def _by_unbound(x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    order = sorted(range(len(x)), key=words.flatten().tolist().__getitem__)
    rows = x.unbind(0)
    back = sorted(range(len(x)), key=order.__getitem__)
    return torch.stack([rows[i] for i in order]), torch.tensor(back)


SHIFTS = [torch.eye(3 * LENGTH, dtype=torch.float64).roll(k, 0) for k in range(5)]


def _by_choice(x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """One of several matrices, or its transpose."""
    k = int(words.sum())
    shift = SHIFTS[1 + k % 4]
    shift = shift.T if k % 2 else shift
    return shift @ x, shift.argmax(0)


class Moved(nn.Module):
    """Rows are moved, worked on, and put back."""

    def __init__(self, move: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5)
        self.middle, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.move = move
        self.shifts = SHIFTS

    def forward(self, words: Tensor) -> Tensor:
        x, back = self.move(self.words(words).tanh().flatten(0, 1), words)
        y: Tensor = self.head(self.middle(x).tanh()[back].view(*words.shape, 5).mean(1))
        return y


@pytest.mark.parametrize("move", [_by_list, _by_unbound, _by_choice])
@pytest.mark.parametrize("function", [False, True])
def test_rows_that_python_moves(
    move: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], function: bool
) -> None:
    """It picks tensors by what is in the data, where no tensor tells."""
    torch.manual_seed(0)
    net = Moved(move).double()
    plain = None
    if move is _by_choice:  # which is another one for an example alone
        assert len({int(part.sum()) % 4 for part in examples()[0].split(3)}) > 1

        def plain(words: Tensor) -> Any:
            return net.head(net.middle(net.words(words).tanh()).tanh().mean(1))

    operator = estimated((lambda w: net(w)) if function else net, net, batches((3, 3, 3)))
    assert_exact(operator, net, plain)


def test_a_loader_that_fills_one_buffer() -> None:
    """Through NumPy, which leaves no trace in the tensors that were yielded before."""

    class Refilling(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            buffer = np.zeros((3, LENGTH), dtype=np.int64)
            for words, labels in super().__iter__():
                buffer[:] = words.numpy()
                yield torch.from_numpy(buffer), labels

    net = model()
    assert_exact(estimated(net, net, Refilling(batches((3, 3, 3)))))


def test_batches_are_not_held_for_that() -> None:
    seen: list[weakref.ref[Tensor]] = []

    class Fresh(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for words, labels in super().__iter__():
                own = words.clone()
                assert all(earlier() is None for earlier in seen[:-1])
                seen.append(weakref.ref(own))
                yield own, labels

    net = model()
    operator = estimated(
        net, net, Fresh(batches((2, 2, 2, 3))), memory_budget=1, check_deterministic=False
    )
    assert_exact(operator)
    assert len(seen) >= 8


def test_operations_on_lists_of_tensors() -> None:
    net, calls = model(), torch.zeros(1)

    def forward(words: Tensor) -> Tensor:
        torch._foreach_add_([calls], 1.0)
        return net(words)  # type: ignore[no-any-return]

    assert_exact(estimated(forward, net, batches((4, 4, 1))))


@lru_cache
def distances(length: int) -> Tensor:
    """Return how far each position is from each other one, `[length²]`."""
    places = torch.arange(length)
    found = torch.zeros(length, length, dtype=torch.long)
    found[:] = places[:, None] - places
    found[:, :] += length - 1
    found[0, :] *= 1
    return found.view(-1)


class Relative(nn.Module):
    """Attention with a bias for each distance, as in BEiT, which are kept from the first call."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5)
        self.bias = nn.Parameter(torch.randn(2 * LENGTH - 1, dtype=torch.float64))
        self.head = nn.Linear(5, 3)
        self.distances = distances if keep else distances.__wrapped__

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        x = self.words(words)
        scores = x @ x.mT + self.bias[self.distances(length)].view(1, length, length)
        y: Tensor = self.head((scores.softmax(-1) @ x)[:, 0].tanh())
        return y


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("calls_before", [0, 1])
@pytest.mark.parametrize("sizes", [(9,), (4, 4, 1)])
def test_tensors_that_a_model_keeps_in_a_cache(
    keep: bool, calls_before: int, sizes: tuple[int, ...]
) -> None:
    distances.cache_clear()
    torch.manual_seed(0)
    net = Relative(keep=keep).double()
    for _ in range(calls_before):
        net(examples()[0])
    operator = estimated(net, net, batches(sizes))
    assert_exact(operator, net)


def test_what_is_written_into_a_kept_tensor_is_data() -> None:
    """It is the same tensor in each call, and has the words of each batch."""
    net, ids, memory = model(), torch.arange(LENGTH)[None], torch.zeros(9, LENGTH).long()

    def forward(words: Tensor) -> Tensor:
        memory[: len(words)] = words
        return net(memory[: len(words)], ids)  # type: ignore[no-any-return]

    assert_exact(estimated(forward, net, batches((9,))))
