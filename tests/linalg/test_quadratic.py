"""The quadratic form and its gradients, against dense matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rotate_ewc.linalg.quadratic import quadratic_form, quadratic_gradient
from tests.helpers.oracles import assert_close
from tests.helpers.random_operators import Layout, RandomOperator

# A block of groups and one basis, one of a transposed weight with its bias, one of its own.
OPERATOR = RandomOperator(
    (
        Layout(2, 3, 2, transposed=False, joint=False, bases="gradient", form=0),
        Layout(1, 2, 4, transposed=True, joint=True, bases="both", form=1),
        Layout(1, 3, 2, transposed=False, joint=True, bases="activation", form=0),
    ),
    order=5,
    seed=1,
    eigenvalues="some zero",
)
BLOCKS, SHAPES = OPERATOR.blocks(), OPERATOR.shapes()
NAMES = [name for block in BLOCKS for name in block.parameters]


def drawn(seed: int, *leading: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = sum(map(prod, SHAPES.values()))
    return torch.randn(*leading, size, generator=generator, dtype=torch.float64)


def split(vector: Tensor) -> dict[str, Tensor]:
    parts = vector.split([prod(shape) for shape in SHAPES.values()])
    return {n: part.reshape(s) for part, (n, s) in zip(parts, SHAPES.items(), strict=True)}


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def form(vector: Tensor) -> Tensor:
    return quadratic_form(BLOCKS, split(vector))


# --- value and derivatives ---


def test_value_and_derivatives() -> None:
    dense, d = OPERATOR.dense(), drawn(1).requires_grad_()
    value = form(d)
    assert value.shape == ()
    assert_close(value.detach(), d.detach() @ dense @ d.detach())
    (gradient,) = torch.autograd.grad(3.0 * value, d)
    assert_close(gradient, 6.0 * dense @ d.detach())
    assert_close(torch.autograd.functional.hessian(form, d.detach()), 2.0 * dense)


def test_second_derivatives_through_what_comes_after() -> None:
    """Of a function of the form: both the chain rule's terms are needed."""
    dense, d = OPERATOR.dense(), drawn(1)
    value, gradient = d @ dense @ d, 2 * dense @ d
    expected = 2 * torch.outer(gradient, gradient) + 2 * value * 2 * dense
    assert_close(torch.autograd.functional.hessian(lambda x: form(x).square(), d), expected)
    assert torch.autograd.gradcheck(form, d.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(form, d.clone().requires_grad_())


def test_torch_func() -> None:
    dense, points = OPERATOR.dense(), drawn(1, 3)
    values = torch.stack([d @ dense @ d for d in points])
    assert_close(torch.func.vmap(form)(points), values)
    assert_close(torch.func.vmap(torch.func.grad(form))(points), 2 * points @ dense)
    assert_close(torch.func.jacrev(torch.func.grad(form))(points[0]), 2 * dense)


def test_gradient_without_autograd() -> None:
    d = drawn(2)
    products = quadratic_gradient(BLOCKS, split(d))
    assert {name: tuple(t.shape) for name, t in products.items()} == SHAPES
    assert_close(joined(products), OPERATOR.dense() @ d)


def test_tensors_of_other_precision() -> None:
    """The sum is computed in the blocks' dtype; gradients are in the tensors' own."""
    tensors = {n: t.float().requires_grad_() for n, t in split(drawn(1)).items()}
    d = joined({n: t.detach().double() for n, t in tensors.items()})
    value = quadratic_form(BLOCKS, tensors)
    assert value.dtype == torch.float64
    assert_close(value.detach(), d @ OPERATOR.dense() @ d)
    gradients = torch.autograd.grad(value, list(tensors.values()), create_graph=True)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    products = quadratic_gradient(BLOCKS, tensors)
    assert {product.dtype for product in products.values()} == {torch.float64}
    found = joined(dict(zip(tensors, gradients, strict=True)))
    assert_close(found.detach().double(), 2 * OPERATOR.dense() @ d, tolerance=1e-6)


def test_only_some_tensors_need_a_gradient() -> None:
    tensors = split(drawn(1))
    first = tensors[NAMES[1]].requires_grad_()
    (gradient,) = torch.autograd.grad(quadratic_form(BLOCKS, tensors), first)
    whole = split(2 * OPERATOR.dense() @ joined({n: t.detach() for n, t in tensors.items()}))
    assert_close(gradient, whole[NAMES[1]])


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_two_products_for_the_value_and_two_for_the_gradient() -> None:
    """One for each basis that is not the identity; and nothing is filled with zeros."""
    tensors = {name: t.clone().requires_grad_() for name, t in split(drawn(1)).items()}
    with Count() as forward:
        value = quadratic_form(BLOCKS, tensors)
    with Count() as backward:
        value.backward()
    assert forward.calls["bmm"] == backward.calls["bmm"] == 1 + 2 + 1
    assert not any(name.startswith("zeros") for name in backward.calls)
