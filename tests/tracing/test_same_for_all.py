"""Tensors that are the same for all examples of a batch, wherever a model has them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator

CE = nn.CrossEntropyLoss()
LENGTH = 6
NAMES = ("words.weight", "places.weight", "head.weight", "head.bias")


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


def exact_diagonal() -> list[Tensor]:
    """Sum the squared gradients of one example after another, in a plain loop."""
    net = model()
    words, labels = examples()
    found = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for own, label in zip(words, labels, strict=True):
        loss = nn.functional.cross_entropy(net(own[None]), label[None])
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        found = [a + g.square() / len(words) for a, g in zip(found, gradients, strict=True)]
    return found


def assert_exact(operator: EKFACLinearOperator) -> None:
    for name, squares in zip(NAMES, exact_diagonal(), strict=True):
        trace = float(operator.block(name).trace)
        assert trace == pytest.approx(float(squares.sum()), rel=1e-10), name


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
def test_the_advice_for_tensors_that_a_function_holds(ids: Tensor) -> None:
    net = model()
    with pytest.raises(ValueError, match=r"a row for each \(positions.expand"):
        estimated(lambda words: net(words, ids), net, batches((9,)))
    rows = lambda words: net(words, ids.expand(len(words), -1))  # noqa: E731
    assert_exact(estimated(rows, net, batches((4, 4, 1))))
