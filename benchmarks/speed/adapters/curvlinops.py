"""curvlinops: ``EKFACLinearOperator``."""

from importlib import import_module

from torch import Tensor, nn

from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation


class OneRowPerToken(nn.Module):
    """A model of tokens with the outputs that the package wants: a matrix."""

    def __init__(self, model: nn.Module) -> None:
        """Keep a model whose outputs are ``[N, C, T]``."""
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores ``[N · T, C]``."""
        scores: Tensor = self.model(inputs)
        return scores.transpose(1, 2).flatten(0, 1)


def prepare(problem: Problem, fisher: str) -> Estimation:
    """Estimate the parameters that it knows; it takes others of the model as constants."""
    problem.freeze_other_parameters()
    package = import_module("curvlinops")
    model, batches = problem.model, problem.batches
    if problem.labels_per_example > 1:
        model = OneRowPerToken(model)
        batches = [(inputs, targets.flatten()) for inputs, targets in batches]

    def estimate(seed: int) -> float:
        operator = package.EKFACLinearOperator(
            model,
            problem.criterion,
            problem.known_parameters,
            batches,
            fisher_type=package.FisherType[fisher.upper()],
            seed=seed,
            check_deterministic=False,
            # Otherwise it counts both, in passes over the data.
            num_data=problem.examples,
            num_per_example_loss_terms=problem.labels_per_example,
        )
        return float(operator.trace)

    return estimate
