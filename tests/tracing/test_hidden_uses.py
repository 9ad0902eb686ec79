"""Uses of parameters that no torch function shows: refused or exact, also beside others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases.modules import Uses
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import parameter_shapes, squared_error_ggn


class Product(torch.autograd.Function):
    """A product with a transposed weight, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply with the other factor."""
        x, w = ctx.saved_tensors
        (g,) = gradients
        return g @ w, g.T @ x


def inner_gradient(m: Any, x: Tensor) -> Tensor:
    """Return the gradient of a scalar with respect to the input."""
    x = x.clone().requires_grad_()
    scalar = F.linear(x, m.w).tanh().sum()
    gradient: Tensor
    (gradient,) = torch.autograd.grad(scalar, x, create_graph=True)
    return gradient[:, :3] + m.b


def written(m: Any, x: Tensor) -> Tensor:
    """Write a bias into a tensor that does not require gradients."""
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    out[:] = m.b
    return out + x @ m.w.T


ALONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "autograd-function": lambda m, x: Product.apply(x, m.w) + m.b,
    "vmap": lambda m, x: torch.vmap(lambda row: F.linear(row.tanh(), m.w))(x) + m.b,
    "dispatched": lambda m, x: torch.ops.aten.linear(x.tanh(), m.w, m.b),
    "inner-gradient": inner_gradient,
    "written": written,
    "looped-over": lambda m, x: torch.stack([(x * row).sum(-1) for row in m.w], dim=1) + m.b,
    "distances": lambda m, x: torch.cdist(x.tanh(), m.w) + m.b,
}
USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **ALONE,
    **{
        f"{name}-beside-linear": lambda m, x, use=use: use(m, x) + F.linear(x, m.w, m.b)
        for name, use in ALONE.items()
    },
    **{
        f"{name}-after-linear": lambda m, x, use=use: use(m, F.linear(x, m.w, m.b) @ m.w)
        for name, use in ALONE.items()
    },
    **{
        f"{name}-beside-computation": lambda m, x, use=use: (
            use(m, x) + F.linear(x, m.w.exp(), m.b.exp())
        )
        for name, use in ALONE.items()
    },
    "detached-beside-linear": lambda m, x: F.linear(x, m.w.detach(), m.b) * F.linear(x, m.w),
    "without-gradient": lambda m, x: F.linear(x, m.w, m.b) * F.linear(x, m.w, m.b).detach(),
    "number": lambda m, x: F.linear(x, m.w) * m.b[0].item() + m.b,
}


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore:there is no rule:UserWarning")
def test_exact_or_refused(name: str, unsupported: str, joint: bool) -> None:
    """An operation that is not seen must not be left out in silence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Uses(USES[name], w=(3, 4), b=(3,)), nn.Tanh(), nn.Linear(3, 2))
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64)
    model = model.double().eval()
    message = ""
    try:
        operator = EKFACLinearOperator(
            model,
            nn.MSELoss(),
            list(model.parameters()),
            [(x[:3], y[:3]), (x[3:], y[3:])],
            fisher_type=FisherType.TYPE2,
            separate_weight_and_bias=not joint,
            unsupported=unsupported,
        )
    except ValueError as refusal:
        message = str(refusal)
    if message:
        assert unsupported == "error"
        assert "'0.w'" in message or "'0.b'" in message
    else:
        shapes = parameter_shapes(model, [n for n, _ in model.named_parameters()])
        assert_exact_diagonal(operator, squared_error_ggn(model, x), shapes)
