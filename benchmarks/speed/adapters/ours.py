"""This package."""

from collections.abc import Sequence

from torch import nn

from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation
from rotate_ewc import EKFACLinearOperator

SMALL_BUDGET = 2**26


def prepare_known(problem: Problem, fisher: str) -> Estimation:
    """Estimate the parameters that every contender knows."""
    problem.freeze_other_parameters()
    return _prepare(problem, fisher, problem.known_parameters)


def prepare_lean(problem: Problem, fisher: str) -> Estimation:
    """Estimate the same in less memory."""
    problem.freeze_other_parameters()
    return _prepare(problem, fisher, problem.known_parameters, memory_budget=SMALL_BUDGET)


def prepare_everything(problem: Problem, fisher: str) -> Estimation:
    """Estimate all parameters."""
    return _prepare(problem, fisher, list(problem.model.parameters()))


def _prepare(
    problem: Problem, fisher: str, parameters: Sequence[nn.Parameter], memory_budget: int = 2**30
) -> Estimation:
    def estimate(seed: int) -> float:
        operator = EKFACLinearOperator(
            problem.model,
            problem.criterion,
            list(parameters),
            problem.batches,
            fisher_type=fisher,
            seed=seed,
            check_deterministic=False,
            memory_budget=memory_budget,
        )
        return float(operator.trace)

    return estimate
