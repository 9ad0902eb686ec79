"""This package, measured like the others."""

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
    weights,
)
from benchmarks.peers.exact import DenseMatrix
from benchmarks.peers.problem import Problem
from benchmarks.peers.verdict import BlockEstimate


class RotateEWC(Adapter):
    """The operator, block by block."""

    package: ClassVar[str] = "rotate-ewc"
    title: ClassVar[str] = "rotate_ewc"
    module: ClassVar[str] = "rotate_ewc"
    modes: ClassVar[tuple[Mode, ...]] = EXACT_EKFAC
    raisers: ClassVar[tuple[str, ...]] = ("rotate_ewc",)
    takes_loss: ClassVar[bool] = True

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Multiply the operator onto the identity."""
        operator = self._operator(problem, mode, model)
        eye = torch.eye(operator.shape[0], dtype=operator.dtype)
        dense = DenseMatrix(operator @ eye, operator.parameter_shapes)
        names = [block.parameters for block in operator.blocks]
        return [BlockEstimate(parameters, dense.block(parameters)) for parameters in names]

    def round_trip(self, problem: Problem, folder: Path) -> RoundTrip:
        """Save to a safetensors file; loading needs no model."""
        operator = self._operator(problem, self.modes[0], problem.model())
        path = folder / "operator.safetensors"
        operator.save(path)
        model = moved_model(problem)
        before = weights(model)
        loaded = type(operator).load(path)
        eye = torch.eye(operator.shape[0], dtype=operator.dtype)
        return RoundTrip(
            without_pickle=True,
            same=nearly_equal(operator @ eye, loaded @ eye),
            weights_kept=all_equal(before, weights(model)),
        )

    def _operator(self, problem: Problem, mode: Mode, model: nn.Module) -> Any:
        rotate_ewc = import_module("rotate_ewc")
        return rotate_ewc.EKFACLinearOperator(
            model,
            problem.loss_for(mode.fisher),
            problem.parameters(model),
            problem.batches(),
            fisher_type=rotate_ewc.FisherType[mode.fisher.upper()],
            **problem.settings.get(self.package, {}),
        )
