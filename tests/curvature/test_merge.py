"""Merging: what it preserves exactly, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotate_ewc import EKFACLinearOperator, merge
from rotate_ewc.curvature.matching import matching_blocks
from rotate_ewc.linalg.block import Block
from rotate_ewc.provenance import Provenance
from tests.helpers.oracles import dense_block, dense_operator

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def random_block(
    seed: int, groups: int = 1, d_out: int = 3, d_in: int = 4, bases: str = "both"
) -> Block:
    """A block with random orthogonal bases and random eigenvalues, some of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> Tensor:
        normal = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(normal)[0]

    eigenvalues = torch.rand(groups, d_out, d_in, generator=generator, dtype=torch.float64)
    eigenvalues = (eigenvalues - 0.2).clamp(min=0)
    return Block(
        ("w",),
        basis(d_out) if bases in ("both", "gradient") else None,
        basis(d_in) if bases in ("both", "activation") else None,
        eigenvalues,
    )


def operator_of(*blocks: Block, num_data: int = 10) -> EKFACLinearOperator:
    shapes = {
        block.parameters[0]: (
            block.eigenvalues.shape[0] * block.eigenvalues.shape[1],
            block.eigenvalues.shape[2],
        )
        for block in blocks
    }
    return EKFACLinearOperator.from_blocks(
        blocks, shapes, Provenance("MSELoss", "mean", "type2", num_data, 2.0 * num_data)
    )


def partial_traces(dense: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """Of dense matrices `[groups, d_out * d_in, d_out * d_in]`, by plain index sums."""
    split = dense.reshape(-1, d_out, d_in, d_out, d_in)
    return torch.einsum("gaibi->gab", split), torch.einsum("gaiaj->gij", split)


def dense_sum(blocks: Sequence[Block], weights: Sequence[float]) -> Tensor:
    return sum(w * dense_block(b) for b, w in zip(blocks, weights, strict=True))


settings.register_profile("seeded", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("seeded")
CASES = st.tuples(
    st.lists(st.integers(0, 10_000), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from(["both", "gradient", "activation", "none"]),
)


@given(CASES, st.integers(0, 100))
def test_trace_and_partial_traces_are_preserved(
    case: tuple[list[int], int, int, int, str], weight_seed: int
) -> None:
    seeds, groups, d_out, d_in, bases = case
    blocks = [random_block(s, groups, d_out, d_in, bases) for s in seeds]
    generator = torch.Generator().manual_seed(weight_seed)
    weights = (3 * torch.rand(len(blocks), generator=generator, dtype=torch.float64)).tolist()
    merged = merge([operator_of(b) for b in blocks], weights)
    exact = dense_sum(blocks, weights)
    result = dense_block(merged.blocks[0])
    torch.testing.assert_close(merged.trace, exact.diagonal(dim1=1, dim2=2).sum(), **TOLERANCE)
    for got, expected in zip(
        partial_traces(result, d_out, d_in), partial_traces(exact, d_out, d_in), strict=True
    ):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert bool((merged.blocks[0].eigenvalues >= 0).all())


@given(CASES)
def test_eigenvalues_are_the_exact_diagonal_in_the_new_basis(
    case: tuple[list[int], int, int, int, str],
) -> None:
    seeds, groups, d_out, d_in, bases = case
    blocks = [random_block(s, groups, d_out, d_in, bases) for s in seeds]
    merged = merge([operator_of(b) for b in blocks]).blocks[0]
    exact = dense_sum(blocks, [1.0] * len(blocks))
    for group in range(groups):
        left = torch.eye(d_out, dtype=torch.float64)
        right = torch.eye(d_in, dtype=torch.float64)
        if merged.gradient_basis is not None:
            left = merged.gradient_basis[group]
        if merged.activation_basis is not None:
            right = merged.activation_basis[group]
        basis = torch.kron(left.contiguous(), right.contiguous())
        torch.testing.assert_close(
            merged.eigenvalues[group].flatten(),
            (basis.T @ exact[group] @ basis).diagonal(),
            **TOLERANCE,
        )


@given(st.permutations([1, 2, 3, 4]))
def test_order_does_not_matter_when_merged_at_once(order: list[int]) -> None:
    one = merge([operator_of(random_block(seed)) for seed in (1, 2, 3, 4)])
    other = merge([operator_of(random_block(seed)) for seed in order])
    torch.testing.assert_close(
        dense_block(one.blocks[0]), dense_block(other.blocks[0]), **TOLERANCE
    )


def test_traces_survive_many_merges_one_by_one() -> None:
    blocks = [random_block(seed, groups=2) for seed in range(50)]
    merged = operator_of(blocks[0])
    for block in blocks[1:]:
        merged = merge([merged, operator_of(block)])
    exact = dense_sum(blocks, [1.0] * 50)
    result = dense_block(merged.blocks[0])
    for got, expected in zip(
        partial_traces(result, 3, 4), partial_traces(exact, 3, 4), strict=True
    ):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    assert merged.num_data == 500


def test_merging_with_itself_doubles() -> None:
    operator = operator_of(random_block(7, groups=2))
    doubled = merge([operator, operator])
    torch.testing.assert_close(
        dense_block(doubled.blocks[0]), 2 * dense_block(operator.blocks[0]), **TOLERANCE
    )


def test_identity_bases_merge_exactly() -> None:
    blocks = [random_block(seed, bases="none") for seed in (1, 2)]
    merged = merge([operator_of(b) for b in blocks], [2.0, 0.5]).blocks[0]
    assert merged.gradient_basis is None
    assert merged.activation_basis is None
    torch.testing.assert_close(
        merged.eigenvalues, 2 * blocks[0].eigenvalues + 0.5 * blocks[1].eigenvalues, **TOLERANCE
    )


@pytest.mark.parametrize("bases", ["both", "gradient", "activation", "none"])
def test_growing_parameter_protects_its_leading_slice(bases: str) -> None:
    small, large = random_block(1, 1, 2, 3, bases), random_block(2, 1, 4, 5, bases)
    merged = merge([operator_of(small), operator_of(large)])
    assert merged.parameter_shapes["w"] == (4, 5)
    padded = torch.zeros(4, 5, 4, 5, dtype=torch.float64)
    padded[:2, :3, :2, :3] = dense_block(small)[0].reshape(2, 3, 2, 3)
    exact = padded.reshape(20, 20) + dense_block(large)[0]
    result = dense_block(merged.blocks[0])
    for got, expected in zip(
        partial_traces(result, 4, 5), partial_traces(exact[None], 4, 5), strict=True
    ):
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_parameters_of_one_operator_only_are_kept() -> None:
    first, second = random_block(1), random_block(2)
    other = Block(("v",), second.gradient_basis, second.activation_basis, second.eigenvalues)
    merged = merge([operator_of(first), operator_of(other)], [1.0, 2.0])
    assert list(merged.parameter_shapes) == ["w", "v"]
    expected = torch.block_diag(dense_block(first)[0], 2 * dense_block(other)[0])
    torch.testing.assert_close(
        dense_operator(merged.blocks, merged.parameter_shapes), expected, **TOLERANCE
    )


def test_operators_are_not_changed() -> None:
    block = random_block(3)
    before = {name: tensor.clone() for name, tensor in block.tensors.items()}
    merge([operator_of(block), operator_of(random_block(4))], [2.0, 3.0])
    for name, tensor in block.tensors.items():
        assert torch.equal(tensor, before[name])


def test_bad_input_is_refused() -> None:
    operator = operator_of(random_block(1))
    with pytest.raises(ValueError, match=r"^operators is empty; expected at least one$"):
        merge([])
    with pytest.raises(TypeError, match="operators has int"):
        merge([operator, 3])
    with pytest.raises(ValueError, match="got 1 weights; expected 2"):
        merge([operator, operator], [1.0])
    with pytest.raises(ValueError, match=r"weights\[1\] is -1.0"):
        merge([operator, operator], [1.0, -1.0])
    with pytest.raises(ValueError, match=r"'w' has blocks that do not fit together.*groups"):
        merge([operator, operator_of(random_block(1, groups=2))])
    joint = EKFACLinearOperator.from_blocks(
        [Block(("w", "b"), None, None, torch.ones(1, 3, 5, dtype=torch.float64))],
        {"w": (3, 4), "b": (3,)},
        operator.provenance,
    )
    with pytest.raises(ValueError, match="'w' has a block of its own in one operator"):
        merge([operator, joint])
    conv = EKFACLinearOperator.from_blocks(
        [Block(("w",), None, None, torch.ones(1, 3, 8))], {"w": (3, 2, 4)}, operator.provenance
    )
    with pytest.raises(ValueError, match=r"'w' has shapes \[3, 4\] and \[3, 2, 4\]"):
        merge([operator, conv])


def test_says_where_it_comes_from() -> None:
    """Everything but the number of examples is that of the last operator."""
    blocks = [random_block(seed) for seed in (1, 2, 3)]
    provenances = [
        Provenance("MSELoss", "mean", "type2", 3, 6.0),
        Provenance("CrossEntropyLoss", "mean", "mc", 5, 2.5),
        Provenance("BCEWithLogitsLoss", "mean", "empirical", 9, 18.0),
    ]
    operators = [
        EKFACLinearOperator.from_blocks([block], {"w": (3, 4)}, provenance)
        for block, provenance in zip(blocks, provenances, strict=True)
    ]
    merged = merge(iter(operators), iter([1.0, 2.0, 3.0]))
    assert merged.provenance == Provenance("BCEWithLogitsLoss", "mean", "empirical", 17, 26.5)
    assert merged.num_data == 17


def test_one_operator_keeps_its_bases() -> None:
    """Nothing is to be projected, so that nothing is rounded either."""
    block = random_block(3, groups=2)
    merged = merge([operator_of(block)], [2.5]).blocks[0]
    assert torch.equal(merged.gradient_basis, block.gradient_basis)
    assert torch.equal(merged.activation_basis, block.activation_basis)
    assert torch.equal(merged.eigenvalues, 2.5 * block.eigenvalues)


def grown(small: Block, large: Block) -> Tensor:
    """The sum of two blocks of one group, the first of which is the leading slice."""
    _, d_out, d_in = large.eigenvalues.shape
    _, rows, columns = small.eigenvalues.shape
    padded = torch.zeros(d_out, d_in, d_out, d_in, dtype=torch.float64)
    padded[:rows, :columns, :rows, :columns] = dense_block(small)[0].reshape(
        rows, columns, rows, columns
    )
    return padded.reshape(d_out * d_in, -1) + dense_block(large)[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("size", [(2, 3), (2, 5), (4, 3)])
@pytest.mark.parametrize("large_bases", ["both", "gradient", "activation", "none"])
@pytest.mark.parametrize("small_bases", ["both", "gradient", "activation", "none"])
def test_growth_with_bases_of_every_kind(
    small_bases: str, large_bases: str, size: tuple[int, int], order: tuple[int, int]
) -> None:
    """Whichever side grows, and where one operator has the identity for a basis."""
    small, large = random_block(1, 1, *size, small_bases), random_block(2, 1, 4, 5, large_bases)
    operators = [operator_of(small), operator_of(large)]
    with torch.device("meta"):  # where nothing of the operators is
        merged = merge([operators[index] for index in order])
    assert merged.parameter_shapes["w"] == (4, 5)
    (block,) = merged.blocks
    assert (block.gradient_basis is None) == ({small_bases, large_bases} <= {"activation", "none"})
    assert (block.activation_basis is None) == ({small_bases, large_bases} <= {"gradient", "none"})
    exact = grown(small, large)
    for got, expected in zip(
        partial_traces(dense_block(block), 4, 5), partial_traces(exact[None], 4, 5), strict=True
    ):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    bases = [
        torch.eye(n, dtype=torch.float64) if basis is None else basis[0].contiguous()
        for basis, n in ((block.gradient_basis, 4), (block.activation_basis, 5))
    ]
    rotated = torch.kron(*bases).T @ exact @ torch.kron(*bases)
    torch.testing.assert_close(block.eigenvalues.flatten(), rotated.diagonal(), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bases", ["both", "gradient", "none"])
def test_dtype_is_kept(bases: str, dtype: torch.dtype) -> None:
    operators = [
        operator_of(random_block(seed, 1, *size, kind).map(lambda t: t.to(dtype)))
        for seed, size, kind in ((1, (2, 3), bases), (2, (4, 5), "both"))
    ]
    merged = merge(operators)
    assert {tensor.dtype for tensor in merged.blocks[0].tensors.values()} == {dtype}
    assert merged.dtype == dtype


def shaped(shape: tuple[int, ...], *, groups: int = 1, transposed: bool = False) -> Any:
    """An operator on one parameter of some shape, with identity bases and all eigenvalues one."""
    first, rest = shape[0] // groups, torch.Size(shape[1:]).numel()
    size = (rest, first) if transposed else (first, rest)
    values = torch.ones(groups, *size, dtype=torch.float64)
    block = Block(("w",), None, None, values, transposed)
    return EKFACLinearOperator.from_blocks(
        [block], {"w": shape}, Provenance("MSELoss", "mean", "type2", 10, 20.0)
    )


def test_transposed_parameters_grow_as_they_are_stored() -> None:
    """More words in an embedding: the identity stays, and the words of both count twice."""
    merged = merge([shaped((3, 2), transposed=True), shaped((5, 2), transposed=True)], [1.0, 10.0])
    assert merged.parameter_shapes["w"] == (5, 2)
    (block,) = merged.blocks
    assert block.transposed
    assert block.gradient_basis is None
    assert block.activation_basis is None
    expected = torch.tensor([11.0, 11.0, 11.0, 10.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(block.eigenvalues[0], expected.expand(2, 5))


def test_more_channels_of_a_convolution() -> None:
    merged = merge([shaped((2, 2, 3)), shaped((3, 4, 3))])
    assert merged.parameter_shapes["w"] == (3, 4, 3)
    expected = torch.ones(3, 12, dtype=torch.float64)
    expected[:2, :6] += 1
    torch.testing.assert_close(merged.blocks[0].eigenvalues[0], expected)


def test_largest_along_every_axis() -> None:
    """Not one of them has the merged shape."""
    merged = merge([shaped((2, 5)), shaped((4, 3)), shaped((3, 3))])
    assert merged.parameter_shapes["w"] == (4, 5)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for rows, columns in ((2, 5), (4, 3), (3, 3)):
        expected[:rows, :columns] += 1
    torch.testing.assert_close(merged.blocks[0].eigenvalues[0], expected)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            lambda: shaped((4, 3), groups=2),
            lambda: shaped((6, 3), groups=2),
            r"'w' has shapes \[4, 3\] and \[6, 3\], which do not fit together; expected shapes "
            r"that differ only by added outputs or inputs, of a layer without groups",
        ),
        (
            lambda: shaped((4, 3, 2)),
            lambda: shaped((4, 3, 5)),
            r"'w' has shapes \[4, 3, 2\] and \[4, 3, 5\], which do not fit together",
        ),
        (
            lambda: shaped((4, 6)),
            lambda: shaped((4, 3, 2)),
            r"'w' has shapes \[4, 6\] and \[4, 3, 2\], which do not fit together",
        ),
        (
            lambda: shaped((4, 3)),
            lambda: shaped((4, 3), transposed=True),
            r"'w' has blocks that do not fit together: \(groups, transposed\) is \(1, False\) in "
            r"one operator and \(1, True\) in another",
        ),
        (
            lambda: shaped((4, 3), groups=2),
            lambda: shaped((4, 3)),
            r"\(groups, transposed\) is \(2, False\) in one operator and \(1, False\) in another",
        ),
    ],
)
def test_what_does_not_fit_together(
    one: Callable[[], Any], other: Callable[[], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge([one(), other()])


def test_all_parameters_that_do_not_fit_together_are_named() -> None:
    def both(columns: int) -> EKFACLinearOperator:
        values = torch.ones(1, 3, 4 * columns)
        return EKFACLinearOperator.from_blocks(
            [Block((name,), None, None, values) for name in ("w", "v")],
            dict.fromkeys(("w", "v"), (3, 4, columns)),
            Provenance("MSELoss", "mean", "type2", 10, 20.0),
        )

    with pytest.raises(ValueError, match="do not fit together") as raised:
        merge([both(2), both(5)])
    assert str(raised.value).startswith(
        "parameter 'w' has shapes [3, 4, 2] and [3, 4, 5], parameter 'v' has shapes [3, 4, 2] and "
        "[3, 4, 5], which do not fit together"
    )


@pytest.mark.parametrize("joint_first", [False, True])
@pytest.mark.parametrize("name", ["w", "b"])
def test_joint_and_separate_blocks_do_not_mix(name: str, joint_first: bool) -> None:
    provenance = Provenance("MSELoss", "mean", "type2", 10, 20.0)
    joint = EKFACLinearOperator.from_blocks(
        [Block(("w", "b"), None, None, torch.ones(1, 3, 5))], {"w": (3, 4), "b": (3,)}, provenance
    )
    shape = {"w": (3, 4), "b": (3,)}[name]
    values = torch.ones(1, 3, 4 if name == "w" else 1)
    alone = EKFACLinearOperator.from_blocks(
        [Block((name,), None, None, values)], {name: shape}, provenance
    )
    operators = [joint, alone] if joint_first else [alone, joint]
    with pytest.raises(
        ValueError,
        match=rf"'{name}' has a block of its own in one operator and a joint block in another; "
        r"estimate both with the same separate_weight_and_bias",
    ):
        merge(operators)


PROVENANCE = Provenance("MSELoss", "mean", "type2", 10, 20.0)
NAMES = {"plain": ("w",), "joint": ("w", "b"), "bias": ("b",)}


def of_weight_and_bias(
    kinds: Sequence[str], seed: int | None, rows: int = 4, groups: int = 1, transposed: bool = False
) -> EKFACLinearOperator:
    """Blocks of a weight `[rows, 6]` and its bias; of zeros where there is no seed."""
    blocks = []
    for kind in kinds:
        names = NAMES[kind]
        columns = {"plain": 6, "joint": 7, "bias": 1}[kind]
        shape = (1, 6, rows) if transposed else (groups, rows // groups, columns)
        if seed is None:
            values = torch.zeros(shape, dtype=torch.float64)
            blocks.append(Block(names, None, None, values, transposed))
        else:
            block = random_block(seed, *shape)
            blocks.append(replace(block, parameters=names, transposed=transposed))
    present = {name for block in blocks for name in block.parameters}
    shapes = {n: s for n, s in {"w": (rows, 6), "b": (rows,)}.items() if n in present}
    return EKFACLinearOperator.from_blocks(blocks, shapes, PROVENANCE)


@pytest.mark.parametrize("zeros_first", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(
    ("telling", "silent"),
    [
        ({"kinds": ["joint"]}, {"kinds": ["plain", "bias"]}),
        ({"kinds": ["plain", "bias"]}, {"kinds": ["joint"]}),
        ({"kinds": ["joint"]}, {"kinds": ["plain"]}),
        ({"kinds": ["joint"]}, {"kinds": ["bias"]}),
        ({"kinds": ["plain"], "groups": 2}, {"kinds": ["plain"]}),
        ({"kinds": ["plain"], "transposed": True}, {"kinds": ["plain"]}),
        ({"kinds": ["plain"]}, {"kinds": ["plain"], "transposed": True}),
        ({"kinds": ["plain"]}, {"kinds": ["plain"], "groups": 2}),
    ],
)
def test_zeros_fit_every_form(
    telling: dict[str, Any], silent: dict[str, Any], weight: float, zeros_first: bool
) -> None:
    """Whether a block is zero by itself, or by the weight of its task."""
    one = of_weight_and_bias(seed=1, **telling)
    none = of_weight_and_bias(seed=None if weight else 2, **silent)
    pairs = [(one, 2.0), (none, weight)]
    merged = merge(*zip(*(pairs[::-1] if zeros_first else pairs), strict=True))
    assert merged.parameter_shapes == one.parameter_shapes
    assert [block.parameters for block in merged.blocks] == [b.parameters for b in one.blocks]
    for found, block in zip(merged.blocks, one.blocks, strict=True):
        assert found.transposed == block.transposed
        torch.testing.assert_close(dense_block(found), 2 * dense_block(block), **TOLERANCE)


def test_rest_of_a_joint_block_of_zeros() -> None:
    """No parameter is lost: the bias, of which nothing else is known, has a block of zeros."""
    weight, zeros = of_weight_and_bias(["plain"], 1), of_weight_and_bias(["joint"], None, rows=5)
    for operators in ([weight, zeros], [zeros, weight]):
        merged = merge(operators)
        assert merged.parameter_shapes == {"w": (5, 6), "b": (5,)}
        assert sorted(block.parameters for block in merged.blocks) == [("b",), ("w",)]
        bias, found = merged.block("b"), merged.block("w")
        assert torch.equal(bias.eigenvalues, torch.zeros(1, 5, 1, dtype=torch.float64))
        expected = torch.zeros(5, 6, 5, 6, dtype=torch.float64)
        expected[:4, :, :4] = dense_block(weight.block("w")).reshape(4, 6, 4, 6)
        torch.testing.assert_close(dense_block(found)[0], expected.reshape(30, 30), **TOLERANCE)


def test_zeros_in_different_forms_are_zero() -> None:
    forms = (["joint"], ["plain", "bias"], ["plain"], ["bias"])
    for one in forms:
        for other in forms:
            merged = merge([of_weight_and_bias(one, None), of_weight_and_bias(other, None)])
            names = {name for kind in (*one, *other) for name in NAMES[kind]}
            assert set(merged.parameter_shapes) == names
            assert float(merged.trace) == 0


def test_every_operator_has_a_weight() -> None:
    """None is left out because there are fewer weights."""
    operators = [of_weight_and_bias(["plain"], seed) for seed in range(2)]
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="zip"):
            matching_blocks(operators, weights, set())


def test_only_zeros_fit_every_form() -> None:
    joint, separate = of_weight_and_bias(["joint"], 1), of_weight_and_bias(["plain", "bias"], 2)
    zeros = of_weight_and_bias(["plain", "bias"], None)
    with pytest.raises(ValueError, match="'w', 'b' have a block of its own in one operator"):
        merge([zeros, joint, separate])


@pytest.mark.parametrize(("size", "side"), [(3, "gradient"), (4, "activation")])
def test_factor_that_cannot_be_decomposed_is_named(
    size: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.linalg.eigh

    def eigh(matrix: Tensor, **options: Any) -> Any:
        if matrix.shape[-1] == size:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(ValueError, match=rf"{size} × {size} merged {side} factor of 'w' did not"):
        merge([operator_of(random_block(1)), operator_of(random_block(2))])


def test_matrix_that_memory_does_not_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do about it, for all parameters of the block."""

    def eigh(*_: Any, **__: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    operators = [of_weight_and_bias(["joint"], seed) for seed in (1, 2)]
    with pytest.raises(MemoryError, match="out of memory in the decomposition") as raised:
        merge(operators)
    assert str(raised.value).endswith("; leave them out (params, or exclude=['w', 'b'])")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_with_one_eigenvalue_keep_it_to_the_bit(dtype: torch.dtype) -> None:
    """Such as words that no example had, whatever the others have, and however outputs turn."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for seed in (1, 2):
        block = random_block(seed, 1, 5, 60, "gradient").map(lambda t: t.to(dtype))
        values = block.eigenvalues.clone()
        values[:, :, ::2] = torch.rand(30, generator=generator).to(dtype)
        blocks.append(block.with_eigenvalues(values))
    (merged,) = merge([operator_of(block) for block in blocks]).blocks
    expected = blocks[0].eigenvalues + blocks[1].eigenvalues
    assert torch.equal(merged.eigenvalues[:, :, ::2], expected[:, :, ::2])
    # All others lie between the sums of their smallest and of their largest.
    least = sum(block.eigenvalues.amin(dim=1) for block in blocks)
    most = sum(block.eigenvalues.amax(dim=1) for block in blocks)
    assert bool((merged.eigenvalues >= least).all())
    assert bool((merged.eigenvalues <= most).all())
    assert bool((merged.eigenvalues[:, 0] != merged.eigenvalues[:, 1]).any())


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, None, None),
    ],
)
def test_bases_are_stored_as_the_most_precise_operator_has_them(
    one: torch.dtype, other: torch.dtype | None, expected: torch.dtype | None
) -> None:
    operators = [
        operator_of(random_block(seed)).to(storage_dtype=dtype)
        for seed, dtype in ((1, one), (2, other))
    ]
    assert merge(operators).blocks[0].storage_dtype == expected
    assert merge(operators[:1]).blocks[0].storage_dtype == one
