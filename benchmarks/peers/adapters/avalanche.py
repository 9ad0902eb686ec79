"""Avalanche: the importances of ``EWCPlugin``, whatever the Fisher type; only their cost."""

import torch

from benchmarks.peers.adapters.adapter import Adapter
from benchmarks.speed.cases import Estimate, InMemory, Workload


class Avalanche(Adapter):
    """What the plugin calls at the end of an experience."""

    package = "avalanche-lib"
    module = "avalanche"
    title = "avalanche"

    def prepare(self, workload: Workload, fisher: str) -> Estimate:
        """Compute squares of batch-mean gradients."""
        from benchmarks.avalanche_names import EWCPlugin

        plugin = EWCPlugin(ewc_lambda=1.0)
        optimizer = torch.optim.SGD(workload.trained_parameters, lr=0.1)
        data = workload.dataset()
        tasks = torch.zeros(len(data), dtype=torch.int64)
        triples = InMemory(*data.tensors, tasks)

        def estimate(seed: int) -> None:
            plugin.compute_importances(
                workload.model, workload.criterion, optimizer, triples, "cpu", workload.batch_size
            )
            # It leaves the model in training mode.
            workload.model.eval()

        return estimate
