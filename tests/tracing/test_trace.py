"""Capture: which axis holds the examples, and uses that hooks would miss."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc._utils.tree import to_device
from rotate_ewc.linalg import eigh
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator

MSE = nn.MSELoss()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class TimeFirst(nn.Module):
    """Runs its layers on [time, batch, features], as attention does inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.transpose(0, 1)).tanh()
        return self.last(hidden.mean(dim=0))


class BatchFirst(TimeFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh().mean(dim=1))


class Flattened(TimeFirst):
    """Runs its first layer on [batch * time, features]."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.reshape(-1, 3)).tanh()
        return self.last(hidden.view(*x.shape[:2], 4).mean(dim=1))


class Functional(TimeFirst):
    """Uses its parameters without calling its modules."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, bias=self.first.bias, weight=self.first.weight).tanh()
        return torch.nn.functional.linear(hidden.mean(dim=1), self.last.weight, self.last.bias)


def dense(model: nn.Module, data: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    params = dict(model.named_parameters())
    operator = EKFACLinearOperator(model, MSE, params, data, fisher_type="type2")
    return dense_operator(operator.blocks, operator.parameter_shapes)


@pytest.mark.parametrize("kind", [TimeFirst, Flattened, Functional])
@pytest.mark.parametrize("time", [1, 3, 5, 10])
def test_batch_axis_is_found(kind: type[nn.Module], time: int) -> None:
    """Also where the number of positions equals, or divides, that of the examples."""
    data = [(seeded(5, time, 3), seeded(5, 2)), (seeded(2, time, 3, seed=1), seeded(2, 2))]
    torch.testing.assert_close(dense(kind(), data), dense(BatchFirst(), data))


@pytest.mark.parametrize("dead", [0, 1, 2, None])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_batch_axis_is_found_where_examples_are_silent(dead: int | None, position: int) -> None:
    """As many positions as examples, only one is read, and one example's gradient vanishes."""

    class OnePosition(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x.transpose(0, 1)).relu()
            return self.last(hidden[position])

    class Reference(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x[:, position]).relu())

    inputs = seeded(3, 3, 3).abs() + 0.1
    if dead is not None:
        inputs[dead] *= -1
    results = []
    for model in (OnePosition(), Reference()):
        with torch.no_grad():
            model.first.weight.abs_()
            model.first.bias.zero_()
        params = dict(model.named_parameters())
        data = [(inputs, seeded(3, 2, seed=1))]
        operator = EKFACLinearOperator(model, MSE, params, data, fisher_type="type2")
        results.append(torch.stack([block.trace for block in operator.blocks]))
    # The bases may differ, since unread positions count in a layer's inputs; traces may not.
    torch.testing.assert_close(results[0], results[1])


def test_batch_axis_is_looked_for_again_after_a_single_example() -> None:
    data = [(seeded(1, 3, 3), seeded(1, 2)), (seeded(4, 3, 3, seed=1), seeded(4, 2))]
    torch.testing.assert_close(dense(TimeFirst(), data), dense(BatchFirst(), data))


def test_checkpointed_layers() -> None:
    class Checkpointed(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=False)
            return self.last(hidden.mean(dim=1))

    data = [(seeded(5, 3, 3), seeded(5, 2))]
    torch.testing.assert_close(dense(Checkpointed(), data), dense(BatchFirst(), data))


def test_inputs_in_dictionaries_and_tuples() -> None:
    model = BatchFirst()
    x, y = seeded(5, 3, 3), seeded(5, 2)
    params = dict(model.named_parameters())
    plain = EKFACLinearOperator(model, MSE, params, [(x, y)], fisher_type="type2")
    for inputs, forward in (
        ({"x": x, "scale": 1.0}, lambda batch: model(batch["x"] * batch["scale"])),
        ((x, "ignored"), lambda batch: model(batch[0])),
    ):
        operator = EKFACLinearOperator(
            forward,
            MSE,
            params,
            [(inputs, y)],
            fisher_type="type2",
            batch_size_fn=lambda batch: 5,
        )
        torch.testing.assert_close(operator.trace, plain.trace, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_at_least_float32(dtype: torch.dtype) -> None:
    model = BatchFirst().to(dtype)
    data = [(seeded(5, 3, 3).to(dtype), seeded(5, 2).to(dtype))]
    params = list(model.parameters())
    operator = EKFACLinearOperator(model, MSE, params, data, fisher_type="type2")
    assert operator.dtype == torch.float32
    reference = model.double()
    exact = EKFACLinearOperator(
        reference,
        MSE,
        list(reference.parameters()),
        [(x.double(), y.double()) for x, y in data],
        fisher_type="type2",
    )
    assert operator.trace.item() == pytest.approx(exact.trace.item(), rel=2e-2)


def test_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [(torch.randn(6, 3), torch.randint(2, (6,)))]
    params = list(model.parameters())
    loss = nn.CrossEntropyLoss()
    exact = EKFACLinearOperator(model, loss, params, data, fisher_type="type2")
    with torch.autocast("cpu", torch.bfloat16):
        operator = EKFACLinearOperator(model, loss, params, data, fisher_type="type2")
    assert operator.dtype == torch.float32
    assert operator.trace.item() == pytest.approx(exact.trace.item(), rel=2e-2)


def test_own_computations_are_not_autocast() -> None:
    """Autocast is for the model; snapshot, products, merging and penalty keep their precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    data = [(torch.randn(6, 2, 4), torch.randint(2, (6,)))]
    loss = nn.CrossEntropyLoss()

    def results() -> list[Tensor]:
        def in_float32(inputs: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return model(inputs)

        params = dict(model.named_parameters())
        operator = EKFACLinearOperator(in_float32, loss, params, data, fisher_type="type2")
        merged = merge([operator, operator * 2.0])
        vectors = [torch.ones_like(p) for p in params.values()]
        penalty = exact_penalty()
        penalty.consolidate(model, loss, data, forward=in_float32)
        penalty.consolidate(model, loss, data, forward=in_float32)
        moved = {name: p.detach() + 0.1 for name, p in params.items()}
        value, gradients = penalty(moved), torch.func.grad(penalty)(moved)
        return [
            *(block.eigenvalues for block in (*operator.blocks, *merged.blocks)),
            *(operator @ vectors),
            operator.quadratic_form(vectors),
            value,
            *gradients.values(),
        ]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        actual = results()
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == torch.float32
        assert torch.equal(left, right)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_inside_contexts_without_gradients(context: Callable[[], object]) -> None:
    model, data = BatchFirst(), [(seeded(5, 3, 3), seeded(5, 2))]
    expected = dense(model, data)
    with context():
        torch.testing.assert_close(dense(model, data), expected)


def test_parameter_without_influence_has_a_block_of_zeros() -> None:
    class TwoHeads(TimeFirst):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            self.other(torch.zeros(1, 4, dtype=torch.float64))
            return self.last(self.first(x).tanh().mean(dim=1))

    model = TwoHeads()
    data = [(seeded(5, 3, 3), seeded(5, 2))]
    params = dict(model.named_parameters())
    operator = EKFACLinearOperator(model, MSE, params, data, fisher_type="type2")
    by_name = {block.label: block for block in operator.blocks}
    assert by_name["other.weight"].eigenvalues.abs().sum() == 0
    assert by_name["other.bias"].eigenvalues.shape == (1, 2, 1)
    product = operator @ [torch.ones_like(p) for p in params.values()]
    assert [p.shape for p in product] == [p.shape for p in params.values()]


def test_eigh_falls_back_on_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.linalg.eigh

    def fails_in_single(matrix: Tensor, **options: str) -> object:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return exact(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single)
    factor = seeded(1, 4, 4)
    covariance = (factor @ factor.mT).float()
    with pytest.warns(RuntimeWarning, match="4 × 4 factor did not converge in torch.float32"):
        basis = eigh.eigenbasis(covariance)
    assert basis.dtype == torch.float32
    rotated = basis.mT @ covariance @ basis
    torch.testing.assert_close(
        rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), atol=1e-5, rtol=0.0
    )


def test_inputs_of_a_type_of_their_own_arrive_unchanged() -> None:
    """Moving inputs to the model's device must not turn a custom mapping into a dictionary."""

    class Tokens(UserDict[str, Tensor]):
        @property
        def values_of_x(self) -> Tensor:
            return self["x"]

    model = BatchFirst()
    data = [(Tokens(x=seeded(5, 3, 3)), seeded(5, 2))]
    operator = EKFACLinearOperator(
        lambda batch: model(batch.values_of_x), MSE, dict(model.named_parameters()), data
    )
    assert operator.num_data == 5
    assert operator.trace > 0


def test_loader_that_fills_the_same_buffer_for_every_batch() -> None:
    model = BatchFirst()
    batches = [(seeded(5, 3, 3, seed=k), seeded(5, 2, seed=9 + k)) for k in range(3)]

    class Buffered:
        def __init__(self) -> None:
            self.buffer = torch.empty(5, 3, 3, dtype=torch.float64)

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in batches:
                yield self.buffer.copy_(x), y

    torch.testing.assert_close(dense(model, Buffered()), dense(model, batches))


def test_nested_inputs_are_moved() -> None:
    class Pair(NamedTuple):
        x: Tensor
        more: list[Tensor]

    moved = to_device(
        {"pair": Pair(torch.zeros(2), [torch.ones(1)]), "text": "t"}, torch.device("meta")
    )
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].x.device.type == moved["pair"].more[0].device.type == "meta"
    assert moved["text"] == "t"


class NoGradient(torch.autograd.Function):
    """The identity, which passes nothing back."""

    @staticmethod
    def forward(ctx: Any, data: Tensor) -> Tensor:
        return data.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        return None


class HalfBlocked(nn.Module):
    """Two paths, one of which no gradient comes through."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.block(self.a(x)) + self.b(x)
        return self.c(hidden.tanh())


@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
def test_an_operation_that_passes_no_gradient_back(unsupported: str) -> None:
    """Its gradient is zero: as where the data are detached, which the oracle does."""
    torch.manual_seed(0)
    model = HalfBlocked(NoGradient.apply).double()
    oracle = HalfBlocked(Tensor.detach).double()
    oracle.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    data = [(x, torch.randn(5, 2, dtype=torch.float64))]
    operator = EKFACLinearOperator(
        model,
        nn.MSELoss(),
        dict(model.named_parameters()),
        data,
        fisher_type="type2",
        unsupported=unsupported,
    )
    jacobians = torch.func.vmap(
        torch.func.jacrev(
            lambda parameters, row: torch.func.functional_call(oracle, parameters, (row,))
        ),
        in_dims=(None, 0),
    )({name: p.detach() for name, p in oracle.named_parameters()}, x)
    for name in operator.parameter_shapes:
        # The mean over examples and both outputs of squares of 2 (output - target).
        exact = jacobians[name].square().sum().item() * 2 / (5 * 2)
        assert operator.block(name).trace.item() == pytest.approx(exact, rel=1e-10)
    assert operator.block("a.weight").trace.item() == 0
    assert operator.block("b.weight").trace.item() > 0
