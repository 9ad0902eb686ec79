"""Training without a step: what a pass over the data takes by itself."""

from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation


def prepare(problem: Problem, fisher: str) -> Estimation:
    """Compute the gradient of the loss of every batch, for all parameters."""

    def run(seed: int) -> None:
        for inputs, targets in problem.batches:
            problem.model.zero_grad()
            problem.criterion(problem.model(inputs), targets).backward()

    return run
