"""laplace-torch: Kronecker factors, whose eigenvalues are not corrected."""

from importlib import import_module

import torch

from benchmarks.speed import names
from benchmarks.speed.adapters.data import loader
from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation


def prepare(problem: Problem, fisher: str) -> Estimation:
    """Fit its posterior with Kronecker factors, its default."""
    problem.freeze_other_parameters()
    package = import_module("laplace")
    data = loader(problem)

    def estimate(seed: int) -> None:
        torch.manual_seed(seed)
        posterior = package.Laplace(
            problem.model,
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend_kwargs={"stochastic": fisher == names.MC},
        )
        posterior.fit(data)

    return estimate
