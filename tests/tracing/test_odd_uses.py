"""Ways of using parameters at the edge of the rules: exact or refused, but never silently wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases.modules import Uses
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import dense_ggn, parameter_shapes

Function = Callable[[Any, Tensor], Tensor]
Shape = tuple[int, ...]


def in_place_scale(m: Any, x: Tensor) -> Tensor:
    """Multiply a fresh tensor in place."""
    h = torch.tanh(x)
    h *= m.w
    return h + m.b


def in_place_shift(m: Any, x: Tensor) -> Tensor:
    """Add to a fresh tensor in place."""
    h = x @ m.w
    h += m.b
    return h


def in_place_method(m: Any, x: Tensor) -> Tensor:
    """Chain in-place methods."""
    return torch.tanh(x).mul_(m.w).add_(m.b, alpha=2).sub_(m.b)


def output_argument(m: Any, x: Tensor) -> Tensor:
    """Use the weight of a product through a view that is written to."""
    stacked = torch.zeros(len(x), 2, 3, dtype=x.dtype)
    stacked[:, 0] = x @ m.w
    stacked[:, 1] = m.b
    return stacked.tanh().sum(1)


def changed_after_use(m: Any, x: Tensor) -> Tensor:
    """Scale a layer's output in place, which a scale before it needs."""
    h = F.linear(torch.tanh(x), m.w.t(), m.b)
    return torch.relu_(h) * m.b


def through_a_list(m: Any, x: Tensor) -> Tensor:
    """Stack the results of uses of slices."""
    return torch.stack([x @ m.w[:, i] for i in range(3)], dim=1) + m.b


def copies_overwritten(m: Any, x: Tensor) -> Tensor:
    """Write data into copies of a parameter."""
    copies = m.w.repeat(len(x), 1)
    copies[:, 0] = x[:, 0]
    return x.tanh() * copies + m.b


def copies_overwritten_through_a_view(m: Any, x: Tensor) -> Tensor:
    """Write data that depend on the same parameter into copies of it."""
    copies = m.w.repeat(len(x), 1)
    copies[:, 1:].copy_((x * m.w)[:, 1:].tanh())
    return x * copies + m.b


def computed_in_place(m: Any, x: Tensor) -> Tensor:
    """Change a weight before it is used, by numbers, itself and another parameter."""
    weight = m.w * 1
    weight[0] = 0
    weight.mul_(2)
    weight[1:2] = m.b[1:2]
    weight[2:].exp_()
    return x * weight + m.b


def computed_in_place_after_use(m: Any, x: Tensor) -> Tensor:
    """Change a weight between two uses."""
    weight = m.w * 1
    before = F.linear(x, weight, m.b)
    weight.mul_(2)
    return before.tanh() + F.linear(x, weight)


# Function, shape of w, shape of b, shape of one input.
USES: dict[str, tuple[Function, Shape, Shape, Shape]] = {
    "parameter-times-data": (lambda m, x: (m.w @ x[..., None])[..., 0] + m.b, (3, 4), (3,), (4,)),
    "vector-product": (lambda m, x: (x @ m.w)[:, None] * m.b, (4,), (3,), (4,)),
    "mv": (lambda m, x: torch.mv(x, m.w)[:, None] + m.b, (4,), (3,), (4,)),
    "batched-product": (
        lambda m, x: torch.bmm(x, m.w.expand(len(x), 4, 3)).mean(1) + m.b,
        (4, 3),
        (3,),
        (2, 4),
    ),
    "product-of-stack": (lambda m, x: (x @ m.w).mean(1) + m.b, (2, 4, 3), (3,), (2, 1, 4)),
    "broadcast-product": (
        lambda m, x: (x[:, None] @ m.w).flatten(1) + m.b,
        (2, 4, 3),
        (6,),
        (1, 4),
    ),
    "addmm-multiples": (
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2),
        (4, 3),
        (3,),
        (4,),
    ),
    "addmm-matrix": (lambda m, x: torch.addmm(m.b, x, m.w), (4, 3), (1, 3), (4,)),
    "addmm-data-first": (lambda m, x: torch.addmm(x, x, m.w) * m.b, (4, 4), (4,), (4,)),
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.b, x, m.w.expand(len(x), 4, 3)).mean(1),
        (4, 3),
        (1, 1, 3),
        (2, 4),
    ),
    "tensordot": (
        lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])).mean(1) + m.b,
        (2, 3),
        (3,),
        (2, 4),
    ),
    "inner": (lambda m, x: torch.inner(x, m.w) + m.b, (3, 4), (3,), (4,)),
    "addcmul": (lambda m, x: torch.addcmul(m.b, x, m.w, value=0.5), (4,), (4,), (4,)),
    "lerp": (lambda m, x: torch.lerp(x, m.w, 0.3) * m.b, (4,), (4,), (4,)),
    "division": (lambda m, x: x / (2 + m.w) + 1 / (3 + m.b), (4,), (4,), (4,)),
    "division-by-parameter": (lambda m, x: x / m.w + m.b, (4,), (4,), (4,)),
    "parameter-over-data": (lambda m, x: m.w / (x**2 + 1) + m.b, (4,), (4,), (4,)),
    "reversed-subtraction": (lambda m, x: torch.rsub(x, m.w) * m.b, (4,), (4,), (4,)),
    "power": (lambda m, x: (x**2 + 1) ** m.w + m.b, (4,), (4,), (4,)),
    "where": (lambda m, x: torch.where(x > 0, x * m.w, m.b), (4,), (4,), (4,)),
    "maximum": (lambda m, x: torch.maximum(x, m.w) * m.b, (4,), (4,), (4,)),
    "clamp": (lambda m, x: x.clamp(min=m.w) + m.b, (4,), (4,), (4,)),
    "in-place-scale": (in_place_scale, (4,), (4,), (4,)),
    "in-place-shift": (in_place_shift, (4, 3), (3,), (4,)),
    "in-place-methods": (in_place_method, (4,), (4,), (4,)),
    "written-into-a-buffer": (output_argument, (4, 3), (3,), (4,)),
    "changed-after-use": (changed_after_use, (4, 4), (4,), (4,)),
    "slices-in-a-list": (through_a_list, (4, 3), (3,), (4,)),
    "parameter-as-data": (
        lambda m, x: F.linear(x * m.w.sum(0), m.w, m.b) + F.linear(m.w.sum(0), m.w),
        (3, 4),
        (3,),
        (4,),
    ),
    "product-of-parameters-with-data": (
        lambda m, x: F.linear(x, m.w * m.b[:, None], m.b),
        (3, 4),
        (3,),
        (4,),
    ),
    "only-parameters": (
        lambda m, x: (m.w @ m.w.t()).sum(0) + m.b + 0 * x[:, :3],
        (3, 4),
        (3,),
        (4,),
    ),
    "expanded-to-the-batch": (
        lambda m, x: x * m.w.expand(len(x), 4) + m.b.repeat(len(x), 1),
        (4,),
        (4,),
        (4,),
    ),
    "expanded-in-time-first": (
        lambda m, x: (x.mT + m.w.mT[None].expand(len(x), 4, 3)).sum(1) + m.b,
        (3, 4),
        (3,),
        (3, 4),
    ),
    "gathered-by-the-data": (lambda m, x: x * m.w[(x[:, 0] > 0).long()] + m.b, (2, 4), (4,), (4,)),
    "gathered-by-the-data-as-rows": (
        lambda m, x: x * F.embedding((x > 0).long(), m.w).sum(-1) + m.b,
        (2, 3),
        (4,),
        (4,),
    ),
    "selected-by-the-data": (
        lambda m, x: x * m.w.index_select(0, (x[:, 1] > 0).long()) + m.b,
        (2, 4),
        (4,),
        (4,),
    ),
    "softmax-of-data-times-parameter": (
        lambda m, x: torch.softmax(x * m.w, dim=-1) @ m.b,
        (4,),
        (4, 3),
        (4,),
    ),
    "attention-to-parameters": (
        lambda m, x: torch.softmax(x @ m.w.t(), dim=-1) @ m.b,
        (3, 4),
        (3, 4),
        (2, 4),
    ),
    "sdpa-with-learned-keys": (
        lambda m, x: F.scaled_dot_product_attention(
            x, m.w.expand(len(x), 3, 4), m.b.expand(len(x), 3, 4)
        ),
        (3, 4),
        (3, 4),
        (2, 4),
    ),
    "distance-to-prototypes": (lambda m, x: torch.cdist(x, m.w) * m.b, (3, 4), (3,), (4,)),
    "cosine-to-prototypes": (
        lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)) * m.b,
        (3, 4),
        (3,),
        (4,),
    ),
    "convolution-as-unfold": (
        lambda m, x: (m.w @ F.unfold(x, 2)).mean(-1) + m.b,
        (3, 8),
        (3,),
        (2, 3, 3),
    ),
    "unbatched-convolution": (
        lambda m, x: F.conv1d(x.t()[None], m.w).squeeze(0).t() * m.b,
        (3, 4, 1),
        (3,),
        (4,),
    ),
    "embedding-bag": (
        lambda m, x: F.embedding_bag((x > 0).long(), m.w, mode="sum") + m.b,
        (2, 3),
        (3,),
        (4,),
    ),
    "one-hot-product": (
        lambda m, x: F.one_hot((x > 0).long(), 2).double() @ m.w + m.b,
        (2, 3),
        (3,),
        (4,),
    ),
    "batch-norm-scale": (
        lambda m, x: F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), m.w, m.b),
        (4,),
        (4,),
        (4,),
    ),
    "layer-norm-shared-scale": (
        lambda m, x: F.layer_norm(F.layer_norm(x, (4,), m.w), (4,), m.w, m.b),
        (4,),
        (4,),
        (4,),
    ),
    "scale-of-channels-and-tokens": (
        lambda m, x: (x * m.w[0] + x.mT.tanh().mT * m.w).sum(1) + m.b,
        (2, 4),
        (4,),
        (2, 4),
    ),
    "complex": (lambda m, x: torch.fft.rfft(x * m.w, dim=-1).abs() + m.b, (4,), (3,), (4,)),
    "outer-product": (lambda m, x: (x[:, :, None] * m.w).flatten(1)[:, :6] + m.b, (3,), (6,), (4,)),
    "product-twice": (
        lambda m, x: x @ m.w + (x @ m.w) @ m.w + m.b,
        (3, 3),
        (3,),
        (3,),
    ),
    "linear-with-a-row-for-each-example": (
        lambda m, x: (
            F.linear(x.repeat_interleave(2, 0), m.w, m.b).unflatten(0, (-1, 2)).tanh().sum(1)
        ),
        (3, 4),
        (3,),
        (4,),
    ),
    "linear-on-repeated-examples": (
        lambda m, x: F.linear(x.repeat(2, 1), m.w, m.b).unflatten(0, (2, -1)).tanh().sum(0),
        (3, 4),
        (3,),
        (4,),
    ),
    "copies-overwritten": (copies_overwritten, (4,), (4,), (4,)),
    "copies-overwritten-through-a-view": (
        copies_overwritten_through_a_view,
        (4,),
        (4,),
        (4,),
    ),
    "computed-in-place": (computed_in_place, (4,), (4,), (4,)),
    "computed-in-place-after-use": (computed_in_place_after_use, (3, 4), (3,), (4,)),
    "parameter-in-data-of-one-shape": (
        lambda m, x: x * (m.w.exp() + 0 * x).tanh() + m.b,
        (4,),
        (4,),
        (4,),
    ),
    "outputs-that-are-copies": (
        lambda m, x: (m.w + m.b).expand(len(x), 4).exp() + 0 * m.w,
        (4,),
        (4,),
        (4,),
    ),
    "transposed-data": (lambda m, x: (m.w.t() @ x.t()).t() + m.b, (4, 3), (3,), (4,)),
}


# Uses that no rule covers, and those that no choice helps: examples lie along a convolved axis, or
# a computed weight is lost.
WITHOUT_RULE = (
    "distance-to-prototypes",
    "embedding-bag",
    "copies-overwritten",
    "copies-overwritten-through-a-view",
)
REFUSED = ("unbatched-convolution", "computed-in-place-after-use")


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("unsupported", ["error", "diagonal"])
@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore:there is no rule:UserWarning")
def test_exact_or_refused(name: str, unsupported: str, joint: bool) -> None:
    """Also in batches that are as large as other axes; refused only where no rule covers a use."""
    function, w, b, shape = USES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inner = Uses(function, w=w, b=b)
        head = nn.Linear(16, 2)
        x = torch.randn(9, *shape, dtype=torch.float64)
    model = nn.Sequential(nn.Identity(), inner, nn.Tanh(), nn.Flatten(), head).double().eval()
    head.weight = nn.Parameter(head.weight[:, : model[:4](x).shape[1]].detach().clone())
    y = torch.zeros(9, 2, dtype=torch.float64)
    names = [n for n, _ in model.named_parameters()]
    data = [(x[i:j], y[i:j]) for i, j in ((0, 4), (4, 5), (5, 7), (7, 9))]
    message = ""
    try:
        operator = EKFACLinearOperator(
            model,
            nn.MSELoss(),
            list(model.parameters()),
            data,
            fisher_type=FisherType.TYPE2,
            separate_weight_and_bias=not joint,
            check_deterministic=False,
            unsupported=unsupported,
        )
    except ValueError as refusal:
        message = str(refusal)
    if message:
        assert "1.w" in message or "1.b" in message
        assert name in REFUSED or (name in WITHOUT_RULE and unsupported == "error")
    else:
        dense = dense_ggn(model, nn.MSELoss(), names, x, y)
        assert_exact_diagonal(operator, dense, parameter_shapes(model, names))
