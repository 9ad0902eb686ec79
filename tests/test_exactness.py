"""The operator against dense matrices from first principles.

Whatever is compared is an invariant (a trace, a dense matrix, eigenvalues in the operator's own
basis), never eigenvectors, whose signs and degenerate subspaces are arbitrary.
"""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rotate_ewc import EKFACLinearOperator, FisherType, KFACType
from tests.cases import BY_NAME, CASES, LOSSES, UNSHARED, Case
from tests.oracles import (
    Approximation,
    BlockLayout,
    Fisher,
    block_bases,
    block_matrix,
    dense_block,
    dense_fisher,
    dense_operator,
    exact_blocks,
    expected_layouts,
    kfac_matrix,
    kronecker_basis,
    kronecker_factors,
    layer_terms,
    parameter_shapes,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

TOLERANCE = 1e-10
FISHER_TYPES = {
    "type2": FisherType.TYPE2,
    "mc": FisherType.MC,
    "empirical": FisherType.EMPIRICAL,
}
EXACT_FISHERS: tuple[Fisher, ...] = ("type2", "empirical")
KFAC_TYPES: dict[Approximation, KFACType] = {"expand": KFACType.EXPAND, "reduce": KFACType.REDUCE}


@dataclass(frozen=True)
class Setting:
    """One way of estimating one case."""

    case: Case
    loss: str = "ce"
    reduction: str = "mean"
    fisher: Fisher = "type2"
    approx: Approximation = "expand"
    joint: bool = False

    def __str__(self) -> str:
        """Return a readable test identifier."""
        kind = "joint" if self.joint else "separate"
        parts = (self.case.name, self.loss, self.reduction, self.fisher, self.approx, kind)
        return "-".join(parts)

    def loss_func(self) -> Any:
        """Return the loss."""
        return LOSSES[self.loss](reduction=self.reduction)

    def estimate(self, **options: Any) -> EKFACLinearOperator:
        """Run the library; options override the setting's own."""
        model = options.pop("model", None) or self.case.model()
        parameters = dict(model.named_parameters())
        arguments = {
            "params": [parameters[name] for name in self.case.names(model)],
            "data": self.case.data(self.loss),
            "fisher_type": FISHER_TYPES[self.fisher],
            "kfac_approx": KFAC_TYPES[self.approx],
            "separate_weight_and_bias": not self.joint,
            "check_deterministic": False,
            **options,
        }
        params, data = arguments.pop("params"), arguments.pop("data")
        return EKFACLinearOperator(model, self.loss_func(), params, data, **arguments)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the estimated parameters, in order."""
        model = self.case.model()
        return parameter_shapes(model, self.case.names(model))

    def has_bias(self) -> bool:
        """Return whether a bias is estimated."""
        return any(name.endswith("bias") for name in self.shapes())

    def layouts(self) -> list[BlockLayout]:
        """Return the blocks that must come out."""
        model = self.case.model()
        return expected_layouts(model, self.case.names(model), self.joint)

    def dense(self, operator: EKFACLinearOperator) -> Tensor:
        """Write out an operator."""
        return dense_operator(operator.blocks, self.shapes())


@cache
def estimated(setting: Setting) -> EKFACLinearOperator:
    """Estimate once; operators do not change."""
    return setting.estimate()


@cache
def exact_matrix(case: Case, loss: str, reduction: str, fisher: Fisher) -> Tensor:
    """Assemble the dense oracle once."""
    model = case.model()
    loss_func = LOSSES[loss](reduction=reduction)
    x, y = case.inputs(), case.targets(loss)
    return dense_fisher(model, loss_func, case.names(model), x, y, fisher)


def exact(setting: Setting) -> dict[tuple[str, ...], Tensor]:
    """Return the exact block of every block that must come out."""
    dense = exact_matrix(setting.case, setting.loss, setting.reduction, setting.fisher)
    return exact_blocks(dense, setting.shapes(), setting.layouts())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Compare relative to the largest entry that is expected."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def in_own_basis(block: Any, matrix: Tensor) -> Tensor:
    """Return ``diag(Q^T B Q)`` in the shape of a block's eigenvalues."""
    basis = kronecker_basis(block)
    rotated = basis.mT @ matrix @ basis
    return rotated.diagonal(dim1=1, dim2=2).reshape(block.eigenvalues.shape)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers that do not depend on the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def settings() -> list[Setting]:
    """Cross the cases with what can be chosen.

    Every case meets every loss and both exact Fisher types. The rest is crossed where it can
    matter: REDUCE where positions are shared, and ``sum``, which only changes the scale, on three
    kinds of network.
    """
    found = []
    for case in CASES:
        for loss in LOSSES:
            for fisher in EXACT_FISHERS:
                base = Setting(case, loss, fisher=fisher)
                found += [base, replace(base, joint=True)]
                if case.name in SUMMED:
                    found.append(replace(base, reduction="sum"))
                if case.shared:
                    joint = fisher == "type2"
                    found.append(replace(base, approx="reduce", joint=joint))
    return found


SUMMED = ("tanh-mlp", "sequence-outputs", "conv2d-stride-groups")
ALL_SETTINGS = settings()
over_all_settings = pytest.mark.parametrize("setting", ALL_SETTINGS, ids=str)


# --------------------------------------------------------------------------- every block


@over_all_settings
def test_blocks_cover_the_parameters(setting: Setting) -> None:
    """The right parameters share a block, in the right shape and number of groups."""
    shapes = setting.shapes()
    blocks = {block.parameters: block for block in estimated(setting).blocks}
    assert len(blocks) == len(estimated(setting).blocks)
    assert set(blocks) == {layout.parameters for layout in setting.layouts()}
    for layout in setting.layouts():
        entries = sum(torch.Size(shapes[name]).numel() for name in layout.parameters)
        d_out = shapes[layout.parameters[0]][0] // layout.groups
        expected = (layout.groups, d_out, entries // (layout.groups * d_out))
        assert tuple(blocks[layout.parameters].eigenvalues.shape) == expected
        if layout.parameters[0].endswith("bias"):
            assert blocks[layout.parameters].activation_basis is None


@over_all_settings
def test_bases_are_orthogonal(setting: Setting) -> None:
    """Both bases of every group."""
    for block in estimated(setting).blocks:
        for basis in block_bases(block):
            assert basis.dtype == torch.float64
            eye = torch.eye(basis.shape[-1], dtype=torch.float64).expand_as(basis)
            assert_close(basis.mT @ basis, eye)
            assert_close(basis @ basis.mT, eye)


@over_all_settings
def test_eigenvalues_are_the_diagonal_in_the_own_basis(setting: Setting) -> None:
    """``eigenvalues == diag(Q^T B Q)`` with B the exact block."""
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        matrix = matrices[block.parameters]
        error = (block.eigenvalues - in_own_basis(block, matrix)).abs().max()
        assert matrix.abs().max() > 0
        assert error <= TOLERANCE * matrix.abs().max()


@over_all_settings
def test_trace_is_exact(setting: Setting) -> None:
    """The trace of the operator is that of the exact blocks."""
    expected = sum(m.diagonal(dim1=1, dim2=2).sum().item() for m in exact(setting).values())
    assert float(estimated(setting).trace) == pytest.approx(expected, rel=TOLERANCE)


@over_all_settings
def test_bases_diagonalise_the_kronecker_factors(setting: Setting) -> None:
    """The bases are eigenvectors of the KFAC factors of the chosen approximation."""
    for block in estimated(setting).blocks:
        if not block.parameters[0].endswith("weight"):
            continue
        inputs, outputs = kronecker_factors(terms_of(setting, block.parameters), setting.approx)
        for factor, basis in zip((outputs, inputs), block_bases(block), strict=True):
            rotated = basis.mT @ factor @ basis
            off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))
            assert off_diagonal.abs().max() <= TOLERANCE * factor.abs().max()


@over_all_settings
def test_no_farther_from_exact_than_kfac(setting: Setting) -> None:
    """Frobenius distance to the exact block, group by group."""
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        if not block.parameters[0].endswith("weight"):
            continue
        matrix = matrices[block.parameters]
        kfac = kfac_matrix(terms_of(setting, block.parameters), setting.approx)
        ours = torch.linalg.matrix_norm(dense_block(block) - matrix)
        theirs = torch.linalg.matrix_norm(kfac - matrix)
        assert (ours <= theirs + 1e-12).all()


def terms_of(setting: Setting, parameters: Sequence[str]) -> Any:
    """Return the layer inputs and output gradients of a block."""
    terms = weight_terms(
        setting.case, setting.loss, setting.reduction, setting.fisher, parameters[0]
    )
    return terms.with_bias() if len(parameters) == 2 else terms


@cache
def weight_terms(case: Case, loss: str, reduction: str, fisher: Fisher, weight: str) -> Any:
    """Record the layer terms once."""
    loss_func = LOSSES[loss](reduction=reduction)
    return layer_terms(case.model(), loss_func, weight, case.inputs(), case.targets(loss), fisher)


@pytest.mark.parametrize("approx", KFAC_TYPES)
def test_strictly_closer_than_kfac_where_kfac_is_wrong(approx: Approximation) -> None:
    """Both distances are real on a nonlinear model, so that comparing them means something."""
    setting = Setting(BY_NAME["pooled-tokens"], approx=approx)
    block = next(b for b in estimated(setting).blocks if b.parameters == ("0.weight",))
    matrix = exact(setting)["0.weight",]
    ours = (dense_block(block) - matrix).norm()
    theirs = (kfac_matrix(terms_of(setting, block.parameters), approx) - matrix).norm()
    assert 0.01 * matrix.norm() < ours < 0.99 * theirs


# --------------------------------------------------------------------------- exact blocks


@pytest.mark.parametrize(
    "setting",
    [s for s in ALL_SETTINGS if not s.joint and s.approx == "expand" and s.has_bias()],
    ids=str,
)
def test_separate_biases_are_exact(setting: Setting) -> None:
    """A separate bias has the eigenbasis of its exact covariance."""
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        if block.parameters[0].endswith("bias"):
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


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
@pytest.mark.parametrize("fisher", EXACT_FISHERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", UNSHARED, ids=str)
def test_one_unshared_example_is_exact(case: Case, loss: str, fisher: Fisher, joint: bool) -> None:
    """One example, one position: the Fisher block is a Kronecker product."""
    setting = Setting(replace(case, batch_sizes=(1,)), loss, fisher=fisher, joint=joint)
    matrices = exact(setting)
    for block in estimated(setting).blocks:
        assert_close(dense_block(block), matrices[block.parameters])


# --------------------------------------------------------------------------- data

# With fewer examples than inputs the factor of REDUCE is degenerate, and with it the operator, so
# that only EXPAND, whose null space is also that of the data, is compared on every case.
INVARIANT_CHOICES: tuple[tuple[str, Fisher, bool], ...] = (
    ("ce", "type2", False),
    ("bce", "type2", True),
    ("mse", "empirical", False),
)
INVARIANT = [
    Setting(case, loss, fisher=fisher, joint=joint)
    for case in CASES
    for loss, fisher, joint in INVARIANT_CHOICES
] + [
    Setting(BY_NAME[name], "ce", approx="reduce", fisher=fisher)
    for name in ("pooled-tokens", "pooled-grid", "linear-twice", "sequence-outputs")
    for fisher in EXACT_FISHERS
]
over_invariant = pytest.mark.parametrize("setting", INVARIANT, ids=str)


@over_invariant
def test_batches_and_order_do_not_matter(setting: Setting) -> None:
    """Several cuts of the same examples, also in another order."""
    expected = setting.dense(estimated(setting))
    n = setting.case.examples
    cuts: list[tuple[list[int], list[int] | None]] = [
        ([n], None),
        ([1] * n, None),
        ([n - 1, 1], list(reversed(range(n)))),
        ([1, n - 1], torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()),
    ]
    for sizes, order in cuts:
        data = setting.case.data(setting.loss, sizes, order)
        assert_close(setting.dense(setting.estimate(data=data)), expected, 1e-9)


@over_invariant
def test_memory_budget_does_not_matter(setting: Setting) -> None:
    """With next to no memory the data are passed twice and cut into chunks."""
    data = Counting(setting.case.data(setting.loss))
    small = setting.dense(setting.estimate(memory_budget=1, data=data))
    passes, data.passes = data.passes, 0
    large = setting.dense(setting.estimate(memory_budget=2**40, data=data))
    assert passes > data.passes
    assert_close(small, large, 1e-9)


class Counting:
    """Data that count how often they are passed through, and draw random numbers meanwhile."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Keep the batches."""
        self.batches = batches
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Start a pass."""
        self.passes += 1
        for batch in self.batches:
            torch.rand(1)
            random.random()
            np.random.rand()
            yield batch

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)


@pytest.mark.parametrize("budget", [1, 2**30], ids=["two-passes", "one-pass"])
def test_shuffling_data_loader(budget: int) -> None:
    """Another order in every pass, an uneven last batch, and the default check."""
    setting = Setting(BY_NAME["tanh-mlp"])
    dataset = TensorDataset(setting.case.inputs(), setting.case.targets("ce"))
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(dataset, batch_size=3, shuffle=True, generator=generator)
    operator = setting.estimate(data=loader, memory_budget=budget, check_deterministic=True)
    assert_close(setting.dense(operator), setting.dense(estimated(setting)), 1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["tanh-mlp", "sequence-outputs", "conv2d-stride-groups"])
def test_sum_is_count_times_mean(name: str, loss: str) -> None:
    """Cross entropy counts positions, the elementwise losses count elements."""
    case = BY_NAME[name]
    mean = Setting(case, loss)
    total = replace(mean, reduction="sum")
    classes, *positions = case.output_shape
    elements = classes if loss != "ce" else 1
    count = case.examples * elements * torch.Size(positions).numel()
    expected = count * mean.dense(estimated(mean))
    assert_close(total.dense(estimated(total)), expected, 1e-9)


# --------------------------------------------------------------------------- algebra

ALGEBRA = [
    Setting(BY_NAME["tanh-mlp"]),
    Setting(BY_NAME["inplace-relu-mlp"], "mse", joint=True),
    Setting(BY_NAME["subset-of-parameters"], joint=True),
    Setting(BY_NAME["conv2d-stride-groups"], "bce", "sum"),
    Setting(BY_NAME["conv2d-stride-groups"], fisher="empirical", joint=True),
    Setting(BY_NAME["conv2d-depthwise"], approx="reduce", joint=True),
    Setting(BY_NAME["conv3d"], joint=True),
    Setting(BY_NAME["tied-weights"]),
]
over_algebra = pytest.mark.parametrize("setting", ALGEBRA, ids=str)


def to_list(flat: Tensor, setting: Setting) -> list[Tensor]:
    """Cut ``[D, *]`` into tensors shaped like the parameters, with any trailing axis kept."""
    shapes = list(setting.shapes().values())
    pieces = torch.split(flat, [torch.Size(shape).numel() for shape in shapes])
    return [p.reshape(*shape, *flat.shape[1:]) for p, shape in zip(pieces, shapes, strict=True)]


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
    operator = EKFACLinearOperator(
        model,
        setting.loss_func(),
        {name: parameters[name] for name in names},
        setting.case.data(setting.loss),
        fisher_type=FISHER_TYPES[setting.fisher],
        kfac_approx=KFAC_TYPES[setting.approx],
        separate_weight_and_bias=not setting.joint,
    )
    shapes = setting.shapes()
    dense = dense_operator(estimated(setting).blocks, {name: shapes[name] for name in names})
    v = seeded(len(dense), 2)
    assert_close(operator @ v, dense @ v, 1e-9)


def test_plain_callable_with_names_of_its_own() -> None:
    """A function of the inputs and a dict from names to parameters."""
    setting = Setting(BY_NAME["tanh-mlp"])
    model = setting.case.model()
    renamed = {f"my/{name}": p for name, p in model.named_parameters()}
    operator = EKFACLinearOperator(
        lambda x: model(x),
        setting.loss_func(),
        renamed,
        setting.case.data("ce"),
        fisher_type=FisherType.TYPE2,
    )
    assert {block.parameters for block in operator.blocks} == {(name,) for name in renamed}
    shapes = {name: tuple(p.shape) for name, p in renamed.items()}
    actual = dense_operator(operator.blocks, shapes)
    assert_close(actual, setting.dense(estimated(setting)), 1e-9)


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


# --------------------------------------------------------------------------- Monte Carlo


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["tanh-mlp", "sequence-outputs", "conv2d-stride-groups"])
def test_monte_carlo_is_reproducible(name: str, loss: str) -> None:
    """The same seed gives the same bits, another seed does not."""
    setting = Setting(BY_NAME[name], loss)
    options = {"fisher_type": FisherType.MC, "mc_samples": 2}
    torch.manual_seed(0)
    first = setting.estimate(**options, seed=1)
    torch.manual_seed(1)
    second = setting.estimate(**options, seed=1)
    other = setting.estimate(**options, seed=2)
    for a, b, c in zip(first.blocks, second.blocks, other.blocks, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)
        assert not torch.allclose(a.eigenvalues, c.eigenvalues, rtol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_monte_carlo_draws_are_the_same_in_both_passes(case: Case, loss: str) -> None:
    """Neither a second pass nor chunks change the sampled labels."""
    setting = Setting(case, loss)
    options = {"fisher_type": FisherType.MC, "mc_samples": 2}
    small = setting.dense(setting.estimate(**options, memory_budget=1))
    large = setting.dense(setting.estimate(**options, memory_budget=2**40))
    assert_close(small, large, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["tanh-mlp", "sequence-outputs"])
def test_monte_carlo_expectation(name: str, loss: str, reduction: str) -> None:
    """With many samples trace and eigenvalues come near the exact matrix's."""
    setting = Setting(BY_NAME[name], loss, reduction)
    operator = setting.estimate(fisher_type=FisherType.MC, mc_samples=1000)
    expected = sum(m.diagonal(dim1=1, dim2=2).sum().item() for m in exact(setting).values())
    assert float(operator.trace) == pytest.approx(expected, rel=0.05)
    for block in operator.blocks:
        diagonal = in_own_basis(block, exact(setting)[block.parameters])
        assert (block.eigenvalues - diagonal).abs().sum() <= 0.1 * diagonal.sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_monte_carlo_rate(loss: str) -> None:
    """Sixteen times the samples divide the error of the trace by about four."""
    setting = Setting(BY_NAME["tanh-mlp"], loss)
    expected = float(estimated(setting).trace)

    def error(samples: int) -> float:
        errors = []
        for seed in range(24):
            options = {"fisher_type": FisherType.MC, "mc_samples": samples, "seed": seed}
            errors.append(float(setting.estimate(**options).trace) / expected - 1)
        return float(np.sqrt(np.mean(np.square(errors))))

    assert 2 < error(2) / error(32) < 8


# --------------------------------------------------------------------------- the model


@dataclass
class Snapshot:
    """All that estimation could have changed."""

    tensors: dict[str, Tensor]
    objects: dict[str, int]
    gradients: dict[str, Tensor | None]
    modes: dict[str, bool]
    requires_grad: dict[str, bool]
    hooks: int
    torch_state: Tensor
    python_state: Any
    numpy_state: Any

    @classmethod
    def of(cls, model: nn.Module) -> "Snapshot":
        """Take a snapshot."""
        parameters = dict(model.named_parameters())
        tensors = parameters | dict(model.named_buffers())
        return cls(
            tensors={name: t.detach().clone() for name, t in tensors.items()},
            objects={name: id(t) for name, t in tensors.items()},
            gradients={
                n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()
            },
            modes={name: module.training for name, module in model.named_modules()},
            requires_grad={name: p.requires_grad for name, p in parameters.items()},
            hooks=sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
                for m in model.modules()
            ),
            torch_state=torch.get_rng_state(),
            python_state=random.getstate(),
            numpy_state=np.random.get_state(),
        )

    def assert_unchanged(self, model: nn.Module) -> None:
        """Compare with a model as it is now."""
        now = Snapshot.of(model)
        assert now.modes == self.modes
        assert now.requires_grad == self.requires_grad
        assert now.objects == self.objects
        assert now.hooks == self.hooks
        assert all(torch.equal(now.tensors[name], t) for name, t in self.tensors.items())
        for name, gradient in self.gradients.items():
            after = now.gradients[name]
            assert (after is None) == (gradient is None)
            assert gradient is None or (after is not None and torch.equal(after, gradient))
        assert torch.equal(now.torch_state, self.torch_state)
        assert now.python_state == self.python_state
        assert repr(now.numpy_state) == repr(self.numpy_state)
        assert np.array_equal(now.numpy_state[1], self.numpy_state[1])


def well_used_model(case: Case) -> nn.Module:
    """Return a model with mixed modes and some gradients."""
    model = case.model().train()
    modules = list(model.modules())
    for module in modules[2::2]:
        module.training = False
    for parameter in list(model.parameters())[::2]:
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 7.0)
    return model


UNTOUCHED = ("batch-norm-and-dropout", "subset-of-parameters", "tied-weights", "linear-twice")


@pytest.mark.parametrize("check", [False, True], ids=["unchecked", "checked"])
@pytest.mark.parametrize("budget", [1, 2**30], ids=["two-passes", "one-pass"])
@pytest.mark.parametrize("fisher", FISHER_TYPES)
@pytest.mark.parametrize("name", UNTOUCHED)
def test_estimation_leaves_everything_as_found(
    name: str, fisher: str, budget: int, check: bool
) -> None:
    """Weights, buffers, gradients, modes, flags, hooks and random states."""
    case = BY_NAME[name]
    model = well_used_model(case)
    params = [p for n, p in model.named_parameters() if n not in case.left_out]
    before = Snapshot.of(model)
    assert len(set(before.modes.values())) == 2
    assert all(before.requires_grad.values()) != bool(case.frozen)
    data = Counting(case.data("ce"))
    EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        params,
        data,
        fisher_type=FISHER_TYPES[fisher],
        memory_budget=budget,
        check_deterministic=check,
    )
    before.assert_unchanged(model)
    assert data.passes > 0


def test_frozen_parameters_can_be_estimated() -> None:
    """Parameters that do not require gradients are treated like the others."""
    case = BY_NAME["subset-of-parameters"]
    frozen, free = Setting(replace(case, left_out=())), Setting(replace(case, frozen=()))
    free = replace(free, case=replace(free.case, left_out=()))
    model = frozen.case.model()
    operator = frozen.estimate(params=dict(model.named_parameters()), model=model)
    assert_close(free.dense(operator), free.dense(estimated(free)))


def test_estimation_in_evaluation_mode() -> None:
    """The modes a model comes in do not matter: BatchNorm and Dropout are always in eval mode."""
    case = BY_NAME["batch-norm-and-dropout"]
    setting = Setting(case)
    model = well_used_model(case)
    parameters = dict(model.named_parameters())
    operator = EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [parameters[name] for name in case.names(model)],
        case.data("ce"),
        fisher_type=FisherType.TYPE2,
    )
    for block in operator.blocks:
        matrix = block_matrix(
            exact_matrix(case, "ce", "mean", "type2"), setting.shapes(), block.parameters
        )
        error = (block.eigenvalues - in_own_basis(block, matrix)).abs().max()
        assert error <= TOLERANCE * matrix.abs().max()


class Broken(nn.Module):
    """A layer that fails on its third call."""

    def __init__(self) -> None:
        """Start counting."""
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Pass on, or fail."""
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("broken on purpose")
        return x


def test_a_failure_leaves_everything_as_found() -> None:
    """An exception in the middle of a pass reaches the caller, and the model is restored."""
    case = BY_NAME["batch-norm-and-dropout"]
    model = well_used_model(replace(case, build=with_broken_layer(case.build)))
    parameters = dict(model.named_parameters())
    params = [parameters[f"0.{name}"] for name in case.names(case.model())]
    before = Snapshot.of(model)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        EKFACLinearOperator(model, nn.CrossEntropyLoss(), params, case.data("ce"))
    before.assert_unchanged(model)


def with_broken_layer(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Append the failing layer to a model."""
    return lambda: nn.Sequential(build(), Broken())


def test_operator_is_finished_when_made() -> None:
    """Changing the weights and the data afterwards does not change the operator."""
    case = BY_NAME["tanh-mlp"]
    setting = Setting(case)
    model, data = case.model(), case.data("ce")
    operator = EKFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), data, fisher_type=FisherType.TYPE2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for x, _ in data:
            x.zero_()
    assert_close(setting.dense(operator), setting.dense(estimated(setting)))
