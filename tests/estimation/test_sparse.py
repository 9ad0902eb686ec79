"""Sparse, nested, quantised and other tensors that are not dense, as buffers and in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator
from tests.helpers.exact import exact_penalty
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import dense_ggn, parameter_shapes

CE = nn.CrossEntropyLoss()
NODES, FEATURES, CLASSES = 6, 4, 3

# Torch says of its CSR layout that it is in beta.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
}


def seeded(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def labels(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(n))


def thinned(*size: int) -> Tensor:
    """A matrix of which about half is zero."""
    numbers = seeded(*size)
    return numbers * (numbers > -0.1)


def by_function(adjacency: Tensor, x: Tensor) -> Tensor:
    return torch.sparse.mm(adjacency, x)


def by_operator(adjacency: Tensor, x: Tensor) -> Tensor:
    return adjacency @ x


class GraphNetwork(nn.Module):
    """Two layers, each of which sums over neighbours; the graph is a buffer or comes with it."""

    def __init__(self, multiply: Callable[..., Tensor], adjacency: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 5).double()
        self.second = nn.Linear(5, CLASSES).double()
        self.multiply = multiply
        self.register_buffer("adjacency", adjacency)

    def forward(self, inputs: Any) -> Tensor:
        adjacency, x = (self.adjacency, inputs) if isinstance(inputs, Tensor) else inputs
        hidden = self.multiply(adjacency, self.first(x)).tanh()
        return self.multiply(adjacency, self.second(hidden))


def dense_of_nodes(model: nn.Module, x: Tensor) -> Tensor:
    """The Fisher matrix of the nodes of one graph, by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda values: functional_call(model, values, (x,)))(parameters)
    rows = torch.cat([j.reshape(NODES, CLASSES, -1) for j in jacobians.values()], dim=2)
    p = model(x).softmax(1).detach()
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("nca,ncd,ndb->ab", rows, hessians, rows) / NODES


@pytest.mark.parametrize("memory_budget", [2**30, 1])
@pytest.mark.parametrize("is_buffer", [True, False])
@pytest.mark.parametrize("multiply", [by_function, by_operator])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_graphs(
    layout: str, multiply: Callable[..., Tensor], is_buffer: bool, memory_budget: int
) -> None:
    """Nodes depend on each other, so that a graph, which is a batch, is one example."""
    adjacency, x = thinned(NODES, NODES), seeded(NODES, FEATURES)
    sparse = LAYOUTS[layout](adjacency)
    model = GraphNetwork(multiply, sparse if is_buffer else None)
    operator = EKFACLinearOperator(
        model,
        CE,
        list(model.parameters()),
        [(x if is_buffer else (sparse, x), labels(NODES))],
        fisher_type="type2",
        batch_size_fn=lambda inputs: 1,
        memory_budget=memory_budget,
    )
    dense = dense_of_nodes(GraphNetwork(by_operator, adjacency), x)
    names = [name for name, _ in model.named_parameters()]
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))


class Layer(nn.Module):
    """A linear layer, by one of the functions that take sparse inputs."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(seeded(CLASSES, FEATURES))
        self.bias = nn.Parameter(seeded(CLASSES))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.how == "sparse.mm":
            return torch.sparse.mm(x, self.weight.T) + self.bias
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("memory_budget", [2**30, 1])
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("how", ["linear", "sparse.mm", "@"])
def test_sparse_inputs(how: str, layout: str, memory_budget: int) -> None:
    model = Layer(how)
    batches = [(thinned(n, FEATURES), labels(n)) for n in (7, 5)]
    operator = EKFACLinearOperator(
        model,
        CE,
        list(model.parameters()),
        [(LAYOUTS[layout](x), y) for x, y in batches],
        fisher_type="type2",
        memory_budget=memory_budget,
    )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    dense = dense_ggn(Layer("linear"), CE, ["weight", "bias"], x, y)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, ["weight", "bias"]))


def test_sparse_inputs_without_a_rule() -> None:
    """They cannot be cut into examples, so that each is taken from the whole batch."""

    class Squared(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.addmm(self.bias[None].expand(len(x), -1), x, self.weight.T)

    model, x, y = Squared(""), thinned(7, FEATURES), labels(7)
    with pytest.warns(UserWarning, match="there is no rule"):
        operator = EKFACLinearOperator(
            model,
            CE,
            list(model.parameters()),
            [(x.to_sparse(), y)],
            fisher_type="type2",
            unsupported="diagonal",
        )
    dense = dense_ggn(Layer("linear"), CE, ["weight", "bias"], x, y)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, ["weight", "bias"]))


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(
        [seeded(2, FEATURES), seeded(4, FEATURES)], layout=layout, dtype=torch.float64
    )


BUFFERS: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: thinned(3, 3).to_sparse(),
    "csr": lambda: thinned(3, 3).to_sparse_csr(),
    "csc": lambda: thinned(3, 3).to_sparse_csc(),
    "bsr": lambda: thinned(4, 4).to_sparse_bsr((2, 2)),
    "nested": lambda: nested(torch.strided),
    "jagged": lambda: nested(torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.empty(3, device="meta"),
    "complex": lambda: torch.ones(3, dtype=torch.cfloat),
}


@pytest.mark.filterwarnings("ignore:(Quantized tensors|torch.quantize|The PyTorch API of nested)")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_any_kind(kind: str) -> None:
    """They change nothing, and stay as they are."""
    model, plain = nn.Linear(FEATURES, CLASSES).double(), nn.Linear(FEATURES, CLASSES).double()
    plain.load_state_dict(model.state_dict())
    buffer = BUFFERS[kind]()
    model.register_buffer("other", buffer)
    data, version = [(seeded(5, FEATURES), labels(5))], buffer._version
    found = EKFACLinearOperator(model, CE, list(model.parameters()), data)
    expected = EKFACLinearOperator(plain, CE, list(plain.parameters()), data)
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert model.other is buffer
    assert buffer._version == version


@pytest.mark.parametrize("kind", ["coo", "csr"])
def test_sparse_buffers_that_change_are_restored(kind: str) -> None:
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.seen.values().add_(1) if kind == "csr" else self.seen._values().add_(1)
            return super().forward(x)

    model = Counting(FEATURES, CLASSES).double()
    model.register_buffer("seen", BUFFERS[kind]())
    data = [(seeded(5, FEATURES), labels(5))]
    EKFACLinearOperator(model, CE, list(model.parameters()), data)
    assert torch.equal(model.seen.to_dense(), thinned(3, 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "layout",
    [
        torch.strided,
        pytest.param(
            torch.jagged,
            marks=pytest.mark.skipif(
                not hasattr(torch.compiler, "set_stance"), reason="torch pads them from 2.6 on"
            ),
        ),
    ],
)
def test_nested_inputs_are_refused_and_padded_ones_exact(layout: torch.layout) -> None:
    class Summed(nn.Module):
        def __init__(self, *, pad: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(FEATURES, CLASSES, bias=False).double()
            self.pad = pad

        def forward(self, x: Tensor) -> Tensor:
            if self.pad:
                x = torch.nested.to_padded_tensor(x, 0.0)
            hidden = self.layer(x)
            return torch.stack([part.sum(0) for part in hidden.unbind()])

    data = [(nested(layout), labels(2))]
    model = Summed(pad=False)
    with pytest.raises(ValueError, match=r"'layer\.weight': .* nested tensor; pad it"):
        EKFACLinearOperator(model, CE, list(model.parameters()), data)
    model = Summed(pad=True)
    operator = EKFACLinearOperator(model, CE, list(model.parameters()), data, fisher_type="type2")
    sums = torch.stack([part.sum(0) for part in nested(torch.strided).unbind()])
    dense = dense_ggn(model.layer, CE, ["weight"], sums, labels(2))
    assert float(operator.trace) == pytest.approx(float(dense.trace()), rel=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Tensor.to_sparse, r"parameters 'weight', 'bias' are sparse or nested; expected dense"),
        (lambda t: t.to("meta"), r"parameters 'weight', 'bias' are on the meta device"),
        (lambda t: t.to(torch.int64), r"params 'weight' is torch.int64, 'bias' is torch.int64"),
    ],
)
def test_parameters_that_cannot_be_estimated(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    model = nn.Linear(FEATURES, CLASSES).double()
    for name, parameter in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(change(parameter.detach()), requires_grad=False))
    data = [(seeded(5, FEATURES), labels(5))]
    params = dict(model.named_parameters())
    with pytest.raises((ValueError, TypeError), match=message):
        EKFACLinearOperator(model, CE, params, data)
    with pytest.raises((ValueError, TypeError), match=message):
        exact_penalty().consolidate(model, CE, data, params=params)
