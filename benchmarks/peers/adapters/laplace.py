"""laplace-torch: the diagonal and the Kronecker-factored posterior precision of all weights."""

from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from benchmarks.peers.adapters.adapter import (
    Adapter,
    Mode,
    RoundTrip,
    all_equal,
    moved_model,
    readable_without_pickle,
    single_blocks,
    weights,
)
from benchmarks.peers.adapters.nngeometry import has_options
from benchmarks.peers.exact import mean_divisor
from benchmarks.peers.problem import Problem
from benchmarks.peers.verdict import BlockEstimate, NotOffered, Structure

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

    package: ClassVar[str] = "laplace-torch"
    title: ClassVar[str] = "laplace-torch"
    module: ClassVar[str] = "laplace"
    modes: ClassVar[tuple[Mode, ...]] = (
        Mode("diagonal", "type2", Structure.DIAGONAL),
        Mode("Kron", "type2", Structure.KRON),
    )
    raisers: ClassVar[tuple[str, ...]] = ("laplace", "curvlinops")

    def estimate(self, problem: Problem, mode: Mode, model: nn.Module) -> list[BlockEstimate]:
        """Read the Hessian of the log likelihood, a sum over the data."""
        fitted, unit = self._fitted(problem, mode, model)
        if mode.structure is Structure.DIAGONAL:
            dense = torch.diag(fitted.H)
        else:
            dense = fitted.H.to_matrix()
        if problem.reduction == "mean":
            unit /= mean_divisor(problem)
        return single_blocks(unit * dense, problem, model)

    def round_trip(self, problem: Problem, folder: Path) -> RoundTrip:
        """Save the state dictionary, and load it into an object around the moved model."""
        fitted, _ = self._fitted(problem, self.modes[0], problem.model())
        path = folder / "laplace.pt"
        torch.save(fitted.state_dict(), path)
        model = moved_model(problem)
        before = weights(model)
        loaded, _ = self._unfitted(problem, self.modes[0], model)
        loaded.load_state_dict(torch.load(path, weights_only=False))
        return RoundTrip(
            without_pickle=readable_without_pickle(path),
            same=torch.equal(fitted.H, loaded.H),
            weights_kept=all_equal(before, weights(model)),
        )

    def _fitted(self, problem: Problem, mode: Mode, model: nn.Module) -> tuple[Any, float]:
        if problem.one_shot:
            raise NotOffered("data are a DataLoader")
        laplace, unit = self._unfitted(problem, mode, model)
        laplace.fit(problem.loader())
        return laplace, unit

    def _unfitted(self, problem: Problem, mode: Mode, model: nn.Module) -> tuple[Any, float]:
        loss = problem.loss("mean")
        if type(loss) not in LIKELIHOODS:
            raise NotOffered("the likelihoods are classification and regression")
        if has_options(loss) or problem.targets in ("some ignored", "probabilities"):
            raise NotOffered("likelihoods have no options of a loss")
        likelihood, unit = LIKELIHOODS[type(loss)]
        structure = "kron" if mode.structure is Structure.KRON else "diag"
        # Passed on to the backend's factors, whatever the name of the argument says.
        extra = {"asdl_fisher_kwargs": {"kfac_approx": "reduce"}} if structure == "kron" else {}
        laplace = import_module("laplace").Laplace(
            model, likelihood, subset_of_weights="all", hessian_structure=structure, **extra
        )
        return laplace, unit
