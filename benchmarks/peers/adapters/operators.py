"""The two packages with an operator: this one, and curvlinops."""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.adapters.adapter import Adapter, Mode, OneRowPerToken, single_blocks
from benchmarks.peers.exact import DenseMatrix
from benchmarks.peers.problem import Problem
from benchmarks.peers.verdict import BlockEstimate
from benchmarks.speed import names
from benchmarks.speed.cases import Estimate, Form, Workload

FILE = "operator.safetensors"
DEFAULT_SEED = 2**31 - 1  # of both packages, which then draw the same labels


def multiplied_out(operator: Any, parameters: Sequence[Tensor]) -> Tensor:
    """The dense matrix of an operator, which multiplies columns."""
    size = sum(parameter.numel() for parameter in parameters)
    product: Tensor = operator @ torch.eye(size, dtype=parameters[0].dtype)
    return product


class RotateEWC(Adapter):
    """This package, measured like the others."""

    package = "rotate-ewc"
    module = title = "rotate_ewc"
    raisers = ("rotate_ewc",)
    modes = (Mode("type2", "type2"), Mode("empirical", "empirical"))
    takes_loss = True

    def operator(self, problem: Problem, mode: Mode, model: nn.Module) -> Any:
        """Estimate, or make what estimates when it is used first."""
        return import_module("rotate_ewc").EKFACLinearOperator(
            model,
            problem.loss_for(mode.fisher),
            problem.parameters(model),
            problem.batches(),
            fisher_type=mode.fisher,
            **problem.settings.get(self.package, {}),
        )

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Multiply the operator onto the identity, and cut out its blocks."""
        operator = self.operator(problem, mode, model)
        matrix = multiplied_out(operator, problem.parameters(model))
        dense = DenseMatrix(matrix, operator.parameter_shapes)
        parameters = [block.parameters for block in operator.blocks]
        return [BlockEstimate(own, dense.block(own)) for own in parameters]

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Multiply it out before it is saved."""
        model = problem.model()
        operator = self.operator(problem, self.modes[0], model)
        product = multiplied_out(operator, problem.parameters(model))
        self.write(operator, folder / FILE)
        return [product]

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Multiply out what is read."""
        loaded = self.read(folder / FILE, problem, model)
        return [multiplied_out(loaded, problem.parameters(model))]

    def write(self, operator: Any, path: Path) -> None:
        """Save to a safetensors file."""
        operator.save(path)

    def read(self, path: Path, problem: Problem, model: nn.Module) -> Any:
        """Load without a model."""
        return import_module("rotate_ewc").EKFACLinearOperator.load(path)

    def prepare(self, workload: Workload, fisher: str, **options: Any) -> Estimate:
        """Make an operator, with options of its own, and read its trace."""
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
                **options,
            )
            return float(estimated.trace)

        return estimate


class Curvlinops(RotateEWC):
    """Weights and biases in blocks of their own, as is its default."""

    package = "curvlinops-for-pytorch"
    module = title = "curvlinops"
    raisers = ("curvlinops",)

    def operator(self, problem: Problem, mode: Mode, model: nn.Module) -> Any:
        """Make an operator, which estimates when it is used first."""
        package = import_module("curvlinops")
        return package.EKFACLinearOperator(
            model,
            problem.loss_for(mode.fisher),
            problem.parameters(model),
            problem.batches(),
            # Plain words, which a state dictionary can hold without pickle.
            fisher_type=package.FisherType[mode.fisher.upper()].value,
            kfac_approx="expand",
            # It would count the entries of the targets, which are more where they are soft.
            num_per_example_loss_terms=problem.loss_terms,
            **problem.settings.get(self.package, {}),
        )

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Multiply the operator onto the identity."""
        matrix = multiplied_out(self.operator(problem, mode, model), problem.parameters(model))
        return single_blocks(matrix, problem, model)

    def write(self, operator: Any, path: Path) -> None:
        """Save the state dictionary."""
        torch.save(operator.state_dict(), path.with_suffix(".pt"))

    def read(self, path: Path, problem: Problem, model: nn.Module) -> Any:
        """Load the state dictionary into an operator on the model."""
        loaded = self.operator(problem, self.modes[0], model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=False))
        return loaded

    def prepare(self, workload: Workload, fisher: str, **options: Any) -> Estimate:
        """Make an operator and read its trace; frozen parameters are constants for it."""
        make = _make_operators(workload, fisher)
        return lambda seed: float(make(seed).trace)

    def quadratic_form(self, workload: Workload) -> Form:
        """A product, through which autograd goes, and a scalar product."""
        operator = _make_operators(workload, names.MC)(DEFAULT_SEED)
        # It is estimated by the first product.
        _ = operator @ [torch.zeros_like(parameter) for parameter in workload.known_parameters]

        def form(deltas: Sequence[Tensor]) -> Tensor:
            pairs = zip(deltas, operator @ list(deltas), strict=True)
            terms = [torch.dot(delta.flatten(), product.flatten()) for delta, product in pairs]
            return 0.5 * torch.stack(terms).sum()

        return form


def _make_operators(workload: Workload, fisher: str) -> Callable[[int], Any]:
    """A function that makes an operator of curvlinops from a seed."""
    package = import_module("curvlinops")
    model, batches = workload.model, workload.batches
    if workload.labels_per_example > 1:
        model = OneRowPerToken(model)
        batches = [(inputs, targets.flatten()) for inputs, targets in batches]
    return lambda seed: package.EKFACLinearOperator(
        model,
        workload.criterion,
        workload.known_parameters,
        batches,
        fisher_type=package.FisherType[fisher.upper()],
        seed=seed,
        check_deterministic=False,
        # Otherwise it counts both, in passes over the data.
        num_data=workload.examples,
        num_per_example_loss_terms=workload.labels_per_example,
    )
