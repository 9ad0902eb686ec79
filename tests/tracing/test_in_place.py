"""What comes after a layer may change its output in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from rotate_ewc import EKFACLinearOperator, FisherType
from tests.helpers.cases.attention_modules import SelfAttention
from tests.helpers.cases.modules import Build, applied, later, linear, sequential, shaken, using
from tests.helpers.exactness import assert_exact_diagonal
from tests.helpers.oracles import dense_ggn, parameter_shapes

# A layer, and the shape of one input.
LAYERS: dict[str, tuple[Build, tuple[int, ...]]] = {
    "linear": (linear(4, 5), (4,)),
    "linear-tokens": (linear(4, 5), (3, 4)),
    "linear-grid-no-bias": (linear(4, 5, False), (2, 3, 4)),
    "linear-turned": (sequential(applied(lambda x: x.mT), linear(3, 5)), (3, 4)),
    "product": (using(lambda m, x: x @ m.w, w=(4, 5)), (4,)),
    "product-tokens": (using(lambda m, x: x @ m.w, w=(4, 5)), (3, 4)),
    "addmm": (using(lambda m, x: torch.addmm(m.b, x, m.w), w=(4, 5), b=(5,)), (4,)),
    "scale": (using(lambda m, x: x * m.s, s=(4,)), (3, 4)),
    "shift": (using(lambda m, x: x + m.s, s=(4,)), (3, 4)),
    "embedding": (sequential(applied(lambda x: (x > 0).long()), later(nn.Embedding, 2, 3)), (4,)),
    "layer-norm": (later(nn.LayerNorm, 4), (3, 4)),
    "rms-norm": (later(nn.RMSNorm, 4), (3, 4)),
    "group-norm": (later(nn.GroupNorm, 2, 4), (4, 3)),
    "instance-norm1d": (later(nn.InstanceNorm1d, 3, affine=True), (3, 4)),
    "instance-norm2d": (later(nn.InstanceNorm2d, 3, affine=True), (3, 2, 2)),
    "instance-norm2d-running": (
        later(nn.InstanceNorm2d, 3, affine=True, track_running_stats=True),
        (3, 2, 2),
    ),
    "batch-norm1d": (later(nn.BatchNorm1d, 3), (3,)),
    "batch-norm2d": (later(nn.BatchNorm2d, 3), (3, 2, 2)),
    "conv1d": (later(nn.Conv1d, 2, 2, 2), (2, 3)),
    "conv2d": (later(nn.Conv2d, 2, 2, 2), (2, 3, 3)),
    "conv3d": (later(nn.Conv3d, 2, 2, 2), (2, 2, 3, 2)),
    "conv-transpose1d": (later(nn.ConvTranspose1d, 2, 2, 2), (2, 2)),
    "conv-transpose2d": (later(nn.ConvTranspose2d, 2, 2, 2), (2, 2, 2)),
    "conv-transpose3d": (later(nn.ConvTranspose3d, 2, 2, 2), (2, 1, 2, 1)),
    "attention": (lambda: SelfAttention(4, 2, mask="causal", batch_first=True), (3, 4)),
    "weight-norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), (3, 4)),
    "computed-weight": (using(lambda m, x: F.linear(x, m.w.exp()), w=(5, 4)), (3, 4)),
    "computed-shift": (using(lambda m, x: x + m.s.exp(), s=(4,)), (3, 4)),
}


def half(h: Tensor) -> Tensor:
    """Scale a part of a tensor in place."""
    h[:, :1].mul_(2.0)
    return h.tanh()


def through_a_view(h: Tensor) -> Tensor:
    """Change a tensor through a view of it."""
    h.transpose(0, 1).relu_()
    return h


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda h: F.relu_(h),
    "half": half,
    "view": through_a_view,
    "product": lambda h: h.mul_(h.detach().sign()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_that_are_changed_in_place(name: str, change: str) -> None:
    """The gradients are those at the layer's own output."""
    build, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = shaken(build)().double().eval()
        x, y = torch.randn(5, *shape).double(), torch.randn(5, 2).double()
        width = layer(x)[0].numel()
        changed: Any = applied(CHANGES[change])
        model = nn.Sequential(layer, changed(), nn.Flatten(), nn.Linear(width, 2).double())
    names = [name for name, _ in model.named_parameters()]
    operator = EKFACLinearOperator(
        model,
        nn.MSELoss(),
        list(model.parameters()),
        [(x[:3], y[:3]), (x[3:], y[3:])],
        fisher_type=FisherType.TYPE2,
    )
    dense = dense_ggn(model, nn.MSELoss(), names, x, y)
    assert_exact_diagonal(operator, dense, parameter_shapes(model, names))
