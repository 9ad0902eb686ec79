"""This package, measured like the others."""

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.peers.adapters.adapter import EXACT_EKFAC, Adapter, Mode, multiplied_out
from benchmarks.peers.exact import DenseMatrix
from benchmarks.peers.problem import Problem
from benchmarks.peers.verdict import BlockEstimate
from benchmarks.speed.cases import Estimate, Workload

FILE = "operator.safetensors"


class RotateEWC(Adapter):
    """The operator, block by block."""

    package = "rotate-ewc"
    module = "rotate_ewc"
    title = "rotate_ewc"
    modes = EXACT_EKFAC
    raisers = ("rotate_ewc",)
    takes_loss = True

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Multiply the operator onto the identity."""
        operator = self._operator(problem, mode, model)
        matrix = multiplied_out(operator, problem.parameters(model))
        dense = DenseMatrix(matrix, operator.parameter_shapes)
        names = [block.parameters for block in operator.blocks]
        return [BlockEstimate(parameters, dense.block(parameters)) for parameters in names]

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Save to a safetensors file."""
        model = problem.model()
        operator = self._operator(problem, self.modes[0], model)
        operator.save(folder / FILE)
        return [multiplied_out(operator, problem.parameters(model))]

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Load without a model."""
        loaded = import_module("rotate_ewc").EKFACLinearOperator.load(folder / FILE)
        return [multiplied_out(loaded, problem.parameters(model))]

    def _operator(self, problem: Problem, mode: Mode, model: nn.Module) -> Any:
        return import_module("rotate_ewc").EKFACLinearOperator(
            model,
            problem.loss_for(mode.fisher),
            problem.parameters(model),
            problem.batches(),
            fisher_type=mode.fisher,
            **problem.settings.get(self.package, {}),
        )

    def prepare(self, workload: Workload, fisher: str, *, memory_budget: int = 2**30) -> Estimate:
        """Make an operator and read its trace."""
        operator = import_module("rotate_ewc").EKFACLinearOperator
        parameters = workload.trained_parameters

        def estimate(seed: int) -> float:
            estimated = operator(
                workload.model,
                workload.criterion,
                parameters,
                workload.batches,
                fisher_type=fisher,
                seed=seed,
                check_deterministic=False,
                memory_budget=memory_budget,
            )
            return float(estimated.trace)

        return estimate
