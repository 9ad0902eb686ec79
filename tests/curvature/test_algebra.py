"""The algebra of random operators against dense matrices: every method, every form of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.random_operators import BASES, RandomOperator, random_operators

PROPERTY = settings(derandomize=True, deadline=None, max_examples=30)
DAMPINGS = st.sampled_from([1e-3, 0.1, 1.0, 30.0])
SEEDS = st.integers(0, 1000)


def check_close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * scale)


def matrix_of(operator: EKFACLinearOperator) -> Tensor:
    """Multiply with every unit vector."""
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


def seeded(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def split(flat: Tensor, random: RandomOperator) -> list[Tensor]:
    """Cut `[D, *]` into tensors of the parameters' shapes, with the same further axes."""
    parts, start = [], 0
    for shape in random.shapes().values():
        size = math.prod(shape)
        parts.append(flat[start : start + size].reshape((*shape, *flat.shape[1:])))
        start += size
    return parts


def joined(tensors: Sequence[Tensor], random: RandomOperator) -> Tensor:
    """The inverse of `split`."""
    shapes = random.shapes().values()
    return torch.cat(
        [
            tensor.reshape(math.prod(shape), *tensor.shape[len(shape) :])
            for tensor, shape in zip(tensors, shapes, strict=True)
        ]
    )


def function_of(dense: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a symmetric matrix, from its own eigendecomposition."""
    values, vectors = torch.linalg.eigh(dense)
    return vectors @ torch.diag(function(values.clamp(min=0))) @ vectors.T


# --------------------------------------------------------------------------- products


@PROPERTY
@given(random_operators(), SEEDS)
def test_products_in_every_form(random: RandomOperator, seed: int) -> None:
    operator, dense = random.operator(), random.dense()
    size = len(dense)
    assert operator.shape == (size, size)
    columns = seeded(seed, size, 3)
    expected = dense @ columns
    check_close(operator @ columns, expected)
    check_close(operator @ columns[:, 0], expected[:, 0])
    check_close(operator @ columns[:, :1], expected[:, :1])
    for like in (columns, columns[:, :1], columns[:, 0]):
        product = operator @ split(like, random)
        assert isinstance(product, list)
        for tensor, shape in zip(product, random.shapes().values(), strict=True):
            assert tensor.shape == (*shape, *like.shape[1:])
        check_close(joined(product, random), dense @ like)


@PROPERTY
@given(random_operators(), SEEDS)
def test_linear_symmetric_and_positive_semi_definite(random: RandomOperator, seed: int) -> None:
    operator = random.operator()
    x, y = seeded(seed, 2, operator.shape[0])
    check_close(operator @ (2.0 * x - 3.0 * y), 2.0 * (operator @ x) - 3.0 * (operator @ y))
    check_close(x @ (operator @ y), y @ (operator @ x))
    matrix = matrix_of(operator)
    check_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@PROPERTY
@given(random_operators(), SEEDS)
def test_quadratic_form(random: RandomOperator, seed: int) -> None:
    operator, dense = random.operator(), random.dense()
    x = seeded(seed, len(dense))
    check_close(operator.quadratic_form(split(x, random)), x @ dense @ x)


@PROPERTY
@given(random_operators(), st.floats(0, 10))
def test_multiples(random: RandomOperator, factor: float) -> None:
    operator, dense = random.operator(), random.dense()
    check_close(matrix_of(factor * operator), factor * dense)
    check_close(matrix_of(operator * factor), factor * dense)


# --------------------------------------------------------------------------- entries and scalars


@PROPERTY
@given(random_operators())
def test_entries(random: RandomOperator) -> None:
    operator, dense = random.operator(), random.dense()
    check_close(operator.to_dense(), dense)
    diagonal = operator.diagonal()
    assert [tuple(part.shape) for part in diagonal] == list(random.shapes().values())
    check_close(joined(diagonal, random), dense.diagonal())


@PROPERTY
@given(random_operators())
def test_block_of_a_parameter(random: RandomOperator) -> None:
    operator = random.operator()
    for name in random.shapes():
        assert [block for block in operator.blocks if name in block.parameters] == [
            operator.block(name)
        ]


@PROPERTY
@given(random_operators(), DAMPINGS)
def test_scalars(random: RandomOperator, damping: float) -> None:
    operator, dense = random.operator(), random.dense()
    check_close(operator.trace, dense.trace())
    check_close(operator.frobenius_norm, torch.linalg.matrix_norm(dense))
    for scalar in (operator.trace, operator.frobenius_norm, operator.logdet, operator.det):
        assert scalar.shape == ()
    singular = any(bool((block.eigenvalues == 0).any()) for block in random.blocks())
    if singular:
        assert operator.logdet.item() == -math.inf
        assert operator.det.item() == 0.0
    else:
        check_close(operator.logdet, torch.linalg.slogdet(dense)[1], scale=100.0)
        check_close(operator.det, torch.linalg.det(dense))
    damped = dense + damping * torch.eye(len(dense), dtype=torch.float64)
    check_close(operator.damped(damping).logdet, torch.linalg.slogdet(damped)[1], scale=100.0)
    check_close(operator.damped(damping).trace, damped.trace())


# --------------------------------------------------------------------------- functions


@PROPERTY
@given(random_operators(), DAMPINGS, SEEDS)
def test_inverse(random: RandomOperator, damping: float, seed: int) -> None:
    operator, dense = random.operator(), random.dense()
    damped = dense + damping * torch.eye(len(dense), dtype=torch.float64)
    inverse = operator.inverse(damping=damping)
    check_close(matrix_of(inverse), torch.linalg.inv(damped), scale=1 / damping)
    x = seeded(seed, len(dense))
    check_close(inverse @ ((operator @ x) + damping * x), x, scale=1 / damping)
    check_close(operator @ (inverse @ x) + damping * (inverse @ x), x, scale=1 / damping)


@PROPERTY
@given(random_operators(["positive"]))
def test_inverse_without_damping(random: RandomOperator) -> None:
    operator, dense = random.operator(), random.dense()
    check_close(matrix_of(operator.inverse(damping=0.0)), torch.linalg.inv(dense))


@PROPERTY
@given(random_operators(), st.sampled_from([0.0, 0.1, 3.0]))
def test_damped(random: RandomOperator, damping: float) -> None:
    operator, dense = random.operator(), random.dense()
    eye = torch.eye(len(dense), dtype=torch.float64)
    check_close(matrix_of(operator.damped(damping)), dense + damping * eye)
    check_close(matrix_of(operator), dense)
    assert operator.damped(damping).parameter_shapes == operator.parameter_shapes
    assert operator.damped(damping).provenance == operator.provenance


@PROPERTY
@given(random_operators())
def test_functions_of_the_matrix(random: RandomOperator) -> None:
    operator, dense = random.operator(), random.dense()
    functions: list[Callable[[Tensor], Tensor]] = [
        torch.square,
        lambda values: torch.exp(-values),
        lambda values: values / (values + 1.0),
    ]
    for function in functions:
        check_close(matrix_of(operator.apply(function)), function_of(dense, function))
        check_close(operator.apply(function).trace, function_of(dense, function).trace())
    check_close(matrix_of(operator), dense)


@PROPERTY
@given(random_operators(), SEEDS)
def test_functions_compose(random: RandomOperator, seed: int) -> None:
    operator, dense = random.operator(), random.dense()
    x = seeded(seed, len(dense))
    composed = operator.apply(lambda values: torch.exp(-(values.square() + 1.0)))
    one_by_one = operator.apply(lambda values: values.square() + 1.0)
    one_by_one = one_by_one.apply(lambda values: torch.exp(-values))
    check_close(one_by_one @ x, composed @ x)
    root = operator.apply(torch.sqrt)
    check_close(root @ (root @ x), dense @ x)
    check_close(operator.apply(torch.clone) @ x, dense @ x)
    # Functions of one operator commute.
    check_close(composed @ (operator @ x), operator @ (composed @ x))


@PROPERTY
@given(random_operators(["positive"]))
def test_whitening(random: RandomOperator) -> None:
    operator, dense = random.operator(), random.dense()
    whitener = matrix_of(operator.apply(torch.rsqrt))
    eye = torch.eye(len(dense), dtype=torch.float64)
    check_close(whitener @ dense @ whitener, eye, scale=10.0)


# --------------------------------------------------------------------------- merging


def partial_traces(dense: Tensor, random: RandomOperator) -> list[Tensor]:
    """Sums over either side of every group's matrix, by plain index sums."""
    sums = []
    for positions in random.positions():
        for position in positions:
            entries = dense[position.flatten()[:, None], position.flatten()]
            entries = entries.reshape(*position.shape, *position.shape)
            sums.append(torch.einsum("aibi->ab", entries))
            sums.append(torch.einsum("aiaj->ij", entries))
    return sums


def relative(random: RandomOperator, seed: int, bases: str) -> RandomOperator:
    """An operator over the same parameters in the same order, with other bases and numbers."""
    layouts = tuple(replace(layout, bases=bases) for layout in random.layouts)
    return replace(random, layouts=layouts, seed=seed, eigenvalues="some zero")


@PROPERTY
@given(random_operators(thin=False), SEEDS, BASES, st.floats(0, 3), st.floats(0, 3))
def test_merging_keeps_traces_of_both_sides(
    random: RandomOperator, seed: int, bases: str, weight: float, other_weight: float
) -> None:
    other = relative(random, seed, bases)
    merged = merge([random.operator(), other.operator()], [weight, other_weight])
    assert list(merged.parameter_shapes) == list(random.shapes())
    exact = weight * random.dense() + other_weight * other.dense()
    matrix = matrix_of(merged)
    check_close(merged.trace, exact.trace())
    for actual, expected in zip(
        partial_traces(matrix, random), partial_traces(exact, random), strict=True
    ):
        check_close(actual, expected)
    check_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-11
    # The best diagonal in whatever basis is a projection, which never lengthens.
    assert merged.frobenius_norm <= torch.linalg.matrix_norm(exact) + 1e-9


@PROPERTY
@given(random_operators(["some zero", "positive"], thin=False))
def test_merging_with_itself_doubles(random: RandomOperator) -> None:
    operator = random.operator()
    # Bases are those of the partial traces, so that equal ones among these leave a choice.
    for trace in partial_traces(random.dense(), random):
        gaps = torch.linalg.eigvalsh(trace).diff()
        assume(bool((gaps > 1e-6).all()))
    check_close(matrix_of(merge([operator, operator])), 2 * random.dense())
    check_close(matrix_of(merge([operator], [0.5])), 0.5 * random.dense())


@PROPERTY
@given(
    random_operators(max_blocks=1, thin=False), st.integers(0, 2), st.integers(0, 2), SEEDS, BASES
)
def test_merging_grown_parameters(
    random: RandomOperator, more_rows: int, more_columns: int, seed: int, bases: str
) -> None:
    """A block stays on the leading slice for which it was made, in every layout."""
    layout = replace(random.layouts[0], groups=1, form=0)
    small = replace(random, layouts=(layout,))
    grown = replace(layout, d_out=layout.d_out + more_rows, columns=layout.columns + more_columns)
    large = relative(replace(random, layouts=(grown,)), seed, bases)
    merged = merge([small.operator(), large.operator()])
    assert {name: tuple(shape) for name, shape in merged.parameter_shapes.items()} == large.shapes()
    exact = large.dense()
    kept = large.positions()[0][:, : layout.d_out, : layout.d_in].flatten()
    order = small.positions()[0].flatten()
    exact[kept[:, None], kept] += small.dense()[order[:, None], order]
    for actual, expected in zip(
        partial_traces(matrix_of(merged), large), partial_traces(exact, large), strict=True
    ):
        check_close(actual, expected)


# --------------------------------------------------------------------------- samples


@PROPERTY
@given(random_operators(), DAMPINGS, SEEDS, st.sampled_from([None, 1, 3]))
def test_samples_agree_with_functions(
    random: RandomOperator, damping: float, seed: int, count: int | None
) -> None:
    """The noise does not depend on the eigenvalues; what is made of it is `(F + δ)^-½` times it."""
    operator, other = random.operator(), random.operator().apply(torch.exp)

    def sample(of: EKFACLinearOperator, damping: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return of.sample(count, damping=damping, generator=generator)

    drawn = sample(operator, damping)
    further_axes = () if count is None else (count,)
    assert [tuple(part.shape) for part in drawn] == [
        (*shape, *further_axes) for shape in random.shapes().values()
    ]
    for part, again in zip(drawn, sample(operator, damping), strict=True):
        assert torch.equal(part, again)
    flat = joined(drawn, random)
    check_close(joined(sample(operator.damped(damping), 0.0), random), flat, 1 / damping)
    check_close(2 * joined(sample(operator * 4.0, 4 * damping), random), flat, 1 / damping)
    noise = operator.damped(damping).apply(torch.sqrt) @ flat
    other_noise = other.damped(damping).apply(torch.sqrt) @ joined(sample(other, damping), random)
    check_close(other_noise, noise, scale=100 / damping)


@settings(PROPERTY, max_examples=12)
@given(random_operators(), SEEDS)
def test_samples_have_mean_zero_and_the_inverse_as_covariance(
    random: RandomOperator, seed: int
) -> None:
    operator, damping, count = random.operator(), 0.2, 20_000
    generator = torch.Generator().manual_seed(seed)
    drawn = joined(operator.sample(count, damping=damping, generator=generator), random)
    eye = torch.eye(len(drawn), dtype=torch.float64)
    # In units of the exact covariance, all entries are independent with variance one.
    whitened = function_of(random.dense() + damping * eye, torch.sqrt) @ drawn
    assert whitened.mean(dim=1).abs().max() < 5 / math.sqrt(count)
    error = whitened @ whitened.T / count - eye
    assert error.abs().max() < 5 * math.sqrt(2 / count)


# --------------------------------------------------------------------------- forms of storage


@PROPERTY
@given(random_operators())
def test_snapshots_hold_everything(random: RandomOperator) -> None:
    operator = random.operator()
    loaded = EKFACLinearOperator.from_state_dict(operator.state_dict())
    assert [block.transposed for block in loaded.blocks] == [
        layout.transposed for layout in random.layouts
    ]
    assert list(loaded.parameter_shapes) == list(random.shapes())
    assert torch.equal(matrix_of(loaded), matrix_of(operator))


@PROPERTY
@given(random_operators())
def test_casts(random: RandomOperator) -> None:
    operator = random.operator().to(dtype=torch.float32)
    assert operator.dtype == torch.float32
    matrix = matrix_of(operator)
    assert matrix.dtype == torch.float32
    torch.testing.assert_close(matrix.double(), random.dense(), rtol=1e-4, atol=1e-5)
    assert operator.to_dense().dtype == torch.float32
    back = operator.to(dtype=torch.float64)
    torch.testing.assert_close(matrix_of(back), random.dense(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_of_different_dtypes(other: torch.dtype) -> None:
    """As of a model whose layers are not all in the same: products have the vector's dtype."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(1, 3, 4, generator=generator), torch.rand(1, 2, 1, generator=generator)]
    blocks = [Block(("w",), None, None, values[0]), Block(("b",), None, None, values[1].double())]
    provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
    operator = EKFACLinearOperator.from_blocks(blocks, {"w": (3, 4), "b": (2,)}, provenance)
    assert operator.dtype == torch.float64
    exact = torch.cat([value.double().flatten() for value in values])
    assert torch.equal(operator.to_dense(), torch.diag(exact))
    flat = torch.randn(14, generator=generator).to(other)
    tolerance = {"rtol": 0.01 if other == torch.bfloat16 else 1e-6, "atol": 0.0}
    product = operator @ flat
    assert product.dtype == other
    torch.testing.assert_close(product.double(), exact * flat.double(), **tolerance)
    parts = operator @ [flat[:12].view(3, 4), flat[12:].float()]
    assert [part.dtype for part in parts] == [other, torch.float32]
    torch.testing.assert_close(
        torch.cat([part.double().flatten() for part in parts]), exact * flat.double(), **tolerance
    )
    form = operator.quadratic_form([flat[:12].view(3, 4), flat[12:]])
    assert float(form) == pytest.approx(float(exact @ flat.double().square()), rel=1e-6)


def test_integers_are_refused() -> None:
    """A product that comes back in their dtype would be rounded."""
    block = Block(("w",), None, None, torch.rand(1, 3, 4))
    provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
    operator = EKFACLinearOperator.from_blocks([block], {"w": (3, 4)}, provenance)
    with pytest.raises(TypeError, match=r"the flat tensor got dtype torch.int64; expected a float"):
        operator @ torch.arange(12)
    for call in (operator.__matmul__, operator.quadratic_form):
        with pytest.raises(TypeError, match=r"'w' got dtype torch.int64; expected a floating"):
            call([torch.arange(12).view(3, 4)])
