"""Every block of the operator against dense matrices from first principles."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.cases import BASIC, BY_NAME, PLAIN_LOSSES, UNSHARED
from tests.helpers.exactness import (
    KFAC_TYPES,
    PAIRS,
    TOLERANCE,
    Setting,
    assert_exact_diagonal,
    estimated,
    exact,
    exact_matrix_of,
    ignore_even_kernels,
    off_diagonal,
    over_all_settings,
)
from tests.helpers.oracles import (
    Approximation,
    assert_close,
    block_bases,
    dense_block,
    kfac_matrix,
    kronecker_factors,
    partial_traces,
)

pytestmark = ignore_even_kernels

TWO_BASES = ("layer", "derived")  # where a derived parameter is no vector


# --------------------------------------------------------------------------- every block


@over_all_settings
def test_eigenvalues_are_the_diagonal_in_the_own_basis(setting: Setting) -> None:
    """``eigenvalues == diag(Q^T B Q)`` with B the exact block; hence the trace."""
    assert_exact_diagonal(estimated(setting), exact_matrix_of(setting), setting.shapes())


@over_all_settings
def test_blocks_are_those_of_the_layers(setting: Setting) -> None:
    """Which parameters share one, in which bases, and how near it is to the exact one."""
    check_oracles(setting)
    check_parameters(setting)
    check_orthogonality(setting)
    check_eigenvectors(setting)
    check_distance(setting)
    check_biases_and_vectors(setting)


def check_oracles(setting: Setting) -> None:
    """Per-example gradients from layer terms square to the dense matrix's block."""
    matrices, checked = exact(setting), 0
    for layout in setting.layouts().values():
        terms = setting.terms(layout) if layout.kind in ("layer", "lookup") else None
        if terms is not None:
            gradients = terms.weight_gradients().flatten(start_dim=3)
            expected = torch.einsum("nvgi,nvgj->gij", gradients, gradients)
            assert_close(matrices[layout.parameters], expected, 1e-12)
            checked += 1
    assert checked > 0 or setting.case not in BASIC


def check_parameters(setting: Setting) -> None:
    """The right parameters share a block, in the right shape, groups and number of bases."""
    shapes = setting.shapes()
    blocks = {block.parameters: block for block in estimated(setting).blocks}
    assert len(blocks) == len(estimated(setting).blocks)
    assert {*blocks} == {*setting.layouts()}
    for layout in setting.layouts().values():
        block = blocks[layout.parameters]
        matrix = torch.empty(shapes[layout.parameters[0]])
        matrix = matrix.reshape(
            layout.groups, len(matrix) // layout.groups if matrix.ndim else 1, -1
        )
        matrix = matrix.mT if layout.transposed else matrix
        columns = matrix.shape[2] + len(layout.parameters) - 1
        assert tuple(block.eigenvalues.shape) == (*matrix.shape[:2], columns)
        assert block.transposed == layout.transposed
        assert (block.gradient_basis is None) == (layout.kind == "diagonal")
        vector = len(shapes[layout.parameters[0]]) < 2 and layout.kind == "derived"
        assert (block.activation_basis is None) == (vector or layout.kind not in TWO_BASES)


def check_orthogonality(setting: Setting) -> None:
    """Both bases of every group."""
    for block in estimated(setting).blocks:
        for basis in block_bases(block):
            assert basis.dtype == torch.float64
            eye = torch.eye(basis.shape[-1], dtype=torch.float64).expand_as(basis)
            assert_close(basis.mT @ basis, eye)
            assert_close(basis @ basis.mT, eye)


def check_eigenvectors(setting: Setting) -> None:
    """Eigenvectors of KFAC's factors or of exact partial traces, or none at all."""
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        layout = setting.layouts()[block.parameters]
        factors = partial_traces(matrices[block.parameters], block.eigenvalues.shape[1])
        if layout.kind in ("layer", "lookup"):
            terms = setting.terms(block)
            if terms is None:
                continue
            inputs, outputs = kronecker_factors(terms, setting.approx)
            factors = (outputs, inputs)
        for factor, basis in zip(
            factors, (block.gradient_basis, block.activation_basis), strict=True
        ):
            if basis is not None:
                assert off_diagonal(factor, basis).abs().max() <= TOLERANCE * factor.abs().max()


def check_distance(setting: Setting) -> None:
    """Frobenius distance to the exact block, group by group."""
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        # The average of one-hot vectors is no longer diagonal, but the basis of a table stays.
        kinds = ("layer", "lookup") if setting.approx == "expand" else ("layer",)
        terms = setting.terms(block) if setting.layouts()[block.parameters].kind in kinds else None
        if terms is None:
            continue
        matrix = matrices[block.parameters]
        ours = torch.linalg.matrix_norm(dense_block(block) - matrix)
        theirs = torch.linalg.matrix_norm(kfac_matrix(terms, setting.approx) - matrix)
        assert (ours <= theirs + 1e-12).all()


@pytest.mark.parametrize("approx", KFAC_TYPES)
@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("pooled-tokens", "0.weight"),
        ("conv-transpose1d-output-padding", "0.weight"),
        ("attention-batch-first", "1.attention.in_proj_weight"),
    ],
)
def test_strictly_closer_than_kfac_where_kfac_is_wrong(
    name: str, weight: str, approx: Approximation
) -> None:
    """Both distances are real on a nonlinear model, so that comparing them means something."""
    setting = Setting(BY_NAME[name], approx=approx)
    block = next(b for b in estimated(setting).blocks if b.parameters == (weight,))
    matrix = exact(setting)[weight,]
    terms = setting.terms(block)
    assert terms is not None
    ours = (dense_block(block) - matrix).norm()
    theirs = (kfac_matrix(terms, approx) - matrix).norm()
    assert 0.01 * matrix.norm() < ours < 0.99 * theirs


# --------------------------------------------------------------------------- exact blocks


def check_biases_and_vectors(setting: Setting) -> None:
    """A separate bias, and a derived vector, have the eigenbasis of their exact covariance."""
    matrices, shapes = exact(setting), setting.shapes()
    for block in estimated(setting).blocks:
        kind, vector = (
            setting.layouts()[block.parameters].kind,
            len(shapes[block.parameters[0]]) < 2,
        )
        if kind == "bias" or (kind == "derived" and vector):
            assert_close(dense_block(block), matrices[block.parameters])


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("name", "approx"),
    [
        ("single-linear", "expand"),
        ("deep-linear", "expand"),
        ("deep-linear", "reduce"),
        ("sequence-linear", "expand"),
        ("pooled-linear", "reduce"),
        ("addmm-linear", "expand"),
        ("embedding-linear", "expand"),
        ("conv-transpose1d-linear", "expand"),
    ],
)
def test_linear_networks_with_squared_error_are_exact(
    name: str, approx: Approximation, reduction: str, joint: bool
) -> None:
    """EXPAND where every position has its own loss, REDUCE where positions are averaged."""
    setting = Setting(BY_NAME[name], "mse", reduction, "type2", approx, joint)
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        assert_close(dense_block(block), matrices[block.parameters])


@pytest.mark.parametrize(("name", "approx"), [("sequence-linear", "reduce")])
def test_the_wrong_approximation_is_not_exact(name: str, approx: Approximation) -> None:
    """The choice between EXPAND and REDUCE takes effect."""
    setting = Setting(BY_NAME[name], "mse", approx=approx)
    for block in estimated(setting).blocks:
        if block.parameters[0].endswith("weight"):
            matrix = exact(setting)[block.parameters]
            assert (dense_block(block) - matrix).norm() > 0.01 * matrix.norm()


ONE_EXAMPLE = [  # every loss, with the four pairs of Fisher type and jointness in turn
    Setting(replace(case, batch_sizes=(1,)), loss, "mean", fisher, "expand", joint)
    for number, case in enumerate(UNSHARED)
    for loss, (fisher, _, joint) in zip(PLAIN_LOSSES, (PAIRS * 2)[number % 4 :], strict=False)
]


@pytest.mark.parametrize("setting", ONE_EXAMPLE, ids=str)
def test_one_unshared_example_is_exact(setting: Setting) -> None:
    """One example, one position: the Fisher block of a layer is a Kronecker product."""
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        if setting.layouts()[block.parameters].kind in ("layer", "bias", "lookup"):
            assert_close(dense_block(block), matrices[block.parameters])
