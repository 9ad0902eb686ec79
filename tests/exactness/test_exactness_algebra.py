"""Products and sums of the operator against its dense matrix."""

import io

import pytest
import torch
from torch import Tensor

from rotate_ewc import EKFACLinearOperator
from tests.helpers.cases import BY_NAME
from tests.helpers.exactness import (
    TOLERANCE,
    Setting,
    estimated,
    seeded,
)
from tests.helpers.oracles import assert_close, dense_operator

ALGEBRA = [
    Setting(BY_NAME["tanh-mlp"]),
    Setting(BY_NAME["inplace-relu-mlp"], "mse", joint=True),
    Setting(BY_NAME["subset-of-parameters"], joint=True),
    Setting(BY_NAME["conv2d-stride-groups"], "bce", "sum"),
    Setting(BY_NAME["conv2d-stride-groups"], fisher="empirical", joint=True),
    Setting(BY_NAME["conv2d-depthwise"], approx="reduce", joint=True),
    Setting(BY_NAME["conv3d"], joint=True),
    Setting(BY_NAME["tied-weights"]),
    Setting(BY_NAME["conv-transpose2d-stride-groups"], joint=True),
    Setting(BY_NAME["conv-transpose3d-groups"], "mse", "sum"),
    Setting(BY_NAME["embedding-padding-pooled"]),
    Setting(BY_NAME["embedding-tied"], approx="reduce"),
    Setting(BY_NAME["addmm"], joint=True),
    Setting(BY_NAME["addmm"], fisher="empirical"),
    Setting(BY_NAME["encoder-layer-norm-last"], joint=True),
    Setting(BY_NAME["cross-attention-three"]),
    Setting(BY_NAME["weight-norm-conv"], joint=True),
    Setting(BY_NAME["scalar-scale"]),
    Setting(BY_NAME["attention-subset"]),
    Setting(BY_NAME["lstm"]),
]
over_algebra = pytest.mark.parametrize("setting", ALGEBRA, ids=str)


def to_list(flat: Tensor, setting: Setting) -> list[Tensor]:
    """Cut ``[D, *]`` into tensors shaped like the parameters, with any trailing axis kept."""
    shapes = list(setting.shapes().values())
    pieces = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    return [p.reshape((*shape, *flat.shape[1:])) for p, shape in zip(pieces, shapes, strict=True)]


@over_algebra
@pytest.mark.parametrize("columns", [(), (1,), (4,)], ids=["vector", "1-column", "4-columns"])
@pytest.mark.parametrize("form", ["flat", "list"])
def test_matmat(setting: Setting, columns: tuple[int, ...], form: str) -> None:
    """Vectors and matrices, flat or shaped like the parameters."""
    operator = estimated(setting)
    dense = setting.dense(operator)
    v = seeded(len(dense), *columns)
    expected = dense @ v
    if form == "flat":
        assert_close(operator @ v, expected)
        return
    product = operator @ to_list(v, setting)
    assert len(product) == len(setting.shapes())
    for actual, piece in zip(product, to_list(expected, setting), strict=True):
        assert actual.shape == piece.shape
        assert (actual - piece).abs().max() <= TOLERANCE * expected.abs().max()


@over_algebra
def test_quadratic_form_and_trace(setting: Setting) -> None:
    """Against the dense matrix."""
    operator = estimated(setting)
    dense = setting.dense(operator)
    v = seeded(len(dense))
    expected = float(v @ dense @ v)
    assert expected > 0
    assert float(operator.quadratic_form(to_list(v, setting))) == pytest.approx(
        expected, rel=TOLERANCE
    )
    assert float(operator.trace) == pytest.approx(float(dense.trace()), rel=TOLERANCE)


@over_algebra
def test_quadratic_form_is_differentiable(setting: Setting) -> None:
    """The gradient of ``d^T F d`` is ``2 F d``."""
    operator = estimated(setting)
    dense = setting.dense(operator)
    v = seeded(len(dense)).requires_grad_()
    (gradient,) = torch.autograd.grad(operator.quadratic_form(to_list(v, setting)), v)
    assert_close(gradient, 2 * dense @ v.detach())


@over_algebra
def test_operator_keeps_the_order_of_params(setting: Setting) -> None:
    """Parameters given as a dict, in another order, to a plain callable."""
    model = setting.case.model()
    parameters = dict(model.named_parameters())
    names = list(reversed(setting.case.names(model)))
    operator = setting.estimate(model=model, params={name: parameters[name] for name in names})
    shapes = setting.shapes()
    dense = dense_operator(estimated(setting).blocks, {name: shapes[name] for name in names})
    v = seeded(len(dense), 2)
    assert_close(operator @ v, dense @ v, 1e-9)


@over_algebra
def test_state_dict_round_trip(setting: Setting) -> None:
    """Through a file that is loaded without pickled objects."""
    operator = estimated(setting)
    buffer = io.BytesIO()
    torch.save(operator.state_dict(), buffer)
    buffer.seek(0)
    loaded = EKFACLinearOperator.from_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(setting.dense(loaded), setting.dense(operator))
    v = seeded(len(setting.dense(operator)), 2)
    assert torch.equal(loaded @ v, operator @ v)
