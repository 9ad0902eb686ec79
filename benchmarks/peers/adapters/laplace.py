"""laplace-torch: the diagonal and the Kronecker-factored posterior precision of all weights."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.adapters.adapter import Adapter, Mode, has_options, single_blocks
from benchmarks.peers.exact import mean_divisor
from benchmarks.peers.problem import Batch, Problem
from benchmarks.peers.verdict import BlockEstimate, NotOffered, Structure
from benchmarks.speed import names
from benchmarks.speed.cases import Estimate, Workload

FILE = "laplace.pt"
# Its likelihoods, and what a loss's Hessian is in units of theirs.
LIKELIHOODS: dict[type[nn.Module], tuple[str, float]] = {
    nn.CrossEntropyLoss: ("classification", 1.0),
    nn.MSELoss: ("regression", 2.0),
}


class Laplace(Adapter):
    """Its default backend, whose diagonal comes from Jacobians and whose factors from curvlinops.

    It has no EKFAC. Its diagonal is exact by definition; its Kronecker factors are so where
    :attr:`Problem.separable` says, with the approximation called "reduce".
    """

    package = title = "laplace-torch"
    module = "laplace"
    modes = (
        Mode("diagonal", "type2", Structure.DIAGONAL),
        Mode("Kron", "type2", Structure.KRON),
    )
    raisers = ("laplace", "curvlinops")

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Read the Hessian of the log likelihood, a sum over the data."""
        fitted, unit = _fitted(problem, mode, model)
        diagonal = mode.structure is Structure.DIAGONAL
        dense = torch.diag(fitted.H) if diagonal else fitted.H.to_matrix()
        if problem.reduction == "mean":
            unit /= mean_divisor(problem)
        return single_blocks(unit * dense, problem, model)

    def save(self, problem: Problem, folder: Path) -> list[Tensor]:
        """Save the state dictionary."""
        fitted, _ = _fitted(problem, self.modes[0], problem.model())
        torch.save(fitted.state_dict(), folder / FILE)
        return [fitted.H]

    def load(self, problem: Problem, folder: Path, model: nn.Module) -> list[Tensor]:
        """Load the state dictionary into an object around the model."""
        loaded, _ = _unfitted(problem, self.modes[0], model)
        loaded.load_state_dict(torch.load(folder / FILE, weights_only=False))
        return [loaded.H]

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Fit a posterior with Kronecker factors, its default."""
        package, data = import_module("laplace"), workload.loader()

        def estimate(seed: int) -> None:
            torch.manual_seed(seed)
            posterior = package.Laplace(
                workload.model,
                "classification",
                subset_of_weights="all",
                hessian_structure="kron",
                backend_kwargs={"stochastic": fisher == names.MC},
            )
            posterior.fit(data)

        return estimate


def _fitted(problem: Problem, mode: Mode, model: nn.Module) -> tuple[Any, float]:
    """The posterior, and the unit of its likelihood."""
    if problem.one_shot:
        raise NotOffered("data are a DataLoader")
    laplace, unit = _unfitted(problem, mode, model)

    def joined(examples: list[Batch]) -> Any:
        inputs, labels = problem.collate(examples)
        return {**inputs, "labels": labels} if isinstance(inputs, Mapping) else (inputs, labels)

    laplace.fit(problem.loader(joined))
    return laplace, unit


def _unfitted(problem: Problem, mode: Mode, model: nn.Module) -> tuple[Any, float]:
    loss = problem.loss("mean")
    if type(loss) not in LIKELIHOODS:
        raise NotOffered("the likelihoods are classification and regression")
    if has_options(loss) or problem.targets in ("some ignored", "probabilities"):
        raise NotOffered("likelihoods have no options of a loss")
    likelihood, unit = LIKELIHOODS[type(loss)]
    structure = "kron" if mode.structure is Structure.KRON else "diag"
    # Passed on to the backend's factors, whatever the name of the argument says.
    extra: dict[str, Any] = dict(problem.settings.get("laplace-torch", {}))
    if structure == "kron":
        extra["asdl_fisher_kwargs"] = {"kfac_approx": "reduce"}
    laplace = import_module("laplace").Laplace(
        model, likelihood, subset_of_weights="all", hessian_structure=structure, **extra
    )
    return laplace, unit
