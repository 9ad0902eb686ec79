"""Ways of estimating the cases, and what must come out; shared by the tests of exactness.

Whatever is compared is an invariant (a trace, a dense matrix, eigenvalues in the operator's own
basis), never eigenvectors, whose signs and degenerate subspaces are arbitrary.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator, FisherType, KFACType
from tests.helpers.cases import BASIC, FURTHER, PLAIN_LOSSES, Case, terms_of
from tests.helpers.oracles import (
    Approximation,
    BlockLayout,
    Fisher,
    LayerTerms,
    block_matrix,
    dense_empirical_fisher,
    dense_ggn,
    dense_operator,
    exact_blocks,
    example_jacobians,
    expected_layouts,
    in_own_basis,
    parameter_shapes,
)

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

    def loss_func(self) -> nn.Module:
        """Return the loss."""
        return self.case.loss_func(self.loss, self.reduction)

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
            "unsupported": self.case.unsupported,
            "rank": "full",
            **options,
        }
        params, data = arguments.pop("params"), arguments.pop("data")
        with self.warns():
            return EKFACLinearOperator(model, self.loss_func(), params, data, **arguments)

    def warns(self) -> AbstractContextManager[Any]:
        """Expect the warning of the fallback, where the case needs that."""
        if self.case.unsupported == "error":
            return nullcontext()
        return pytest.warns(UserWarning, match="diagonal")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the estimated parameters, in order."""
        return shapes_of(self.case)

    def layouts(self) -> dict[tuple[str, ...], BlockLayout]:
        """Return the blocks that must come out, by their parameters."""
        return layouts_of(self.case, self.joint)

    def terms(self, block: Any) -> LayerTerms | None:
        """Return a block's layer inputs and output gradients, where modules show them."""
        return terms_of(self.case, self.loss, self.reduction, self.fisher, block.parameters)

    def dense(self, operator: EKFACLinearOperator) -> Tensor:
        """Write out an operator."""
        return dense_operator(operator.blocks, self.shapes())


@cache
def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Look at a case's parameters once."""
    model = case.model()
    return parameter_shapes(model, case.names(model))


@cache
def layouts_of(case: Case, joint: bool) -> dict[tuple[str, ...], BlockLayout]:
    """Work a case's blocks out once."""
    model = case.model()
    layouts = expected_layouts(model, case.names(model), joint, case.layouts)
    return {layout.parameters: layout for layout in layouts}


# Whatever is shared is kept as long as tests of one setting, or of one case, follow each other.
@lru_cache(maxsize=64)
def estimated(setting: Setting) -> EKFACLinearOperator:
    """Estimate once; operators do not change."""
    return setting.estimate()


@lru_cache(maxsize=64)
def exact_matrix(case: Case, loss: str, reduction: str, fisher: Fisher) -> Tensor:
    """Assemble the dense oracle once."""
    model, loss_func = case.model(), case.loss_func(loss, reduction)
    names, x, y = case.names(model), case.inputs(), case.targets(loss)
    if fisher == "empirical":
        return dense_empirical_fisher(model, loss_func, names, x, y)
    return dense_ggn(model, loss_func, names, x, y, jacobians_of(case))


@lru_cache(maxsize=8)
def jacobians_of(case: Case) -> list[Tensor]:
    """Differentiate the outputs of a case once, for all losses."""
    model = case.model()
    return example_jacobians(model, case.names(model), case.inputs())


def exact_matrix_of(setting: Setting) -> Tensor:
    """Return the dense matrix that a setting stands for."""
    return exact_matrix(setting.case, setting.loss, setting.reduction, setting.fisher)


def exact(setting: Setting) -> dict[tuple[str, ...], Tensor]:
    """Return the exact block of every block that must come out."""
    return exact_blocks(exact_matrix_of(setting), setting.shapes(), setting.layouts().values())


def assert_exact_diagonal(
    operator: EKFACLinearOperator, dense: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check ``eigenvalues == diag(Q^T B Q)`` of whatever blocks came out, and the trace."""
    assert sorted(name for block in operator.blocks for name in block.parameters) == sorted(shapes)
    for block in operator.blocks:
        groups = block.eigenvalues.shape[0]
        matrix = block_matrix(dense, shapes, block.parameters, groups, block.transposed)
        error = (block.eigenvalues - in_own_basis(block, matrix)).abs().max()
        assert matrix.abs().max() > 0
        assert error <= TOLERANCE * matrix.abs().max(), block.label
    assert float(operator.trace) == pytest.approx(float(dense.trace()), rel=TOLERANCE)


def off_diagonal(factor: Tensor, basis: Tensor) -> Tensor:
    """Return what is left off the diagonal of a factor in a basis."""
    rotated = basis.mT @ factor @ basis
    return rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers that do not depend on the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


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


# --------------------------------------------------------------------------- the crossing

SUMMED = (
    "tanh-mlp",
    "sequence-outputs",
    "conv2d-stride-groups",
    "conv-transpose2d-stride-groups",
    "embedding-padding-flattened-outputs",
    "encoder-layer-norm-last",
    "gpt-functional-positions",
    "weight-norm-conv",
    "lstm",
)


# Loss, Fisher type, approximation, and whether weight and bias are together: all pairs of values,
# and in either half every value.
PAIRWISE: tuple[tuple[str, Fisher, Approximation, bool], ...] = (
    ("ce", "type2", "expand", False),
    ("mse", "empirical", "reduce", False),
    ("bce", "type2", "reduce", True),
    ("ce", "empirical", "reduce", True),
    ("mse", "type2", "expand", True),
    ("bce", "empirical", "expand", False),
)
# The same without losses.
PAIRS: tuple[tuple[Fisher, Approximation, bool], ...] = (
    ("type2", "expand", False),
    ("empirical", "expand", True),
    ("type2", "reduce", True),
    ("empirical", "reduce", False),
)
# Two rows in which every value has its turn; the four of them are all combinations.
OPPOSITES: tuple[tuple[tuple[Fisher, Approximation, bool], ...], ...] = (
    (("type2", "expand", False), ("empirical", "reduce", True)),
    (("type2", "reduce", True), ("empirical", "expand", False)),
    (("type2", "reduce", False), ("empirical", "expand", True)),
    (("type2", "expand", True), ("empirical", "reduce", False)),
)


def settings() -> list[Setting]:
    """Cross the cases with what can be chosen, so that all pairs of choices meet.

    In every basic case each loss, Fisher type and approximation has its turn, with weight and bias
    apart and together; in two neighbours each loss meets each Fisher type, and so on. In the
    further ones, whose layers see of a loss only the vectors that come back from it, every value
    but one of the losses has its turn, and losses and combinations of the others go round among
    neighbours of the same family. ``sum``, which only changes the scale, meets every
    loss and Fisher type on some kinds of network, among which they go round too.
    """
    found = []
    for number, case in enumerate(BASIC):
        found += [
            Setting(case, loss, "mean", fisher, approx if case.shared else "expand", joint)
            for loss, fisher, approx, joint in PAIRWISE[number % 2 * 3 :][:3]
        ]
        if case.name in SUMMED:
            found += [
                Setting(case, loss, "sum", fisher)
                for loss, fisher, _, _ in PAIRWISE[SUMMED.index(case.name) % 2 :: 2]
            ]
    for number, case in enumerate(FURTHER):
        for turn, (fisher, approx, joint) in enumerate(OPPOSITES[number % len(OPPOSITES)]):
            loss = tuple(PLAIN_LOSSES)[(number + turn) % len(PLAIN_LOSSES)]
            approx = approx if case.shared else "expand"
            found.append(Setting(case, loss, "mean", fisher, approx, joint))
        if case.name in SUMMED:
            found += [Setting(case, "ce", "sum", fisher) for fisher in EXACT_FISHERS]
    return found


ALL_SETTINGS = settings()
# Of the scope of a module, or pytest would go through all settings again for every test.
over_all_settings = pytest.mark.parametrize("setting", ALL_SETTINGS, ids=str, scope="module")
ignore_even_kernels = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
