"""The quadratic form, its gradients and the proximal step, against dense matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rotate_ewc.linalg.quadratic import quadratic_form, quadratic_gradient
from rotate_ewc.penalty.proximal import (
    check_step_size,
    shrink_towards_anchors_,
    step_sizes_by_stack,
)
from rotate_ewc.penalty.terms import Stack
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


# --- the proximal step ---


def stacks(anchor: Mapping[str, Tensor]) -> list[Stack]:
    return [
        Stack(block.parameters, block, tuple(anchor[name][None] for name in block.parameters))
        for block in BLOCKS
    ]


@pytest.mark.parametrize("scale", [0.5, 30.0])
def test_proximal_step_solves_the_dense_system(scale: float) -> None:
    start, anchor, dense = drawn(1), drawn(2), OPERATOR.dense()
    parameters = split(start.clone())
    deltas = {name: t[None] for name, t in split(start - anchor).items()}
    sizes = {name: 0.2 + 0.1 * i for i, name in enumerate(NAMES)}
    shrink_towards_anchors_(stacks(split(anchor)), parameters, deltas, sizes, scale)
    # A joint block takes the mean of its two, which commutes with its matrix.
    means = {
        name: sum(sizes[n] for n in block.parameters) / len(block.parameters)
        for block in BLOCKS
        for name in block.parameters
    }
    eta = joined({n: torch.full(s, means[n], dtype=torch.float64) for n, s in SHAPES.items()})
    system = torch.eye(len(dense), dtype=torch.float64) + scale * eta[:, None] * dense
    expected = anchor + torch.linalg.solve(system, start - anchor)
    assert_close(joined(parameters) - start, expected - start)


def test_proximal_step_of_other_precision() -> None:
    """Displacements and parameters in single precision are rotated in that of the blocks."""
    anchor, dense = drawn(2), OPERATOR.dense()
    parameters = {name: t.float() for name, t in split(drawn(1)).items()}
    start = joined({name: t.double() for name, t in parameters.items()})
    deltas = {name: t[None].float() for name, t in split(start - anchor).items()}
    shrink_towards_anchors_(stacks(split(anchor)), parameters, deltas, 0.3, 2.0)
    system = torch.eye(len(dense), dtype=torch.float64) + 0.6 * dense
    expected = anchor + torch.linalg.solve(system, start - anchor)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}
    assert_close(joined(parameters).double(), expected, tolerance=1e-6)


def test_parameters_that_do_not_fit_stay() -> None:
    """One that is missing or too small is left alone, whatever its block holds."""
    start, anchor = drawn(1), drawn(2)
    parameters = split(start.clone())
    deltas = {name: t[None] for name, t in split(start - anchor).items()}
    small, missing = NAMES[0], NAMES[2]
    parameters[small] = parameters[small][:1].clone()
    kept = parameters[small].clone()
    del parameters[missing]
    shrink_towards_anchors_(stacks(split(anchor)), parameters, deltas, 0.3, 2.0)
    assert torch.equal(parameters[small], kept)
    assert missing not in parameters
    for name in set(NAMES) - {small, missing}:
        assert not torch.equal(parameters[name], split(start)[name])


def test_every_step_size_is_looked_up_before_anything_moves() -> None:
    start = drawn(1)
    parameters = split(start.clone())
    deltas = {name: t[None] for name, t in split(start).items()}
    sizes = dict.fromkeys(NAMES[:-1], 0.1)
    with pytest.raises(ValueError, match=f"no entry for the parameter '{NAMES[-1]}'"):
        shrink_towards_anchors_(stacks(split(drawn(2))), parameters, deltas, sizes, 1.0)
    assert torch.equal(joined(parameters), start)


def test_step_sizes() -> None:
    class Named:
        names = ("a", "b")

    stack: Any = Named()
    for given, expected in ((2, 2.0), ({"a": 1, "b": 2, "c": 9}, 1.5), ({"a": 1, "b": 1}, 1.0)):
        found = step_sizes_by_stack(given, [stack])
        assert found == {stack: expected}
        assert isinstance(found[stack], float)
    with pytest.raises(ValueError, match="step_size has no entry for the parameter 'b'; expected"):
        step_sizes_by_stack({"a": 1}, [stack])
    with pytest.raises(ValueError, match="step_size has no entry for the parameter 'a', 'b'; exp"):
        step_sizes_by_stack({}, [stack])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_step_size(-1.0), "^step_size is -1.0"),
        (lambda: check_step_size(float("inf")), "^step_size is inf"),
        (lambda: check_step_size({"a": 0.0, "b": -2.0}), r"^step_size\['b'\] is -2.0"),
    ],
)
def test_bad_step_sizes(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert check_step_size(0.0) is None
    assert check_step_size({"a": 0, "b": 1e9}) is None
