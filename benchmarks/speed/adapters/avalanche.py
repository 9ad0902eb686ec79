"""Avalanche: the importances of ``EWCPlugin``, whatever the Fisher type."""

import torch

from benchmarks.avalanche_names import EWCPlugin
from benchmarks.speed.adapters.data import InMemory, in_memory
from benchmarks.speed.cases import Problem
from benchmarks.speed.contenders import Estimation


def prepare(problem: Problem, fisher: str) -> Estimation:
    """Call what the plugin calls at the end of an experience."""
    problem.freeze_other_parameters()
    plugin = EWCPlugin(ewc_lambda=1.0)
    optimizer = torch.optim.SGD(problem.known_parameters, lr=0.1)
    data = in_memory(problem)
    tasks = torch.zeros(len(data), dtype=torch.int64)
    triples = InMemory(*data.tensors, tasks)
    batch_size = len(problem.batches[0][0])

    def estimate(seed: int) -> None:
        plugin.compute_importances(
            problem.model, problem.criterion, optimizer, triples, "cpu", batch_size
        )
        # It leaves the model in training mode.
        problem.model.eval()

    return estimate
