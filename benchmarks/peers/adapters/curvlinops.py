"""curvlinops: ``EKFACLinearOperator`` with the exact and the empirical Fisher matrix."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.peers.adapters.adapter import (
    EXACT_EKFAC,
    Adapter,
    Mode,
    RoundTrip,
    all_equal,
    moved_model,
    nearly_equal,
    readable_without_pickle,
    single_blocks,
    weights,
)
from benchmarks.peers.problem import DTYPE, Problem
from benchmarks.peers.verdict import BlockEstimate


class Curvlinops(Adapter):
    """Weights and biases in blocks of their own, as is its default."""

    package: ClassVar[str] = "curvlinops-for-pytorch"
    title: ClassVar[str] = "curvlinops"
    module: ClassVar[str] = "curvlinops"
    modes: ClassVar[tuple[Mode, ...]] = EXACT_EKFAC
    raisers: ClassVar[tuple[str, ...]] = ("curvlinops",)
    takes_loss: ClassVar[bool] = True

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Multiply the operator onto the identity."""
        operator = self._operator(problem, mode, model)
        dense = operator @ torch.eye(operator.shape[0], dtype=DTYPE)
        return single_blocks(dense, problem, model)

    def round_trip(self, problem: Problem, folder: Path) -> RoundTrip:
        """Save the state dictionary, and load it into an operator on the moved model."""
        operator = self._operator(problem, self.modes[0], problem.model())
        eye = torch.eye(operator.shape[0], dtype=DTYPE)
        product = operator @ eye
        path = folder / "operator.pt"
        torch.save(operator.state_dict(), path)
        model = moved_model(problem)
        before = weights(model)
        loaded = self._operator(problem, self.modes[0], model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded.load_state_dict(torch.load(path, weights_only=False))
        return RoundTrip(
            without_pickle=readable_without_pickle(path),
            same=nearly_equal(product, loaded @ eye),
            weights_kept=all_equal(before, weights(model)),
        )

    def _operator(self, problem: Problem, mode: Mode, model: nn.Module) -> Any:
        curvlinops = import_module("curvlinops")
        return curvlinops.EKFACLinearOperator(
            model,
            problem.loss_for(mode.fisher),
            problem.parameters(model),
            problem.batches(),
            # Plain words, which a state dictionary can hold without pickle.
            fisher_type=curvlinops.FisherType[mode.fisher.upper()].value,
            kfac_approx="expand",
            # It would count the entries of the targets, which are more where they are soft.
            num_per_example_loss_terms=problem.loss_terms,
        )
