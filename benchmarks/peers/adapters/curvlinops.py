"""curvlinops: ``EKFACLinearOperator``."""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.adapters.adapter import (
    EXACT_EKFAC,
    Adapter,
    Mode,
    OneRowPerToken,
    multiplied_out,
    single_blocks,
)
from benchmarks.peers.problem import Problem
from benchmarks.peers.verdict import BlockEstimate
from benchmarks.speed import names
from benchmarks.speed.cases import Estimate, Form, Workload

FILE = "operator.pt"
DEFAULT_SEED = 2**31 - 1  # of this package as well, which then draws the same labels


class Curvlinops(Adapter):
    """Weights and biases in blocks of their own, as is its default."""

    package = "curvlinops-for-pytorch"
    module = "curvlinops"
    title = "curvlinops"
    modes = EXACT_EKFAC
    raisers = ("curvlinops",)
    takes_loss = True

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Multiply the operator onto the identity."""
        operator = self._operator(problem, mode, model)
        matrix = multiplied_out(operator, problem.parameters(model))
        return single_blocks(matrix, problem, model)

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Save the state dictionary."""
        model = problem.model()
        operator = self._operator(problem, self.modes[0], model)
        product = multiplied_out(operator, problem.parameters(model))
        torch.save(operator.state_dict(), folder / FILE)
        return [product]

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Load the state dictionary into an operator on the model."""
        loaded = self._operator(problem, self.modes[0], model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded.load_state_dict(torch.load(folder / FILE, weights_only=False))
        return [multiplied_out(loaded, problem.parameters(model))]

    def _operator(self, problem: Problem, mode: Mode, model: nn.Module) -> Any:
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
        )

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Make an operator and read its trace; frozen parameters are constants for it."""
        make = _make_operators(workload, fisher)
        return lambda seed: float(make(seed).trace)

    def quadratic_form(self, workload: Workload) -> Form:
        """A product, through which autograd goes, and a scalar product."""
        operator = _make_operators(workload, names.MC)(DEFAULT_SEED)
        # It is estimated by the first product.
        _ = operator @ [torch.zeros_like(parameter) for parameter in workload.known_parameters]

        def form(deltas: Sequence[Tensor]) -> Tensor:
            products = operator @ list(deltas)
            pairs = zip(deltas, products, strict=True)
            terms = [torch.dot(delta.flatten(), product.flatten()) for delta, product in pairs]
            return 0.5 * torch.stack(terms).sum()

        return form


def _make_operators(workload: Workload, fisher: str) -> Callable[[int], Any]:
    """A function that makes an operator from a seed."""
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
