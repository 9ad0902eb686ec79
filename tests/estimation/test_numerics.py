"""Extreme numbers: the result is right, or refused by name, or warned about.

Everything is compared with dense Fisher matrices in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from rotate_ewc.errors import NotFiniteError
from rotate_ewc.losses import Likelihood, likelihood_of
from rotate_ewc.options import FisherType
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import (
    block_bases,
    block_matrix,
    dense_fisher,
    in_own_basis,
    parameter_shapes,
)
from tests.helpers.worlds import same

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
VANISHED = "has vanished: over .*temperature above.*fisher_type='type2'.*more examples.*train"
FAINT = "of {} has vanished, or lost its precision: gradients do reach .*double"


def net(
    dtype: torch.dtype = torch.float32,
    activation: type[nn.Module] = nn.ReLU,
    classes: int = 3,
    scale: float = 1.0,
) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.to(dtype)


def examples(n: int = 12, classes: int = 3, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return scale * inputs, torch.randint(classes, (n,), generator=generator)


def estimate(
    model: nn.Module, loss: Any, x: Tensor, y: Tensor, fisher: str = "type2", **options: Any
) -> EKFACLinearOperator:
    dtype = next(model.parameters()).dtype
    real = [t.to(dtype) if t.is_floating_point() else t for t in (x, y)]
    batches = list(zip(*(t.split(5) for t in real), strict=True))
    params = list(model.parameters())
    return EKFACLinearOperator(
        model, loss, params, batches, fisher_type=fisher, check_deterministic=False, **options
    )


def assert_right(
    operator: EKFACLinearOperator, model: nn.Module, loss: Any, x: Tensor, y: Tensor, fisher: str
) -> None:
    """Compare each block with the diagonal of the dense matrix, relative to its largest entry."""
    dtype = next(model.parameters()).dtype
    reference, loss = copy.deepcopy(model).double(), copy.deepcopy(loss).double()
    names = [name for name, _ in reference.named_parameters()]
    # What the model gets is rounded to its dtype.
    x, y = (t.to(dtype).double() if t.is_floating_point() else t for t in (x, y))
    dense = dense_fisher(reference, loss, names, x, y, fisher)
    assert bool(dense.isfinite().all())
    for block in operator.blocks:
        exact = block.map(Tensor.double)
        for basis in block_bases(exact):
            eye = torch.eye(basis.shape[-1], dtype=torch.float64)
            assert (basis.mT @ basis - eye).abs().max() < 1e-5
        shapes = parameter_shapes(reference, names)
        matrix = block_matrix(dense, shapes, block.parameters, len(basis), block.transposed)
        error = (exact.eigenvalues - in_own_basis(exact, matrix)).abs().max()
        assert error <= TOLERANCES[dtype] * matrix.abs().max(), block.label


SCALED = [
    # What is scaled by how much under which loss and Fisher type, and what is refused by name.
    ("inputs", 1e18, MSE, "type2", None),
    ("inputs", 1e18, CE, "type2", None),
    ("inputs", 1e10, MSE, "empirical", "Fisher matrix of '0.weight' is not finite: .*float32"),
    ("inputs", 1e-18, MSE, "type2", None),
    ("inputs", 1e-18, CE, "empirical", None),
    ("weights", 1e18, MSE, "type2", None),
    ("weights", 1e18, MSE, "empirical", "output gradients of '0.weight' are not finite"),
    ("weights", 1e-18, MSE, "type2", None),
    ("weights", 1e-18, CE, "empirical", None),
    ("loss", 1e18, CE, "type2", None),
    ("loss", 1e18, CE, "empirical", None),
    ("loss", 1e-18, CE, "type2", None),
    ("loss", 1e-18, CE, "empirical", None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("what", "scale", "loss", "fisher", "refused"), SCALED)
def test_enormous_and_tiny_scales(
    dtype: torch.dtype, what: str, scale: float, loss: Any, fisher: str, refused: str | None
) -> None:
    x, y = examples(scale=scale if what == "inputs" else 1.0)
    # Units that saturate, where the model could not be unsure otherwise.
    activation = nn.ReLU if loss is MSE else nn.Tanh
    model = net(dtype, activation, scale=scale if what == "weights" else 1.0)
    if loss is MSE:
        y = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if what == "loss":
        loss = nn.CrossEntropyLoss(weight=torch.full((3,), scale), reduction="sum")
    if refused:
        with pytest.raises(NotFiniteError, match=f"(?s){refused}.*double"):
            estimate(model, loss, x, y, fisher)
        return
    assert_right(estimate(model, loss, x, y, fisher), model, loss, x, y, fisher)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("fisher", ["type2", "empirical"])
def test_scales_in_half_precision(scale: float, fisher: str) -> None:
    x, y = examples(scale=scale)
    model = net(torch.float16, nn.Tanh)
    assert_right(estimate(model, CE, x, y, fisher), model, CE, x, y, fisher)
    with pytest.raises(NotFiniteError, match="batch 0 of data: the model's outputs are not finite"):
        estimate(net(torch.float16, scale=1e4), MSE, *examples(scale=1e4), "type2")


def test_a_sum_that_is_too_large_for_half_precision() -> None:
    """Finite gradients are not refused for that."""
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 300)).half()
    with torch.no_grad():
        model[2].weight.fill_(500.0)
        model[0].weight.fill_(1e-3)
        model[0].bias.fill_(1e-3)
    x = torch.ones(6, 4)
    operator = estimate(model, MSE, x, torch.zeros(6, 300), "mc")
    assert operator.trace.isfinite()


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("positions", [1, 2, 40])
def test_products_that_overflow(joint: bool, positions: int) -> None:
    """By every route, where squares of inputs and of gradients are each still finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.Linear(3 * positions, 2))
    with torch.no_grad():
        model[2].weight.mul_(1e12)
    x = 1e12 * torch.randn(5, 2, positions)
    with pytest.raises(NotFiniteError, match=r"Fisher matrix of '0.weight.*training diverged"):
        estimate(model, MSE, x, torch.zeros(5, 2), "type2", separate_weight_and_bias=not joint)


def test_tables_and_scales_that_overflow() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(1e19 * self.table(x))

    x = torch.arange(5)
    with pytest.raises(NotFiniteError, match=r"of '(table|head)\.weight'"):
        estimate(Model(), MSE, x, torch.zeros(5, 2), "type2")


# ------------------------------------------------------------------------------ vanished


def confident(gap: float) -> nn.Sequential:
    model = net()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([gap, 0.0, 0.0]))
    return model


@pytest.mark.parametrize("check", [False, True])
def test_a_vanished_matrix_is_told_once(check: bool) -> None:
    x, _ = examples()
    data, model = [(x.float(), torch.zeros(12).long())], confident(60.0)
    params = list(model.parameters())
    with pytest.warns(RuntimeWarning, match=VANISHED) as caught:
        EKFACLinearOperator(model, CE, params, data, check_deterministic=check)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    penalty = exact_penalty()
    with pytest.warns(RuntimeWarning, match=VANISHED) as caught:
        penalty.consolidate(model, CE, data)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert penalty.num_tasks == 1


@pytest.mark.parametrize("options", [{"fisher_type": "type2"}, {"temperature": 20.0}])
def test_what_the_warning_recommends_helps(options: dict[str, Any]) -> None:
    x, _ = examples()
    penalty = exact_penalty(**options)
    penalty.consolidate(confident(60.0), CE, [(x.float(), torch.zeros(12).long())])
    assert 0 < float(penalty.terms[0].operator.trace) < 100


@pytest.mark.parametrize("fisher", FisherType)
def test_a_single_class(fisher: FisherType) -> None:
    """There is nothing to be learned: all blocks are zero, in the form they always have."""
    model = net(classes=1)
    with pytest.warns(RuntimeWarning, match=VANISHED):
        operator = estimate(model, CE, *examples(classes=1), fisher)
    assert operator.num_data == 12
    assert float(operator.trace) == 0
    assert operator.block("0.weight").gradient_basis.shape == (1, 5, 5)


def test_zeros_that_are_right_are_not_told() -> None:
    """Unused parameters, a layer all of whose units are dead, and one that is switched off."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(4, 3)
            self.off = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x) - 1e3)) + 0.0 * self.off(x)

    model = Model()
    operator = estimate(model, CE, *examples(), "type2")
    assert operator.block("head.bias").trace > 0
    for name in ("body", "unused", "off"):
        assert float(operator.block(f"{name}.weight").trace) == 0
    with pytest.raises(ValueError, match=r"depend on none of the parameters \('unused.weight', "):
        EKFACLinearOperator(model, CE, list(model.unused.parameters()), [batch()])


def batch() -> tuple[Tensor, Tensor]:
    x, y = examples()
    return x.float(), y


def test_squares_that_are_too_small_are_told() -> None:
    """Of layer inputs, or of gradients, though those themselves are not zero."""
    model = net()
    with pytest.warns(RuntimeWarning, match=FAINT.format("'0.weight'")):
        estimate(model, MSE, examples(scale=1e-24)[0], torch.zeros(12, 3), "type2")
    with torch.no_grad():
        model[2].weight.mul_(1e-24)
    with pytest.warns(RuntimeWarning, match=FAINT.format("'0.bias', '0.weight'")):
        estimate(model, MSE, examples()[0], torch.zeros(12, 3), "type2")
    # They are not too small for float64.
    exact = net(torch.float64)
    with torch.no_grad():
        exact[2].weight.mul_(1e-24)
    operator = estimate(exact, MSE, examples()[0], torch.zeros(12, 3).double(), "type2")
    assert 0 < float(operator.block("0.weight").trace) < 1e-40


# ------------------------------------------------------------------------------ confident


def softmax_hessian(z: Tensor) -> Tensor:
    """diag(p) - ppᵀ without cancellation: the diagonal is minus the sum of what is beside it."""
    p = z.double().softmax(dim=1)
    hessian = -p[:, :, None] * p[:, None, :]
    hessian.diagonal(dim1=1, dim2=2).zero_()
    return hessian - torch.diag_embed(hessian.sum(dim=2))


def outer_products(likelihood: Likelihood, z: Tensor, y: Tensor, fisher: FisherType) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vectors = likelihood.vectors(z, y, len(z), fisher, 1, generator)
    return sum(v.double()[:, :, None] * v.double()[:, None, :] for v in vectors)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
def test_confident_predictions_keep_their_digits(gap: float) -> None:
    """Each entry to single precision, wherever the sure class is among the others."""
    z = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    z[range(4), range(4)] += gap
    labels = torch.arange(4)
    categorical = likelihood_of(CE)
    exact = softmax_hessian(z)
    found = outer_products(categorical, z, labels, FisherType.TYPE2)
    size = exact.abs().amax(dim=(1, 2), keepdim=True)
    assert ((found - exact).abs() / size).max() < 1e-5
    p = z.double().softmax(dim=1)
    p[range(4), labels] = 0
    p[range(4), labels] = -p.sum(dim=1)
    torch.testing.assert_close(categorical.gradient(z, labels).double(), p, rtol=1e-5, atol=1e-45)
    if gap > 10:
        # No other label is drawn.
        generator = torch.Generator().manual_seed(0)
        drawn = categorical.sampled_vector(z, labels, generator)
        torch.testing.assert_close(drawn.double(), p, rtol=1e-5, atol=1e-45)


@pytest.mark.parametrize("logit", [-80.0, -30.0, 30.0, 80.0])
def test_confident_binary_predictions_keep_their_digits(logit: float) -> None:
    z, y = torch.tensor([[logit]]), torch.tensor([[float(logit > 0)]])
    bernoulli = likelihood_of(nn.BCEWithLogitsLoss())
    rest = torch.tensor(-abs(logit)).double().exp() / (1 + torch.tensor(-abs(logit)).double().exp())
    expected = -rest if logit > 0 else rest
    generator = torch.Generator().manual_seed(0)
    for found in (bernoulli.gradient(z, y), bernoulli.sampled_vector(z, y, generator)):
        torch.testing.assert_close(found.double().squeeze(), expected, rtol=1e-5, atol=1e-45)


# ------------------------------------------------------------------------------ degenerate


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("kind", ["one example", "few", "duplicated", "constant", "zero", "dead"])
def test_factors_of_low_rank(kind: str, fisher: str, dtype: torch.dtype) -> None:
    n = {"one example": 1, "few": 2}.get(kind, 12)
    x, y = examples(n)
    model = net(dtype)
    if kind == "duplicated":
        x = x[:, :1].expand(-1, 4).contiguous()
    elif kind in ("constant", "zero"):
        x = torch.full_like(x, float(kind == "constant"))
    elif kind == "dead":
        with torch.no_grad():
            model[0].bias[:3] = -100
    assert_right(estimate(model, CE, x, y, fisher), model, CE, x, y, fisher)


# ------------------------------------------------------------------------------ sums of tasks


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_tasks_whose_sum_overflows_are_refused(mode: str) -> None:
    """By name, and what was learned before stays."""
    model = net(torch.float32)
    penalty = exact_penalty(mode=mode)
    penalty.consolidate(model, CE, [batch()])
    before = copy.deepcopy(penalty.state_dict())
    with pytest.raises(NotFiniteError, match=r"matrix of '0\.weight' .*smaller task weights"):
        penalty.consolidate(model, CE, [batch()], weight=1e38)
    assert penalty.num_tasks == 1
    assert same(penalty.state_dict(), before)
    with torch.no_grad():
        model[2].weight[0] = 1e16
    x = 1e16 * batch()[0]
    with pytest.raises(NotFiniteError, match=r"'0\.weight'.*has training diverged"):
        penalty.consolidate(model, MSE, [(x, torch.zeros(12, 3))])
    assert same(penalty.state_dict(), before)
