"""What counts as a use of parameters: computed weights, constants, time-first rows, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rotate_ewc import EKFACLinearOperator
from tests.helpers.oracles import dense_ggn, dense_operator

MSE = nn.MSELoss()


def seeded(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def estimate(model: nn.Module, data: list[tuple[Any, Tensor]], **options: Any) -> Any:
    params = dict(model.named_parameters())
    return EKFACLinearOperator(model, MSE, params, data, fisher_type="type2", **options)


def check_trace(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> EKFACLinearOperator:
    """Compare every block's trace, which does not depend on the basis, with the exact matrix's."""
    operator: EKFACLinearOperator = estimate(model, [(x, y)], **options)
    names = list(operator.parameter_shapes)
    exact = dense_ggn(model, MSE, names, x, y).diagonal()
    sizes = [shape.numel() for shape in operator.parameter_shapes.values()]
    for name, diagonal in zip(names, torch.split(exact, sizes), strict=True):
        assert operator.block(name).trace.item() == pytest.approx(diagonal.sum().item(), rel=1e-10)
        assert diagonal.sum() > 0
    return operator


class Layer(nn.Module):
    """A weight, a buffer, and a way of using them; then an ordinary layer."""

    def __init__(self, use: Callable[[Layer, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.use = use
        self.weight = nn.Parameter(seeded(*shape, seed=7))
        self.register_buffer("mask", (seeded(*shape, seed=8) > -0.5).double())
        self.last = nn.Linear(5, 2).double()
        with torch.no_grad():
            for index, parameter in enumerate(self.last.parameters()):
                parameter.copy_(seeded(*parameter.shape, seed=20 + index))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.use(self, x).tanh())


COMPUTED: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "masked by a buffer": lambda layer, x: F.linear(x, layer.weight * layer.mask),
    "normalised": lambda layer, x: F.linear(x, F.normalize(layer.weight, dim=1)),
    "transposed": lambda layer, x: x @ layer.weight.t(),
    "split and joined": lambda layer, x: F.linear(x, torch.cat(layer.weight.split([2, 3])).exp()),
    "with an identity": lambda layer, x: F.linear(x, layer.weight + torch.eye(5, 4).double()),
    "blanks filled in": lambda layer, x: F.linear(
        F.pad(x, (0, 1)), torch.cat([layer.weight, layer.weight.new_zeros(5, 1)], dim=1)
    ),
    "in two ways": lambda layer, x: F.linear(x, layer.weight) + F.linear(x, layer.weight.sin()),
    "from whole numbers": lambda layer, x: F.linear(x, layer.weight * layer.weight.int()),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_computed_from_parameters_and_constants(name: str) -> None:
    model = Layer(COMPUTED[name], 5, 4)
    operator = check_trace(model, seeded(6, 4), seeded(6, 2, seed=1))
    block = operator.block("weight")
    assert block.gradient_basis is not None
    assert block.activation_basis is not None


def test_rows_of_a_transposed_product() -> None:
    operator = check_trace(
        Layer(lambda layer, x: x @ layer.weight, 4, 5), seeded(6, 4), seeded(6, 2, seed=1)
    )
    assert operator.block("weight").transposed
    assert operator.block("weight").eigenvalues.shape == (1, 5, 4)


def test_what_data_were_written_into_is_no_constant() -> None:
    """A weight times a buffer that holds the data is no computed weight: it is refused."""

    def use(layer: Layer, x: Tensor) -> Tensor:
        scratch = torch.zeros(5, 4, dtype=torch.float64)
        scratch[0, 0] = x.sum()
        return F.linear(x, layer.weight.sin() * scratch.cos())

    model = Layer(use, 5, 4)
    with pytest.raises(ValueError, match=r"the layer of 'weight|'weight' is used by"):
        estimate(model, [(seeded(6, 4), seeded(6, 2, seed=1))])


@pytest.mark.parametrize("blank", ["zeros", "new_zeros", "zeros_like"])
def test_first_state_of_a_recurrent_layer_is_an_input(blank: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(5, 5).double(), nn.Linear(3, 5).double()
            self.last = nn.Linear(5, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            if blank == "zeros":
                state = torch.zeros(len(x), 5, dtype=torch.float64)
            elif blank == "new_zeros":
                state = self.inner.weight.new_zeros(len(x), 5)
            else:
                state = torch.zeros_like(x[:, 0, :1]).expand(-1, 5)
            for step in x.unbind(1):
                state = (self.outer(step) + self.inner(state)).tanh()
            return self.last(state)

    operator = check_trace(Recurrent(), seeded(4, 3, 3), seeded(4, 2))
    assert operator.block("inner.weight").gradient_basis is not None


class TimeMajor(nn.Module):
    """Runs a layer on rows ordered by time first, as attention does inside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).reshape(-1, 3)
        hidden = self.first(rows).tanh().view(x.shape[1], x.shape[0], 4)
        return self.last(hidden.mean(dim=0))


@pytest.mark.parametrize("time", [1, 2, 4, 8])
def test_interleaved_rows(time: int) -> None:
    x, y = seeded(4, time, 3), seeded(4, 2)
    model = TimeMajor()
    whole = check_trace(model, x, y)
    parts = estimate(model, [(x[:1], y[:1]), (x[1:], y[1:])])
    shapes = whole.parameter_shapes
    torch.testing.assert_close(
        dense_operator(parts.blocks, shapes), dense_operator(whole.blocks, shapes)
    )


def test_refused_uses_without_influence_do_not_matter() -> None:
    def use(layer: Layer, x: Tensor) -> Tensor:
        torch.cdist(x, layer.weight)
        return F.linear(x, layer.weight)

    check_trace(Layer(use, 5, 4), seeded(6, 4), seeded(6, 2, seed=1))


def test_one_use_without_a_rule_makes_the_whole_parameter_diagonal() -> None:
    def use(layer: Layer, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight) + torch.cdist(x.sin(), layer.weight)

    x, y = seeded(6, 4), seeded(6, 2, seed=1)
    with pytest.raises(ValueError, match=r"'weight' is used by the operation torch.*cdist"):
        estimate(Layer(use, 5, 4), [(x, y)])
    with pytest.warns(UserWarning, match="no rule .*'weight'"):
        operator = check_trace(Layer(use, 5, 4), x, y, unsupported="diagonal")
    block = operator.block("weight")
    assert block.gradient_basis is None
    assert block.activation_basis is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "'0.weight': an embedding has max_norm set"),
        ({"scale_grad_by_freq": True}, "'0.weight': an embedding has scale_grad_by_freq"),
    ],
)
def test_embeddings_whose_gradient_is_not_that_of_the_loss(
    options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Embedding(5, 2, **options), nn.Tanh()).double()
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        estimate(model, [(torch.tensor([[1], [2]]), seeded(2, 1, 2))])
    assert torch.equal(model[0].weight, before)


def test_uses_that_change_between_batches() -> None:
    def use(layer: Layer, x: Tensor) -> Tensor:
        if len(x) == 2:
            return torch.cdist(x, layer.weight)
        return F.linear(x, layer.weight)

    data = [(seeded(4, 4), seeded(4, 2)), (seeded(2, 4), seeded(2, 2))]
    with pytest.raises(ValueError, match=r"batch 1 .*'weight' is used by .* not so in the first"):
        estimate(Layer(use, 5, 4), data, unsupported="diagonal")

    def other(layer: Layer, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.sin() if len(x) == 2 else layer.weight)

    with pytest.raises(ValueError, match="'weight' was used in different ways"):
        estimate(Layer(other, 5, 4), data)


def test_skipping_everything_leaves_nothing() -> None:
    model = nn.LSTM(3, 2, batch_first=True).double()
    params = dict(model.named_parameters())
    data = [(seeded(4, 2, 3), seeded(4, 2, 2))]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no parameter is left"),
    ):
        EKFACLinearOperator(lambda x: model(x)[0], MSE, params, data, unsupported="skip")


def test_statistics_of_a_model_in_a_lower_precision() -> None:
    """Normalised inputs are computed again, in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    low = model.to(torch.bfloat16)
    x, y = seeded(6, 3).bfloat16(), seeded(6, 2, seed=1).bfloat16()
    operator = estimate(low, [(x, y)])
    exact = estimate(model.double(), [(x.double(), y.double())])
    assert operator.dtype == torch.float32
    assert operator.trace.item() == pytest.approx(exact.trace.item(), rel=3e-2)


@pytest.mark.parametrize("inputs", ["tensor", "pair", "with a stranger", "with a table"])
def test_per_example_gradients_are_exact_whatever_the_inputs(inputs: str) -> None:
    """Inputs are cut into examples where they can be; others are kept whole."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.GRU(3, 2, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    model, x, y = Recurrent(), seeded(5, 4, 3), seeded(5, 2)
    params = dict(model.named_parameters())
    batches: dict[str, tuple[Any, Callable[[Any], Tensor]]] = {
        "tensor": (x, model),
        "pair": ((x, torch.ones(5)), lambda pair: model(pair[0])),
        "with a stranger": ((x, torch.ones(3)), lambda pair: model(pair[0])),
        # Of as many rows as there are examples, but not theirs: cut, it makes other outputs.
        "with a table": (
            (x * 2, x.new_full((5,), 0.1)),
            lambda pair: model(pair[0] * pair[1].sum()),
        ),
    }
    batch, forward = batches[inputs]
    with pytest.warns(UserWarning, match="exact diagonal"):
        operator = EKFACLinearOperator(
            forward, MSE, params, [(batch, y)], fisher_type="type2", unsupported="diagonal"
        )
    exact = dense_ggn(model, MSE, list(params), x, y).diagonal()
    torch.testing.assert_close(
        torch.cat([part.flatten() for part in operator.diagonal()]), exact, rtol=1e-10, atol=1e-14
    )


def test_per_example_gradients_show_examples_that_are_not_independent() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 2, batch_first=True).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(dim=0))[0][:, -1]

    with pytest.raises(ValueError, match="example 0 are not the same when it is run alone"):
        estimate(Mixed(), [(seeded(5, 4, 3), seeded(5, 2))], unsupported="diagonal")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_converted_in_the_forward_pass(dtype: torch.dtype) -> None:
    """Statistics are in the parameters' dtype or float32, whatever the layer computes in."""

    def use(layer: Layer, x: Tensor) -> Tensor:
        hidden = F.linear(x.float(), layer.weight.float()) * layer.mask.float()[:, 0]
        return hidden.to(layer.weight.dtype)

    model = Layer(use, 5, 4).to(dtype)
    x, y = seeded(6, 4).to(dtype), seeded(6, 2, seed=1).to(dtype)
    operator = estimate(model, [(x, y)])
    exact = estimate(Layer(use, 5, 4), [(seeded(6, 4), seeded(6, 2, seed=1))])
    assert operator.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-5 if dtype is torch.float64 else 5e-2
    assert operator.trace.item() == pytest.approx(exact.trace.item(), rel=tolerance)


@pytest.mark.parametrize("use", ["concatenated", "divided"])
def test_tokens_inside_checkpoints(use: str) -> None:
    """Activations that are computed again in the backward pass."""
    if use == "divided" and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this PyTorch does not tell that it is inside a checkpoint")

    class Tokens(nn.Module):
        def __init__(self, *, again: bool) -> None:
            super().__init__()
            self.again = again
            self.token = nn.Parameter(seeded(1, 1, 4, seed=3))
            self.layer = nn.Linear(4, 2).double()
            with torch.no_grad():
                self.layer.weight.copy_(seeded(2, 4, seed=4))
                self.layer.bias.zero_()

        def inner(self, x: Tensor) -> Tensor:
            if use == "divided":
                return self.layer((x.exp() / self.token.exp()).tanh()).sum(1)
            return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1)).tanh().sum(1)

        def forward(self, x: Tensor) -> Tensor:
            if not self.again:
                return self.inner(x)
            result: Tensor = checkpoint(self.inner, x.requires_grad_(), use_reentrant=False)
            return result

    x, y = seeded(6, 3, 4), seeded(6, 2, seed=1)
    whole = check_trace(Tokens(again=False), x, y)
    if use == "divided":
        with pytest.raises(
            ValueError, match=r"'token' is used by .*div, for which there is no rule"
        ):
            estimate(Tokens(again=True), [(x, y)])
        with pytest.warns(UserWarning, match="no rule .*'token'"):
            again = estimate(Tokens(again=True), [(x, y)], unsupported="diagonal")
    else:
        again = estimate(Tokens(again=True), [(x, y)])
    for name in whole.parameter_shapes:
        assert again.block(name).trace.item() == pytest.approx(whole.block(name).trace.item())


class Attributes(nn.Module):
    """Has a table, a layer, and a tensor that is a plain attribute."""

    def __init__(self, kept: Tensor, use: Callable[[Attributes, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(5, 4).double(), nn.Linear(4, 2).double()
        self.kept, self.use = kept, use

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.use(self, x)).tanh().sum(1)


def test_a_state_that_a_model_keeps_is_the_input_of_a_layer() -> None:
    """A real-valued attribute holds examples where a layer takes it as its input."""
    model = Attributes(seeded(6, 3, 4, seed=5), lambda m, x: x + m.layer(m.kept).repeat(1, 1, 2))
    x, y = seeded(6, 3, 4), seeded(6, 2, seed=1)
    operator = estimate(model, [(x, y)])
    assert operator.block("layer.weight").activation_basis is not None
    total = 0.0
    for n in range(6):
        model.kept = seeded(6, 3, 4, seed=5)[n : n + 1]
        for output in model(x[n : n + 1]).flatten():
            found = torch.autograd.grad(output, model.layer.parameters(), retain_graph=True)
            total += sum(g.square().sum().item() for g in found) / 6
    assert operator.trace.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (4, 2), (5, 1)])
def test_ids_made_of_numbers(sizes: tuple[int, ...]) -> None:
    """They may have come with the batch, but they are the same for all examples."""
    x, y = seeded(6, 3, 4), seeded(6, 2, seed=1)
    data = list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))
    for look_up in (lambda m, ids: m.table(ids), lambda m, ids: m.table.weight[ids]):
        model = Attributes(
            torch.arange(3), lambda m, x, look=look_up: x + look(m, torch.tensor([4, 0, 2]))
        )
        check_trace(model, x, y)
        whole = estimate(model, [(x, y)]).trace.item()
        assert estimate(model, data).trace.item() == pytest.approx(whole, rel=1e-10)


def test_large_positions_have_no_basis() -> None:
    """A basis for all entries of positional embeddings would not fit into memory."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(seeded(1, 1, 4, seed=3))
            self.positions = nn.Parameter(seeded(1, 60000, 4, seed=4))
            self.layer = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            return self.layer((tokens + self.positions[:, :4]).tanh()).sum(1)

    operator = estimate(Positions(), [(seeded(6, 3, 4), seeded(6, 2, seed=1))])
    assert operator.block("positions").activation_basis is None
    assert operator.block("token").activation_basis is not None
